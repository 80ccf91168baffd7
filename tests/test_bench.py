"""Contract of a comparison: complete tidy scores, everything a report needs, the same numbers twice."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import invirtuo as iv
from invirtuo.bench import Entry, compare
from invirtuo.bench.demo import HELD_OUT, demo


@pytest.fixture
def comparison(toy, design, tmp_path):
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A", "b_cell|A+B"])
    adata = iv.preprocess.normalize(toy, split=split)
    tiny = iv.models.PRiMeFlow.Config(hidden_dim=32, cell_width=32, gene_width=16, n_blocks=1, steps=3)
    fit = iv.FitConfig(steps=8, batch_size=32, val_every=4, progress=False)
    entries = [
        Entry("flow", "primeflow", tiny, fit),
        Entry("mean", "perturbation_mean", "shift-cells"),
        Entry("none", "no_change"),
    ]

    def run(name: str, split: pd.Series = split) -> pd.DataFrame:
        return compare(adata, design, split, entries, tmp_path / name, n_cells=30, about={"title": "toy"})

    return run


def test_scores_are_complete_and_tidy(comparison, tmp_path):
    scores = comparison("a")
    assert scores.columns[:4].tolist() == ["condition", "perturbation", "cell_type", "metric"]
    counts = scores.groupby("model").size()
    assert set(counts.index) == {"flow", "mean", "none", "noise_floor"}
    assert (counts == 2 * 11).all()  # conditions x metrics
    pd.testing.assert_frame_equal(scores, pd.read_csv(tmp_path / "a" / "scores.csv"), check_dtype=False)
    floor = scores[(scores["model"] == "noise_floor") & (scores["metric"] == "rmse_mean")]["value"].mean()
    none = scores[(scores["model"] == "none") & (scores["metric"] == "rmse_mean")]["value"].mean()
    assert floor < none


def test_everything_a_report_needs(comparison, tmp_path):
    comparison("a")
    folder = tmp_path / "a"
    assert ad.read_h5ad(folder / "predicted.h5ad").uns["invirtuo"]["model"] == "primeflow"
    assert set(pd.read_csv(folder / "panels.csv")["kind"]) == {"background", "real", "predicted"}
    run = json.loads((folder / "run.json").read_text())
    assert [entry["label"] for entry in run["models"]] == ["flow", "mean", "none"]
    assert run["models"][0]["fit"]["steps"] == 8
    page = iv.report(folder, folder / "report.html").read_text()
    assert "noise_floor" in page
    assert iv.load(folder / "models" / "flow").name == "primeflow"


def test_effects_have_intervals_where_conditions_are_held_out_for_validation(comparison, toy, design, tmp_path):
    comparison("a")
    plain = pd.read_csv(tmp_path / "a" / "effects.csv")
    assert plain["low"].isna().all() and plain["real"].notna().all()
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"], val_fraction=0.0)
    comparison("b", split.mask(design.names(toy.obs) == "b_cell|B", "val"))
    table = pd.read_csv(tmp_path / "b" / "effects.csv")
    assert set(table["condition"]) == {"monocyte|A"} and (table["low"] <= table["high"]).all()
    predicted = ad.read_h5ad(tmp_path / "b" / "predicted.h5ad")
    width = predicted.varm["effect_high"] - predicted.varm["effect_low"]
    np.testing.assert_allclose(table["high"] - table["low"], width[:, 0], atol=1e-6)
    np.testing.assert_allclose(table["effect"] + table["control"], predicted.X.mean(0), atol=1e-5)
    page = iv.report(tmp_path / "b", tmp_path / "report.html").read_text()
    assert "cover 90% of all genes" in page


def test_groups_without_control_cells_have_no_effects(toy, design, tmp_path):
    adata = iv.preprocess.normalize(toy)
    names = design.names(adata.obs)
    split = pd.Series("train", adata.obs_names).mask(names.isin(["monocyte|A", "t_cell|A"]), "test")
    split = split.mask(names == "b_cell|B", "val")
    adata, split = (x[(names != "t_cell|control").to_numpy()] for x in (adata, split))
    tiny = iv.models.PRiMeFlow.Config(hidden_dim=32, cell_width=32, gene_width=16, n_blocks=1, steps=3)
    entries = [Entry("flow", "primeflow", tiny, iv.FitConfig(steps=2, batch_size=32, progress=False))]
    compare(adata.copy(), design, split, entries, tmp_path, n_cells=20, metrics=["rmse_mean"])
    table = pd.read_csv(tmp_path / "effects.csv")
    assert set(table["condition"]) == {"monocyte|A"} and table["low"].isna().all()


def test_same_seed_same_table(comparison):
    pd.testing.assert_frame_equal(comparison("a"), comparison("b"))


def test_a_comparison_goes_on_and_replaces_nothing_unasked(comparison, tmp_path, monkeypatch):
    whole = comparison("a")
    (tmp_path / "a" / "rows" / "none" / "record.json").unlink()  # stopped before the last entry
    fitted = []
    fit = iv.models.NoChange.fit
    monkeypatch.setattr(iv.models.PRiMeFlow, "fit", lambda *_, **__: pytest.fail("fitted again"))
    monkeypatch.setattr(iv.models.NoChange, "fit", lambda *args, **options: fitted.append(1) or fit(*args, **options))
    pd.testing.assert_frame_equal(comparison("a"), whole)
    assert fitted == [1]
    other = pd.Series("train", index=iv.datasets.toy().obs_names)
    other[iv.datasets.toy().obs["perturbation"] == "B"] = "test"
    with pytest.raises(ValueError, match="holds flow with another split"):
        comparison("a", other)


@pytest.mark.slow
def test_demo_keeps_its_promise(tmp_path):
    """PRiMeFlow is best in every measure on the held-out conditions (two cores: about five minutes)."""
    scores = demo(tmp_path, progress=False)
    assert set(scores["cell_type"]) == set(HELD_OUT)
    mean = scores.pivot_table(index="model", columns="metric", values="value")
    others = mean.drop(index=["primeflow", "noise_floor"])
    for metric in ("mmd_gex", "mmd_pca", "rmse_mean"):
        assert mean.loc["primeflow", metric] < others[metric].min()
    for metric in ("deg_recall", "cosine_logfc"):
        assert mean.loc["primeflow", metric] > others[metric].max()
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_a_dose_read_as_text_is_the_same_dose(toy):
    toy.obs["dose"] = (toy.obs["perturbation"] != "control") * 10.0
    design = iv.Design.from_adata(toy, perturbation="perturbation", control="control", dose="dose")
    wanted = pd.DataFrame({"perturbation": ["A"], "dose": ["10"]})
    adata = iv.preprocess.normalize(toy)
    predicted = iv.models.PerturbationMean(design, adata.var_names).fit(adata).predict(wanted, n_cells=5)
    scores = iv.evaluate(predicted, adata, design, ["rmse_mean"])
    assert scores["condition"].tolist() == ["A|10"]

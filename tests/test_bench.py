"""Contract of a comparison: complete tidy scores, everything a report needs, the same numbers twice."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import invirtuo as iv
from invirtuo.bench import Entry, compare
from invirtuo.bench.demo import HELD_OUT, demo
from invirtuo.bench.entry import BASELINES
from invirtuo.metrics.scores import FLOOR_NOTE


def compared(out, split=None):
    """A comparison of toy cells, written into a folder."""
    toy = iv.datasets.toy()
    design = iv.Design.from_adata(toy, perturbation="perturbation", control="control", covariates=["cell_type"])
    held_out = iv.splits.hold_out(toy.obs, design, ["monocyte|A", "b_cell|A+B"])
    adata = iv.preprocess.normalize(toy, split=held_out)
    tiny = iv.models.PRiMeFlow.Config(hidden_dim=32, cell_width=32, gene_width=16, n_blocks=1, steps=3)
    fit = iv.FitConfig(steps=8, batch_size=32, val_every=4, progress=False)
    entries = [
        Entry("flow", "primeflow", tiny, fit),
        Entry("mean", "perturbation_mean", "shift-cells"),
        Entry("none", "no_change"),
    ]
    return compare(adata, design, entries, split=held_out if split is None else split, out=out, baselines=False,
                   n_cells=30, about={"title": "toy"})  # fmt: skip


@pytest.fixture
def comparison(tmp_path):
    return lambda name, split=None: compared(tmp_path / name, split)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Folder and scores of a comparison that nothing is done to."""
    folder = tmp_path_factory.mktemp("once")
    return folder, compared(folder)


def test_scores_are_complete_and_tidy(once):
    folder, scores = once
    columns = ["condition", "perturbation", "cell_type", "metric", "value", "direction"]
    assert scores.columns[:6].tolist() == columns
    counts = scores.groupby("model").size()
    assert set(counts.index) == {"flow", "mean", "none", "noise_floor"}
    assert (counts == 2 * 11).all()  # conditions x metrics
    pd.testing.assert_frame_equal(scores, pd.read_csv(folder / "scores.csv"), check_dtype=False)
    assert FLOOR_NOTE in (folder / "report.html").read_text(encoding="utf-8")
    floor = scores[(scores["model"] == "noise_floor") & (scores["metric"] == "rmse_mean")]["value"].mean()
    none = scores[(scores["model"] == "none") & (scores["metric"] == "rmse_mean")]["value"].mean()
    assert floor < none


def test_everything_a_report_needs(once, tmp_path):
    folder, _ = once
    assert ad.read_h5ad(folder / "predicted.h5ad").uns["invirtuo"]["model"] == "primeflow"
    assert set(pd.read_csv(folder / "panels.csv")["kind"]) == {"background", "real", "predicted"}
    run = json.loads((folder / "run.json").read_text())
    assert [entry["label"] for entry in run["models"]] == ["flow", "mean", "none"]
    assert run["models"][0]["fit"]["steps"] == 8
    page = iv.report(folder, tmp_path / "report.html").read_text()
    assert "noise_floor" in page
    assert iv.load(folder / "models" / "flow").name == "primeflow"


def test_effects_have_intervals_where_conditions_are_held_out_for_validation(once, comparison, toy, design, tmp_path):
    plain = pd.read_csv(once[0] / "effects.csv")
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


def test_every_gene_is_tested_and_its_values_counted(once, toy, design):
    folder, _ = once
    table = pd.read_csv(folder / "effects.csv")
    predicted = ad.read_h5ad(folder / "predicted.h5ad")
    adata = iv.preprocess.normalize(toy)
    condition, gene = table["condition"].iloc[-1], table["gene"].iloc[3]
    cell_type = condition.split("|")[0]
    of_type = (adata.obs["cell_type"] == cell_type).to_numpy()
    is_control = of_type & design.is_control(adata.obs)
    values = {"control": adata[is_control], "real": adata[(design.names(adata.obs) == condition).to_numpy()]}
    values["predicted"] = predicted[(design.names(predicted.obs) == condition).to_numpy()]
    values = {origin: np.asarray(cells[:, gene].to_df()[gene]) for origin, cells in values.items()}

    # the test, before adjusting, orders genes; the smallest adjusted p-value of a gene is at least its own
    own = table[(table["condition"] == condition) & (table["gene"] == gene)].iloc[0]
    for origin, column in (("predicted", "q"), ("real", "q_real")):
        p = stats.mannwhitneyu(values[origin], values["control"], method="asymptotic").pvalue
        assert p - 1e-9 <= own[column] <= 1
    arrays = np.load(folder / "distributions.npz")
    i, j = list(arrays["condition"]).index(condition), list(arrays["gene"]).index(gene)
    assert arrays["top"][j] == pytest.approx(max(adata[:, gene].X.max(), predicted[:, gene].X.max()))
    for origin, own_values in values.items():
        shares = arrays[origin][i, j]
        assert shares.sum() == pytest.approx(1) and shares[0] == pytest.approx((own_values <= 0).mean())


def test_groups_without_control_cells_have_no_effects(toy, design, tmp_path):
    adata = iv.preprocess.normalize(toy)
    names = design.names(adata.obs)
    split = pd.Series("train", adata.obs_names).mask(names.isin(["monocyte|A", "t_cell|A"]), "test")
    split = split.mask(names == "b_cell|B", "val")
    adata, split = (x[(names != "t_cell|control").to_numpy()] for x in (adata, split))
    tiny = iv.models.PRiMeFlow.Config(hidden_dim=32, cell_width=32, gene_width=16, n_blocks=1, steps=3)
    entries = [Entry("flow", "primeflow", tiny, iv.FitConfig(steps=2, batch_size=32, progress=False))]
    options = {"n_cells": 20, "metrics": ["rmse_mean"], "baselines": False}
    compare(adata.copy(), design, entries, split=split, out=tmp_path, **options)
    table = pd.read_csv(tmp_path / "effects.csv")
    assert set(table["condition"]) == {"monocyte|A"} and table["low"].isna().all()


def test_sets_of_genes_hold_genes_of_any_name(toy, design, tmp_path):
    toy.var_names = ["NA", *toy.var_names[1:]]
    genes = list(toy.var_names[:5])
    (tmp_path / "sets.gmt").write_text("\t".join(["first five", "", *genes]) + "\n")
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"])
    iv.compare(toy, design, "no_change", split=split, out=tmp_path / "out", baselines=False, n_cells=20,
               metrics=["rmse_mean"], gene_sets=tmp_path / "sets.gmt")  # fmt: skip
    table = pd.read_csv(tmp_path / "out" / "gene_sets.csv")
    assert table["n_genes"].tolist() == [5] and table["gene_set"].tolist() == ["first five"]
    assert "Sets of genes" in (tmp_path / "out" / "report.html").read_text()


def test_same_seed_same_table(once, comparison):
    pd.testing.assert_frame_equal(once[1], comparison("b"))


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


# ---- from a file to an answer ----------------------------------------------------------------------------------------


def test_counts_and_their_logarithms_give_the_same_answer(toy, design, tmp_path):
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"])
    options = {"split": split, "n_cells": 20, "metrics": ["rmse_mean", "energy_distance"]}
    of_counts = iv.compare(toy, design, "ridge", out=tmp_path / "counts", **options)
    of_logs = iv.compare(iv.preprocess.normalize(toy), design, ["ridge"], out=tmp_path / "logs", **options)
    pd.testing.assert_frame_equal(of_counts, of_logs)
    assert set(of_counts["model"]) == {"ridge", "noise_floor", *(entry.label for entry in BASELINES)}
    page = (tmp_path / "counts" / "report.html").read_text()
    assert "How well were monocyte|A predicted?" in page and "held out: monocyte|A" in page


def test_genes_are_chosen_without_held_out_cells(toy, design, tmp_path):
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"])
    spoiled = toy.copy()
    values = spoiled.X.toarray()
    values[(split == "test").to_numpy()] = 7
    spoiled.X = values
    chosen = []
    for i, adata in enumerate((toy, spoiled)):
        iv.compare(adata, design, "no_change", split=split, out=tmp_path / str(i), n_genes=10, n_cells=5,
                   metrics=["rmse_mean"], baselines=False)  # fmt: skip
        chosen.append(list(iv.load(tmp_path / str(i) / "models" / "no_change").genes))
    assert chosen[0] == chosen[1] and len(chosen[0]) == 10


def test_the_seed_is_that_of_the_fits_too(toy, design, tmp_path):
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"])
    few = {"steps": 2, "batch_size": 32, "progress": False}
    for seed, fit in ((1, few), (2, few | {"seed": 5})):
        entry = Entry("linear", "linear_additive", None, fit)
        iv.compare(toy, design, entry, split=split, out=tmp_path / str(seed), seed=seed, n_cells=5,
                   metrics=["rmse_mean"], baselines=False)  # fmt: skip
    seeds = [iv.load(tmp_path / str(seed) / "models" / "linear").card["fit"]["seed"] for seed in (1, 2)]
    assert seeds == [1, 5]


@pytest.mark.slow
def test_a_target_that_was_seen_nowhere_has_fewer_baselines(toy, design, tmp_path):
    features = pd.DataFrame(np.eye(3), index=["A", "B", "C"])
    split = iv.splits.unseen_targets(toy.obs, design, n_folds=3)
    scores = iv.compare(toy, design.with_features(features), "ridge:kernel", split=split, out=tmp_path, n_cells=5,
                        metrics=["rmse_mean"])  # fmt: skip
    assert set(scores["model"]) == {"ridge:kernel", "context_mean", "no_change", "noise_floor"}


def test_what_cannot_be_compared(toy, design, tmp_path):
    everything = pd.Series("train", index=toy.obs_names)
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"])
    logs = iv.preprocess.normalize(toy)
    for arguments, message in (
        ({"split": everything}, "holds out no perturbed cell for 'test'"),
        ({"models": "nothing"}, "unknown model 'nothing'"),
        ({"models": ["ridge", "ridge"]}, "named more than once: ridge"),
        ({"adata": logs, "n_genes": 5}, "n_genes and size_factor act on raw counts"),
        ({"split": split[:10]}, "split"),
    ):
        asked = {"adata": toy, "design": design, "models": "ridge", "split": split} | arguments
        with pytest.raises(ValueError, match=message):
            iv.compare(**asked, out=tmp_path / "out")
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_bars_are_shown_or_not(toy, tmp_path, capfd):
    design = iv.Design.from_adata(toy, perturbation="perturbation", control="control", covariates=["cell_type"])
    split = iv.splits.hold_out(toy.obs, design, ["monocyte|A"])
    entry = Entry("linear", "linear_additive", fit=iv.FitConfig(steps=2, batch_size=32, progress=True))
    options = {"split": split, "baselines": False, "n_cells": 5, "metrics": ["rmse_mean"]}
    said = {}
    for progress in (True, False):
        iv.compare(toy, design, entry, out=tmp_path / str(progress), progress=progress, **options)
        said[progress] = "".join(capfd.readouterr())
    assert "fitting" in said[True] and "predicting" in said[True]
    assert "fitting" not in said[False] and "predicting" not in said[False]


@pytest.mark.slow
def test_the_shell_compares(run, toy, tmp_path):
    toy.write_h5ad(tmp_path / "cells.h5ad")
    columns = ["--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type"]
    asked = ["compare", tmp_path / "cells.h5ad", *columns, "--model", "ridge", "--out", tmp_path / "out", "-n", 20]
    code, said, error = run(*asked, "--hold-out", "monocyte|A", "--metrics", "rmse_mean,deg_recall", "--umap")
    assert code == 0 and "ridge" in said and "report.html" in said, error
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["data"].endswith("cells.h5ad") and facts["command"].startswith("invirtuo ") and facts["date"]
    counts = pd.read_csv(tmp_path / "out" / "umap.csv", keep_default_na=False).groupby(["kind", "model"]).size()
    n_cells = counts.to_dict()
    assert n_cells["predicted", "ridge"] == 20 and n_cells["background", ""] + n_cells["real", ""] == toy.n_obs
    assert "UMAP of real and predicted cells together" in (tmp_path / "out" / "report.html").read_text()
    code, _, error = run(*asked)
    assert code == 2 and "nothing is held out" in error
    code, _, error = run(*asked, "--hold-out", "monocyte|A", "--seed", 1)
    assert code == 2 and "holds ridge with another" in error

"""Judging generated populations: scores, pictures, report, errors."""

from __future__ import annotations

import re
import sys

import anndata
import numpy as np
import pandas as pd
import pytest

import invirtuo as iv
from invirtuo.bench import judge
from invirtuo.bench.comparators import embeddings, posterior_mean, sample_prior
from invirtuo.bench.populations import REAL_NOTE
from invirtuo.metrics import PROFILES
from invirtuo.reports import folder


@pytest.fixture(scope="module")
def cells():
    adata = iv.datasets.load("kang")
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:600]
    return adata[rows, :80].copy()


@pytest.fixture(scope="module")
def design(cells):
    return iv.Design.from_adata(cells, covariates=["cell_type"])


@pytest.fixture(scope="module")
def judged(cells, design, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged")
    halves = cells[:300].copy(), cells[300:].copy()
    model = iv.models.MODELS["independent_nb"](design, cells.var_names).fit(halves[0])
    made = model.generate(labels=halves[1].obs[["cell_type"]].reset_index(drop=True))
    return judge({"independent_nb": made, "training cells": halves[0]}, halves[1], design, out, n_pcs=5), out, halves


def test_scores_are_by_class_and_together(judged, design):
    scores, out, (_, real) = judged
    assert set(scores["metric"]) == set(PROFILES["generation"])
    assert set(scores["model"]) == {"independent_nb", "training cells", "noise_floor"}
    large = real.obs["cell_type"].value_counts().loc[lambda n: n >= 20].index
    assert set(scores.loc[scores["task"] == "class by class", "condition"]) == set(large)
    assert set(scores.loc[scores["task"] != "class by class", "condition"]) == {"all"}
    written = pd.read_csv(out / "scores.csv")
    np.testing.assert_allclose(written["value"], scores["value"], equal_nan=True)


def test_training_cells_are_no_baseline(judged):
    page = (judged[1] / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr class="(\w+)"><th scope="row">([\w ]+)', page)
    assert {("baseline", "independent_nb"), ("floor", "training cells"), ("floor", "noise_floor")} <= set(rows)
    assert "training cells is best" not in page and REAL_NOTE in page


def test_independent_genes_are_found_out(judged):
    scores = judged[0]
    table = scores[scores["task"] == "all cells together"].pivot_table(index="metric", columns="model", values="value")
    assert table.loc["c2st", "independent_nb"] > table.loc["c2st", "training cells"] + 0.1


def test_tables_of_genes_and_cells(judged):
    _, out, (_, real) = judged
    genes, single = folder.read_populations(out)
    of_real = genes[genes["model"] == "real"].set_index("gene")
    x = real.X.toarray()
    np.testing.assert_allclose(of_real.loc[real.var_names, "mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(of_real.loc[real.var_names, "variance"], x.var(0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(of_real.loc[real.var_names, "zeros"], (x == 0).mean(0), rtol=1e-5)
    assert single.groupby("model").size().to_dict() == {"independent_nb": 300, "real": 300, "training cells": 300}
    page = (out / "report.html").read_text()
    assert "Populations" in page and "class by class" in page and "independent_nb" in page


def test_log_values_are_taken_as_they_are(cells, design, tmp_path):
    filled = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0]
    cells = anndata.AnnData(filled.X, obs=filled.obs[["cell_type"]], var=filled.var[[]])
    logged = iv.preprocess.normalize(cells)
    logged = anndata.AnnData(logged.X, obs=logged.obs, var=logged.var[[]])
    by_counts = judge({"a": cells[:300]}, cells[300:], design, tmp_path / "a", metrics=["rmse_mean"])
    by_logs = judge({"a": logged[:300]}, logged[300:], design, tmp_path / "b", metrics=["rmse_mean"])
    rows = by_counts["model"] == "a"
    np.testing.assert_allclose(by_counts.loc[rows, "value"], by_logs.loc[rows, "value"], rtol=1e-4)


@pytest.mark.slow
def test_large_classes_are_cut_to_so_many_cells(cells, design, tmp_path, capsys):
    """The same cells whatever else is judged, the note says so, and all cells are in the tables of genes."""
    arguments = {"metrics": ["zeros_distance", "wasserstein2"], "n_pcs": 5, "max_cells": 30}
    table = judge({"a": cells[:300]}, cells[300:], design, tmp_path / "cut", **arguments, progress=True)
    assert "scores" in capsys.readouterr().out
    kept = table[table["model"] == "a"]
    numbers = cells.obs["cell_type"][300:].value_counts()
    by_class = kept[kept["task"] == "class by class"].set_index("condition")["n_real"]
    assert (by_class == numbers.clip(upper=30)[by_class.index]).all() and (kept["n_pred"] <= 30).all()
    assert (kept.loc[kept["task"] != "class by class", ["n_real", "n_pred"]] == 30).all(axis=None)
    facts = folder.read_run(tmp_path / "cut" / "run.json")
    assert facts["cells"] == {"real": 300, "a": 300} and "at most 30 cells were scored" in facts["notes"][0]
    assert "at most 30 cells were scored" in (tmp_path / "cut" / "report.html").read_text()
    more = judge({"a": cells[:300], "b": cells[:100]}, cells[300:], design, tmp_path / "more", **arguments)
    pd.testing.assert_frame_equal(more[more["model"] == "a"].reset_index(drop=True), kept.reset_index(drop=True))
    whole = judge({"a": cells[:300]}, cells[300:], design, tmp_path / "whole", **(arguments | {"max_cells": None}))
    assert whole["n_real"].max() == 300 and not folder.read_run(tmp_path / "whole" / "run.json")["notes"]
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="max_cells is 0; expected at least 1"):
        judge({"a": cells}, cells, design, tmp_path / "none", max_cells=0)


def test_what_cannot_be_judged(cells, design, tmp_path):
    with pytest.raises(ValueError, match="no generated cells are given"):
        judge({}, cells, design, tmp_path)
    with pytest.raises(ValueError, match="no class has 10000 real cells"):
        judge({"a": cells}, cells, design, tmp_path, min_cells=10_000)
    other = cells.copy()
    other.obs["cell_type"] = "plant"
    with pytest.raises(ValueError, match="a has none of the classes"):
        judge({"a": other}, cells, design, tmp_path)
    assert not list(tmp_path.iterdir())


def test_empty_cells_are_judged_too(cells, design, tmp_path):
    empty = cells[:300].copy()
    empty.X = empty.X.multiply((np.arange(300) > 100)[:, None]).tocsr()
    table = judge({"a": empty, "b": cells[:300]}, cells[300:], design, tmp_path, metrics=["zeros_distance"])
    worse, fine = table.groupby("model")["value"].mean()[["a", "b"]]
    assert worse > 2 * fine


def test_comparators(cells, design):
    pytest.importorskip("scvi", reason="needs scvi-tools")
    labels = pd.DataFrame({"cell_type": ["B cell"] * 30 + ["CD14 monocyte"] * 20})
    filled = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0].copy()
    for name in ("scvi", "scanvi"):
        made = sample_prior(name, filled, design, labels, epochs=2, seed=1)
        assert made.shape == (50, 80) and list(made.obs["cell_type"]) == list(labels["cell_type"])
        assert made.X.dtype == np.int32 and made.X.sum() > 0
    with pytest.raises(ValueError, match="labels holds values"):
        sample_prior("scvi", filled, design, labels.replace("B cell", "plant"), epochs=1)


def test_comparators_fill_in_and_embed(cells):
    pytest.importorskip("scvi", reason="needs scvi-tools")
    filled = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0].copy()
    filled.obs["batch"] = np.where(np.arange(filled.n_obs) % 2, "x", "y")
    design = iv.Design.from_adata(filled, covariates=["cell_type"])
    mean = posterior_mean(filled, design, epochs=2)
    assert mean.shape == filled.shape and (mean > 0).all()
    np.testing.assert_allclose(mean.sum(axis=1), np.asarray(filled.X.sum(axis=1)).ravel(), rtol=1e-4)
    few = posterior_mean(filled, design, cells=filled[:7], epochs=2)
    np.testing.assert_allclose(few, mean[:7], rtol=1e-3)
    found = embeddings(filled, "batch", "cell_type", epochs=2)
    assert {name: len(z) for name, z in found.items()} == {"scvi": filled.n_obs, "scanvi": filled.n_obs}
    assert not np.allclose(found["scvi"], found["scanvi"])


def test_comparators_say_that_scvi_is_missing(cells, design, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    for call in (lambda: posterior_mean(cells, design), lambda: embeddings(cells, "cell_type", "cell_type")):
        with pytest.raises(ValueError, match="scvi-tools is not installed; install the extra"):
            call()


def test_unknown_comparator(cells, design):
    with pytest.raises(ValueError, match="unknown comparator 'gan'; known: scvi, scanvi, peakvi"):
        sample_prior("gan", cells, design, cells.obs)

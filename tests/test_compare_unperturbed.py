"""Comparisons where nothing was perturbed: generators and models of time courses, from a file to a page."""

from __future__ import annotations

import importlib
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from small_models import SMALL

import invirtuo as iv
from invirtuo.bench import Entry

FIT = {"steps": 4, "batch_size": 32, "warmup": 0, "val_every": 0, "progress": False}
CFGEN = Entry("flow", "cfgen", SMALL["cfgen"], FIT)
ODE = Entry("ode", "sparse_ode", SMALL["sparse_ode"], FIT)


@pytest.fixture
def series(toy):
    """Cells of two lineages and three donors along a time."""
    rng = np.random.default_rng(0)
    cells = toy[:, :6].copy()
    cells.obs["lineage"] = np.where(np.arange(toy.n_obs) % 2, "mono", "eryth")
    cells.obs["donor"] = np.array(["a", "b", "c"])[np.arange(toy.n_obs) // 2 % 3]
    cells.obs["hours"] = rng.random(toy.n_obs)
    return cells


def test_populations(toy, tmp_path):
    design = iv.Design.from_adata(toy, covariates=["cell_type"])
    scores = iv.compare(toy, design, CFGEN, out=tmp_path, n_genes=20, metrics=["rmse_mean", "zeros_distance"])
    assert set(scores["model"]) == {"flow", "independent_nb", "training cells", "noise_floor"}
    assert set(scores["task"]) == {"class by class", "all cells together"} and set(scores["direction"]) == {"lower"}

    # as many cells of each class as were held out, counts of the genes chosen
    held_out = iv.splits.cells(toy.obs, design) == "test"
    made = ad.read_h5ad(tmp_path / "rows" / "flow" / "generated.h5ad")
    assert made.obs["cell_type"].value_counts().to_dict() == toy.obs["cell_type"][held_out].value_counts().to_dict()
    assert made.n_vars == 20 and iv.load(tmp_path / "models" / "flow").name == "cfgen"
    facts = json.loads((tmp_path / "run.json").read_text())
    assert [model["label"] for model in facts["models"]] == ["flow", "independent_nb"]
    page = (tmp_path / "report.html").read_text()
    assert (
        f"{held_out.sum()} cells of" in page
        and page.count("held-out groups flow is better than the simple baseline") == 1
    )


def test_populations_go_on(toy, tmp_path, monkeypatch):
    design = iv.Design.from_adata(toy, covariates=["cell_type"])
    options = {"out": tmp_path, "n_genes": 20, "metrics": ["rmse_mean"], "n_cells": 50}
    whole = iv.compare(toy, design, CFGEN, **options)
    (tmp_path / "rows" / "independent_nb" / "record.json").unlink()  # stopped before the last row
    monkeypatch.setattr(iv.models.CFGen, "fit", None)
    pd.testing.assert_frame_equal(iv.compare(toy, design, CFGEN, **options), whole)
    with pytest.raises(ValueError, match="holds flow with another asked"):
        iv.compare(toy, design, CFGEN, **options | {"n_cells": 60})
    rows = importlib.import_module("invirtuo.bench.compare.rows")
    monkeypatch.setattr(rows, "version", lambda name: "0.0.1")  # other numbers
    with pytest.raises(ValueError, match="holds flow with another asked"):
        iv.compare(toy, design, CFGEN, **options)


@pytest.mark.filterwarnings("ignore:sparse_ode does not forecast")
def test_time_courses(series, tmp_path):
    design = iv.Design.from_adata(series, covariates=["lineage", "donor"], time="hours")
    split = iv.splits.courses(series.obs, design, {"donor": "c"})
    scores = iv.compare(series, design, ODE, split=split, out=tmp_path)
    assert {"ode", "smoother", "noise_floor"} <= set(scores["model"]) and "own_mean" not in set(scores["model"])
    assert set(scores["condition"]) == {"mono|c", "eryth|c"}
    assert set(ad.read_h5ad(tmp_path / "ahead.h5ad").obs["donor"]) == {"c"}
    page = (tmp_path / "report.html").read_text()
    assert "How well were time courses forecast?" in page and "<h2>Forecasts</h2>" in page
    assert "Of 2 held-out courses ode is better than every simple baseline in" in page
    assert "smoother" in json.loads((tmp_path / "run.json").read_text())["baselines"]
    alone = iv.compare(series, design, ODE, split=split, out=tmp_path, baselines=False)  # what was computed is read
    assert set(alone["model"]) == {"ode", "noise_floor"}


def test_what_cannot_be_compared(toy, series, design, tmp_path):
    plain = iv.Design.from_adata(toy, covariates=["cell_type"])
    timed = iv.Design.from_adata(series, covariates=["lineage", "donor"], time="hours")
    logs = iv.preprocess.normalize(toy)
    for arguments, message in (
        ({"models": ["cfgen", "sparse_ode"]}, "names no perturbation.*found cfgen, sparse_ode"),
        ({"models": "ridge"}, "names no perturbation.*found ridge.*perturbation="),
        ({"size_factor": "total"}, "without size_factor"),
        ({"adata": logs}, "generators learn raw counts"),
        ({"adata": series, "design": timed, "models": "sparse_ode"}, "forecasts need a split"),
        ({"adata": series, "design": timed, "models": "sparse_ode", "n_pcs": 5}, "do not take metrics, n_cells, n_pcs"),
        ({"design": design, "split": None, "models": "ridge"}, "nothing is held out"),
        ({"design": design, "models": "sparse_ode"}, "sparse_ode cannot predict"),
    ):
        asked = {"adata": toy, "design": plain, "models": "cfgen"} | arguments
        with pytest.raises(ValueError, match=message):
            iv.compare(**asked, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:sparse_ode does not forecast")
def test_the_shell_compares(run, toy, series, tmp_path):
    toy[:, :20].write_h5ad(tmp_path / "cells.h5ad")
    series.write_h5ad(tmp_path / "series.h5ad")
    fit = ["--fit-set", "steps=4", "--fit-set", "batch_size=32", "--quiet"]
    asked = ["compare", tmp_path / "cells.h5ad", "--covariate", "cell_type", "--model", "independent_nb", *fit]
    code, _, error = run(*asked, "--metrics", "rmse_mean", "--out", tmp_path / "populations")
    assert code == 0 and (tmp_path / "populations" / "report.html").exists(), error
    columns = ["--covariate", "lineage", "--covariate", "donor", "--time", "hours"]
    asked = ["compare", tmp_path / "series.h5ad", *columns, "--model", "sparse_ode", *fit, "--hold-out", "donor=c"]
    code, _, error = run(*asked, "--out", tmp_path / "courses")
    assert code == 0 and (tmp_path / "courses" / "report.html").exists(), error

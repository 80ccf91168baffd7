"""The model of the how-to, in a package of its own: it goes wherever the name of a model goes."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import invirtuo as iv
from invirtuo import models
from invirtuo.bench import Entry
from invirtuo.bench.entry import as_entry

PAGE = Path(__file__).parents[1] / "docs" / "how-to.md"
FIT = {"steps": 4, "batch_size": 32, "progress": False}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The module of the how-to, as it is written there."""
    (code,) = re.findall(r"```python\n(# lab\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "lab.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("lab")
    sys.modules.pop("lab")


@pytest.fixture
def cells(toy):
    return iv.preprocess.normalize(toy)


def test_in_a_comparison(lab, cells, design, tmp_path):
    split = iv.splits.hold_out(cells.obs, design, ["monocyte|A"])
    entries = [Entry("class", lab.Shift, {"scale": 2.0}, FIT), Entry("name", "lab:Shift", {"scale": 2.0}, FIT)]
    options = {"split": split, "n_cells": 10, "metrics": ["rmse_mean"], "baselines": False}
    scores = iv.compare(cells, design, entries, out=tmp_path / "out", **options)
    values = scores.set_index("model")["value"]
    assert values["class"] == values["name"]
    assert as_entry(lab.Shift).label == "shift" and as_entry(lab.Shift).model == "lab:Shift"
    assert as_entry(iv.models.Ridge) == Entry("ridge", "ridge")
    assert iv.load(tmp_path / "out" / "models" / "class").config.scale == 2.0


def test_from_the_shell(lab, cells, run, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    columns = ["--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type"]
    fit = ["--hold-out", "monocyte|A", "--set", "scale=0.5", "--fit-set", "steps=4", "--quiet"]
    code, _, error = run("fit", "lab:Shift", tmp_path / "cells.h5ad", *columns, *fit, "--out", tmp_path / "run")
    assert code == 0, error
    assert run("predict", tmp_path / "run", "-n", 5, "--quiet", "--out", tmp_path / "p.h5ad")[0] == 0
    code, said, _ = run("list", "models", "lab:Shift")
    assert code == 0 and "factor on the learned vector" in said


def test_offered_by_an_installed_package(lab, monkeypatch, run):
    point = EntryPoint("shift", "lab:Shift", models.GROUP)
    monkeypatch.setattr(models, "entry_points", lambda group: [point] if group == models.GROUP else [])
    models._offered.cache_clear()
    try:
        assert models.model_class("shift") is lab.Shift and as_entry("shift").kind is lab.Shift
        assert "Adds a learned vector" in run("list", "models")[1]
    finally:
        models._offered.cache_clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "unknown model 'nothing'; known: primeflow"),
        ("nothing:Here", "cannot be imported .No module named 'nothing'.; known: primeflow"),
        ("lab:Nothing", "cannot be imported .*Nothing"),
        ("lab:dataclass", "lab:dataclass is no model; expected a class derived from invirtuo.Model"),
        (":Shift", "cannot be imported"),
    ],
)
def test_what_is_no_model(lab, name, words):
    with pytest.raises(ValueError, match=words):
        models.model_class(name)


def test_a_saved_model_whose_module_is_gone(lab, cells, design, tmp_path):
    lab.Shift(design, cells.var_names).fit(cells, config=iv.FitConfig(**FIT)).save(tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace("lab:Shift", "gone:Shift"))
    with pytest.raises(ValueError, match="is a saved 'gone:Shift'; .*No module named 'gone'"):
        iv.load(tmp_path / "run")

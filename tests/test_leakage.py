"""Contract test: cells that are held out change nothing that is learned. They are replaced by garbage to prove it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from small_models import SMALL

import invirtuo as iv
from invirtuo.cells.transforms import TRANSFORMS
from invirtuo.fit import FitConfig

MODELS = {name: kind for name, kind in iv.models.MODELS.items() if kind.verb == "predict"}
FIT = FitConfig(steps=6, batch_size=64, warmup=0, precision="fp32", accelerator="cpu", progress=False, val_every=2)


def garbage(x, rows: np.ndarray) -> sparse.csr_matrix:
    """The same kind of numbers, but with nothing left of the rows."""
    rng = np.random.default_rng(9)
    x = x.toarray()
    kind = (
        rng.poisson(30, (len(rows), x.shape[1])) if (x % 1 == 0).all() else rng.uniform(0, 8, (len(rows), x.shape[1]))
    )
    x[rows] = kind * (rng.random((len(rows), x.shape[1])) < 0.7)
    return sparse.csr_matrix(x.astype(np.float32))


@pytest.fixture(scope="module")
def raw():
    return iv.datasets.toy(n_cells=400, n_genes=60)


@pytest.fixture(scope="module")
def plan(raw):
    return iv.Design.from_adata(raw, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture(scope="module")
def split(raw, plan):
    return iv.splits.hold_out(raw.obs, plan, ["t_cell|A", "b_cell|A+B"], val_fraction=0.2)


@pytest.fixture(scope="module")
def spoiled(raw, split):
    """The same cells with garbage in val and test."""
    adata = raw.copy()
    adata.X = garbage(adata.X, np.flatnonzero(split != "train"))
    return adata


def log(adata, genes: int = 12):
    """Log values of the first genes, each cell by its own depth: no choice that could leak."""
    return iv.preprocess.normalize(adata)[:, :genes].copy()


def test_the_garbage_is_garbage(raw, spoiled, split):
    held_out = (split != "train").to_numpy()
    assert 0.3 < held_out.mean() < 0.7 and {"train", "val", "test"} == set(split)
    a, b = log(raw).X.toarray(), log(spoiled).X.toarray()
    np.testing.assert_array_equal(a[~held_out], b[~held_out])
    assert (np.abs(a[held_out] - b[held_out]).mean(1) > 0.3).all()


@pytest.mark.parametrize("name", MODELS)
def test_models(name, raw, spoiled, plan, split):
    """Weights, statistics, transforms, stored controls and predictions are equal to the last bit."""
    everything = spoiled.copy()
    everything.X = garbage(everything.X, np.flatnonzero(split == "train"))
    models = []
    for adata in (log(raw), log(spoiled), log(everything)):
        model = MODELS[name](plan, adata.var_names, SMALL.get(name))
        models.append(model.fit(adata, split, config=replace(FIT, keep="last")))
    first, second, _ = models
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert first.transforms.keys() == second.transforms.keys()
    for key, transform in first.transforms.items():
        for part, array in transform.state().items():
            np.testing.assert_array_equal(array, second.transforms[key].state()[part])
    for group, pool in first._controls.items():
        assert (pool.expression != second._controls[group].expression).nnz == 0
    a, b, c = (model.predict("test", 10, precision="fp32").X for model in models)
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c, atol=0.01)  # garbage in training cells would be noticed


@pytest.mark.parametrize("name", ["primeflow", "linear_additive"])
def test_validation_has_no_effect_on_training(name, raw, plan, split):
    states = []
    for val_every in (0, 1):
        adata = log(raw)
        model = MODELS[name](plan, adata.var_names, SMALL.get(name))
        states.append(model.fit(adata, split, config=replace(FIT, val_every=val_every)).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_statistics_of_the_data_set(raw, spoiled, plan, split):
    first, second = (iv.CellDataset(log(adata), plan, split) for adata in (raw, spoiled))
    seen = [dataset.pseudobulk("train") for dataset in (first, second)]
    for name in ("table", "mean", "variance", "n_cells"):
        np.testing.assert_array_equal(*(np.asarray(getattr(bulk, name)) for bulk in seen))
    train = torch.from_numpy(first.rows("train"))
    assert torch.equal(first.size_factor[train], second.size_factor[train])
    assert not torch.equal(first.size_factor, second.size_factor)
    for name, transform in TRANSFORMS.items():
        states = [transform().fit(d.dense(d.rows("train")).numpy()).state() for d in (first, second)]
        for part, array in states[0].items():
            np.testing.assert_array_equal(array, states[1][part], err_msg=name)


@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat"])
def test_gene_choice(raw, spoiled, split, flavor):
    chosen = [
        iv.preprocess.normalize(adata, n_genes=20, split=split, flavor=flavor).var_names for adata in (raw, spoiled)
    ]
    assert chosen[0].equals(chosen[1])
    blind = [iv.preprocess.normalize(adata, n_genes=20, flavor=flavor).var_names for adata in (raw, spoiled)]
    assert not blind[0].equals(blind[1])  # without the split it would leak


def test_gene_choice_of_perturbench(raw, spoiled, plan, split):
    """Its scaling to the median depth and its filter of rare genes see all cells, as published; its choice does not."""
    options = {"n_genes": 15, "degs": 2, "min_cells": 0, "target_sum": 1e4, "split": split}
    first, second = (iv.preprocess.perturbench(adata, plan, **options) for adata in (raw, spoiled))
    assert first.var_names.equals(second.var_names)
    assert first.uns["rank_genes_groups_cov"] == second.uns["rank_genes_groups_cov"]
    blind = [iv.preprocess.perturbench(a, plan, **options | {"split": None}).var_names for a in (raw, spoiled)]
    assert not blind[0].equals(blind[1])


def test_held_out_conditions_are_not_in_the_card_as_trained(raw, plan, split):
    adata = log(raw)
    only = split.where(adata.obs["perturbation"].astype(str) != "C", "test")
    model = MODELS["no_change"](plan, adata.var_names).fit(adata, pd.Series(only, index=adata.obs_names))
    assert "t_cell|A" in plan.names(pd.DataFrame(model.card["held_out"]["test"])).tolist()
    assert model.card["n_cells"]["train"] == int((only == "train").sum())

"""Counts of cells that are drawn in log space: units of cells, whole numbers, depths."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

import invirtuo as iv
from invirtuo.metrics import Pair
from invirtuo.verbs.controls import ControlCells
from invirtuo.verbs.emission import Depths, units, whole

matrices = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**31)).map(
    lambda size: np.random.default_rng(size[2]).gamma(0.5, 2.0, size[:2])
)


@given(matrices)
def test_whole_numbers_keep_sums_zeros_and_order(expected):
    found = whole(torch.from_numpy(expected)).numpy()
    assert (np.abs(found - expected) < 1).all()
    np.testing.assert_allclose(found.sum(axis=0), expected.sum(axis=0), atol=0.5 + 1e-9)
    assert not found[expected == 0].any()
    np.testing.assert_array_equal(whole(torch.from_numpy(found.astype(float))).numpy(), found)


@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e4, 1e6]), st.integers(1, 3))
def test_units_of_counts_are_found(seed, target, least):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 1.0, 40), (8, 40)) * least
    counts[0] = 0
    depth = np.maximum(counts.sum(axis=1), 1)
    x = np.log1p(counts * (target / depth)[:, None]).astype(np.float32)
    found = units(torch.from_numpy(x)).numpy()
    assert np.isnan(found[0])
    several = (counts > 0).sum(axis=1) > 1

    # whole multiples of the unit, which is one count or as many as all counts of the cell share
    share = found * depth / target
    np.testing.assert_allclose(share[several], np.rint(share[several]), rtol=1e-3)
    again = np.expm1(x.astype(float)) / found[:, None]
    np.testing.assert_allclose(again[several], np.rint(again[several]), rtol=2e-3, atol=1e-6)


def test_values_that_are_no_counts_have_no_unit():
    x = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    assert units(x).isnan().float().mean() > 0.9
    pool = {"a": ControlCells(sparse.csr_matrix(x.numpy()))}
    with pytest.raises(ValueError, match="control cells of 'a' are not log1p of counts per depth"):
        Depths.of(pool, 3.0).counts(x, "a", None)


@pytest.fixture(scope="module")
def halves():
    """Control monocytes of the bundled data, in two halves: log1p values of both, counts of the second."""
    adata = iv.preprocess.normalize(iv.datasets.load("kang"), n_genes=500)
    control = adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "CD14 monocyte")]
    order = np.random.default_rng(0).permutation(control.n_obs)
    first, second = control[order[::2]], control[order[1::2]]
    return first.X.toarray(), second.X.toarray(), second.layers["counts"].toarray()


def test_cells_that_become_their_own_source_keep_their_counts(halves):
    first, second, counts = halves
    depths = Depths.of({"a": ControlCells(sparse.csr_matrix(first))}, 10.0)
    x = torch.from_numpy(second)
    np.testing.assert_array_equal(depths.counts(x, "a", x).numpy(), counts)


def test_controls_stay_controls(halves):
    """Control cells whose depths are not known, as counts, against other control cells: no more calls than halves."""
    first, second, counts = halves
    depths = Depths.of({"a": ControlCells(sparse.csr_matrix(first))}, 10.0)
    emitted = depths.counts(torch.from_numpy(second), "a", None).numpy()
    own = np.rint(np.expm1(first.astype(float)) / units(torch.from_numpy(first)).numpy()[:, None])

    def calls(cells):
        obs = pd.DataFrame({"perturbation": ["x"] * len(cells) + ["control"] * len(own)})
        adata = iv.preprocess.normalize(
            anndata.AnnData(np.concatenate([cells, own]).astype(np.float32), obs=obs.set_index(obs.index.astype(str)))
        )
        design = iv.Design.from_adata(adata, perturbation="perturbation", control="control")
        pvals = Pair(adata, adata, design).see("pvals", "real", "x")
        return int((pvals < 0.05 / counts.shape[1]).sum())

    assert calls(emitted) <= max(calls(counts), 1)
    naive = np.random.default_rng(0).poisson(np.expm1(second.astype(float)) / np.median(np.expm1(second[second > 0])))
    assert calls(naive) > 10

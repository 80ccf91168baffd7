"""What must not change a score, for every metric of the registry: order, storage, blocks, threads, unrelated cells."""

import os
import subprocess
import sys
from functools import cache

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from invirtuo import Design
from invirtuo.metrics import METRICS, cells, distribution, evaluate, wilcoxon
from invirtuo.metrics.numerics import axes, distances

few = settings(max_examples=3, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)

ALL = list(METRICS)
RANKED = {name for name in ALL if name.endswith("_rank")}
DISCRIMINATION = {name for name in ALL if name.startswith("pds_")} | {"centroid_accuracy"}
ON_AXES = {  # of all real cells, or of those of every condition that are not scored
    *("mmd_pca", "mmd_pca_disjoint", "cosine_pca", "wasserstein2", "knn_recall", "knn_precision"),
    *("mmd_linear", "mmd_rbf", "mmd_rbf_unbiased", "mmd_rbf_median", "mmd_rbf_disjoint", "wasserstein2_disjoint"),
    *("knn_recall_disjoint", "knn_precision_disjoint"),
    *("c2st", "correlation_error"),  # the latter on the most variable of all genes
}
OF_GROUP = {
    *("rmse_scaled", "rmse_scaled_ref", "de_spearman_size", "edistance_pearson"),
    "expr_mse_unbiased_capped_norm",
    *("wmse", "r2_weighted", "mse_degs", "pearson_degs", "pearson_perturbed_mean"),  # what sets apart from the others
}
INERT = ["de_false_calls", "de_false_share", "de_false_any"]  # of conditions without DE genes, of which there are none


def screen(seed=0, labels=("control", "A", "B", "A+C"), kinds=("t1",), n=14):
    """Log1p cells, sparse; the label sets the effect, so that two seeds are prediction and truth."""
    rng = np.random.default_rng(seed)
    blocks, rows = [], []
    for kind in kinds:
        for i, label in enumerate(labels):
            truth = np.random.default_rng([ord(letter) for letter in kind + label])
            base = np.random.default_rng([ord(letter) for letter in kind]).gamma(1.0, 1.0, 60)
            rate = base * np.exp(truth.normal(0, 1.2, 60) * (label != "control"))
            blocks.append(np.log1p(rng.poisson(rate, (n + i, 60)) * rng.uniform(0.5, 2, (n + i, 1))))
            rows += [(label, kind)] * (n + i)
    obs = pd.DataFrame(rows, columns=["gene", "kind"], index=[f"c{i}" for i in range(len(rows))])
    names = [f"G{i:02d}" for i in range(59)] + ["A"]
    values = sparse.csr_matrix(np.concatenate(blocks).astype(np.float32))
    return anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=names))


PRED, REAL = screen(1), screen(2)
DESIGN = Design.from_adata(REAL, perturbation="gene", control="control", covariates=["kind"])


def table(pred, real, names=ALL):
    scores = evaluate(pred, real, DESIGN, names, n_pcs=5)
    return scores.pivot(index="condition", columns="metric", values="value")[list(names)]


def same(changed, reference, tolerance=2e-6):
    pd.testing.assert_frame_equal(changed, reference, rtol=tolerance, atol=tolerance)


@cache
def reference():
    """Scores that nothing changes; made when they are first asked for, and not when tests are collected."""
    return table(PRED, REAL)


def shuffled(adata, seed, *, cell=False, gene=False):
    rng = np.random.default_rng(seed)
    rows = rng.permutation(adata.n_obs) if cell else np.arange(adata.n_obs)
    columns = rng.permutation(adata.n_vars) if gene else np.arange(adata.n_vars)
    return adata[rows][:, columns].copy()


def stored(adata, form, dtype):
    return anndata.AnnData(form(adata.X.astype(dtype)), obs=adata.obs, var=adata.var)


FORMS = [sparse.csr_matrix, sparse.csc_matrix, lambda x: x.toarray()]


def test_the_reference_tells_metrics_apart():
    assert set(reference()) == set(METRICS) and len(reference()) == 3
    assert reference().drop(columns=INERT).notna().all(axis=None)
    assert {*ON_AXES, *OF_GROUP} <= set(ALL)


@few
@given(seeds, seeds)
def test_order_of_cells(a, b):
    same(table(shuffled(PRED, a, cell=True), shuffled(REAL, b, cell=True)), reference())


@few
@given(seeds, seeds)
def test_order_of_genes_with_names(a, b):
    same(table(shuffled(PRED, a, gene=True), shuffled(REAL, b, gene=True)), reference())


@few
@given(st.sampled_from(FORMS), st.sampled_from(FORMS), *[st.sampled_from([np.float32, np.float64])] * 2)
def test_storage_and_precision(pred_form, real_form, pred_dtype, real_dtype):
    same(table(stored(PRED, pred_form, pred_dtype), stored(REAL, real_form, real_dtype)), reference())


@settings(few, max_examples=4)
@given(st.integers(1, 40), st.integers(30, 2000), st.integers(1, 2000))
def test_size_of_blocks(rows, pairs, values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "BLOCK", rows)
        patch.setattr(axes, "BLOCK", rows)
        patch.setattr(distances, "PAIRS", pairs)
        patch.setattr(distribution, "PAIRS", pairs)
        patch.setattr(distribution, "CACHED_CELLS", values)
        patch.setattr(wilcoxon, "CELLS_AT_ONCE", 1 + rows)
        same(table(PRED, REAL), reference())


def test_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        same(table(PRED, REAL), reference())
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_hash_seed():
    code = (
        "import runpy, sys; m = runpy.run_path(sys.argv[1]); "
        "print(m['reference']().to_json(double_precision=12), m['screen'](3).X.sum())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, __file__],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and "rmse_mean" in printed[0]


@few
@given(seeds)
def test_another_condition(seed):
    """Changes what compares conditions with each other, or standardises or projects by all cells; nothing else."""
    more = [anndata.concat([a, screen(seed + i, labels=("Z",))], index_unique="-") for i, a in enumerate((PRED, REAL))]
    changed = table(*more)
    names = [name for name in ALL if name not in RANKED | DISCRIMINATION | ON_AXES | OF_GROUP]
    same(changed.loc[reference().index, names], reference()[names])
    assert len(changed) == 4 and len(names) > 25


@few
@given(seeds)
def test_another_group(seed):
    """Changes nothing but the principal axes of all real cells."""
    more = [anndata.concat([a, screen(seed + i, kinds=("t2",))], index_unique="-") for i, a in enumerate((PRED, REAL))]
    changed = table(*more)
    names = [name for name in ALL if name not in ON_AXES and name.removesuffix("_rank") not in ON_AXES]
    same(changed.loc[reference().index, names], reference()[names])
    assert len(changed) == 6 and len(names) > 35

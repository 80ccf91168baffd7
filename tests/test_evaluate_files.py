"""Scores of cells on disk are those of the same cells in memory, in every form, and memory is bounded."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import invirtuo as iv
from invirtuo.cells import source
from invirtuo.metrics import cells
from invirtuo.metrics.numerics import axes, streamed

NAMES = ["mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean"]
MORE = ["mmd_gex_rank", "rmse_mean_rank", "correlation_error", "wasserstein2_disjoint", "pds_l1", "mmd_pca_disjoint"]
ROLES = {"perturbation": "perturbation", "control": "control", "covariates": ["cell_type"]}


@pytest.fixture(scope="module")
def real():
    """600 cells, log values, genes out of alphabetical order; cells of a condition lie scattered."""
    adata = iv.preprocess.normalize(iv.datasets.toy(n_cells=600, n_genes=60))
    return anndata.AnnData(adata.X.astype(np.float32), obs=adata.obs, var=adata.var[[]])


@pytest.fixture(scope="module")
def pred(real):
    """The same conditions with other cells."""
    rng = np.random.default_rng(0)
    noisy = real.copy()
    noisy.X.data = noisy.X.data * rng.uniform(0.7, 1.2, real.X.nnz).astype(np.float32)
    return noisy[rng.random(real.n_obs) < 0.8].copy()


@pytest.fixture(scope="module")
def design(real):
    return iv.Design.from_adata(real, **ROLES)


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few cells, so that everything is streamed, and no file that fits into memory."""
    for module in (streamed, cells, axes):
        monkeypatch.setattr(module, "BLOCK", 50)
    monkeypatch.setattr(source, "IN_MEMORY", 0)


@pytest.fixture
def in_memory(pred, real, design, small):
    """Scores of the cells in memory, by the names of metrics; computed once for all tests."""

    def find(*names):
        if names not in KNOWN:
            KNOWN[names] = iv.evaluate(pred, real, design, list(names), n_pcs=8)
        return KNOWN[names]

    return find


KNOWN: dict[tuple[str, ...], pd.DataFrame] = {}


def h5ad(adata, folder, **options):
    adata.write_h5ad(folder / "cells.h5ad", **options)
    return folder / "cells.h5ad"


def dense(adata):
    return anndata.AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var)


def pieces(adata, folder):
    """Two files, the second with its genes in another order and one of them dense."""
    adata[:300].write_h5ad(folder / "a.h5ad")
    dense(adata[300:, ::-1]).write_h5ad(folder / "b.h5ad")
    return [folder / "a.h5ad", folder / "b.h5ad"]


def zarr(adata, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the next AnnData writes another version of zarr
        adata.write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def shuffled(adata, folder):
    iv.shuffle(iv.CellStore.open(h5ad(adata, folder)), folder / "store")
    return folder / "store"


SAME_BITS = {
    "path": h5ad,
    "gzip": lambda adata, folder: str(h5ad(adata, folder, compression="gzip")),
    "backed": lambda adata, folder: anndata.read_h5ad(h5ad(adata, folder), backed="r"),
    "store": lambda adata, folder: iv.CellStore.open(h5ad(adata, folder)),
    "zarr": zarr,
}
TO_ROUNDING = {
    "list": pieces,
    "folder": lambda adata, folder: pieces(adata, folder)[0].parent,
    "shuffled": shuffled,
    "store of dense": lambda adata, folder: [h5ad(dense(adata), folder)],
    "store, float64": lambda adata, folder: [
        h5ad(anndata.AnnData(adata.X.astype(float), adata.obs, adata.var), folder)
    ],
}


FORMS = [("pred", "path"), ("pred", "gzip"), *(("real", form) for form in SAME_BITS if form != "path")]


@pytest.mark.parametrize(("side", "form"), [*FORMS, ("pred", "store"), ("pred", "zarr")])
def test_scores_from_disk_are_those_from_memory_to_the_last_bit(form, side, pred, real, design, in_memory, tmp_path):
    expected = in_memory(*NAMES, *MORE)
    given = {"pred": pred, "real": real}
    given[side] = SAME_BITS[form](given[side], tmp_path)
    found = iv.evaluate(**given, design=design, metrics=NAMES + MORE, n_pcs=8)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found["value"].notna().all()


@pytest.mark.parametrize("form", TO_ROUNDING)
def test_scores_of_other_storage_agree_to_rounding(form, pred, real, design, in_memory, tmp_path):
    expected = in_memory(*NAMES)
    found = iv.evaluate(pred, TO_ROUNDING[form](real, tmp_path), design, NAMES, n_pcs=8)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["path", "store"])
def test_values_stored_in_pieces_count_once(form, pred, real, design, in_memory, tmp_path):
    """A matrix may hold a place twice; the values add up, from disk as in memory."""
    halves = real.X.copy()
    halves = sparse.csr_matrix((np.repeat(halves.data / 2, 2), np.repeat(halves.indices, 2), halves.indptr * 2))
    twice = anndata.AnnData(halves, obs=real.obs, var=real.var)
    expected = in_memory(*NAMES)
    found = iv.evaluate(pred, SAME_BITS[form](twice, tmp_path), design, NAMES, n_pcs=8)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_dense_files_have_the_bits_of_dense_memory(pred, real, design, small, tmp_path):
    expected = iv.evaluate(dense(pred), dense(real), design, NAMES, n_pcs=8)
    found = iv.evaluate(pred=dense(pred), real=h5ad(dense(real), tmp_path), design=design, metrics=NAMES, n_pcs=8)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.mark.parametrize("few", [10, 60])
def test_axes_of_many_genes_are_streamed(few, real, monkeypatch, small):
    """With more genes than allowed for a scatter matrix, the blocks of the iteration come from disk."""
    monkeypatch.setattr(axes, "FEW", few)
    rows = np.arange(real.n_obs)
    on_disk = streamed.Streamed(lambda chosen: real.X[chosen], rows, real.n_vars)
    (centre, found), (_, expected) = axes.principal_axes(on_disk, 4), axes.principal_axes(real.X, 4)
    np.testing.assert_allclose(centre, real.X.toarray().mean(axis=0, dtype=float), rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(found * expected, axis=0)), 1.0, atol=1e-8)


@pytest.mark.parametrize("convert", [sparse.csr_matrix.toarray, sparse.csr_matrix.copy], ids=["dense", "csr"])
@pytest.mark.parametrize("n", [1, 50, 51, 333])
def test_streamed_sums_have_the_bits_of_those_in_memory(convert, n, real, small):
    x = convert(real.X)
    one = streamed.Streamed(lambda rows: x[rows], np.arange(n), real.n_vars)
    for found, expected in zip(one.moments(), streamed.moments(x[:n]), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(one.mean(), np.asarray(x[:n].mean(axis=0, dtype=np.float64)).ravel())


def test_halves_and_counts_from_disk(real, design, small, tmp_path):
    counts = iv.datasets.toy(n_cells=600, n_genes=60)
    for adata, options in ((real, {}), (counts, {"scale": "counts"})):
        expected = iv.metrics.noise_floor(adata, design, NAMES, n_pcs=8, **options)
        found = iv.metrics.noise_floor(h5ad(adata, tmp_path), design, NAMES, n_pcs=8, **options)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_small_files_are_read_whole_and_large_ones_stay_on_disk(real, tmp_path, monkeypatch):
    path = h5ad(real, tmp_path)
    assert not source.opened(path, small_in_memory=True).isbacked
    monkeypatch.setattr(source, "IN_MEMORY", real.X.data.nbytes + real.X.indices.nbytes - 1)
    assert source.opened(path, small_in_memory=True).isbacked
    assert not source.opened(path, small_in_memory=True, layer="other").isbacked
    by_column = anndata.AnnData(real.X.tocsc(), obs=real.obs, var=real.var)
    assert not source.opened(h5ad(by_column, tmp_path), small_in_memory=True).isbacked


def test_command_line_takes_folders(run, pred, real, design, tmp_path):
    expected = iv.evaluate(pred, real, design, NAMES, n_pcs=8)
    (tmp_path / "real").mkdir()
    pieces(real, tmp_path / "real")
    columns = ["--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type"]
    asked = ["--metrics", ",".join(NAMES), "--n-pcs", "8", "--out", tmp_path / "scores.csv", "--quiet"]
    code, _, err = run("evaluate", h5ad(pred, tmp_path), tmp_path / "real", *columns, *asked)
    assert code == 0, err
    found = pd.read_csv(tmp_path / "scores.csv")
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-5, atol=1e-6)


def with_nan(adata, folder):
    broken = adata.copy()
    broken.X.data[5] = np.nan
    return [h5ad(broken, folder)]


def unlabelled(adata, folder):
    return [h5ad(anndata.AnnData(adata.X, obs=adata.obs[["perturbation"]], var=adata.var), folder)]


def other_genes(adata, folder):
    (folder / "x").mkdir()
    return [h5ad(adata, folder), h5ad(adata[:, :50], folder / "x")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda adata, folder: folder, "holds no .h5ad or .zarr"),
        (lambda adata, folder: folder / "absent.h5ad", "does not exist"),
        (lambda adata, folder: [folder / "absent.h5ad"], "does not exist"),
        (lambda adata, folder: [], "no files were given"),
        (with_nan, "real: X holds 1 NaN"),
        (unlabelled, "real: column 'cell_type' is not in the table"),
        (other_genes, "has 50 genes"),
        (lambda adata, folder: [h5ad(iv.datasets.toy(n_cells=600, n_genes=60), folder)], "raw counts"),
    ],
)
def test_messages(make, message, pred, real, design, tmp_path):
    with pytest.raises(ValueError, match=message):
        iv.evaluate(pred, make(real, tmp_path), design, NAMES)


def test_layers_of_a_store_are_refused(pred, real, design, tmp_path):
    with pytest.raises(ValueError, match="of a store only X is read"):
        iv.evaluate(pred, [h5ad(real, tmp_path)], design, NAMES, layer={"real": "logged"})


def test_files_are_closed_afterwards(pred, real, design, small, tmp_path):
    path = h5ad(real, tmp_path)
    iv.evaluate(pred, path, design, NAMES, n_pcs=8)
    path.unlink()
    h5ad(real, tmp_path)  # HDF5 refuses to write over an open file
    iv.evaluate(pred, path, design, NAMES, n_pcs=8)
    h5ad(real, tmp_path)

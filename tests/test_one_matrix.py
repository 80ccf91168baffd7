"""One matrix of a file: the values of AnnData, genes sorted, little memory beside the matrix itself."""

from __future__ import annotations

import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import invirtuo as iv
from invirtuo.bench import TASKS
from invirtuo.cells import datasets, one_matrix
from invirtuo.cells.one_matrix import contents, read_one_matrix, row_sums


@pytest.fixture
def cells(toy):
    """Log values in X and counts in a layer, genes in any order."""
    adata = iv.preprocess.normalize(toy)
    adata.obsm["X_pca"] = np.zeros((adata.n_obs, 3))
    adata.raw = adata.copy()
    return adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()


@pytest.mark.parametrize("layout", ["csr", "csr 64 bits", "dense", "csc"])
@pytest.mark.parametrize("block", [97, 1 << 20])
def test_values_are_those_of_the_file(cells, tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(one_matrix, "BLOCK", block)
    for key in ("X", "counts"):
        x = cells.X if key == "X" else cells.layers[key]
        if layout == "csr 64 bits":
            x = sparse.csr_matrix((x.data.astype(np.float64), x.indices, x.indptr.astype(np.int64)), x.shape)
        x = {"dense": x.toarray, "csc": x.tocsc}.get(layout, lambda x=x: x)()
        if key == "X":
            cells.X = x
        else:
            cells.layers[key] = x
    cells.write_h5ad(tmp_path / "x.h5ad")
    genes = sorted(cells.var_names)
    for matrix, whole in (("X", cells.X), ("layers/counts", cells.layers["counts"])):
        for sort, names in ((False, list(cells.var_names)), (True, genes)):
            adata = read_one_matrix(tmp_path / "x.h5ad", matrix, sort_genes=sort)
            assert list(adata.var_names) == names
            expected = AnnData(whole, var=cells.var)[:, names].X
            np.testing.assert_array_equal(_dense(adata.X), _dense(expected))
            assert adata.X.dtype == whole.dtype and not adata.layers and not adata.obsm and adata.raw is None
            pd.testing.assert_frame_equal(adata.obs, cells.obs)
            pd.testing.assert_frame_equal(adata.var, cells.var.loc[names])
        np.testing.assert_allclose(row_sums(tmp_path / "x.h5ad", matrix), _dense(whole).sum(axis=1), rtol=1e-6)
    found = contents(tmp_path / "x.h5ad")
    assert found.shape == cells.shape and found.layers == ("counts",)


def _dense(x):
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


def test_damage_is_named(cells, tmp_path):
    path = tmp_path / "x.h5ad"
    cells.write_h5ad(path)
    with pytest.raises(ValueError, match=r"x.h5ad has no layers/none"):
        read_one_matrix(path, "layers/none")
    with h5py.File(path, "r+") as file:
        file["X/indices"][3] = 1000
    with pytest.raises(ValueError, match="x.h5ad: sparse matrix /X has indices from 0 to 1000"):
        read_one_matrix(path)
    read_one_matrix(path, "layers/counts")
    del file
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"]
    with pytest.raises(ValueError, match="x.h5ad is not a readable h5ad file"):
        contents(path)


def test_loading_a_published_task_takes_little_beside_its_matrix(tmp_path, monkeypatch):
    """Of what NumPy and pandas allocate at a time, in a file whose X and counts have 3 MiB each."""
    monkeypatch.setattr(one_matrix, "BLOCK", 1 << 12)
    monkeypatch.setattr("invirtuo.cells.files.BLOCK", 1 << 12)
    rng = np.random.default_rng(0)
    n_cells, n_genes, n_values = 2000, 1000, 200
    labels = np.array(["control", "A", "B", "C", "A+B", "A+C", "B+C"])
    obs = pd.DataFrame({"condition": labels[np.arange(n_cells) % 7], "cell_type": "k562"})
    obs.index = [f"c{i}" for i in range(n_cells)]
    columns = np.sort(rng.random((n_cells, n_genes)).argsort(axis=1)[:, :n_values], axis=1).ravel()
    values = rng.integers(1, 5, n_cells * n_values).astype(np.float32)
    pointers = np.arange(0, n_cells * n_values + 1, n_values)
    counts = sparse.csr_matrix((values, columns, pointers), (n_cells, n_genes))
    var = pd.DataFrame(index=rng.permutation([f"gene{i}" for i in range(n_genes)]))
    AnnData(counts.log1p(), obs=obs, var=var, layers={"counts": counts}).write_h5ad(
        tmp_path / datasets.DATASETS["norman19"].file
    )
    TASKS["norman19"].load(data_dir=tmp_path)  # imports and caches
    tracemalloc.start()
    adata, _, _ = TASKS["norman19"].load(data_dir=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes
    assert size > 3 << 20
    assert peak < 1.7 * size

"""The tables of an h5ad file and one of its matrices; what nobody asked for stays on disk.

Beside the matrix that is given back, a few megabytes are in memory at a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.files import check_h5ad, check_sparse, plain_text, reading
from invirtuo.cells.packed import plain

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Contents", "contents", "read_one_matrix", "row_sums"]

BLOCK = 1 << 20  # stored values that are converted at a time


@dataclass(frozen=True)
class Contents:
    """What an h5ad file holds, its matrices left on disk."""

    obs: pd.DataFrame
    var_names: pd.Index
    layers: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.obs), len(self.var_names)


def contents(path: str | os.PathLike[str]) -> Contents:
    """Read the tables of a file and the names of its layers.

    Raises
    ------
    ValueError
        If the file is missing, truncated or no h5ad.
    """
    path = plain(path)
    check_h5ad(path, values=False)
    with reading(path), h5py.File(path, "r") as file:
        return Contents(_table(file["obs"]), _table(file["var"]).index, tuple(file.get("layers", ())))


def read_one_matrix(path: str | os.PathLike[str], matrix: str = "X", *, sort_genes: bool = False) -> AnnData:
    """Read obs, var and one matrix, which becomes X.

    Parameters
    ----------
    path
        The file, packed with gzip or not.
    matrix
        "X", or "layers/" and the name of a layer; CSR, or dense.
    sort_genes
        Sort genes by name.

    Returns
    -------
    AnnData without layers, obsm, uns and raw. Values keep their type; those of CSR lie in the order of their columns.

    Raises
    ------
    ValueError
        If the file is missing, damaged, or lacks that matrix.
    """
    import anndata

    path = plain(path)
    check_h5ad(path, values=False)
    with h5py.File(path, "r") as file:
        if matrix not in file:
            raise ValueError(f"{path} has no {matrix}; expected cells x genes there")
        stored = file[matrix]
        encoding = stored.attrs.get("encoding-type", "array")
        if encoding == "csr_matrix":
            check_sparse(stored, path)
        with reading(path):
            obs, var = _table(file["obs"]), _table(file["var"])
            order = np.argsort(var.index.to_numpy(dtype=object), kind="stable") if sort_genes else np.arange(len(var))
            if encoding == "csr_matrix":
                x = _read_csr(stored, order)
            elif encoding == "array":
                x = _read_dense(stored, order)
            else:
                x = anndata.io.read_elem(stored)[:, order]
    return anndata.AnnData(x, obs=obs, var=var.iloc[order])


def row_sums(path: str | os.PathLike[str], matrix: str) -> np.ndarray:
    """(n,) sums of the rows of a matrix of a file, read piece by piece."""
    import anndata

    path = plain(path)
    with reading(path), h5py.File(path, "r") as file:
        stored = file[matrix]
        if stored.attrs.get("encoding-type") == "csc_matrix":  # has no rows to read
            return np.asarray(anndata.io.read_elem(stored).sum(axis=1), dtype=np.float64).ravel()
        is_dense = isinstance(stored, h5py.Dataset)
        n_values = stored.size if is_dense else stored["data"].size
        x = stored if is_dense else anndata.io.sparse_dataset(stored)
        n_rows = x.shape[0]
        step = max(BLOCK * n_rows // max(n_values, 1), 1)
        sums = [np.zeros(0)]
        for start in range(0, n_rows, step):
            block = x[start : start + step]
            sums.append(np.asarray(block.sum(axis=1, dtype=np.float64)).ravel())
        return np.concatenate(sums)


def _table(group: Any) -> pd.DataFrame:
    """obs or var, in the form of any version of AnnData."""
    from anndata.io import read_elem

    if isinstance(group, h5py.Dataset):
        raise ValueError("it is in the form of AnnData 0.6; read it with anndata.read_h5ad and write it again")
    return plain_text(read_elem(group))


def _read_csr(stored: h5py.Group, order: np.ndarray) -> sparse.csr_matrix:
    """A stored CSR matrix with its columns in another order; nothing is there twice."""
    n, g = (int(size) for size in stored.attrs["shape"])
    data, indices = stored["data"], stored["indices"]
    place = np.empty(g, np.int32)  # of each stored column
    place[order] = np.arange(g, dtype=np.int32)

    values = np.empty(data.shape, data.dtype)
    columns = np.empty(indices.shape, np.int32)
    for start in range(0, len(data), BLOCK):
        block = slice(start, start + BLOCK)
        values[block] = data[block]
        columns[block] = place[indices[block]]
    pointers = stored["indptr"][:]
    if len(data) < 2**31:
        pointers = pointers.astype(np.int32)
    x = sparse.csr_matrix((values, columns, pointers), (n, g))
    x.sort_indices()  # row by row, in place
    return x


def _read_dense(stored: h5py.Dataset, order: np.ndarray) -> np.ndarray:
    x = np.empty(stored.shape, stored.dtype)
    step = max(BLOCK // max(stored.shape[1], 1), 1)
    for start in range(0, len(x), step):
        x[start : start + step] = stored[start : start + step][:, order]
    return x

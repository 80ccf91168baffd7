"""Opening files of cells, and such a file as a matrix of which some rows are in memory at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from scipy import sparse

from invirtuo.files import bytes_by_row, read_h5ad
from invirtuo.store.cells import CellStore

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["BLOCK", "Closing", "Source", "Streamed", "opened"]

Source: TypeAlias = "AnnData | CellStore | str | Path | Sequence[str | Path]"
IN_MEMORY = 512 << 20  # bytes of X, beyond which a file that is named by its path stays on disk
BLOCK = 4096  # cells in memory at a time


class Streamed:
    """Rows of a file, read when they are looked at: what a pass over many cells needs of a matrix.

    Sums run row after row across blocks, so that they are those of the same matrix in memory.

    Parameters
    ----------
    read
        Takes numbers of rows, returns (m, g) CSR or dense.
    rows
        (n,) rows of the file.
    n_genes
        Number of columns.
    """

    def __init__(self, read: Callable[[np.ndarray], Any], rows: np.ndarray, n_genes: int):
        self.read, self.rows, self.shape = read, rows, (len(rows), n_genes)

    def __getitem__(self, places: slice) -> Streamed:
        return Streamed(self.read, self.rows[places], self.shape[1])

    def __matmul__(self, axes: np.ndarray) -> np.ndarray:
        return np.concatenate([block @ axes for block in self.blocks()])

    def blocks(self) -> Iterator[Any]:
        """(m, g) CSR or dense, one block of rows after the other."""
        for start in range(0, len(self.rows), BLOCK):
            yield self.read(self.rows[start : start + BLOCK])

    def toarray(self) -> np.ndarray:
        """(n, g) dense."""
        block = self.read(self.rows)
        return block.toarray() if sparse.issparse(block) else block

    def squared(self) -> Streamed:
        """The same cells, every value squared."""

        def read(rows: np.ndarray):
            block = self.read(rows)
            return block.multiply(block).tocsr() if sparse.issparse(block) else np.square(block)

        return Streamed(read, self.rows, self.shape[1])

    def mean(self) -> np.ndarray:
        """(g,) mean of each gene in float64; of sparse values summed in their own precision, as SciPy does."""
        n, g = self.shape
        total = None
        for block in self.blocks():
            if sparse.issparse(block):
                share = block * (1.0 / n)
                total = _added(np.zeros(g, share.dtype) if total is None else total, share)
            else:
                total = _added(np.zeros(g) if total is None else total, block)
        is_sparse = sparse.issparse(block)
        return np.asarray(total, dtype=np.float64) / (1 if is_sparse else n)

    def moments(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Mean (g,) and variance (g,) with n - 1 (NaN for one cell), by two passes, and the number of cells."""
        n, g = self.shape
        total = np.zeros(g)
        for block in self.blocks():
            total = _added(total, block)
        mean, squares, implied = total / n, np.zeros(g), np.full(g, n)
        for block in self.blocks():
            if sparse.issparse(block):
                np.add.at(squares, block.indices, np.square(block.data - mean[block.indices]))
                implied -= np.bincount(block.indices, minlength=g)
            else:
                squares, implied = _added(squares, np.square(block - mean)), np.zeros(g, int)
        squares += implied * np.square(mean)
        return mean, squares / (n - 1) if n > 1 else np.full(g, np.nan), n


def opened(source: Source, *, layer: str | None = None) -> AnnData | CellStore:
    """What a path, a folder, or a list of them stands for.

    An h5ad with an X of more than 512 MiB stays on disk (not if X is stored by columns, or `layer` is named instead of
    X); a zarr, a folder and a list of files always do.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return CellStore.open(path)
        return read_h5ad(path, backed=layer is None and bytes_by_row(path) > IN_MEMORY)
    return CellStore.open(source) if isinstance(source, list | tuple) else source


class Closing:
    """Closes a file that was opened here, when the last that reads it is gone; AnnData waits for garbage collection."""

    def __init__(self, adata: AnnData | CellStore):
        files = adata.parts if isinstance(adata, CellStore) else [adata.file]
        weakref.finalize(self, lambda: [file.close() for file in files])


def _added(total: np.ndarray, block) -> np.ndarray:
    """Sums (g,) with the rows of a block added one after the other."""
    if sparse.issparse(block):
        np.add.at(total, block.indices, block.data)
        return total
    return np.concatenate([total[None], block]).sum(axis=0, dtype=np.float64)

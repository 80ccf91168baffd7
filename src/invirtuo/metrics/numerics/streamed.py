"""Cells as a matrix, dense, sparse, or a file of which a few rows are in memory at a time; moments of their genes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy import sparse

from invirtuo.cells.values import AnyMatrix

__all__ = ["BLOCK", "Streamed", "dense", "mean_of_genes", "moments", "squared"]

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

    def __init__(self, read: Callable[[np.ndarray], AnyMatrix], rows: np.ndarray, n_genes: int):
        self.read = read
        self.rows = rows
        self.shape = (len(rows), n_genes)

    def __getitem__(self, positions: slice) -> Streamed:
        return Streamed(self.read, self.rows[positions], self.shape[1])

    def __matmul__(self, axes: np.ndarray) -> np.ndarray:
        return np.concatenate([block @ axes for block in self.blocks()])

    def blocks(self) -> Iterator[AnyMatrix]:
        """(m, g) CSR or dense, one block of rows after the other."""
        for start in range(0, len(self.rows), BLOCK):
            yield self.read(self.rows[start : start + BLOCK])

    def toarray(self) -> np.ndarray:
        """(n, g) dense."""
        return dense(self.read(self.rows))

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
        # of sparse blocks the zeros that are not stored are counted, and added at the end
        mean = total / n
        squares = np.zeros(g)
        implied = np.full(g, n)
        for block in self.blocks():
            if sparse.issparse(block):
                np.add.at(squares, block.indices, np.square(block.data - mean[block.indices]))
                implied -= np.bincount(block.indices, minlength=g)
            else:
                squares = _added(squares, np.square(block - mean))
                implied = np.zeros(g, int)
        squares += implied * np.square(mean)
        variance = squares / (n - 1) if n > 1 else np.full(g, np.nan)
        return mean, variance, n


def dense(cells: AnyMatrix | Streamed) -> np.ndarray:
    """(n, g) dense."""
    return cells if isinstance(cells, np.ndarray) else cells.toarray()


def squared(cells: AnyMatrix | Streamed) -> AnyMatrix | Streamed:
    """The same cells, every value squared."""
    if isinstance(cells, Streamed):
        return Streamed(lambda rows: squared(cells.read(rows)), cells.rows, cells.shape[1])
    return cells.multiply(cells).tocsr() if sparse.issparse(cells) else np.square(cells)


def mean_of_genes(cells: AnyMatrix | Streamed) -> np.ndarray:
    """(g,) mean of each gene in float64."""
    if isinstance(cells, Streamed):
        return cells.mean()
    return np.asarray(cells.mean(axis=0, dtype=np.float64)).ravel()


def moments(cells: AnyMatrix | Streamed) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and variance of each gene by two passes, also for CSR without making it dense, and for cells on disk."""
    if isinstance(cells, Streamed):
        return cells.moments()
    n, g = cells.shape
    if sparse.issparse(cells):
        # stored values first, then the zeros that are not stored
        mean = np.bincount(cells.indices, weights=cells.data, minlength=g) / n
        squares = np.bincount(cells.indices, weights=np.square(cells.data - mean[cells.indices]), minlength=g)
        squares = squares + (n - np.bincount(cells.indices, minlength=g)) * np.square(mean)
    else:
        mean = cells.mean(axis=0, dtype=np.float64)
        squares = np.square(cells - mean).sum(axis=0)
    variance = squares / (n - 1) if n > 1 else np.full(g, np.nan)
    return mean, variance, n


def _added(total: np.ndarray, block: AnyMatrix) -> np.ndarray:
    """Sums (g,) with the rows of a block added one after the other."""
    if sparse.issparse(block):
        np.add.at(total, block.indices, block.data)
        return total
    added: np.ndarray = np.concatenate([total[None], block]).sum(axis=0, dtype=np.float64)
    return added

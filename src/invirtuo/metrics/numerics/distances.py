"""Distances between populations of cells in bounded memory: all pairs in blocks, and Euclidean means to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from invirtuo.nn.linear import products

__all__ = ["FLOOR", "PAIRS", "Cloud", "between", "blocks", "cloud", "mean_distance", "nearest"]

FLOOR = 1e-8  # smallest squared distance, as published
PAIRS = 1 << 22  # cell pairs held at a time: 32 MB in float64
CLOSE = 0.01  # squared distance over squared norms, below which rounding of float32 products shows
SUBTRACTED = 512  # close pairs of cells subtracted at a time


def blocks(x: np.ndarray, y: np.ndarray, kind: str = "euclidean") -> Iterator[tuple[slice, np.ndarray]]:
    """Distances of SciPy's `cdist` between (n, d) and (m, d): some rows after the other, and which these are."""
    from scipy.spatial.distance import cdist

    n_rows = max(1, PAIRS // len(y))
    for start in range(0, len(x), n_rows):
        rows = slice(start, min(start + n_rows, len(x)))
        yield rows, cdist(x[rows], y, kind)


def nearest(cells: np.ndarray, others: np.ndarray, *, itself: np.ndarray | None = None) -> np.ndarray:
    """(n,) distance of each cell (n, d) to the nearest of others (m, d), without the row `itself` (n,) of these."""
    found = np.full(len(cells), np.inf)
    for rows, block in blocks(cells, others):
        if itself is not None:
            block[np.arange(len(block)), itself[rows]] = np.inf
        found[rows] = block.min(axis=1)
    return found


class Cloud(NamedTuple):
    """Cells made ready for products: (n, d) around a common centre, and their squared norms (n,)."""

    cells: torch.Tensor
    norms: torch.Tensor


def cloud(cells: np.ndarray, centre: np.ndarray, *, double: bool = False) -> Cloud:
    """Shift cells by a centre, float32 unless `double`."""
    dtype = torch.float64 if double else torch.float32
    shifted = torch.tensor(cells, dtype=dtype).sub_(torch.tensor(centre, dtype=dtype))
    return Cloud(shifted, shifted.square().sum(dim=1, dtype=torch.float64).to(shifted.dtype))


def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean Euclidean distance over all pairs of rows, (n, d) against (m, d), in float64."""
    origin = np.zeros(x.shape[1])
    return between(cloud(x, origin, double=True), cloud(y, origin, double=True))


def between(x: Cloud, y: Cloud) -> float:
    """Mean Euclidean distance over all pairs of cells of two clouds, in blocks of bounded memory.

    ``|x|^2 - 2 x.y + |y|^2`` with a floor of 1e-8, summed in float64; cells so close that rounding of the products
    would show are subtracted instead.
    """
    rows = max(1, PAIRS // len(y.cells))
    total = 0.0
    for start in range(0, len(x.cells), rows):
        block = Cloud(x.cells[start : start + rows], x.norms[start : start + rows])
        # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, in one buffer; of close cells the digits cancel
        squares = products(block.cells, y.cells).mul_(-2).add_(block.norms[:, None]).add_(y.norms)
        if squares.min() <= CLOSE * (block.norms.max() + y.norms.max()):
            squares = _repaired(squares, block, y)
        total += float(squares.clamp_min_(FLOOR).sqrt_().sum(dtype=torch.float64))
    return total / (len(x.cells) * len(y.cells))


def _repaired(squares: torch.Tensor, x: Cloud, y: Cloud) -> torch.Tensor:
    """Squared distances of close cells by subtraction, of many close cells by products in float64."""
    close = (squares <= CLOSE * (x.norms[:, None] + y.norms)).nonzero()
    if len(close) > 4 * max(squares.shape):
        a = x.cells.double()
        b = y.cells.double()
        norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
        return torch.addmm(norms, a, b.T, alpha=-2)
    for pairs in close.split(SUBTRACTED):
        i, j = pairs.T
        squares[i, j] = (x.cells[i] - y.cells[j]).square().sum(dim=1)
    return squares

"""Principal axes of many cells, sparse or dense."""

from __future__ import annotations

import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from scipy import linalg

from invirtuo.cells.values import AnyMatrix
from invirtuo.metrics.numerics.streamed import Streamed, dense, mean_of_genes

__all__ = ["principal_axes", "projected"]

logger = logging.getLogger(__name__)

FEW = 2048  # up to so many genes or cells axes come from a dense matrix
BLOCK = 4096  # cells dense at a time


def principal_axes(cells: AnyMatrix | Streamed, n_pcs: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact leading principal axes of cells, centred and not scaled.

    Parameters
    ----------
    cells
        (n, g), sparse, dense or streamed from disk: in one pass for the mean and one for the scatter matrix of up to
        2,048 genes; the axes of more genes take some ten passes or more.
    n_pcs
        Number of axes. Fewer are returned, with a warning, if the cells do not have as many.

    Returns
    -------
    centre
        (g,) mean of all cells.
    axes
        (g, d), orthonormal, largest variance first.
    """
    n, g = cells.shape
    d = min(n_pcs, n - 1, g - 1)
    if d < 1:
        raise ValueError(f"n_pcs={n_pcs}: expected one component or more; real has {n} cells and {g} genes")
    centre = mean_of_genes(cells)

    # the cheapest of three exact ways
    if g <= FEW:
        variances, axes = _axes_of_few_genes(cells, centre, d)
    elif n <= FEW:
        variances, axes = _axes_of_few_cells(cells, centre, d)
    else:
        variances, axes = _axes_of_many_genes(cells, centre, d)
    axes = axes[:, variances > 1e-12 * variances.max()]  # directions without variance are arbitrary
    if axes.shape[1] == 0:
        raise ValueError("real: all cells are equal, so they have no principal components; check X")
    if axes.shape[1] < n_pcs:
        logger.warning("n_pcs=%d, but the real cells have only %d components", n_pcs, axes.shape[1])
    return centre, axes


def projected(cells: AnyMatrix | Streamed, centre: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """(n, d) coordinates of cells (n, g), sparse, dense or streamed, on axes (g, d) through the centre (g,)."""
    coordinates: np.ndarray = cells @ axes - centre @ axes
    return coordinates


def _axes_of_few_genes(cells: AnyMatrix | Streamed, centre: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """By the eigenvectors of the scatter matrix (g, g)."""
    n, g = cells.shape
    scatter = np.zeros((g, g))
    for start in range(0, n, BLOCK):
        block = cells[start : start + BLOCK]
        shifted = dense(block) - centre
        scatter += shifted.T @ shifted
    variances, axes = linalg.eigh(scatter, subset_by_index=[g - d, g - 1])
    return variances[::-1], axes[:, ::-1]


def _axes_of_few_cells(cells: AnyMatrix | Streamed, centre: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """By the eigenvectors of the products of cells (n, n)."""
    shifted = dense(cells) - centre
    n = len(shifted)
    variances, weights = linalg.eigh(shifted @ shifted.T, subset_by_index=[n - d, n - 1])
    axes, _ = linalg.qr(shifted.T @ weights[:, ::-1], mode="economic")
    return np.maximum(variances[::-1], 0.0), axes


def _axes_of_many_genes(
    cells: AnyMatrix | Streamed, centre: np.ndarray, d: int, *, width: int = 8, tolerance: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """By block Lanczos iteration without restarts, every new block made orthogonal to all before.

    Ends when the residual of each axis is below `tolerance` of the largest variance, which makes the variances exact to
    its square. Blocks read sparse cells once for several vectors, a restarted iteration once for each.
    """
    if not isinstance(cells, Streamed):
        cells = cells.astype(np.float64, copy=False)
    n, g = cells.shape

    # a slice of the cells for each thread
    bounds = np.linspace(0, n, torch.get_num_threads() + 1).astype(int)
    slices = [cells[slice(*rows)] for rows in itertools.pairwise(bounds)]

    # the space is spanned by a random block and what the scatter matrix makes of it, again and again
    random_block = np.random.default_rng(0).standard_normal((g, width))
    block, _ = linalg.qr(random_block, mode="economic")
    basis, images = block, np.empty((g, 0))
    with ThreadPoolExecutor(len(slices)) as pool:
        for step in itertools.count(1):
            image = np.sum([*pool.map(partial(_scatter_of, centre=centre, block=block), slices)], axis=0)
            images = np.hstack([images, image])
            block, residual = _orthogonal_to(basis, image)
            last = basis.shape[1] + width > min(cells.shape)
            if last or (step % 8 == 0 and basis.shape[1] > d):
                # Ritz pairs: eigenvectors of the scatter matrix as it acts within the basis
                small = basis.T @ images
                rising_variances, rising_weights = linalg.eigh((small + small.T) / 2)
                variances = rising_variances[::-1][:d]
                weights = rising_weights[:, ::-1][:, :d]
                errors = np.linalg.norm(residual @ weights[-width:], axis=0)
                if last or errors.max() <= tolerance * variances[0]:
                    break
            basis = np.hstack([basis, block])
    return np.maximum(variances, 0.0), basis @ weights


def _scatter_of(cells: AnyMatrix | Streamed, centre: np.ndarray, block: np.ndarray) -> np.ndarray:
    """(g, k) product of the scatter matrix of cells around a centre with a block of vectors."""
    if isinstance(cells, Streamed):
        scatter: np.ndarray = np.sum([_scatter_of(rows, centre, block) for rows in cells.blocks()], axis=0)
        return scatter
    along = cells @ block - centre @ block
    scatter = cells.T @ along - np.outer(centre, along.sum(axis=0))
    return scatter


def _orthogonal_to(basis: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What of a block lies outside of a basis: orthonormal columns, and the (k, k) factors that give it back."""
    factors = np.eye(block.shape[1])
    for turn in range(8):  # two, or more for a block that lies in the basis and leaves only rounding
        block, factor = linalg.qr(block - basis @ (basis.T @ block), mode="economic")
        factors = factor @ factors
        if turn and np.abs(np.diagonal(factor)).min() > 0.5:
            break
    return block, factors

"""Metrics on populations of cells: energy distances in gene space and in principal components."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import aslinearoperator, svds

from invirtuo.metrics.core import metric, view
from invirtuo.metrics.mean import CELL_EVAL, PERTURBENCH, pearson

if TYPE_CHECKING:
    from invirtuo.metrics.core import Pair, Side

__all__ = [
    "axes_of_all",
    "distance_correlation",
    "energy_distance",
    "half_energy",
    "half_energy_unbiased",
    "mean_distance",
    "principal_axes",
]

logger = logging.getLogger(__name__)

FLOOR = 1e-8  # smallest squared distance, as published
PAIRS = 1 << 22  # cell pairs held at a time: 32 MB in float64
CACHED_CELLS = 1 << 27  # values of real cells held dense at a time: 512 MB in float32
BLOCK = 4096  # cells dense at a time
FEW_GENES = 2048  # up to here principal axes come from the covariance matrix


@view("cells", cached=False)
def cells_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(n, g) log1p expression of the cells."""
    return pair.cells(side, condition)


@view("pca")
def pca_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(n, d) cells on the principal axes of all real cells, in seeded order."""
    return _projected(pair, side, condition, axes_of_all(pair))


@view("pca_disjoint")
def pca_disjoint_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(n, d) cells on the principal axes of the real cells that are not scored here.

    A random half of the real cells of every condition is scored; the other halves and the controls give the axes.
    """
    axes = pair.once(("disjoint axes",), lambda: principal_axes(pair.unscored_matrix(), pair.n_pcs))
    cells = _projected(pair, side, condition, axes)
    return cells[: (len(cells) + 1) // 2] if side == "real" else cells


@view("pca_average")
def pca_average_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(d,) mean over cells on the principal axes of all real cells."""
    return pair.see("pca", side, condition).mean(axis=0)


def axes_of_all(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Mean (g,) and principal axes (g, d) of all real cells, controls included."""
    return pair.once(("principal axes",), lambda: principal_axes(pair.real_matrix(), pair.n_pcs))


def _projected(pair: Pair, side: Side, condition: str, axes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(n, d) cells of a condition on given axes, in seeded order."""
    cells = pair.cells(side, condition)[pair.seeded_order(side, condition)]
    return (cells - axes[0]) @ axes[1]


def _half_energy_matrix(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray]) -> np.ndarray:
    """`half_energy` of all pairs: each self term once, as many real conditions dense at a time as memory allows."""
    centre = np.mean([cells.mean(axis=0, dtype=np.float64) for cells in reals], axis=0)
    within_pred = np.array([mean_distance(x, x) for x in (_shifted(cells, centre) for cells in preds)])
    matrix = np.empty((len(preds), len(reals)))
    for block in _blocks_in_memory(reals):
        held = [_shifted(reals[j], centre) for j in block]
        within = [mean_distance(y, y) for y in held]
        for i in range(len(preds)):
            x = _shifted(preds[i], centre)
            matrix[i, block] = [mean_distance(x, y) - own / 2 for y, own in zip(held, within, strict=True)]
    return matrix - within_pred[:, None] / 2


_MMD = (
    "Half the energy distance of predicted and real cells {space}: mean distance between the populations minus half "
    "the mean distance within each, self-pairs included, so it depends on the numbers of cells"
)


@metric(
    "mmd_gex",
    label="MMD GEX",
    direction="lower",
    range=(0.0, np.inf),
    best=0.0,
    definition=_MMD.format(space="in gene space"),
    reference=PERTURBENCH,
    on="cells",
    pairwise=_half_energy_matrix,
    ranked=True,
)
@metric(
    "mmd_pca",
    label="MMD PCA",
    direction="lower",
    range=(0.0, np.inf),
    best=0.0,
    definition=_MMD.format(space="on the principal components of all real cells"),
    reference=PERTURBENCH,
    on="pca",
    pairwise=_half_energy_matrix,
    ranked=True,
)
def half_energy(pred: np.ndarray, real: np.ndarray) -> float:
    """Half the energy distance, the quantity that is published as MMD.

    ``mean |x - y| - mean |x - x'| / 2 - mean |y - y'| / 2`` with Euclidean distances and self-pairs (V-statistic). The
    self-pairs add about ``mean |x - x'| / (2 n)`` for each side, so compare models at equal numbers of cells.

    Parameters
    ----------
    pred, real
        (n, d) and (m, d) cells.

    References
    ----------
    Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018; Wu et al. 2024, arXiv:2408.10609.
    """
    centre = real.mean(axis=0, dtype=np.float64)
    x, y = _shifted(pred, centre), _shifted(real, centre)
    return mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2


@metric(
    "mmd_pca_disjoint",
    label="MMD PCA disjoint",
    direction="lower",
    range=(-np.inf, np.inf),
    best=0.0,
    definition="Half the unbiased energy distance of predicted cells to a random half of the real cells of the "
    "condition (fixed seed), on principal components of the other halves and the controls; NaN for fewer than three "
    "real cells",
    reference="A variant of mmd_pca that neither the cells scored nor their numbers favour",
    on="pca_disjoint",
    default=False,
)
def half_energy_unbiased(pred: np.ndarray, real: np.ndarray) -> float:
    """Half of :func:`energy_distance`: :func:`half_energy` without self-pairs."""
    return energy_distance(pred, real) / 2


@metric(
    "energy_distance",
    label="Energy distance",
    direction="lower",
    range=(-np.inf, np.inf),
    best=0.0,
    definition="Energy distance of predicted and real cells in gene space, unbiased (U-statistic): about 0 for equal "
    "populations whatever the numbers of cells",
    reference="Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018",
    on="cells",
    default=False,
)
def energy_distance(pred: np.ndarray, real: np.ndarray) -> float:
    """Unbiased energy distance ``2 E|x - y| - E|x - x'| - E|y - y'|``, self-pairs left out; NaN for a single cell.

    Parameters
    ----------
    pred, real
        (n, d) and (m, d) cells.
    """
    centre = real.mean(axis=0, dtype=np.float64)
    x, y = _shifted(pred, centre), _shifted(real, centre)
    return 2 * mean_distance(x, y) - _without_self(x) - _without_self(y)


@metric(
    "edistance_pearson",
    label="E-distance Pearson",
    direction="higher",
    range=(-1.0, 1.0),
    best=1.0,
    definition="Pearson correlation over the perturbations of a group of the predicted and real energy distance to the "
    "control; one value per group, repeated for each of its conditions; NaN for fewer than two or equal distances",
    reference=CELL_EVAL,
    default=False,
)
def edistance_pearson(pair: Pair, group: str) -> np.ndarray:
    """:func:`distance_correlation` of a group, (P,) times the same value."""
    return np.full(
        len(pair.names(group)), distance_correlation(*(_to_control(pair, s, group) for s in ("pred", "real")))
    )


def _to_control(pair: Pair, side: Side, group: str) -> np.ndarray:
    """(P,) energy distances to the control cells, ``2 E|x - c| - E|x - x'|`` with self-pairs.

    ``E|c - c'|`` is left out: it is the same for all conditions, costs most, and changes no correlation.
    """
    known = pair.once(("distance to control", side, group), dict)
    waiting = [name for name in pair.names(group) if name not in known]
    if waiting:
        centre = pair.control_moments(side, group)[0]
        control = _shifted(pair.control_cells(side, group), centre)
        for name in waiting:
            cells = _shifted(pair.cells(side, name), centre)
            within = mean_distance(cells, cells) - np.sqrt(FLOOR) / len(cells)  # no distance to itself
            known[name] = 2 * mean_distance(cells, control) - within
    return np.array([known[name] for name in pair.names(group)])


def distance_correlation(pred: np.ndarray, real: np.ndarray, *, rounding: float = 1e-6) -> float:
    """Pearson correlation of distances, (P,) against (P,); NaN where a side is constant up to relative rounding."""
    constant = any(np.ptp(side) <= rounding * np.abs(side).max() for side in (pred, real))
    return np.nan if constant else float(pearson(pred, real))


def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean Euclidean distance over all pairs of rows, (n, d) against (m, d), in blocks of bounded memory.

    ``|x|^2 - 2 x.y + |y|^2`` with a floor of 1e-8. Float32 cells are multiplied in float32, but for blocks in which two
    cells lie so close that rounding would show.
    """
    rows = max(1, PAIRS // len(y))
    norms_x, norms_y = (np.einsum("ij,ij->i", cells, cells, dtype=np.float64) for cells in (x, y))
    total = 0.0
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        sizes = norms_x[block, None] + norms_y
        squares = _squares(x[block], y, sizes, rough=x.dtype == np.float32 and x is not y)
        total += np.sqrt(np.maximum(squares, FLOOR, out=squares), out=squares).sum()
    return float(total / (len(x) * len(y)))


def _squares(x: np.ndarray, y: np.ndarray, sizes: np.ndarray, *, rough: bool) -> np.ndarray:
    """Squared distances of all pairs, given the sums of squared norms."""
    if rough:
        squares = sizes - 2.0 * (x @ y.T)
        if (squares > 0.01 * sizes).all():
            return squares
    return sizes - 2.0 * (x.astype(np.float64, copy=False) @ y.astype(np.float64, copy=False).T)


def principal_axes(cells, n_pcs: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact leading principal axes of cells, centred and not scaled.

    Parameters
    ----------
    cells
        (n, g), sparse or dense.
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
    centre = np.asarray(cells.mean(axis=0, dtype=np.float64)).ravel()
    variances, axes = (_axes_of_few_genes if g <= FEW_GENES else _axes_of_many_genes)(cells, centre, d)
    axes = axes[:, variances > 1e-12 * variances.max()]  # directions without variance are arbitrary
    if axes.shape[1] == 0:
        raise ValueError("real: all cells are equal, so they have no principal components; check X")
    if axes.shape[1] < n_pcs:
        logger.warning("n_pcs=%d, but the real cells have only %d components", n_pcs, axes.shape[1])
    return centre, axes


def _axes_of_few_genes(cells, centre: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """By the eigenvectors of the scatter matrix (g, g)."""
    n, g = cells.shape
    scatter = np.zeros((g, g))
    for start in range(0, n, BLOCK):
        block = cells[start : start + BLOCK]
        shifted = (block.toarray() if sparse.issparse(block) else block) - centre
        scatter += shifted.T @ shifted
    variances, axes = linalg.eigh(scatter, subset_by_index=[g - d, g - 1])
    return variances[::-1], axes[:, ::-1]


def _axes_of_many_genes(cells, centre: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """By a truncated singular value decomposition; sparse cells are centred on the fly."""
    cells = cells.astype(np.float64)
    if sparse.issparse(cells):
        ones = np.ones((cells.shape[0], 1))
        cells = aslinearoperator(cells) - aslinearoperator(ones) * aslinearoperator(centre[None])
    else:
        cells -= centre
    start = np.random.default_rng(0).standard_normal(min(cells.shape))
    _, values, axes = svds(cells, k=d, v0=start, return_singular_vectors="vh")
    order = np.argsort(values)[::-1]
    return np.square(values[order]), axes[order].T


def _without_self(x: np.ndarray) -> float:
    """Mean distance over pairs of different rows."""
    n = len(x)
    if n < 2:
        return np.nan
    return (mean_distance(x, x) * n - np.sqrt(FLOOR)) / (n - 1)


def _shifted(cells: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Cells minus a common centre; in float32 where there are many columns."""
    return (cells - centre).astype(np.float32 if cells.shape[1] > 256 else np.float64, copy=False)


def _blocks_in_memory(views: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Positions of views that are held at the same time."""
    block: list[int] = []
    size = 0
    for j in range(len(views)):
        block.append(j)
        size += views[j].size
        if size > CACHED_CELLS:
            yield block
            block, size = [], 0
    if block:
        yield block

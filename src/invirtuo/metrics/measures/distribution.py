"""Metrics on populations of cells: energy distances in gene space and in principal components."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from invirtuo.metrics.cells import Side
from invirtuo.metrics.measures.mean import CELL_EVAL, PERTURBENCH, pearson
from invirtuo.metrics.numerics.axes import principal_axes
from invirtuo.metrics.numerics.distances import FLOOR, PAIRS, Cloud, between, cloud
from invirtuo.metrics.pair import Pair, view
from invirtuo.metrics.registry import CORRELATION, ERROR, metric
from invirtuo.nn.linear import products

__all__ = [
    "axes_of_all",
    "distance_correlation",
    "energy_distance",
    "half_energy",
    "half_energy_unbiased",
]

CACHED_CELLS = 1 << 27  # values of real cells held dense at a time: 512 MB in float32
NARROW = 256  # up to here products are in float64
SCREENED = 1e11  # multiplications for a matrix of distances from which a rough first look is worth it
SKETCH = 128  # dimensions of the rough look
SAFETY = 10.0  # a rough value settles a rank if it lies so many times the largest error seen from its rival


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
    cells = _projected(pair, side, condition, disjoint_axes(pair))
    return cells[: (len(cells) + 1) // 2] if side == "real" else cells


@view("pca_average")
def pca_average_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(d,) mean over cells on the principal axes of all real cells."""
    mean: np.ndarray = pair.see("pca", side, condition).mean(axis=0)
    return mean


def axes_of_all(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Mean (g,) and principal axes (g, d) of all real cells, controls included."""
    return pair.once("real", ("principal axes",), lambda: principal_axes(pair.real_matrix(), pair.n_pcs))


def disjoint_axes(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Mean (g,) and principal axes (g, d) of the real cells that are not scored where halves are, and the controls."""
    return pair.once("real", ("disjoint axes",), lambda: principal_axes(pair.unscored_matrix(), pair.n_pcs))


def _projected(pair: Pair, side: Side, condition: str, axes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(n, d) cells of a condition on given axes, in seeded order."""
    cells = pair.cells(side, condition)[pair.seeded_order(side, condition)]
    coordinates: np.ndarray = (cells - axes[0]) @ axes[1]
    return coordinates


def _half_energy_matrix(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray]) -> np.ndarray:
    """`half_energy` of all pairs, (P, P): self terms once, as many real conditions dense at a time as memory allows.

    Large matrices get a rough first look in fewer dimensions. What decides a rank is exact all the same: the pair of
    each condition with itself, and every pair that the rough value does not clearly tell from it.
    """
    # a pass over the real cells: how many there are, and a common centre
    shapes, means = [], []
    for cells in reals:
        shapes.append(cells.shape)
        means.append(cells.mean(axis=0, dtype=np.float64))
    centre = np.mean(means, axis=0)
    n_cells = sum(n for n, _ in shapes)
    n_genes = shapes[0][1]

    # many cells of many genes are first compared in a few dimensions
    is_screened = n_genes > 4 * SKETCH and n_cells**2 * n_genes > SCREENED
    axes = _sketch_axes(preds, reals, centre) if is_screened else None

    # exact: the self terms and the diagonal; beside it the entries that show how exact the sketches are
    matrix = np.full((len(preds), len(preds)), np.nan)
    within_pred = np.empty(len(preds))
    within_real = np.empty(len(preds))
    pred_sketches, real_sketches = [], []
    previous: Cloud | None = None
    for i in range(len(preds)):
        x = cloud(preds[i], centre)
        y = cloud(reals[i], centre)
        within_pred[i] = between(x, x)
        within_real[i] = between(y, y)
        matrix[i, i] = between(x, y)
        if axes is not None:
            if previous is not None:
                matrix[i - 1, i] = between(previous, y)
            pred_sketches.append(_Sketch.of(x, axes))
            real_sketches.append(_Sketch.of(y, axes))
            previous = x
    if axes is not None:
        matrix = _settled(matrix, _rough_matrix(pred_sketches, real_sketches), within_pred)

    # exact: every entry that is still open
    for block in _blocks_in_memory([n * g for n, g in shapes]):
        in_memory = {j: cloud(reals[j], centre) for j in block if np.isnan(matrix[:, j]).any()}
        is_open = np.isnan(matrix[:, block]).any(axis=1)
        for i in np.flatnonzero(is_open).tolist():
            x = cloud(preds[i], centre)
            for j, y in in_memory.items():
                if np.isnan(matrix[i, j]):
                    matrix[i, j] = between(x, y)
    return matrix - within_pred[:, None] / 2 - within_real / 2


class _Sketch(NamedTuple):
    """Cells in a few dimensions (n, d), their squared norms in all (n,), and the mean of what was left out (g,)."""

    cells: torch.Tensor
    norms: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, x: Cloud, axes: torch.Tensor) -> _Sketch:
        mean = x.cells.mean(dim=0)
        outside = mean - axes @ (axes.T @ mean)
        return cls(x.cells @ axes, x.norms, outside)


def _sketch_axes(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray], centre: np.ndarray) -> torch.Tensor:
    """(g, d) leading principal axes of a sample of the cells of every condition of both sides."""
    n_sampled = max(2, 2048 // (2 * len(preds)))
    samples = [view[:: max(1, len(view) // n_sampled)] for view in (*preds, *reals)]
    sample = cloud(np.concatenate(samples), centre).cells
    # of few cells the axes follow from the products of cells
    _, vectors = torch.linalg.eigh(sample @ sample.T)
    axes: torch.Tensor = torch.linalg.qr(sample.T @ vectors[:, -SKETCH:])[0]
    return axes


def _rough_matrix(preds: Sequence[_Sketch], reals: Sequence[_Sketch]) -> np.ndarray:
    """(P, P) mean distances; of the products in the dimensions left out only the mean over cells is seen."""
    # all real cells in one matrix, condition by condition
    cells = torch.cat([real.cells for real in reals])
    norms = torch.cat([real.norms for real in reals])
    sizes = torch.tensor([len(real.cells) for real in reals])
    starts = np.cumsum([0, *sizes.tolist()[:-1]])

    # products of the means in the dimensions left out
    pred_rest = torch.stack([pred.rest for pred in preds])
    real_rest = torch.stack([real.rest for real in reals])
    rest = pred_rest @ real_rest.T

    matrix = np.empty((len(preds), len(reals)))
    for i, x in enumerate(preds):
        shifted = norms - 2 * rest[i].repeat_interleave(sizes)
        sums = []
        rows = max(1, PAIRS // 2 // len(x.cells))
        for start in range(0, len(cells), rows):
            block = slice(start, start + rows)
            squares = products(x.cells, cells[block]).mul_(-2)
            squares.add_(x.norms[:, None]).add_(shifted[block])
            sums.append(squares.clamp_min_(FLOOR).sqrt_().sum(dim=0))
        totals = np.add.reduceat(torch.cat(sums).double().numpy(), starts)
        matrix[i] = totals / (len(x.cells) * sizes.numpy())
    return matrix


def _settled(exact: np.ndarray, rough: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Exact mean distances where known, rough ones where they settle the rank, NaN where they do not.

    The error of the rough values is taken from the pairs known exactly: two of every prediction and real condition.
    """
    errors = (rough - exact)[~np.isnan(exact)]
    margin = SAFETY * np.abs(errors - np.median(errors)).max()
    guess = rough - np.median(errors)
    gap = guess - within[:, None] / 2 - (np.diagonal(exact) - within / 2)
    return np.where(np.isnan(exact) & (np.abs(gap) > margin), guess, exact)


_MMD = (
    "Half the energy distance of predicted and real cells {space}: mean distance between the populations minus half "
    "the mean distance within each, self-pairs included, so it depends on the numbers of cells"
)


@metric(
    "mmd_gex",
    label="MMD GEX",
    **ERROR,
    definition=_MMD.format(space="in gene space"),
    reference=PERTURBENCH,
    on="cells",
    pairwise=_half_energy_matrix,
    ranked=True,
)
@metric(
    "mmd_pca",
    label="MMD PCA",
    **ERROR,
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
    x, y = _clouds(pred, real)
    return between(x, y) - between(x, x) / 2 - between(y, y) / 2


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
    x, y = _clouds(pred, real)
    return 2 * between(x, y) - _without_self(x) - _without_self(y)


@metric(
    "edistance_pearson",
    label="E-distance Pearson",
    **CORRELATION,
    definition="Pearson correlation over the perturbations of a group of the predicted and real energy distance to the "
    "control; one value per group, repeated for each of its conditions; NaN for fewer than two or equal distances",
    reference=CELL_EVAL,
    default=False,
)
def edistance_pearson(pair: Pair, group: str) -> np.ndarray:
    """:func:`distance_correlation` of a group, (P,) times the same value."""
    correlation = distance_correlation(_to_control(pair, "pred", group), _to_control(pair, "real", group))
    return np.full(len(pair.names(group)), correlation)


def _to_control(pair: Pair, side: Side, group: str) -> np.ndarray:
    """(P,) energy distances to the control cells, ``2 E|x - c| - E|x - x'|`` with self-pairs.

    ``E|c - c'|`` is left out: it is the same for all conditions, costs most, and changes no correlation.
    """
    known: dict[str, float] = pair.once(side, ("distance to control", group), dict)
    missing = [name for name in pair.names(group) if name not in known]
    if missing:
        centre = pair.control_moments(side, group)[0]
        double = len(centre) <= NARROW
        control = cloud(pair.control_cells(side, group), centre, double=double)
        for name in missing:
            cells = cloud(pair.cells(side, name), centre, double=double)
            within = between(cells, cells) - np.sqrt(FLOOR) / len(cells.cells)  # no distance to itself
            known[name] = 2 * between(cells, control) - within
    return np.array([known[name] for name in pair.names(group)])


def distance_correlation(pred: np.ndarray, real: np.ndarray, *, rounding: float = 1e-6) -> float:
    """Pearson correlation of distances, (P,) against (P,); NaN where a side is constant up to relative rounding."""
    constant = any(np.ptp(side) <= rounding * np.abs(side).max() for side in (pred, real))
    return np.nan if constant else float(pearson(pred, real))


def _clouds(pred: np.ndarray, real: np.ndarray) -> tuple[Cloud, Cloud]:
    """Both populations around the mean of the real one."""
    centre = real.mean(axis=0, dtype=np.float64)
    return cloud(pred, centre), cloud(real, centre)


def _without_self(x: Cloud) -> float:
    """Mean distance over pairs of different cells."""
    n = len(x.cells)
    return (between(x, x) * n - np.sqrt(FLOOR)) / (n - 1) if n > 1 else np.nan


def _blocks_in_memory(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Positions of views that are in memory at the same time, given the number of values of each."""
    block: list[int] = []
    n_values = 0
    for j, size in enumerate(sizes):
        block.append(j)
        n_values += size
        if n_values > CACHED_CELLS:
            yield block
            block, n_values = [], 0
    if block:
        yield block

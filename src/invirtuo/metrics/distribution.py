"""Metrics on populations of cells: energy distances in gene space and in principal components."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import linalg, sparse

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
NARROW = 256  # up to here products are in float64
CLOSE = 0.01  # squared distance over squared norms, below which rounding of float32 products shows
SCREENED = 1e11  # multiplications for a matrix of distances from which a rough first look is worth it
SKETCH = 128  # dimensions of the rough look
SAFETY = 10.0  # a rough value settles a rank if it lies so many times the largest error seen from its rival
FEW = 2048  # up to so many genes or cells principal axes come from a dense matrix


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


class Cloud(NamedTuple):
    """Cells made ready for products: (n, d) around a common centre, and their squared norms (n,)."""

    cells: torch.Tensor
    norms: torch.Tensor


def cloud(cells: np.ndarray, centre: np.ndarray, *, double: bool = False) -> Cloud:
    """Shift cells by a centre, float32 unless `double`."""
    dtype = torch.float64 if double else torch.float32
    shifted = torch.tensor(cells, dtype=dtype).sub_(torch.tensor(centre, dtype=dtype))
    return Cloud(shifted, shifted.square().sum(dim=1, dtype=torch.float64).to(shifted.dtype))


def _half_energy_matrix(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray]) -> np.ndarray:
    """`half_energy` of all pairs, (P, P): self terms once, as many real conditions dense at a time as memory allows.

    Large matrices get a rough first look in fewer dimensions. What decides a rank is exact all the same: the pair of
    each condition with itself, and every pair that the rough value does not clearly tell from it.
    """
    shapes, means = zip(*((cells.shape, cells.mean(axis=0, dtype=np.float64)) for cells in reals), strict=True)
    centre = np.mean(means, axis=0)
    screened = shapes[0][1] > 4 * SKETCH and sum(n for n, _ in shapes) ** 2 * shapes[0][1] > SCREENED
    axes = _sketch_axes(preds, reals, centre) if screened else None
    within, matrix, sketches, before = np.empty((2, len(preds))), np.full((len(preds),) * 2, np.nan), [], None
    for i in range(len(preds)):
        x, y = cloud(preds[i], centre), cloud(reals[i], centre)
        within[:, i] = between(x, x), between(y, y)
        matrix[i, i] = between(x, y)
        if axes is not None:
            matrix[i - 1, i] = between(before, y) if before else np.nan
            sketches.append((_Sketch.of(x, axes), _Sketch.of(y, axes)))
            before = x
    if axes is not None:
        matrix = _settled(matrix, _rough_matrix(*zip(*sketches, strict=True)), within[0])
    for block in _blocks_in_memory([n * g for n, g in shapes]):
        held = {j: cloud(reals[j], centre) for j in block if np.isnan(matrix[:, j]).any()}
        for row in np.flatnonzero(np.isnan(matrix[:, block]).any(axis=1)).tolist():
            x = cloud(preds[row], centre)
            for j, y in held.items():
                if np.isnan(matrix[row, j]):
                    matrix[row, j] = between(x, y)
    return matrix - within[0, :, None] / 2 - within[1] / 2


class _Sketch(NamedTuple):
    """Cells in a few dimensions (n, d), their squared norms in all (n,), and the mean of what was left out (g,)."""

    cells: torch.Tensor
    norms: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, x: Cloud, axes: torch.Tensor) -> _Sketch:
        cells, mean = x.cells @ axes, x.cells.mean(dim=0)
        return cls(cells, x.norms, mean - axes @ (axes.T @ mean))


def _sketch_axes(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray], centre: np.ndarray) -> torch.Tensor:
    """(g, d) leading principal axes of some cells of every condition of both sides."""
    several = max(2, 2048 // (2 * len(preds)))
    some = [view[:: max(1, len(view) // several)] for side in (preds, reals) for view in side]
    sample = cloud(np.concatenate(some), centre).cells
    _, vectors = torch.linalg.eigh(sample @ sample.T)
    axes, _ = torch.linalg.qr(sample.T @ vectors[:, -SKETCH:])
    return axes


def _rough_matrix(preds: Sequence[_Sketch], reals: Sequence[_Sketch]) -> np.ndarray:
    """(P, P) mean distances; of the products in the dimensions left out only the mean over cells is seen."""
    cells, norms = (torch.cat([getattr(one, name) for one in reals]) for name in ("cells", "norms"))
    sizes = torch.tensor([len(one.cells) for one in reals])
    starts = np.cumsum([0, *sizes.tolist()[:-1]])
    rest = torch.stack([one.rest for one in preds]) @ torch.stack([one.rest for one in reals]).T
    matrix = np.empty((len(preds), len(reals)))
    for i, x in enumerate(preds):
        shifted, sums = norms - 2 * rest[i].repeat_interleave(sizes), []
        rows = max(1, PAIRS // 2 // len(x.cells))
        for start in range(0, len(cells), rows):
            block = slice(start, start + rows)
            squares = torch.addmm(x.norms[:, None] + shifted[block], x.cells, cells[block].T, alpha=-2)
            sums.append(squares.clamp_min_(FLOOR).sqrt_().sum(dim=0))
        matrix[i] = np.add.reduceat(torch.cat(sums).double().numpy(), starts) / (len(x.cells) * sizes.numpy())
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
    x, y = cloud(pred, centre), cloud(real, centre)
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
    centre = real.mean(axis=0, dtype=np.float64)
    x, y = cloud(pred, centre), cloud(real, centre)
    return 2 * between(x, y) - _without_self(x) - _without_self(y)


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
        double = len(centre) <= NARROW
        control = cloud(pair.control_cells(side, group), centre, double=double)
        for name in waiting:
            cells = cloud(pair.cells(side, name), centre, double=double)
            within = between(cells, cells) - np.sqrt(FLOOR) / len(cells.cells)  # no distance to itself
            known[name] = 2 * between(cells, control) - within
    return np.array([known[name] for name in pair.names(group)])


def distance_correlation(pred: np.ndarray, real: np.ndarray, *, rounding: float = 1e-6) -> float:
    """Pearson correlation of distances, (P,) against (P,); NaN where a side is constant up to relative rounding."""
    constant = any(np.ptp(side) <= rounding * np.abs(side).max() for side in (pred, real))
    return np.nan if constant else float(pearson(pred, real))


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
        part = Cloud(x.cells[start : start + rows], x.norms[start : start + rows])
        squares = torch.addmm(part.norms[:, None] + y.norms, part.cells, y.cells.T, alpha=-2)
        if squares.min() <= CLOSE * (part.norms.max() + y.norms.max()):
            squares = _repaired(squares, part, y)
        total += float(squares.clamp_min_(FLOOR).sqrt_().sum(dtype=torch.float64))
    return total / (len(x.cells) * len(y.cells))


def _repaired(squares: torch.Tensor, x: Cloud, y: Cloud) -> torch.Tensor:
    """Squared distances of close cells by subtraction, of many close cells by products in float64."""
    close = (squares <= CLOSE * (x.norms[:, None] + y.norms)).nonzero()
    if len(close) > 4 * max(squares.shape):
        wide = [Cloud(*(part.double() for part in side)) for side in (x, y)]
        norms = [side.cells.square().sum(dim=1) for side in wide]
        return torch.addmm(norms[0][:, None] + norms[1], wide[0].cells, wide[1].cells.T, alpha=-2)
    for pairs in close.split(1 + BLOCK // 8):
        i, j = pairs.T
        squares[i, j] = (x.cells[i] - y.cells[j]).square().sum(dim=1)
    return squares


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
    way = _axes_of_few_genes if g <= FEW else _axes_of_few_cells if n <= FEW else _axes_of_many_genes
    variances, axes = way(cells, centre, d)
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


def _axes_of_few_cells(cells, centre: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """By the eigenvectors of the products of cells (n, n)."""
    shifted = (cells.toarray() if sparse.issparse(cells) else cells) - centre
    n = len(shifted)
    variances, weights = linalg.eigh(shifted @ shifted.T, subset_by_index=[n - d, n - 1])
    axes, _ = linalg.qr(shifted.T @ weights[:, ::-1], mode="economic")
    return np.maximum(variances[::-1], 0.0), axes


def _axes_of_many_genes(
    cells, centre: np.ndarray, d: int, *, width: int = 8, tolerance: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """By block Lanczos iteration without restarts, every new block made orthogonal to all before.

    Ends when the residual of each axis is below `tolerance` of the largest variance, which makes the variances exact to
    its square. Blocks read sparse cells once for several vectors, a restarted iteration once for each.
    """
    cells = cells.astype(np.float64, copy=False)
    bounds = np.linspace(0, cells.shape[0], torch.get_num_threads() + 1).astype(int)
    parts = [cells[slice(*rows)] for rows in itertools.pairwise(bounds)]
    block = linalg.qr(np.random.default_rng(0).standard_normal((cells.shape[1], width)), mode="economic")[0]
    basis, images = block, np.empty((cells.shape[1], 0))
    with ThreadPoolExecutor(len(parts)) as pool:
        for step in itertools.count(1):
            image = np.sum([*pool.map(_scatter_of, parts, itertools.repeat(centre), itertools.repeat(block))], axis=0)
            images = np.hstack([images, image])
            block, residual = _orthogonal_to(basis, image)
            last = basis.shape[1] + width > min(cells.shape)
            if last or (step % 8 == 0 and basis.shape[1] > d):
                small = basis.T @ images
                variances, weights = (x[..., ::-1][..., :d] for x in linalg.eigh((small + small.T) / 2))
                if last or np.linalg.norm(residual @ weights[-width:], axis=0).max() <= tolerance * variances[0]:
                    break
            basis = np.hstack([basis, block])
    return np.maximum(variances, 0.0), basis @ weights


def _scatter_of(cells, centre: np.ndarray, block: np.ndarray) -> np.ndarray:
    """(g, k) product of the scatter matrix of some cells around a centre with a block of vectors."""
    along = cells @ block - centre @ block
    return cells.T @ along - np.outer(centre, along.sum(axis=0))


def _orthogonal_to(basis: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What of a block lies outside of a basis: orthonormal columns, and the (k, k) factors that give it back."""
    factors = np.eye(block.shape[1])
    for turn in range(8):  # two, or more for a block that lies in the basis and leaves only rounding
        block, factor = linalg.qr(block - basis @ (basis.T @ block), mode="economic")
        factors = factor @ factors
        if turn and np.abs(np.diagonal(factor)).min() > 0.5:
            break
    return block, factors


def _without_self(x: Cloud) -> float:
    """Mean distance over pairs of different cells."""
    n = len(x.cells)
    return (between(x, x) * n - np.sqrt(FLOOR)) / (n - 1) if n > 1 else np.nan


def _blocks_in_memory(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Positions of views that are held at the same time, given the number of values of each."""
    block: list[int] = []
    held = 0
    for j, size in enumerate(sizes):
        block.append(j)
        held += size
        if held > CACHED_CELLS:
            yield block
            block, held = [], 0
    if block:
        yield block

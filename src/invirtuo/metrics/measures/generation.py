"""Metrics of generated populations as CFGen and cellFlow define them: kernels, optimal transport, neighbourhoods.

The functions take (n, d) generated and (m, d) real cells. Where the published definition depends on the order of the
rows, the function does too; the registered metric sees the cells in an order that their place in the file does not
change (`Pair.seeded_order`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist

from invirtuo.metrics.cells import Side
from invirtuo.metrics.measures.distribution import axes_of_all, disjoint_axes
from invirtuo.metrics.numerics.axes import projected
from invirtuo.metrics.numerics.distances import blocks
from invirtuo.metrics.pair import Pair, view
from invirtuo.metrics.registry import ERROR, SHARE, metric

__all__ = [
    "knn_coverage",
    "knn_density",
    "knn_precision",
    "knn_precision_equal",
    "knn_recall",
    "knn_recall_equal",
    "mmd_linear",
    "mmd_rbf",
    "mmd_rbf_median",
    "mmd_rbf_unbiased",
    "transport_cost",
    "wasserstein1",
    "wasserstein2",
    "wasserstein2_equal",
]

CFGEN = "Palma et al. 2025, CFGen, arXiv:2407.11734"
CELLFLOW = "Palma et al. 2023, cellFlow; code of Tong et al. 2024, arXiv:2302.00482"
PRDC = "Naeem et al. 2020, arXiv:2002.09797; Kynkaanniemi et al. 2019, arXiv:1904.06991; cellFlow, k = 10"
SIGMAS = (0.01, 0.1, 1.0, 10.0, 100.0)
VANISHED = 700.0  # exp(-700) is the last that float64 can hold; pairs further apart are not asked for
MANY = 4096  # cells from which the median distance is taken
MOST_PIVOTS = 10**9  # never reached: transport between 14,000 and 1,000 cells takes seconds


@view("pca_scaled")
def pca_scaled_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(n, d) cells on the principal axes of all real cells, divided by the standard deviation of these on each axis."""
    cells: np.ndarray = pair.see("pca", side, condition) / pair.once("real", ("spread",), lambda: _spread(pair))
    return cells


@view("pca_disjoint_scaled")
def pca_disjoint_scaled_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(n, d) cells as in the view pca_disjoint, divided by the standard deviation of the cells that gave the axes."""
    spread = pair.once("real", ("disjoint spread",), lambda: _disjoint_spread(pair))
    cells: np.ndarray = pair.see("pca_disjoint", side, condition) / spread
    return cells


@metric(
    "mmd_rbf",
    label="MMD RBF",
    direction="lower",
    range=(0.0, 2.0 * len(SIGMAS)),
    best=0.0,
    definition="Squared MMD on principal components, Gaussian kernels of sigma 0.01 to 100 summed, V-statistic: at the "
    "three small scales it sees only each cell's own kernel, a floor of about 6 / n",
    reference=CFGEN,
    on="pca",
    default=False,
)
def mmd_rbf(pred: np.ndarray, real: np.ndarray, *, sigmas: Sequence[float] = SIGMAS) -> float:
    """Squared maximum mean discrepancy under the kernel ``sum_s exp(-|x - y|^2 / (2 s^2))``, biased, as published.

    Parameters
    ----------
    pred, real
        (n, d) and (m, d) cells, of which the first min(n, m) count.
    sigmas
        Scales; their kernels are summed.

    References
    ----------
    Gretton et al. 2012, equation 5; Palma et al. 2025, arXiv:2407.11734.
    """
    n = min(len(pred), len(real))
    x = pred[:n]
    y = real[:n]
    within = _kernel_mean(x, x, sigmas) + _kernel_mean(y, y, sigmas)
    return max(0.0, within - 2 * _kernel_mean(x, y, sigmas))


@metric(
    "mmd_rbf_unbiased",
    label="MMD RBF unbiased",
    direction="lower",
    range=(-2.0 * len(SIGMAS), 2.0 * len(SIGMAS)),
    best=0.0,
    definition="mmd_rbf without the kernel of each cell with itself (U-statistic): about 0 for equal populations, "
    "whatever the number of cells; NaN for a single cell",
    reference="A variant of mmd_rbf; Gretton et al. 2012, equation 3",
    on="pca",
    default=False,
)
def mmd_rbf_unbiased(pred: np.ndarray, real: np.ndarray, *, sigmas: Sequence[float] = SIGMAS) -> float:
    """Like :func:`mmd_rbf`, the diagonals of the two inner kernels left out; NaN for a single cell."""
    n = min(len(pred), len(real))
    return _unbiased(pred[:n], real[:n], sigmas)


metric(
    "mmd_rbf_disjoint",
    label="MMD RBF disjoint",
    direction="lower",
    range=(-2.0 * len(SIGMAS), 2.0 * len(SIGMAS)),
    best=0.0,
    definition="mmd_rbf_unbiased against a random half of the real cells of the condition, on principal components of "
    "the other halves and the controls; NaN for a single cell",
    reference="A variant of mmd_rbf_unbiased that the cells scored do not favour",
    on="pca_disjoint",
    default=False,
)(mmd_rbf_unbiased)


@metric(
    "mmd_rbf_median",
    label="MMD RBF median",
    direction="lower",
    range=(-2.0, 2.0),
    best=0.0,
    definition="Unbiased squared MMD on principal components, one Gaussian kernel whose sigma is the median distance "
    "between real cells of the condition, all cells; NaN for a single cell or equal real cells",
    reference="A variant of mmd_rbf with the median heuristic, Gretton et al. 2012, section 8",
    on="pca",
    default=False,
)
def mmd_rbf_median(pred: np.ndarray, real: np.ndarray) -> float:
    """Unbiased squared MMD of all cells, sigma the median distance of real cells: one ruler for all predictions."""
    sigma = _median_distance(real)
    return _unbiased(pred, real, (sigma,)) if sigma > 0 else np.nan


@metric(
    "mmd_linear",
    label="MMD linear",
    direction="lower",
    range=(-np.inf, np.inf),
    best=0.0,
    definition="Estimate of the squared distance of means on standardised principal components from products of "
    "successive differences of paired cells; may be negative; depends on the order, here random with a fixed seed",
    reference=CELLFLOW,
    on="pca_scaled",
    default=False,
)
def mmd_linear(pred: np.ndarray, real: np.ndarray) -> float:
    """Mean over i of ``<d_i, d_i+1>`` with ``d_i = x_i - y_i``: depends on the order of rows, may be negative.

    Parameters
    ----------
    pred, real
        (n, d) and (m, d) cells, of which the first min(n, m) count; NaN if that is one.
    """
    n = min(len(pred), len(real))
    difference = np.subtract(pred[:n], real[:n], dtype=np.float64)
    return float(np.einsum("ij,ij->i", difference[:-1], difference[1:]).mean()) if n > 1 else np.nan


@metric(
    "wasserstein2",
    label="Wasserstein-2",
    **ERROR,
    definition="Root of the smallest mean squared distance between predicted and real cells paired by optimal "
    "transport, on principal components; depends on the numbers of cells",
    reference=CFGEN,
    on="pca",
    default=False,
)
def wasserstein2(pred: np.ndarray, real: np.ndarray) -> float:
    """Root of the exact optimal transport cost of squared Euclidean distances, all rows with equal weights."""
    return float(np.sqrt(transport_cost(cdist(pred, real, "sqeuclidean"))))


@metric(
    "wasserstein2_disjoint",
    label="Wasserstein-2 disjoint",
    **ERROR,
    definition="wasserstein2 of as many predicted as real cells, a random half of the real cells of the condition, on "
    "principal components of the other halves and the controls; depends on the numbers of cells",
    reference="A variant of wasserstein2 that the cells scored do not favour",
    on="pca_disjoint",
    default=False,
)
def wasserstein2_equal(pred: np.ndarray, real: np.ndarray) -> float:
    """:func:`wasserstein2` of the first min(n, m) cells of both sides."""
    n = min(len(pred), len(real))
    return wasserstein2(pred[:n], real[:n])


def wasserstein1(pred: np.ndarray, real: np.ndarray) -> float:
    """Exact optimal transport cost of Euclidean distances, all rows with equal weights."""
    return transport_cost(cdist(pred, real))


@metric(
    "knn_recall",
    label="kNN recall",
    **SHARE,
    definition="Share of real cells nearer to a predicted cell than that cell's 10th predicted neighbour (L1, "
    "standardised principal components): is all that is real covered?",
    reference=PRDC,
    on="pca_scaled",
    default=False,
)
def knn_recall(pred: np.ndarray, real: np.ndarray, *, k: int = 10) -> float:
    """Share of real cells inside the ball of a predicted cell; see :func:`knn_precision`."""
    return knn_precision(real, pred, k=k)


@metric(
    "knn_precision",
    label="kNN precision",
    **SHARE,
    definition="Share of predicted cells nearer to a real cell than that cell's 10th real neighbour (L1, standardised "
    "principal components): is what is predicted real?",
    reference=PRDC,
    on="pca_scaled",
    default=False,
)
def knn_precision(pred: np.ndarray, real: np.ndarray, *, k: int = 10) -> float:
    """Share of predicted cells inside the ball of a real cell.

    Parameters
    ----------
    pred, real
        (n, d) and (m, d) cells.
    k
        The ball of a cell reaches to its k-th neighbour of its own kind (L1, border excluded), or to the last of fewer.

    Returns
    -------
    float
        NaN if there is one real cell only, which has no neighbour.
    """
    return float(_balls_around(pred, real, k)[0].astype(bool).mean()) if len(real) > 1 else np.nan


@metric(
    "knn_recall_disjoint",
    label="kNN recall disjoint",
    **SHARE,
    definition="knn_recall of a random half of the real cells of the condition among as many predicted cells, on "
    "standardised principal components of the other halves and the controls",
    reference="A variant of knn_recall that the cells scored do not favour",
    on="pca_disjoint_scaled",
    default=False,
)
def knn_recall_equal(pred: np.ndarray, real: np.ndarray) -> float:
    """:func:`knn_recall` of the first min(n, m) cells of both sides."""
    n = min(len(pred), len(real))
    return knn_recall(pred[:n], real[:n])


@metric(
    "knn_precision_disjoint",
    label="kNN precision disjoint",
    **SHARE,
    definition="knn_precision of predicted cells among as many real cells, a random half of those of the condition, on "
    "standardised principal components of the other halves and the controls",
    reference="A variant of knn_precision that the cells scored do not favour",
    on="pca_disjoint_scaled",
    default=False,
)
def knn_precision_equal(pred: np.ndarray, real: np.ndarray) -> float:
    """:func:`knn_precision` of the first min(n, m) cells of both sides."""
    n = min(len(pred), len(real))
    return knn_precision(pred[:n], real[:n])


def knn_density(pred: np.ndarray, real: np.ndarray, *, k: int = 10) -> float:
    """Mean over predicted cells of the number of real balls around it, over k; see :func:`knn_precision`."""
    return float(_balls_around(pred, real, k)[0].mean() / k) if len(real) > 1 else np.nan


def knn_coverage(pred: np.ndarray, real: np.ndarray, *, k: int = 10) -> float:
    """Share of real balls with a predicted cell inside; see :func:`knn_precision`."""
    return float(_balls_around(pred, real, k)[1].mean()) if len(real) > 1 else np.nan


def transport_cost(cost: np.ndarray) -> float:
    """Exact cost of optimal transport between uniform weights, by the network simplex of POT.

    Parameters
    ----------
    cost
        (n, m), >= 0.

    Examples
    --------
    >>> transport_cost(np.array([[0.0, 4.0], [1.0, 0.0]]))
    0.0
    >>> round(transport_cost(np.array([[0.0, 3.0, 1.0], [1.0, 1.0, 2.0]])), 6)
    0.833333
    """
    from ot import emd2  # slow to import

    return float(emd2([], [], np.asarray(cost, dtype=np.float64), numItermax=MOST_PIVOTS))


def _kernel_mean(x: np.ndarray, y: np.ndarray, sigmas: Sequence[float]) -> float:
    """Mean over all pairs of the sum of Gaussian kernels."""
    total = 0.0
    for _, block in blocks(x, y, "sqeuclidean"):
        # exp is slow: pairs whose kernel is 0 in float64 are left out
        furthest = block.max()
        for sigma in sigmas:
            reach = VANISHED * 2 * sigma**2
            squares = block if furthest < reach else block[block < reach]
            total += float(np.exp(squares / (-2 * sigma**2)).sum())
    return total / (len(x) * len(y))


def _unbiased(x: np.ndarray, y: np.ndarray, sigmas: Sequence[float]) -> float:
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return np.nan
    # the kernels of a cell with itself are 1 each
    self_kernel = len(sigmas)
    within_x = (_kernel_mean(x, x, sigmas) - self_kernel / n) * n / (n - 1)
    within_y = (_kernel_mean(y, y, sigmas) - self_kernel / m) * m / (m - 1)
    return within_x + within_y - 2 * _kernel_mean(x, y, sigmas)


def _median_distance(cells: np.ndarray) -> float:
    """Median distance of different cells, from evenly spaced ones of the order by length if there are many."""
    if len(cells) > MANY:
        order = np.argsort(np.linalg.norm(cells, axis=1), kind="stable")
        cells = cells[order[np.linspace(0, len(cells) - 1, MANY).astype(int)]]
    if len(cells) < 2:
        return np.nan
    return float(np.median(cdist(cells, cells)[np.triu_indices(len(cells), 1)]))


def _balls_around(points: np.ndarray, centres: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """How many balls of centres hold each point, and whether each ball holds a point."""
    # a ball reaches to the k-th neighbour of its centre
    k = min(k, len(centres) - 1)
    radius = np.empty(len(centres))
    for rows, block in blocks(centres, centres, "cityblock"):
        radius[rows] = np.partition(block, k, axis=1)[:, k]
    counts = np.empty(len(points), dtype=int)
    filled = np.zeros(len(centres), dtype=bool)
    for rows, block in blocks(points, centres, "cityblock"):
        inside = block < radius
        counts[rows] = inside.sum(axis=1)
        filled |= inside.any(axis=0)
    return counts, filled


def _spread(pair: Pair) -> np.ndarray:
    """(d,) standard deviation of all real cells on each principal axis."""
    spread: np.ndarray = projected(pair.real_matrix(), *axes_of_all(pair)).std(axis=0)
    return spread


def _disjoint_spread(pair: Pair) -> np.ndarray:
    """(d,) standard deviation of the real cells that are not scored on each of their principal axes."""
    spread: np.ndarray = projected(pair.unscored_matrix(), *disjoint_axes(pair)).std(axis=0)
    return spread

"""Metrics of what sets a perturbation apart from the other ones: weights, DE genes and centres from real cells.

A response that all perturbations share does not help here. The others of a condition are the real cells of the other
perturbations of its covariate group, scored or not; where there are none, the control cells stand in their place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from invirtuo.metrics.measures.mean import mse, pearson
from invirtuo.metrics.measures.wilcoxon import LEVEL
from invirtuo.metrics.numerics.rank import ranks
from invirtuo.metrics.pair import Moments, Pair
from invirtuo.metrics.registry import CORRELATION, ERROR, SHARE, each_condition, metric

__all__ = [
    "Others",
    "Tests",
    "keep_others",
    "others_of",
    "r2_weighted",
    "tests_of",
    "weighted_mse",
    "weights",
    "welch",
]

CONSTANT = 1e-12  # variance over mean square that is rounding
MEANS: dict[str, Any] = {"default": False, "of_means": True}  # metrics that see means alone
SCPERTEVAL = "scPertEval 0.2"
DIVERSITY = "Mejia et al. 2025, Diversity by Design, arXiv:2506.22641; scPertEval 0.2"
SYSTEMA = "Viñas Torné et al. 2025, Systema, doi:10.1038/s41587-025-02777-8; scPertEval 0.2"


class Others(NamedTuple):
    """What the real cells of the other perturbations of a group look like, from the point of view of one condition.

    Parameters
    ----------
    mean
        (g,) mean over perturbations of their means, each with the same weight.
    moments
        Mean, variance and number of all their cells taken together.
    are_controls
        Whether these are the control cells, for want of another perturbation.
    """

    mean: np.ndarray
    moments: Moments
    are_controls: bool


class Tests(NamedTuple):
    """Tests of the real cells of a condition against those of the others, gene by gene.

    Parameters
    ----------
    statistic
        (g,) t, or another measure of effect whose sign is that of the change.
    p_adj
        (g,) p-value, adjusted over genes (Benjamini-Hochberg).
    """

    statistic: np.ndarray
    p_adj: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        """(g,) whether the adjusted p-value is below 0.05."""
        return self.p_adj < LEVEL


class _Sums(NamedTuple):
    """Sums over the perturbed cells of a group: number, values and squares; and of means, over n perturbations."""

    cells: int
    values: np.ndarray
    squares: np.ndarray
    means: np.ndarray
    n: int


def others_of(pair: Pair, condition: str, *, min_cells: int = 1) -> Others:
    """The others of a condition among the real cells of its group.

    Parameters
    ----------
    pair, condition
        Where to look.
    min_cells
        Perturbations with fewer cells do not count in the mean over perturbations.
    """

    def compute() -> Others:
        group = pair.group_of(condition)
        key = ("sums of perturbed cells", group, str(min_cells))
        total = pair.once("real", key, lambda: _sums(pair, pair.all_names("real", group), min_cells))
        own = _sums(pair, [condition], min_cells)
        n = total.n - own.n
        if n == 0:
            control = pair.control_moments("real", group)
            return Others(control[0], control, are_controls=True)

        # all but the own cells
        cells = total.cells - own.cells
        mean = (total.values - own.values) / cells
        mean_square = (total.squares - own.squares) / cells
        variance = np.maximum(mean_square - np.square(mean), 0.0) * cells / max(cells - 1, 1)
        variance = np.where(variance > CONSTANT * mean_square, variance, 0.0)
        return Others((total.means - own.means) / n, (mean, variance, cells), are_controls=False)

    return pair.once("real", ("others", condition), compute)


def keep_others(pair: Pair, condition: str, others: Others, tests: Tests) -> None:
    """Let metrics of a pair see these others, whose cells need not be those of its real side."""
    pair.keep("real", ("others", condition), others)
    pair.keep("real", ("tests against others", condition), tests)


def _sums(pair: Pair, names: list[str], min_cells: int) -> _Sums:
    n_genes = len(pair.genes)
    values, squares, means = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    cells, n = 0, 0
    for name in names:
        mean, variance, m = pair.moments("real", name)
        cells += m
        values += m * mean
        squares += (m - 1) * np.nan_to_num(variance) + m * np.square(mean)
        if m >= min_cells:
            means += mean
            n += 1
    return _Sums(cells, values, squares, means, n)


def tests_of(pair: Pair, condition: str) -> Tests:
    """Welch tests of the real cells of a condition against its others."""

    def compute() -> Tests:
        return welch(pair.moments("real", condition), others_of(pair, condition).moments)

    return pair.once("real", ("tests against others", condition), compute)


def welch(group: Moments, reference: Moments) -> Tests:
    """Welch's t-test gene by gene; t is 0 and p is 1 where they are not defined.

    Parameters
    ----------
    group, reference
        Mean (g,), variance (g,) with n - 1, and number of cells.
    """
    mean, var, n = group
    reference_mean, reference_var, m = reference
    error, reference_error = np.nan_to_num(var) / n, np.nan_to_num(reference_var) / m
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (mean - reference_mean) / np.sqrt(error + reference_error)
        own_spread = np.square(error) / max(n - 1, 1)
        reference_spread = np.square(reference_error) / max(m - 1, 1)
        freedom = np.square(error + reference_error) / (own_spread + reference_spread)
    t = np.where(np.isfinite(t), t, 0.0)
    freedom = np.where(np.isfinite(freedom) & (freedom > 0), freedom, 1.0)
    p_value = 2 * stats.t.sf(np.abs(t), freedom)
    return Tests(t, stats.false_discovery_control(p_value))


def weights(statistic: np.ndarray, exponent: float = 2.0) -> np.ndarray:
    """Weights of genes, (g,) with sum 1: absolute statistics brought to the range 0 to 1, to a power.

    Genes whose statistic is not finite weigh nothing; without any difference between genes all weigh the same.

    References
    ----------
    Mejia et al. 2025, Diversity by Design, arXiv:2506.22641; scPertEval 0.2, `wmse_exp2`.

    Examples
    --------
    >>> weights(np.array([0.0, -3.0, 1.5])).round(2).tolist()
    [0.0, 0.8, 0.2]
    """
    size = np.abs(np.asarray(statistic, dtype=float))
    known = np.isfinite(size)
    least, largest = size[known].min(initial=np.inf), size[known].max(initial=-np.inf)
    if not largest > least:
        return np.full(len(size), 1.0 / len(size))
    scaled = np.where(known, (size - least) / (largest - least), 0.0) ** exponent
    result: np.ndarray = scaled / scaled.sum()
    return result


def weighted_mse(pred: np.ndarray, real: np.ndarray, weight: np.ndarray) -> float:
    """``sum w (pred - real)^2`` of (g,) vectors with weights of sum 1."""
    return float((weight * np.square(pred - real)).sum())


def r2_weighted(pred: np.ndarray, real: np.ndarray, weight: np.ndarray) -> float:
    """``1 - sum w (real - pred)^2 / sum w (real - weighted mean of real)^2``; NaN where real is constant."""
    centre = (weight * real).sum()
    total = weighted_mse(np.broadcast_to(centre, real.shape), real, weight)
    return 1.0 - weighted_mse(pred, real, weight) / total if total > 0 else np.nan


@metric(
    "wmse",
    label="Weighted MSE",
    **ERROR,
    definition="Squared difference of the mean log1p expression, genes weighted by the square of their t-score (real "
    "cells against those of the other perturbations of the group) brought to the range 0 to 1",
    reference=DIVERSITY,
    **MEANS,
)
@each_condition
def wmse(pair: Pair, name: str) -> float:
    """:func:`weighted_mse` of the means."""
    pred, real = pair.both("mean", name)
    return weighted_mse(pred, real, weights(tests_of(pair, name).statistic))


@metric(
    "r2_weighted",
    label="Weighted R2",
    direction="higher",
    range=(-np.inf, 1.0),
    best=1.0,
    definition="Coefficient of determination of the real mean log1p expression, minus the mean of the other real "
    "perturbations of the group, by the predicted one, genes weighted as in wmse; at most 0 for the mean of the others",
    reference=DIVERSITY,
    **MEANS,
)
@each_condition
def r2_weighted_of_condition(pair: Pair, name: str) -> float:
    """:func:`r2_weighted` of what a perturbation does beyond the mean of the others."""
    centre = others_of(pair, name).mean
    pred, real = pair.both("mean", name)
    return r2_weighted(pred - centre, real - centre, weights(tests_of(pair, name).statistic))


@metric(
    "mse_degs",
    label="MSE of DE genes",
    **ERROR,
    definition="Mean squared difference of the mean log1p expression over the genes in which the real cells differ "
    "from those of the other perturbations of the group (Welch test, adjusted p below 0.05); NaN without such genes",
    reference=SCPERTEVAL,
    **MEANS,
)
@each_condition
def mse_degs(pair: Pair, name: str) -> float:
    """Mean squared difference over the genes that set a perturbation apart."""
    genes = tests_of(pair, name).significant
    pred, real = pair.both("mean", name)
    return float(mse(pred[genes], real[genes])) if genes.any() else np.nan


@metric(
    "pearson_degs",
    label="Pearson of DE genes",
    **CORRELATION,
    definition="Pearson correlation of the predicted and the real difference of mean log1p expression to the control "
    "over the genes of mse_degs; NaN for fewer than two",
    reference=SCPERTEVAL,
    **MEANS,
)
@each_condition
def pearson_degs(pair: Pair, name: str) -> float:
    """Pearson correlation of effects over the genes that set a perturbation apart."""
    genes = tests_of(pair, name).significant
    pred, real = pair.both("effect", name)
    return float(pearson(pred[genes], real[genes])) if genes.sum() > 1 else np.nan


@metric(
    "pearson_perturbed_mean",
    label="Pearson delta (perturbed mean)",
    **CORRELATION,
    definition="Pearson correlation over genes of the predicted and the real mean log1p expression, minus the mean of "
    "the other real perturbations of the group on both sides; NaN without others",
    reference=SYSTEMA,
    **MEANS,
)
@each_condition
def pearson_perturbed_mean(pair: Pair, name: str) -> float:
    """Pearson correlation of what a perturbation does beyond the mean of the others."""
    is_alone = len(pair.all_names("real", pair.group_of(name))) < 2
    if is_alone or others_of(pair, name).are_controls:
        return np.nan
    centre = others_of(pair, name).mean
    pred, real = pair.both("mean", name)
    return float(pearson(pred - centre, real - centre))


@metric(
    "centroid_accuracy",
    label="Centroid accuracy",
    **SHARE,
    definition="Share of the other real means of the group that are farther (Euclidean) from the predicted mean than "
    "its own; ties count half",
    reference=SYSTEMA,
    relative=True,
    **MEANS,
)
def centroid_accuracy(pair: Pair, group: str) -> np.ndarray:
    """One minus the place of the own real mean by its distance from the prediction, (P,).

    Published with means minus that of all perturbations: distances do not change by it.
    """
    from scipy.spatial.distance import cdist

    preds = np.stack(list(pair.view("mean", "pred", group)))
    reals = np.stack(list(pair.view("mean", "real", group)))
    centre = reals.mean(axis=0)
    distances = cdist(preds - centre, reals - centre)
    return 1 - ranks(distances, "lower", by="pred")

"""Metrics on pseudobulks: one vector per condition, compared gene by gene.

The functions work along the last axis and broadcast over the others; `pred` and `real` hold what the view gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from invirtuo.cells.values import AnyMatrix
from invirtuo.metrics.cells import Side
from invirtuo.metrics.pair import Moments, Pair, view
from invirtuo.metrics.registry import CORRELATION, DESCRIPTION, ERROR, metric

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = [
    "coefficient_of_variation",
    "cosine",
    "effect",
    "logfc",
    "mae",
    "mse",
    "pearson",
    "r2_ref",
    "r2_score",
    "ratio",
    "rmse",
    "scaled_mean",
    "variance_ratio",
]

PERTURBENCH = "Wu et al. 2024, PerturBench, arXiv:2408.10609"
CELL_EVAL = "Adduri et al. 2025, STATE, doi:10.1101/2025.06.26.661135; cell-eval 0.8"


@view("mean", of_means=True)
def mean_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) mean over cells of log1p expression."""
    return pair.moments(side, condition)[0]


@view("logfc", of_means=True)
def logfc_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) log fold change of the means against the control cells of the group."""
    control_mean = pair.control_moments(side, pair.group_of(condition))[0]
    return logfc(pair.moments(side, condition)[0], control_mean)


@view("effect", of_means=True)
def effect_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) mean over cells of log1p expression, minus that of the control cells of the group."""
    return effect(pair.moments(side, condition)[0], pair.control_moments(side, pair.group_of(condition))[0])


@view("logfc_linear")
def logfc_linear_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) log fold change of mean expression, logarithm undone cell by cell, against the control of the group."""
    group = pair.group_of(condition)
    key = ("mean expression of control", group)
    control_mean = pair.once_of_control(side, key, lambda: _mean_expression(pair.stored_control(side, group)))
    return logfc(_mean_expression(pair.stored(side, condition)), control_mean)


@view("scaled")
def scaled_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) mean over cells of expression standardised within the covariate group of this file."""
    return _scaled_by(side, pair, side, condition)


@view("scaled_ref")
def scaled_ref_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) mean over cells of expression standardised by the real cells of the covariate group."""
    return _scaled_by("real", pair, side, condition)


def _scaled_by(ruler: Side, pair: Pair, side: Side, condition: str) -> np.ndarray:
    group = pair.group_of(condition)
    centre, scale = pair.once(ruler, ("scaling", group), lambda: _pooled(pair.group_moments(ruler, group)))
    return scaled_mean(pair.cells(side, condition), centre, scale)


@view("variance")
def variance_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) variance over cells of log1p expression, with n - 1; NaN for a single cell."""
    return pair.moments(side, condition)[1]


@view("var")
def var_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) coefficient of variation over cells."""
    return coefficient_of_variation(*pair.moments(side, condition))


def _rmse_matrix(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray]) -> np.ndarray:
    from scipy.spatial.distance import cdist

    x = np.stack(list(preds))
    y = np.stack(list(reals))
    errors: np.ndarray = cdist(x, y) / np.sqrt(x.shape[1])
    return errors


def _cosine_matrix(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray]) -> np.ndarray:
    x = np.stack(list(preds))
    y = np.stack(list(reals))
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    return ratio(x @ y.T, norms)


@metric(
    "rmse_var",
    label="RMSE variation",
    **ERROR,
    definition="Root mean squared difference over genes of the coefficient of variation (standard deviation over mean) "
    "of log1p expression",
    reference=PERTURBENCH,
    on="var",
    default=False,
)
@metric(
    "rmse_scaled_ref",
    label="RMSE scaled (real)",
    direction="lower",
    range=(0.0, 20.0),
    best=0.0,
    definition="Root mean squared difference over genes of mean expression, both sides standardised by the real cells "
    "of the covariate group, controls included, and clipped to 10",
    reference="A variant of rmse_scaled with one ruler for both sides",
    on="scaled_ref",
    default=False,
)
@metric(
    "rmse_scaled",
    label="RMSE scaled",
    direction="lower",
    range=(0.0, 20.0),
    best=0.0,
    definition="Root mean squared difference over genes of mean expression, each side standardised by its own cells of "
    "the covariate group, all its conditions and the controls, and clipped to 10",
    reference=PERTURBENCH,
    on="scaled",
    default=False,
)
@metric(
    "rmse_mean",
    label="RMSE mean",
    **ERROR,
    definition="Root mean squared difference over genes of the mean log1p expression",
    reference=PERTURBENCH,
    on="mean",
    pairwise=_rmse_matrix,
    ranked=True,
)
def rmse(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Root mean squared difference, (..., g) against (..., g)."""
    error: np.ndarray = np.sqrt(mse(pred, real))
    return error


@metric(
    "cosine_pca",
    label="Cosine PCA",
    **CORRELATION,
    definition="Cosine of the angle between predicted and real mean on the principal components of all real cells",
    reference=PERTURBENCH,
    on="pca_average",
    pairwise=_cosine_matrix,
    ranked=True,
    default=False,
)
@metric(
    "cosine_logfc_linear",
    label="Cosine logFC linear",
    **CORRELATION,
    definition="Cosine of the angle between predicted and real log fold change of mean expression, the logarithm of "
    "the data undone before taking means",
    reference="A variant of cosine_logfc; PerturBench takes means of log1p values",
    on="logfc_linear",
    default=False,
)
@metric(
    "cosine_logfc",
    label="Cosine logFC",
    **CORRELATION,
    definition="Cosine of the angle between predicted and real log fold change against the control",
    reference=PERTURBENCH,
    on="logfc",
    pairwise=_cosine_matrix,
    ranked=True,
)
def cosine(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Cosine similarity, (..., g) against (..., g); NaN where a vector is zero."""
    norms = np.linalg.norm(pred, axis=-1) * np.linalg.norm(real, axis=-1)
    return ratio((pred * real).sum(axis=-1), norms)


@metric(
    "mse_delta",
    label="MSE delta",
    **ERROR,
    definition="Mean squared difference over genes of the predicted and the real difference of mean log1p expression "
    "to the control",
    reference=CELL_EVAL,
    on="effect",
    default=False,
)
@metric(
    "mse",
    label="MSE",
    **ERROR,
    definition="Mean squared difference over genes of the mean log1p expression",
    reference=CELL_EVAL,
    on="mean",
    default=False,
)
def mse(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean squared difference, (..., g) against (..., g)."""
    error: np.ndarray = np.square(pred - real).mean(axis=-1)
    return error


@metric(
    "mae_delta",
    label="MAE delta",
    **ERROR,
    definition="Mean absolute difference over genes of the predicted and the real difference of mean log1p expression "
    "to the control",
    reference=CELL_EVAL,
    on="effect",
    default=False,
)
@metric(
    "mae",
    label="MAE",
    **ERROR,
    definition="Mean absolute difference over genes of the mean log1p expression",
    reference=CELL_EVAL,
    on="mean",
    default=False,
)
def mae(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean absolute difference, (..., g) against (..., g)."""
    error: np.ndarray = np.abs(pred - real).mean(axis=-1)
    return error


@metric(
    "pearson_delta",
    label="Pearson delta",
    **CORRELATION,
    definition="Pearson correlation over genes of the predicted and the real difference of mean log1p expression to "
    "the control; NaN for no effect",
    reference=CELL_EVAL,
    on="effect",
    default=False,
)
def pearson(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Pearson correlation, (..., g) against (..., g); NaN where a vector is constant."""
    return cosine(_centred(pred), _centred(real))


@metric(
    "r2_score",
    label="R2 scores",
    direction="higher",
    range=(-np.inf, 1.0),
    best=1.0,
    definition="1 minus the squared difference of t-scores over the variation of the predicted t-scores over genes: "
    "the prediction stands in the place of the truth, as published",
    reference=PERTURBENCH,
    on="scores",
    default=False,
)
def r2_score(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Coefficient of determination as published: the prediction plays the role of the truth.

    ``1 - sum (pred - real)^2 / sum (pred - mean(pred))^2``. Call it with swapped arguments for the usual definition.
    A constant `pred` gives 1 if `real` equals it and 0 otherwise, as in scikit-learn.
    """
    residual = np.square(pred - real).sum(axis=-1)
    unexplained = ratio(residual, np.square(_centred(pred)).sum(axis=-1))
    constant = np.where(residual == 0, 1.0, 0.0)
    return np.where(np.isnan(unexplained), constant, 1.0 - unexplained)


@metric(
    "r2_ref",
    label="R2 scores (real)",
    direction="higher",
    range=(-np.inf, 1.0),
    best=1.0,
    definition="Coefficient of determination over genes of the real t-scores by the predicted ones",
    reference="A variant of r2_score with the real data as the truth",
    on="scores",
    default=False,
)
def r2_ref(pred: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Coefficient of determination with `real` as the truth, (..., g) against (..., g)."""
    return r2_score(real, pred)


@metric(
    "variance_ratio",
    label="Variance ratio",
    **DESCRIPTION,
    definition="Variance over cells, summed over genes, of the prediction over that of the real cells: below 1 cells "
    "are too alike, above 1 too different; NaN for a single cell; a description, not a score",
    reference="Ours; whether a model misses the spread of cells, the question of PRiMeFlow",
    on="variance",
    default=False,
)
def variance_ratio(pred: np.ndarray, real: np.ndarray) -> float:
    """Total variance of predicted over real cells, (g,) against (g,); NaN where the real cells have none."""
    total = real.sum()
    return float(pred.sum() / total) if total > 0 else np.nan


def coefficient_of_variation(mean: np.ndarray, var: np.ndarray, n: int) -> np.ndarray:
    """Standard deviation (dividing by n) over mean; 0 where that is not finite.

    Parameters
    ----------
    mean, var, n
        Mean (g,) and variance (g,) with n - 1 (NaN for one cell), and number of cells.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(np.nan_to_num(var) * (n - 1) / n) / mean
    return np.where(np.isfinite(ratio), ratio, 0.0)


def logfc(mean: np.ndarray, control_mean: np.ndarray, *, pseudocount: float = 0.1) -> np.ndarray:
    """Log fold change as published, ``log2(mean + 0.1) - log2(control_mean + 0.1)`` of means of log1p values.

    Parameters
    ----------
    mean, control_mean
        (..., g) means over cells of log1p expression (not expression: the published definition).
    pseudocount
        Added to both.

    Returns
    -------
    np.ndarray
        (..., g); 0 where a mean lies below minus the pseudocount, which a prediction with negative values can have.
    """
    mean = np.asarray(mean, dtype=float)
    control_mean = np.asarray(control_mean, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(mean + pseudocount) - np.log2(control_mean + pseudocount)
    return np.where(np.isnan(change), 0.0, change)


def effect(mean: np.ndarray, control_mean: np.ndarray, *, rounding: float = 1e-6) -> np.ndarray:
    """Difference of two means, (g,) minus (g,); all 0 if no gene differs by more than rounding of the largest mean."""
    difference = mean - control_mean
    size = max(np.abs(mean).max(initial=0), np.abs(control_mean).max(initial=0))
    return difference if np.abs(difference).max(initial=0) > rounding * size else np.zeros_like(difference)


def scaled_mean(cells: np.ndarray, centre: np.ndarray, scale: np.ndarray, *, limit: float = 10.0) -> np.ndarray:
    """Mean over cells of ``(x - centre) / scale``, clipped to +-limit; (n, g) to (g,)."""
    clipped = np.clip((cells - centre) / scale, -limit, limit)
    mean: np.ndarray = clipped.mean(axis=0, dtype=np.float64)
    return mean


def _mean_expression(block: AnyMatrix) -> np.ndarray:
    """(g,) mean over cells of ``expm1``; values below 0, which predictions may have, count as 0."""
    if not sparse.issparse(block):
        mean: np.ndarray = np.expm1(np.maximum(block, 0.0)).mean(axis=0, dtype=np.float64)
        return mean
    values = np.expm1(np.maximum(block.data, 0.0))
    totals = np.bincount(block.indices, weights=values, minlength=block.shape[1])
    mean = totals / block.shape[0]
    return mean


def _pooled(moments: Sequence[Moments]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n - 1; 0 becomes 1) of several sets of cells taken together."""
    total = sum(n for *_, n in moments)
    centre = np.sum([n * mean for mean, _, n in moments], axis=0) / total
    squares = []
    for mean, var, n in moments:
        within = (n - 1) * np.nan_to_num(var)
        between = n * np.square(mean - centre)
        squares.append(within + between)
    scale = np.sqrt(np.sum(squares, axis=0) / max(total - 1, 1))
    return centre, np.where(scale == 0, 1.0, scale)


def _centred(x: np.ndarray) -> np.ndarray:
    centred: np.ndarray = x - x.mean(axis=-1, keepdims=True)
    return centred


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient; NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, np.true_divide(numerator, denominator))

"""Effects of perturbations, gene by gene, and how far the truth may lie from a prediction of them.

Intervals are split conformal with scaled residuals (Lei et al. 2018, arXiv:1604.04173, section 5.2): half-widths are
q s. What is known of the size of an error (the spread of the gene among control cells, the predicted effect, the
expected expression, the spread of several models) becomes the scale s by quantile regression, and q is the smallest
factor that covers the wanted share of genes of calibration conditions, which no model was fitted to. Genes with
large predicted effects have a q of their own, since few of them would hardly count among all.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from invirtuo.verbs.draw import Request, Sampled, drawn, means_of

if TYPE_CHECKING:
    import pandas as pd

    from invirtuo.design import Design
    from invirtuo.verbs.observed import ObservedMeans

__all__ = ["Calibration", "bounds"]

CALIBRATION_CELLS = 1000  # most cells that are drawn of a calibration condition
LARGE = 0.95  # quantile of predicted effects above which genes are calibrated by themselves
MOST_GENES = 3000  # for the regression; all count for q
LEAST = 0.01  # smallest scale, in standard deviations of the gene among control cells


class Calibration:
    """How a fitted model's intervals are made: from the conditions that its split held out for validation.

    Parameters
    ----------
    model
        A fitted model.
    seen
        Real cells: controls, and those of the known conditions.
    known
        The conditions that were held out for validation.
    level
        Share of genes that intervals cover.

    Raises
    ------
    ValueError
        If the fit held out no conditions for validation, or the level is no share.
    """

    def __init__(self, model: Sampled, seen: ObservedMeans | None, known: pd.DataFrame, level: float):
        if not 0 < level < 1:
            raise ValueError(f"effect_level is {level}; expected a share between 0 and 1, or None for no intervals")
        if seen is None or known.empty:
            raise ValueError(
                "intervals of effects are calibrated on conditions that the fit held out for validation, and there are "
                'none; fit with a split that has whole conditions as "val", or pass effect_level=None'
            )
        self.model, self.seen, self.known, self.level = model, seen, known, level

    def intervals(self, request: Request, means: np.ndarray) -> dict[str, np.ndarray]:
        """Effects on every gene and their bounds, (g, c) each.

        Parameters
        ----------
        request, means
            What was drawn, and the means (c, g) of its cells; calibration conditions are drawn as the request was.
        """
        model, known = self.model, self.known

        # means of the calibration conditions; their cells are not kept
        calibration = replace(request, table=known, n_cells=[min(*request.n_cells, CALIBRATION_CELLS)] * len(known))
        known_means = np.empty((len(known), means.shape[1]))
        for _ in means_of(drawn(model, calibration, "local", None), known_means):
            pass

        effect, half = bounds(self.seen, model.design, request.table, means[None], known, known_means[None], self.level)
        return {"effect": effect.T, "effect_low": (effect - half).T, "effect_high": (effect + half).T}


def bounds(
    observed: ObservedMeans,
    design: Design,
    table: pd.DataFrame,
    means: np.ndarray,
    known: pd.DataFrame | None = None,
    known_means: np.ndarray | None = None,
    level: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Effects of conditions as models predict them, and half-widths of their intervals.

    Parameters
    ----------
    observed
        Control cells of all groups, and the cells of the calibration conditions.
    table, means
        The c conditions, and the means (m, c, g) of the cells that each of m models drew for them.
    known, known_means
        The same of the calibration conditions.
    level
        Share of the genes of calibration conditions that intervals cover; None gives no intervals.

    Returns
    -------
    (c, g) and (c, g), NaN without a level.
    """
    effect, predictors = _error_predictors(observed, design, table, means)
    if level is None or known is None or known_means is None:
        return effect, np.full_like(effect, np.nan)

    # scale of errors, learned on the calibration conditions
    known_effect, known_predictors = _error_predictors(observed, design, known, known_means)
    error = np.abs(observed.effect(design, known) - known_effect)
    weights = _quantile_regression(error, known_predictors, level)
    scale = _scale(predictors, weights)
    known_scale = _scale(known_predictors, weights)

    # a factor q for genes with large predicted effects, and one for the others
    edge = np.quantile(np.abs(known_effect), LARGE)
    known_is_large = np.abs(known_effect) >= edge
    is_large = np.abs(effect) >= edge
    half = np.zeros_like(effect)
    for large in (True, False):
        known_genes = known_is_large == large
        genes = is_large == large
        half[genes] = _factor(error[known_genes], known_scale[known_genes], level) * scale[genes]
    return effect, half


def _error_predictors(
    observed: ObservedMeans, design: Design, table: pd.DataFrame, means: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the models' effects (c, g), and four predictors of the size of their errors (c, g, 4)."""
    control, sd = observed.of_control(design, table)
    mean = np.mean(means, axis=0)
    spread = np.std(means, axis=0, ddof=1) if len(means) > 1 else np.zeros_like(mean)
    effect = mean - control
    root_mean = np.sqrt(np.maximum(mean, 0))
    return effect, np.stack([sd, np.abs(effect), root_mean, spread], axis=-1)


def _quantile_regression(error: np.ndarray, predictors: np.ndarray, level: float) -> np.ndarray:
    """(4,) weights of the predictors (c, g, 4) of the quantile of errors (c, g)."""
    from sklearn.linear_model import QuantileRegressor

    x = predictors.reshape(-1, predictors.shape[-1])
    y = error.ravel()
    rows = np.flatnonzero(np.isfinite(y) & (x[:, 0] > 0))
    rows = np.random.default_rng(0).permutation(rows)[:MOST_GENES]
    if not len(rows):
        return np.zeros(x.shape[1])
    regressor = QuantileRegressor(quantile=level, alpha=0, fit_intercept=False)
    weights: np.ndarray = regressor.fit(x[rows], y[rows]).coef_
    return weights


def _scale(predictors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    sd = predictors[..., 0]
    scale: np.ndarray = np.maximum(predictors @ weights, LEAST * sd)
    return scale


def _factor(error: np.ndarray, scale: np.ndarray, level: float) -> float:
    """Smallest factor by which the scale covers a share of the errors; genes that cannot vary are left out."""
    ratio = np.sort(error / np.where(scale > 0, scale, np.nan))
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio):
        return 0.0
    rank = math.ceil(level * (len(ratio) + 1))  # of n + 1: finite-sample coverage
    return float(ratio[min(rank, len(ratio)) - 1])

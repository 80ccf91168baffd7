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
        asked = replace(request, table=known, n_cells=min(request.n_cells, CALIBRATION_CELLS))
        known_means = np.empty((len(known), means.shape[1]))
        for _ in means_of(drawn(model, asked, "local", None), known_means):
            pass
        drawn_means = (means[None], known, known_means[None])
        effect, half = bounds(self.seen, model.design, request.table, *drawn_means, self.level)
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
    effect, told = _told(observed, design, table, means)
    if level is None or known is None or known_means is None:
        return effect, np.full_like(effect, np.nan)
    guess, known_told = _told(observed, design, known, known_means)
    error = np.abs(observed.effect(design, known) - guess)
    weights = _regressed(error, known_told, level)
    scale, known_scale = _scale(told, weights), _scale(known_told, weights)
    edge, half = np.quantile(np.abs(guess), LARGE), np.zeros_like(effect)
    for large in (True, False):
        own, new = (np.abs(guess) >= edge) == large, (np.abs(effect) >= edge) == large
        half[new] = _factor(error[own], known_scale[own], level) * scale[new]
    return effect, half


def _told(observed: ObservedMeans, design: Design, table, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the models' effects (c, g), and what tells the size of their errors (c, g, 4)."""
    control, sd = observed.of_control(design, table)
    mean = np.mean(means, axis=0)
    spread = np.std(means, axis=0, ddof=1) if len(means) > 1 else np.zeros_like(mean)
    effect = mean - control
    return effect, np.stack([sd, np.abs(effect), np.sqrt(np.maximum(mean, 0)), spread], axis=-1)


def _regressed(error: np.ndarray, told: np.ndarray, level: float) -> np.ndarray:
    """(4,) weights by which the quantile of errors (c, g) grows with what tells it."""
    from sklearn.linear_model import QuantileRegressor

    x, y = told.reshape(-1, told.shape[-1]), error.ravel()
    rows = np.flatnonzero(np.isfinite(y) & (x[:, 0] > 0))
    rows = np.random.default_rng(0).permutation(rows)[:MOST_GENES]
    if not len(rows):
        return np.zeros(x.shape[1])
    return QuantileRegressor(quantile=level, alpha=0, fit_intercept=False).fit(x[rows], y[rows]).coef_


def _scale(told: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.maximum(told @ weights, LEAST * told[..., 0])


def _factor(error: np.ndarray, scale: np.ndarray, level: float) -> float:
    """Smallest factor by which the scale covers a share of the errors; genes that cannot vary are left out."""
    ratio = np.sort(error / np.where(scale > 0, scale, np.nan))
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio):
        return 0.0
    return float(ratio[min(math.ceil(level * (len(ratio) + 1)), len(ratio)) - 1])

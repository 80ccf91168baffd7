"""The six metrics of the Virtual Cell Challenge 2026, on raw counts, condition by condition.

Names are unique among all metrics (`pds_cosine` is that of 2025); :func:`invirtuo.metrics.vcc2026` gives the official
ones. Genes that a perturbation targets do not count.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from invirtuo.metrics.measures.counts import CountTests, control_bulk, of_tests
from invirtuo.metrics.measures.mean import ratio
from invirtuo.metrics.pair import Pair
from invirtuo.metrics.registry import ERROR, SHARE, metric

__all__ = ["MIN_GENES", "OFFICIAL", "VCC2026", "expression_errors"]

CHALLENGE: dict[str, Any] = {"reference": "Virtual Cell Challenge 2026; cell-eval2 0.20", "default": False}
MIN_GENES = 10  # real DE genes below which errors of fold changes are not taken
PURITY = 0.9  # share of right signs that a ranking must keep

OFFICIAL = {  # name in METRICS to official name
    "pds_cosine_panel": "pds_cosine",
    "expr_mse_unbiased_capped_norm": "expr_mse_unbiased_capped_norm",
    "de_wilcoxon_direction_fidelity_yield_raw": "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw": "de_wilcoxon_direction_reach_raw",
    "de_wilcoxon_sig_jaccard": "de_wilcoxon_sig_jaccard",
    "de_wilcoxon_lfc_nmae": "de_wilcoxon_lfc_nmae",
}
VCC2026 = tuple(OFFICIAL)


@metric(
    "pds_cosine_panel",
    label="PDS cosine (2026)",
    **SHARE,
    definition="1 minus the share of the other real effects of the group closer (cosine) to the predicted effect than "
    "its own, effects of log pseudobulks of counts, without the genes that any perturbation of the group targets; ties "
    "count half",
    **CHALLENGE,
    relative=True,
)
def pds_cosine_panel(pair: Pair, group: str) -> np.ndarray:
    """Perturbation discrimination of a group, (P,): 0.5 for no effect; 1 if there is one perturbation only."""
    names = pair.names(group)
    counted = np.all([pair.counted_genes(name) for name in names], axis=0)
    if not counted.any():
        raise ValueError(f"group {group!r}: every gene is the target of a perturbation; none is left to compare")
    real, pred = (_effects(pair, side, group)[:, counted] for side in ("real", "pred"))

    # distance of every prediction (row) to every real effect; 1 from or to no effect
    norms = np.outer(np.linalg.norm(pred, axis=1), np.linalg.norm(real, axis=1))
    cosine = np.where(norms > 0, ratio(pred @ real.T, norms), 0.0)
    distance = np.clip(1 - cosine, 0.0, 2.0)
    own = np.diagonal(distance)[:, None]
    closer = (distance < own).sum(axis=1) + ((distance == own).sum(axis=1) - 1) / 2
    return np.asarray(1 - closer / max(len(names) - 1, 1))


def _effects(pair: Pair, side: Literal["pred", "real"], group: str) -> np.ndarray:
    """(P, g) pseudobulks of a group minus that of the control cells."""
    control = control_bulk(pair, side, group).profile
    return np.stack([found.profile - control for found in pair.view("bulk", side, group)])


@metric(
    "expr_mse_unbiased_capped_norm",
    label="Expression error",
    direction="lower",
    range=(-np.inf, np.inf),
    best=0.0,
    definition="Squared error of the log pseudobulk of counts over the squared distance of the real one from the "
    "control, both summed over the perturbations of the group and without the noise of few cells; below 0 where a "
    "prediction is closer than noise allows",
    **CHALLENGE,
)
def expression_error(pair: Pair, group: str) -> np.ndarray:
    """Error of each perturbation over the mean distance of all, (P,), so that its mean is the published ratio."""
    error, distance = expression_errors(pair, group)
    mean_distance = distance.mean()
    return error / mean_distance if mean_distance > 0 else np.full(len(error), np.nan)


def expression_errors(pair: Pair, group: str) -> tuple[np.ndarray, np.ndarray]:
    """Squared error of predicted pseudobulks, and squared distance of real ones from the control, (P,) each, by gene.

    The noise of both sides is taken off. Of a prediction at most the noise of the real cells counts, and for the whole
    group at most what the predictions differ between perturbations: scatter of cells that cancels in the sum gains
    nothing.
    """
    control = control_bulk(pair, "real", group)
    real, pred = (list(pair.view("bulk", side, group)) for side in ("real", "pred"))
    profiles = np.stack([found.profile for found in pred])
    truth = np.stack([found.profile for found in real])
    counted = np.stack([pair.counted_genes(name) for name in pair.names(group)])
    n_genes = counted.sum(axis=1)

    # what each prediction claims as noise, at most what all of them have to give
    real_noise = np.array([found.noise for found in real])
    claim = np.minimum([found.noise for found in pred], real_noise)
    claimed = float((claim / n_genes).sum())
    granted = min(1.0, _spread(profiles, counted, n_genes) / claimed) if claimed > 0 else 1.0

    error = (counted * np.square(profiles - truth)).sum(axis=1)
    distance = (counted * np.square(truth - control.profile)).sum(axis=1)
    error -= granted * claim + real_noise
    distance -= real_noise + control.noise
    return error / n_genes, distance / n_genes


def _spread(profiles: np.ndarray, counted: np.ndarray, n_genes: np.ndarray) -> float:
    """Squared distance of (P, g) profiles from their mean, per gene; genes that count for one only are left out."""
    weights = counted / n_genes[:, None]
    weights = np.where(counted.sum(axis=0) > 1, weights, 0.0)
    with np.errstate(invalid="ignore"):
        mean = (weights * profiles).sum(axis=0) / weights.sum(axis=0)
    return float((weights * np.square(profiles - np.nan_to_num(mean))).sum())


@metric(
    "de_wilcoxon_direction_fidelity_yield_raw",
    label="DE direction fidelity",
    **SHARE,
    definition="Predicted DE genes whose fold change has the real sign, over the larger of the numbers of predicted "
    "and real DE genes; NaN if there are none of both",
    **CHALLENGE,
)
@of_tests()
def direction_fidelity(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Right signs among the genes that are called, with a penalty for calling too few."""
    called = pred.significant & real.tested & (real.lfc != 0) & counted
    n_real = int((real.significant & counted).sum())
    n_right = int((np.sign(pred.lfc) == np.sign(real.lfc))[called].sum())
    largest = max(int(called.sum()), n_real)
    return n_right / largest if largest else np.nan


@metric(
    "de_wilcoxon_direction_reach_raw",
    label="DE direction reach",
    **SHARE,
    definition="Share of the real DE genes that one can walk down, the predicted strongest first, with 90 % of the "
    "signs right; NaN without real DE genes",
    **CHALLENGE,
)
@of_tests()
def direction_reach(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """The deepest place in the predicted order of real DE genes up to which 90 % of the signs are right."""
    found = np.flatnonzero(real.significant & counted)
    if not len(found):
        return np.nan
    pool = found[pred.tested[found]]
    by_change = pool[np.argsort(-np.abs(pred.lfc[pool]), kind="stable")]
    order = by_change[np.lexsort((pred.p_value[by_change], pred.p_adj[by_change]))]
    order = order[real.lfc[order] != 0]
    right = np.cumsum(np.sign(pred.lfc[order]) == np.sign(real.lfc[order]))
    deep = np.flatnonzero(right / np.arange(1, len(order) + 1) >= PURITY)
    return (deep[-1] + 1) / len(found) if len(deep) else 0.0


@metric(
    "de_wilcoxon_sig_jaccard",
    label="DE Jaccard",
    **SHARE,
    definition="DE genes of both sides over DE genes of either; 1 if there are none",
    **CHALLENGE,
)
@of_tests()
def significant_jaccard(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Jaccard index of the predicted and the real DE genes; 1 if both are empty."""
    either = (pred.significant | real.significant) & counted
    both = pred.significant & real.significant & counted
    return both.sum() / either.sum() if either.any() else 1.0


@metric(
    "de_wilcoxon_lfc_nmae",
    label="DE LFC error",
    **ERROR,
    definition="Absolute error of the predicted log2 fold changes over the absolute real ones, summed over the real DE "
    "genes; NaN for fewer than 10",
    **CHALLENGE,
)
@of_tests()
def lfc_error(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Error of fold changes over the real DE genes, relative to doing nothing; NaN for fewer than 10 such genes."""
    gate = real.significant & counted
    if gate.sum() < MIN_GENES:
        return np.nan
    predicted = np.where(pred.tested, pred.lfc, 0.0)[gate]
    truth = real.lfc[gate]
    return float(np.abs(predicted - truth).sum() / np.abs(truth).sum())

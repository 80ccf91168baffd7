"""Metrics on differential expression: t-scores per gene against the control cells, and the genes that stand out.

Genes are in alphabetical order, on which the published tie rule depends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invirtuo.metrics.cells import Side
from invirtuo.metrics.measures.mean import PERTURBENCH
from invirtuo.metrics.pair import Moments, Pair, view
from invirtuo.metrics.registry import SHARE, metric

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["p_values", "signed_log_p", "t_scores", "top_degs", "top_k_recall"]

TOP = 50  # genes that count as the strongest


@view("scores")
def scores_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) t-score of each gene against the control cells of the group."""
    return t_scores(pair.moments(side, condition), pair.control_moments(side, pair.group_of(condition)))


@view("scores_floor")
def scores_floor_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) t-score of each gene, the variance of the perturbed cells not below that of the controls."""
    mean, var, n = pair.moments(side, condition)
    control = pair.control_moments(side, pair.group_of(condition))
    return t_scores((mean, np.fmax(var, control[1]), n), control)


@view("pvals")
def pvals_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) two-sided p-value of each gene against the control cells of the group."""
    return p_values(pair.moments(side, condition), pair.control_moments(side, pair.group_of(condition)))


@view("logp")
def logp_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) signed logarithm of the adjusted p-value of each gene."""
    return signed_log_p(pair.see("pvals", side, condition), pair.see("scores", side, condition))


def _recall_matrix(preds: Sequence[np.ndarray], reals: Sequence[np.ndarray]) -> np.ndarray:
    """All pairs at once: shared members of two families of gene sets."""
    if len(reals[0]) <= TOP:
        return np.full((len(preds), len(reals)), np.nan)
    pred_tops = np.stack([_among_top(scores, TOP) for scores in preds]).astype(float)
    real_tops = np.stack([_among_top(scores, TOP) for scores in reals]).astype(float)
    recall: np.ndarray = pred_tops @ real_tops.T / real_tops.sum(axis=1)
    return recall


@metric(
    "deg_recall",
    label="DEG recall",
    **SHARE,
    definition="Share of the 50 genes with the largest absolute t-score that are among the 50 of the prediction",
    reference=PERTURBENCH,
    on="scores",
    pairwise=_recall_matrix,
    ranked=True,
)
@metric(
    "deg_recall_floor",
    label="DEG recall (floor)",
    **SHARE,
    definition="deg_recall of t-scores in which each gene varies at least as much among the perturbed cells as among "
    "the control cells, on both sides: predictions without variance keep their scores",
    reference="A variant of deg_recall for predictions with little or no variance",
    on="scores_floor",
    default=False,
)
@metric(
    "deg_recall_lfc",
    label="DEG recall (logFC)",
    **SHARE,
    definition="Share of the 50 genes with the largest absolute log fold change that are among the 50 of the "
    "prediction; unlike deg_recall it does not depend on the variance of the predicted cells",
    reference="A variant of deg_recall for predictions without variance",
    on="logfc",
    default=False,
)
def top_k_recall(pred: np.ndarray, real: np.ndarray, k: int = TOP) -> float:
    """Share of the k largest absolute scores that both vectors have in common, up and down mixed.

    Parameters
    ----------
    pred, real
        (g,) scores, genes in alphabetical order: of equal scores the later gene counts as larger.
    k
        Number of genes. NaN if there are no more: the top k of k genes are all of them, whatever was predicted.
    """
    if k >= len(real):
        return np.nan
    return float((_among_top(pred, k) & _among_top(real, k)).sum() / k)


def t_scores(group: Moments, control: Moments) -> np.ndarray:
    """Welch's t with the number of perturbed cells on both sides (scanpy ``t-test_overestim_var``).

    ``(mean_p - mean_c) / sqrt(var_p / n_p + var_c / n_p)``. 0 where it is not finite: no variance, or one cell only.

    Parameters
    ----------
    group, control
        Mean (g,), variance (g,) with n - 1, and number of cells of the perturbed and the control cells.

    Returns
    -------
    np.ndarray
        (g,), rounded to float32 as published, so that ties agree.
    """
    mean, var, n = group
    control_mean, control_var, _ = control
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = ((mean - control_mean) / np.sqrt(var / n + control_var / n)).astype(np.float32)
    return np.where(np.isfinite(scores), scores, 0.0).astype(np.float64)


def p_values(group: Moments, control: Moments) -> np.ndarray:
    """Two-sided p-values of :func:`t_scores`, Welch's degrees of freedom with n_p on both sides; 1 if not finite."""
    from scipy import stats

    mean, var, n = group
    control_mean, control_var, _ = control
    # squared standard errors of both means, and Welch's degrees of freedom
    error, control_error = var / n, control_var / n
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (np.square(error) + np.square(control_error)) / (n - 1)
        freedom = np.square(error + control_error) / spread
        t = (mean - control_mean) / np.sqrt(error + control_error)
    known = np.isfinite(t) & np.isfinite(freedom)
    pvals = np.ones_like(t)
    pvals[known] = 2 * stats.t.sf(np.abs(t[known]), freedom[known])
    return pvals


def signed_log_p(pvals: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """``-ln(adjusted p + 1e-37) * sign(score)`` with Benjamini-Hochberg adjustment over genes; (g,) to (g,)."""
    from scipy import stats

    signed: np.ndarray = -np.log(stats.false_discovery_control(pvals) + 1e-37) * np.sign(scores)
    return signed


def top_degs(pair: Pair, condition: str, n: int = 20, *, compat_deg_index: bool = False) -> np.ndarray:
    """Positions in `Pair.genes` of the n genes with the largest absolute t-score in the real data.

    Parameters
    ----------
    pair, condition
        Where to look.
    n
        Number of genes.
    compat_deg_index
        Reproduce a defect of the published code, which takes positions in the alphabetical order of genes for
        positions in the order of the file, and so other genes unless the file is in alphabetical order.
    """
    largest = _largest(pair.see("scores", "real", condition), n)
    return pair.file_order[largest] if compat_deg_index else largest


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest absolute scores; of equal ones the later comes first."""
    return np.argsort(np.abs(scores), kind="stable")[::-1][:k]


def _among_top(scores: np.ndarray, k: int) -> np.ndarray:
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[_largest(scores, k)] = True
    return chosen

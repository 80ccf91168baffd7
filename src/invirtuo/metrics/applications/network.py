"""How well scores of edges recover a known graph; matrices are (d, d), [regulator, target]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["column_auroc", "correlation_scores", "edge_recovery", "edge_sets", "random_scores"]


def edge_recovery(
    scores: np.ndarray, truth: np.ndarray, *, regulators: Sequence[int] | None = None, diagonal: bool = False
) -> dict[str, float]:
    """AUROC, average precision and early precision ratio of scored edges.

    Parameters
    ----------
    scores
        (d, d), large for an edge.
    truth
        (d, d), not 0 where there is one.
    regulators
        Rows that count; None: all.
    diagonal
        Whether an effect of a gene on itself counts.

    Returns
    -------
    ``auroc``, ``auprc`` (average precision), ``epr`` (precision among the E best edges over the density, E being the
    number of true edges), ``density``, ``n_edges``.

    Raises
    ------
    ValueError
        If there is no edge, or nothing but edges.

    References
    ----------
    Pratapa et al. 2020 (BEELINE), doi:10.1038/s41592-019-0690-6.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    counted = _counted(truth, regulators, diagonal)
    y = np.asarray(truth)[counted] != 0
    s = np.asarray(scores, dtype=float)[counted]
    n = int(y.sum())
    if not 0 < n < len(y):
        raise ValueError(f"{n} of {len(y)} possible edges are true; expected some that are and some that are not")
    # early precision: of the n best scored edges; edges of the n-th score share what they leave open
    best = np.argsort(-s, kind="stable")[:n]
    is_above = s > s[best[-1]]
    is_tied = s == s[best[-1]]
    hits = y[is_above].sum() + y[is_tied].mean() * (n - is_above.sum())
    density = n / len(y)
    auroc = roc_auc_score(y, s)
    auprc = average_precision_score(y, s)
    epr = float(hits / n / density)
    return {"auroc": float(auroc), "auprc": float(auprc), "epr": epr, "density": density, "n_edges": float(n)}


def edge_sets(
    found: np.ndarray, truth: np.ndarray, *, regulators: Sequence[int] | None = None, diagonal: bool = False
) -> dict[str, float]:
    """True and false positive rate of a set of edges, and its structural Hamming distance to the graph."""
    counted = _counted(truth, regulators, diagonal)
    y = np.asarray(truth)[counted] != 0
    x = np.asarray(found)[counted] != 0
    tpr = float(x[y].mean()) if y.any() else float("nan")
    fpr = float(x[~y].mean()) if not y.all() else float("nan")
    return {"tpr": tpr, "fpr": fpr, "hamming": float((x != y).sum()), "n_found": float(x.sum())}


def random_scores(truth: np.ndarray, rng: np.random.Generator, *, degree_matched: bool = False) -> np.ndarray:
    """Scores without knowledge; degree-matched ones know how many targets each regulator has, and no more."""
    noise = rng.random(np.shape(truth))
    if not degree_matched:
        return noise
    degree = (np.asarray(truth) != 0).sum(axis=1, keepdims=True)
    return rng.binomial(1, degree / np.shape(truth)[1], np.shape(truth)) + noise * 1e-3


def correlation_scores(x: np.ndarray, *, later: np.ndarray | None = None) -> np.ndarray:
    """Absolute Pearson correlation of (n, d); with `later`, of each variable with later states of all."""
    y = x if later is None else later
    a = np.asarray(x, float)
    b = np.asarray(y, float)
    a = a - a.mean(axis=0)
    b = b - b.mean(axis=0)
    squares = np.outer((a**2).sum(axis=0), (b**2).sum(axis=0))
    scale = np.sqrt(squares)
    correlations = np.divide(a.T @ b, scale, out=np.zeros_like(scale), where=scale > 0)
    scores: np.ndarray = np.abs(correlations)
    return scores


def column_auroc(scores: np.ndarray, is_regulator: np.ndarray) -> float:
    """AUROC of a score for each gene for telling regulators from other genes."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(np.asarray(is_regulator, bool), scores))


def _counted(truth: np.ndarray, regulators: Sequence[int] | None, diagonal: bool) -> np.ndarray:
    counted = np.ones(np.shape(truth), dtype=bool)
    if regulators is not None:
        counted[:] = False
        counted[list(regulators)] = True
    if not diagonal:
        np.fill_diagonal(counted, False)
    return counted

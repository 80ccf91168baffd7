"""Metrics of what makes a population look real: genes that vary together, empty genes, spread, and a judge that learns.

Means and principal components hardly tell cells whose genes were drawn one by one from real ones; these metrics do.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse, stats

from invirtuo.cells.values import AnyMatrix
from invirtuo.metrics.cells import Side
from invirtuo.metrics.numerics.streamed import Streamed, mean_of_genes, squared
from invirtuo.metrics.pair import Pair, view
from invirtuo.metrics.registry import ERROR, metric

__all__ = ["c2st", "correlation_error", "rmse_logvar", "zeros_distance"]

N_VARIABLE = 200  # genes whose correlations are compared
LEAST = 1e-3  # variance that counts as none
FOLDS = 5
OURS = "Ours; the usual comparisons of count generators, CFGen, arXiv:2407.11734, appendix G"


@view("correlations")
def correlations_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(k, k) correlations between the most variable genes of the real cells.

    Genes that are constant here have NaN outside of the diagonal; all is NaN for a single cell.
    """
    genes = pair.once("real", ("variable genes",), lambda: _most_variable(pair.real_matrix()))
    cells = pair.cells(side, condition)[:, genes]
    if len(cells) < 2:
        return np.full((len(genes),) * 2, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = np.corrcoef(cells, rowvar=False, dtype=np.float64).reshape((len(genes),) * 2)
    np.fill_diagonal(found, 1.0)
    return found


@view("zeros")
def zeros_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(n,) share of genes that are 0 in each cell."""
    cells = pair.stored(side, condition)
    filled = cells.astype(bool).sum(axis=1) if sparse.issparse(cells) else np.count_nonzero(cells, axis=1)
    empty: np.ndarray = 1 - np.asarray(filled).ravel() / cells.shape[1]
    return empty


@view("logvar")
def logvar_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) decimal logarithm of the variance over cells, of at least 0.001; NaN for a single cell."""
    logvar: np.ndarray = np.log10(np.maximum(pair.moments(side, condition)[1], LEAST))
    return logvar


@metric(
    "correlation_error",
    label="Correlation error",
    direction="lower",
    range=(0.0, 2.0),
    best=0.0,
    definition=f"Mean absolute difference of the correlations between the {N_VARIABLE} genes that vary most over all "
    "real cells; genes constant in the real cells of the condition are left out, in the prediction they correlate with "
    "none; depends on the numbers of cells; NaN for a single cell",
    reference=OURS,
    on="correlations",
    default=False,
)
def correlation_error(pred: np.ndarray, real: np.ndarray) -> float:
    """Mean absolute difference over pairs of genes, (k, k) against (k, k); NaN if fewer than two genes vary."""
    rows, columns = np.triu_indices(len(real), 1)
    known = np.isfinite(real[rows, columns])
    if not known.any() or np.isnan(np.diagonal(pred)).any():
        return np.nan
    # a gene that is constant in the prediction correlates with none
    errors = np.abs(np.nan_to_num(pred[rows, columns]) - real[rows, columns])
    return float(errors[known].mean())


@metric(
    "zeros_distance",
    label="Zeros distance",
    direction="lower",
    range=(0.0, 1.0),
    best=0.0,
    definition="1-Wasserstein distance between the shares of empty genes of predicted and of real cells",
    reference=OURS,
    on="zeros",
    default=False,
)
def zeros_distance(pred: np.ndarray, real: np.ndarray) -> float:
    """Mean distance between the sorted shares of zeros of (n,) and (m,) cells."""
    return float(stats.wasserstein_distance(pred, real))


@metric(
    "rmse_logvar",
    label="RMSE log variance",
    **ERROR,
    definition="Root mean squared difference over genes of the decimal logarithm of the variance over cells of log1p "
    "expression, variances below 0.001 counting as that; NaN for a single cell",
    reference=OURS,
    on="logvar",
    default=False,
)
def rmse_logvar(pred: np.ndarray, real: np.ndarray) -> float:
    """Root mean squared difference, (g,) against (g,)."""
    return float(np.sqrt(np.square(pred - real).mean()))


@metric(
    "c2st",
    label="Classifier test",
    direction="lower",
    range=(0.0, 1.0),
    best=0.0,
    definition="How well a logistic regression on principal components and their squares tells predicted from real "
    "cells it has not seen: 2 AUC - 1 in five folds, 0 where it does no better than a guess; axes from real cells that "
    "are not scored; NaN for fewer than five cells",
    reference="Classifier two-sample test, Lopez-Paz and Oquab 2017, arXiv:1610.06545",
    on="pca_disjoint",
    default=False,
)
def c2st(pred: np.ndarray, real: np.ndarray) -> float:
    """Held-out ``2 AUC - 1``, at least 0, between (n, d) and (m, d) cells, rows in random order."""
    if min(len(pred), len(real)) < FOLDS:
        return np.nan
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # squares let a linear classifier see differences of spread
    cells = np.concatenate([pred, real]) / np.maximum(real.std(axis=0), 1e-12)
    features = np.concatenate([cells, np.square(cells - cells.mean(axis=0))], axis=1)
    label = np.repeat([0, 1], [len(pred), len(real)])
    fold = np.concatenate([np.arange(len(pred)), np.arange(len(real))]) % FOLDS
    score = np.empty(len(label))
    for k in range(FOLDS):
        held_out = fold == k
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        model.fit(features[~held_out], label[~held_out])
        score[held_out] = model.decision_function(features[held_out])
    return max(0.0, 2 * float(roc_auc_score(label, score)) - 1)


def _most_variable(cells: AnyMatrix | Streamed) -> np.ndarray:
    """Positions of the genes with the largest variance over all real cells, sorted."""
    variance = mean_of_genes(squared(cells)) - mean_of_genes(cells) ** 2
    return np.sort(np.argsort(-variance, kind="stable")[:N_VARIABLE])

"""Metrics on differential expression by the Wilcoxon rank-sum test, as cell-eval defines them.

A table of tests is made once for each condition and side; the metrics are functions of two such tables.
"""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse, stats

from invirtuo.cells.values import AnyMatrix
from invirtuo.metrics.cells import Side
from invirtuo.metrics.measures.mean import CELL_EVAL, pearson
from invirtuo.metrics.numerics.streamed import dense
from invirtuo.metrics.pair import Pair, view
from invirtuo.metrics.registry import CORRELATION, DESCRIPTION, SHARE, metric

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


__all__ = [
    "DETable",
    "area",
    "de_direction_match",
    "de_overlap",
    "de_pr_auc",
    "de_precision",
    "de_recall",
    "de_roc_auc",
    "de_spearman_lfc",
    "de_spearman_lfc_finite",
    "log2_fold_change",
    "rank_sum",
    "size_correlation",
    "spearman",
]

LEVEL = 0.05  # significance of the adjusted p-value
CELLS_AT_ONCE = 8192  # of several conditions that are tested in one call
RANK_SUM: dict[str, Any] = {
    "reference": CELL_EVAL,
    "on": "wilcoxon",
    "default": False,
}  # metrics on two tables of tests


class DETable(NamedTuple):
    """Differential expression of one condition against the control cells of its group, gene by gene.

    Parameters
    ----------
    lfc
        (g,) log2 fold change, infinite where one mean is 0.
    p_value
        (g,) two-sided p-value.
    statistic
        (g,) U of the perturbed cells.
    fdr
        (g,) p-values adjusted within the condition (Benjamini-Hochberg).
    """

    lfc: np.ndarray
    p_value: np.ndarray
    statistic: np.ndarray
    fdr: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        """(g,) whether the adjusted p-value, rounded to float32 as published, is below 0.05."""
        return self.fdr.astype(np.float32) < LEVEL

    def top(self, k: int | None = None) -> np.ndarray:
        """Positions of the significant genes by falling absolute LFC; of ties first smaller p, then earlier gene.

        Differs: the published order of ties is undefined.
        """
        found = np.flatnonzero(self.significant)
        return found[np.lexsort((self.p_value[found], -np.abs(self.lfc[found])))][:k]


@view("wilcoxon")
def wilcoxon_view(pair: Pair, side: Side, condition: str) -> DETable:
    """Table of rank-sum tests, made together with those of the other scored conditions of the group."""
    group = pair.group_of(condition)
    known: dict[str, tuple[np.ndarray, np.ndarray]] = pair.once(side, ("rank sum", group), dict)
    missing = [name for name in pair.names(group) if name not in known]
    for names in batches(pair, side, missing):
        found = rank_sum([pair.stored(side, name) for name in names], pair.stored_control(side, group))
        known.update(zip(names, zip(*found, strict=True), strict=True))
    p_value, statistic = known[condition]
    lfc = log2_fold_change(pair.moments(side, condition)[0], pair.control_moments(side, group)[0])
    return DETable(lfc, p_value, statistic, stats.false_discovery_control(p_value))


def batches(pair: Pair, side: Side, names: Sequence[str]) -> list[list[str]]:
    """Conditions that are tested together, in their order: few enough cells to be in memory, or one condition."""
    found: list[list[str]] = []
    n_cells = 0
    for name in names:
        size = pair.n_cells(side, name)
        if not found or n_cells + size > CELLS_AT_ONCE:
            found.append([])
            n_cells = 0
        found[-1].append(name)
        n_cells += size
    return found


def rank_sum(groups: Sequence[AnyMatrix], control: AnyMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided Wilcoxon rank-sum test (Mann-Whitney U) of P groups of cells against the same control cells.

    Normal approximation with correction for ties and continuity, as ``scipy.stats.mannwhitneyu(method="asymptotic")``.
    Values are compared in float32, so that ties do not depend on how a file stores them.

    Parameters
    ----------
    groups
        P matrices (n, g), CSR or dense.
    control
        (m, g), CSR or dense.

    Returns
    -------
    p_values
        (P, g); 1 where all values are equal.
    statistics
        (P, g), U of the group: the number of pairs in which its cell has the larger value, ties counting half.

    Examples
    --------
    >>> p, u = rank_sum([np.array([[1.0, 0.0], [2.0, 0.0]])], np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    >>> u.tolist(), p.round(3).tolist()
    ([[5.5, 3.0]], [[0.224, 1.0]])
    """
    import anndata

    blocks = [control, *groups]
    sizes = np.array([block.shape[0] for block in blocks])

    # the test takes one AnnData with a label for each cell
    labels = np.repeat([f"{i:06d}" for i in range(len(blocks))], sizes)
    index = pd.RangeIndex(len(labels)).astype(str)
    adata = anndata.AnnData(_stack(blocks), obs=pd.DataFrame({"group": labels}, index=index))
    with _quiet():
        import joblib
        from illico import asymptotic_wilcoxon

        table = asymptotic_wilcoxon(
            adata, is_log1p=True, group_keys="group", reference="000000", n_threads=joblib.effective_n_jobs(-1)
        )

    def of_groups(name: str) -> np.ndarray:
        """(P, g) values of a column; the first group is the control."""
        wide = table[name].unstack("pert").sort_index(axis=1)
        values: np.ndarray = wide.loc[adata.var_names].to_numpy().T
        return values[1:].copy()

    p_values, statistics = of_groups("p_value"), of_groups("statistic")
    centre = sizes[0] * sizes[1:, None] / 2
    p_values[np.abs(statistics - centre) <= 0.5] = 1.0  # illico applies the continuity correction past the centre
    return p_values, statistics


def log2_fold_change(mean: np.ndarray, control_mean: np.ndarray) -> np.ndarray:
    """``log2(expm1(mean) / expm1(control_mean))`` of means of log1p values; (g,) to (g,).

    0 where both are 0, plus or minus infinity where one of them is. Means below 0, which a prediction may have, count
    as 0.
    """
    top, bottom = (np.expm1(np.maximum(x, 0.0)) for x in (mean, control_mean))
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(top) - np.log2(bottom)
    return np.where((top == 0) & (bottom == 0), 0.0, change)


def de_overlap(pred: DETable, real: DETable, k: int | None = None, *, denominator: Literal["q", "k"] = "q") -> float:
    """Share of the q strongest real genes among the q strongest predicted, q = min(k, number of real DE genes).

    Only significant genes count. 0 if the real data have none.

    Parameters
    ----------
    pred, real
        DETable of one condition.
    k
        None: all real DE genes.
    denominator
        "q": divide by q, as the published code. "k": by k also where there are fewer DE genes (paper, equation 38).
    """
    if denominator not in ("q", "k"):
        raise ValueError(f"denominator must be 'q' or 'k'; found {denominator!r}")
    strongest = real.top(k)
    n = len(strongest) if denominator == "q" or k is None else k
    return _shared(strongest, pred.top(len(strongest)), n)


def de_precision(pred: DETable, real: DETable, k: int | None = None) -> float:
    """Like :func:`de_overlap`, q = min(k, number of predicted DE genes); 0 if there are none predicted."""
    strongest = pred.top(k)
    return _shared(real.top(len(strongest)), strongest, len(strongest))


def _number(pred: DETable, real: DETable, side: Side) -> float:
    return float({"pred": pred, "real": real}[side].significant.sum())


for _k in (None, 50, 100, 200, 500):
    _which = "all" if _k is None else f"up to {_k}"
    _register = metric(
        f"de_overlap_{_k or 'n'}",
        label=f"DE overlap {_k or 'N'}",
        **SHARE,
        definition=f"Share of the real DE genes ({_which}, strongest first) among as many of the prediction, by "
        "rank-sum test; 0 without real DE genes",
        **RANK_SUM,
    )
    _register(partial(de_overlap, k=_k))
    _register = metric(
        f"de_precision_{_k or 'n'}",
        label=f"DE precision {_k or 'N'}",
        **SHARE,
        definition=f"Share of the predicted DE genes ({_which}, strongest first) that are among as many of the "
        "strongest real DE genes; 0 without predicted DE genes",
        **RANK_SUM,
    )
    _register(partial(de_precision, k=_k))


_WHOSE: dict[Side, str] = {"real": "the real data", "pred": "the prediction"}

for _side, _whose in _WHOSE.items():
    _register = metric(
        f"de_nsig_{_side}",
        label=f"DE genes {_side}",
        **DESCRIPTION,
        definition=f"Number of DE genes of {_whose}, adjusted p below 0.05; a description, not a score",
        **RANK_SUM,
    )
    _register(partial(_number, side=_side))


@metric(
    "de_direction_match",
    label="DE direction match",
    **SHARE,
    definition="Share of the real DE genes whose predicted fold change has the same sign; NaN without real DE genes",
    **RANK_SUM,
)
def de_direction_match(pred: DETable, real: DETable) -> float:
    """Share of the real DE genes with equal sign of the LFC; NaN without real DE genes."""
    return _mean((np.sign(pred.lfc) == np.sign(real.lfc))[real.significant])


@metric(
    "de_recall",
    label="DE recall",
    **SHARE,
    definition="Share of the real DE genes that are DE genes of the prediction; NaN without real DE genes",
    **RANK_SUM,
)
def de_recall(pred: DETable, real: DETable) -> float:
    """Share of the real DE genes that are predicted DE genes; NaN without real DE genes."""
    return _mean(pred.significant[real.significant])


@metric(
    "de_spearman_lfc",
    label="DE Spearman LFC",
    **CORRELATION,
    definition="Spearman correlation of predicted and real fold change over the real DE genes; NaN for fewer than two",
    **RANK_SUM,
)
def de_spearman_lfc(pred: DETable, real: DETable) -> float:
    """Spearman correlation of the LFC over the real DE genes; NaN for fewer than two or a constant side."""
    return spearman(pred.lfc[real.significant], real.lfc[real.significant])


@metric(
    "de_spearman_lfc_finite",
    label="DE Spearman LFC (finite)",
    **CORRELATION,
    definition="de_spearman_lfc over the real DE genes whose fold changes are finite on both sides, that is expressed "
    "in perturbed and control cells",
    reference="A variant of de_spearman_lfc; genes absent from one group all tie at an infinite fold change there",
    on="wilcoxon",
    default=False,
)
def de_spearman_lfc_finite(pred: DETable, real: DETable) -> float:
    """Like :func:`de_spearman_lfc`, genes with an infinite LFC on either side left out."""
    finite = real.significant & np.isfinite(pred.lfc) & np.isfinite(real.lfc)
    return spearman(pred.lfc[finite], real.lfc[finite])


@metric(
    "de_pr_auc",
    label="DE PR AUC",
    **SHARE,
    definition="Average precision of the predicted adjusted p-values for the real DE genes; NaN if none or all are DE",
    **RANK_SUM,
)
def de_pr_auc(pred: DETable, real: DETable) -> float:
    """Average precision over all genes, real DE genes as labels, ``-log10(clip(fdr, 1e-10, 1))`` as score."""
    return area("pr", real.significant, -np.log10(np.clip(pred.fdr, 1e-10, 1.0)))


@metric(
    "de_roc_auc",
    label="DE ROC AUC",
    **SHARE,
    definition="ROC area of the predicted adjusted p-values for the real DE genes; NaN if none or all are DE",
    **RANK_SUM,
)
def de_roc_auc(pred: DETable, real: DETable) -> float:
    """Area under the ROC curve, labels and score as in :func:`de_pr_auc`."""
    return area("roc", real.significant, -np.log10(np.clip(pred.fdr, 1e-10, 1.0)))


@metric(
    "de_spearman_size",
    label="DE Spearman size",
    **CORRELATION,
    definition="Spearman correlation over the perturbations of a group of the predicted and real numbers of DE genes; "
    "one value per group, repeated for each of its conditions",
    reference=CELL_EVAL,
    default=False,
)
def de_spearman_size(pair: Pair, group: str) -> np.ndarray:
    """:func:`size_correlation` of a group, (P,) times the same value."""
    n_pred = np.array([int(tests.significant.sum()) for tests in pair.view("wilcoxon", "pred", group)])
    n_real = np.array([int(tests.significant.sum()) for tests in pair.view("wilcoxon", "real", group)])
    return np.full(len(n_pred), size_correlation(n_pred, n_real))


def size_correlation(pred: np.ndarray, real: np.ndarray, *, all_perturbations: bool = False) -> float:
    """Spearman correlation of numbers of DE genes, (P,) against (P,), over perturbations with a real DE gene.

    1 if there are none, as published; NaN for a single one or a constant side.

    Parameters
    ----------
    pred, real
        (P,) numbers of DE genes.
    all_perturbations
        Count those without a real DE gene too, as the paper does.
    """
    counted = (real > 0) | all_perturbations
    return spearman(pred[counted], real[counted]) if counted.any() else 1.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman correlation, (n,) against (n,), infinities allowed; NaN for fewer than two or a constant side."""
    return float(pearson(stats.rankdata(x), stats.rankdata(y))) if len(x) > 1 else np.nan


def area(curve: Literal["pr", "roc"], labels: np.ndarray, score: np.ndarray) -> float:
    """Area under the precision-recall (average precision) or the ROC curve, (g,) and (g,); NaN if all labels agree."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if labels.all() or not labels.any():
        return np.nan
    return float(average_precision_score(labels, score) if curve == "pr" else roc_auc_score(labels, score))


def _shared(real: np.ndarray, pred: np.ndarray, n: int) -> float:
    return len(np.intersect1d(real, pred)) / n if n else 0.0


def _mean(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else np.nan


def _stack(blocks: Sequence[AnyMatrix]) -> AnyMatrix:
    """Blocks of cells in float32: sparse if all are and no value is negative; the sparse test takes 0 for the least."""
    if all(sparse.issparse(block) and block.data.min(initial=0) >= 0 for block in blocks):
        return sparse.csc_array(sparse.vstack(blocks, format="csr"), dtype=np.float32)  # gene by gene is faster
    return np.concatenate([dense(block) for block in blocks], dtype=np.float32, casting="same_kind")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no log lines of illico, which has no switch for them."""
    from loguru import logger

    logger.disable("illico")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.enable("illico")

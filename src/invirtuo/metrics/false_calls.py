"""False discoveries: genes called that are no DE genes of the real cells, from rank-sum tests on counts.

A condition without a real DE gene is inert, the others are active. That the real cells miss genes for lack of cells is
a floor below which no rate falls: hold the scores against those of halves (`noise_floor`, `replicates`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from invirtuo.metrics.attached import Attached
from invirtuo.metrics.core import CountOptions, Pair, metric
from invirtuo.metrics.counts import CountTests, of_tests

if TYPE_CHECKING:
    from invirtuo.cells.source import AnyCells
    from invirtuo.design import Design
    from invirtuo.metrics.cells import Scale
    from invirtuo.metrics.core import TargetGenes

__all__ = ["FALSE_DISCOVERIES", "calls", "false_discoveries"]

REFERENCE = "Ours; which genes a biologist would follow in vain"
ALLOWED = 0.1  # false discovery rate up to which one walks down a ranking
FALSE_DISCOVERIES = (
    *("de_false_calls", "de_false_share", "de_false_any"),
    *("de_fdr", "de_recall_active", "de_recall_at_fdr", "de_silent"),
)


@metric(
    "de_false_calls",
    label="False DE genes",
    direction="lower",
    range=(0.0, np.inf),
    best=0.0,
    definition="Number of predicted DE genes of a condition that has no real one; NaN for other conditions",
    reference=REFERENCE,
    of_mistakes=True,
)
@of_tests("equal_tests")
def false_calls(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Genes called in an inert condition."""
    n_real, n_pred, _ = _numbers(pred, real, counted)
    return n_pred if n_real == 0 else np.nan


@metric(
    "de_false_share",
    label="False DE share",
    direction="lower",
    range=(0.0, 1.0),
    best=0.0,
    definition="de_false_calls over the number of tested genes",
    reference=REFERENCE,
    of_mistakes=True,
    default=False,
)
@of_tests("equal_tests")
def false_share(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Share of the tested genes that is called in an inert condition."""
    n_real, n_pred, _ = _numbers(pred, real, counted)
    n_tested = (pred.tested & counted).sum()
    return n_pred / n_tested if n_real == 0 and n_tested else np.nan


@metric(
    "de_false_any",
    label="False DE at all",
    direction="lower",
    range=(0.0, 1.0),
    best=0.0,
    definition="1 if any gene is called in a condition that has no real DE gene, else 0; NaN for other conditions",
    reference=REFERENCE,
    of_mistakes=True,
    default=False,
)
@of_tests("equal_tests")
def false_any(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Whether a gene is called in an inert condition."""
    n_real, n_pred, _ = _numbers(pred, real, counted)
    return float(n_pred > 0) if n_real == 0 else np.nan


@metric(
    "de_fdr",
    label="DE FDR",
    direction="lower",
    range=(0.0, 1.0),
    best=0.0,
    definition="Share of the predicted DE genes that are no real ones; 0 if none are predicted (see de_silent), NaN "
    "for conditions without a real DE gene",
    reference=REFERENCE,
    of_mistakes=True,
)
@of_tests("equal_tests")
def false_discovery_rate(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """False among the called genes of an active condition."""
    n_real, n_pred, n_both = _numbers(pred, real, counted)
    return (n_pred - n_both) / max(n_pred, 1) if n_real else np.nan


@metric(
    "de_recall_active",
    label="DE recall (counts)",
    direction="higher",
    range=(0.0, 1.0),
    best=1.0,
    definition="Share of the real DE genes that are predicted DE genes, tests on counts; NaN without real DE genes",
    reference=REFERENCE,
    default=False,
)
@of_tests("equal_tests")
def recall_active(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Share of the real DE genes of an active condition that are called."""
    n_real, _, n_both = _numbers(pred, real, counted)
    return n_both / n_real if n_real else np.nan


@metric(
    "de_recall_at_fdr",
    label="DE recall at FDR .1",
    direction="higher",
    range=(0.0, 1.0),
    best=1.0,
    definition="Largest share of the real DE genes among the first genes of the predicted order (rising p, then "
    "falling absolute fold change) of which at most 10 % are false; NaN without real DE genes",
    reference=REFERENCE,
)
@of_tests("equal_tests")
def recall_at_fdr(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Real DE genes that are found before one gene in ten is false."""
    truth = real.significant & counted
    if not truth.any():
        return np.nan
    genes = np.flatnonzero(pred.tested & counted)
    order = genes[np.lexsort((genes, -np.abs(pred.lfc[genes]), pred.p_value[genes]))]
    found = np.cumsum(truth[order])
    place = np.arange(1, len(order) + 1)
    # of genes that tie only all or none can be chosen
    p_value, change = pred.p_value[order], np.abs(pred.lfc[order])
    differs = (np.diff(p_value) != 0) | (np.diff(change) != 0)
    is_last = np.append(differs, True)
    allowed = is_last & ((place - found) <= ALLOWED * place)
    return float(found[allowed].max(initial=0) / truth.sum())


@metric(
    "de_silent",
    label="DE silent",
    direction="lower",
    range=(0.0, 1.0),
    best=0.0,
    definition="1 if no gene is predicted in a condition with real DE genes, else 0; NaN without real DE genes",
    reference=REFERENCE,
    default=False,
)
@of_tests("equal_tests")
def silent(pred: CountTests, real: CountTests, counted: np.ndarray) -> float:
    """Whether nothing is called in an active condition."""
    n_real, n_pred, _ = _numbers(pred, real, counted)
    return float(n_pred == 0) if n_real else np.nan


def _numbers(pred: CountTests, real: CountTests, counted: np.ndarray) -> tuple[int, int, int]:
    """Real, predicted and common DE genes."""
    truth, called = real.significant & counted, pred.significant & counted
    return int(truth.sum()), int(called.sum()), int((truth & called).sum())


def calls(pair: Pair) -> pd.DataFrame:
    """Numbers of genes by condition: `n_tested`, `n_real`, `n_pred`, `n_both`; index `condition`."""
    rows = {}
    for name in pair.conditions.index:
        pred, real = (pair.see("equal_tests", side, name) for side in ("pred", "real"))
        counted = np.ones(len(pair.genes), dtype=bool)
        counted[pair.own_genes(name)] = False
        rows[name] = (int((pred.tested & counted).sum()), *_numbers(pred, real, counted))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["n_tested", "n_real", "n_pred", "n_both"])
    return table.rename_axis("condition")


def false_discoveries(
    pred: AnyCells,
    real: AnyCells,
    design: Design,
    *,
    target_genes: TargetGenes | None = None,
    controls: Literal["real", "pred"] = "real",
    scale: Scale = "counts",
) -> pd.Series:
    """How many genes a prediction calls that the real cells do not, and how many it finds, over all conditions.

    Of a condition with more predicted than real cells as many are taken as there are real ones, with a fixed seed.

    Parameters
    ----------
    pred, real, design, target_genes, controls, scale
        As in :func:`invirtuo.metrics.vcc2026`.

    Returns
    -------
    pd.Series
        `n_inert`, `n_active`: conditions without and with a real DE gene. Over the inert: `false_calls_mean` and
        `false_calls_median`, `false_call_share` of the tested genes, `inert_with_any_call`. Over the active: `fdr`
        (mean over conditions, 0 for those without a call), `fdr_pooled` (all calls together), `recall`,
        `n_active_without_call`. NaN without such conditions. ``attrs["calls"]`` holds the numbers of each condition.
    """
    pair = Pair(pred, real, design, controls=controls, scale=scale, counts=CountOptions(target_genes=target_genes))
    table = calls(pair)
    inert, active = table[table["n_real"] == 0], table[table["n_real"] > 0]
    false = active["n_pred"] - active["n_both"]
    n_calls = active["n_pred"].sum()
    summary = {
        "n_inert": len(inert),
        "n_active": len(active),
        "false_calls_mean": inert["n_pred"].mean(),
        "false_calls_median": inert["n_pred"].median(),
        "false_call_share": (inert["n_pred"] / inert["n_tested"]).mean(),
        "inert_with_any_call": (inert["n_pred"] > 0).mean(),
        "fdr": (false / active["n_pred"].clip(lower=1)).mean(),
        "fdr_pooled": false.sum() / n_calls if n_calls else np.nan,
        "recall": (active["n_both"] / active["n_real"]).mean(),
        "n_active_without_call": int((active["n_pred"] == 0).sum()),
    }
    result = pd.Series(summary, name="value").rename_axis("measure")
    result.attrs["calls"] = Attached(table)
    return result

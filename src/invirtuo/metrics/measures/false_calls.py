"""False discoveries: genes called that are no DE genes of the real cells, from rank-sum tests on counts.

A condition without a real DE gene is inert, the others are active. That the real cells miss genes for lack of cells is
a floor below which no rate falls: hold the scores against those of halves (`noise_floor`, `replicates`).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.metrics.attached import Attached
from invirtuo.metrics.cells import Scale
from invirtuo.metrics.measures.counts import CountTests, of_tests
from invirtuo.metrics.pair import CountOptions, Pair, TargetGenes
from invirtuo.metrics.registry import SHARE, metric

__all__ = ["FALSE_DISCOVERIES", "MEASURES", "calls", "false_discoveries", "measures"]

REFERENCE = "Ours; which genes a biologist would follow in vain"
ALLOWED = 0.1  # false discovery rate up to which one walks down a ranking


class _Measure(NamedTuple):
    """What a reader must know of a column of :func:`measures`."""

    label: str
    definition: str
    range: tuple[float, float] = (0.0, 1.0)
    direction: Literal["lower", "higher"] = "lower"
    default: bool = False
    of_mistakes: bool = True


MEASURES = {
    "de_false_calls": _Measure(
        "False DE genes",
        "Number of predicted DE genes of a condition that has no real one; NaN for other conditions",
        range=(0.0, np.inf),
        default=True,
    ),
    "de_false_share": _Measure("False DE share", "de_false_calls over the number of tested genes"),
    "de_false_any": _Measure(
        "False DE at all",
        "1 if any gene is called in a condition that has no real DE gene, else 0; NaN for other conditions",
    ),
    "de_fdr": _Measure(
        "DE FDR",
        "Share of the predicted DE genes that are no real ones; 0 if none are predicted (see de_silent), NaN for "
        "conditions without a real DE gene",
        default=True,
    ),
    "de_recall_active": _Measure(
        "DE recall (counts)",
        "Share of the real DE genes that are predicted DE genes, tests on counts; NaN without real DE genes",
        direction="higher",
        of_mistakes=False,
    ),
    "de_silent": _Measure(
        "DE silent",
        "1 if no gene is predicted in a condition with real DE genes, else 0; NaN without real DE genes",
        of_mistakes=False,
    ),
}
FALSE_DISCOVERIES = (*list(MEASURES)[:-1], "de_recall_at_fdr", "de_silent")


def calls(pair: Pair) -> pd.DataFrame:
    """Numbers of genes by condition: `n_tested`, `n_real`, `n_pred`, `n_both`; index `condition`."""
    return pair.once("pred", ("calls",), lambda: _calls(pair))


def _calls(pair: Pair) -> pd.DataFrame:
    rows = {}
    for name in pair.conditions.index:
        pred, real = pair.both("equal_tests", name)
        counted = pair.counted_genes(name)
        truth, called = real.significant & counted, pred.significant & counted
        rows[name] = [int(genes.sum()) for genes in (pred.tested & counted, truth, called, truth & called)]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["n_tested", "n_real", "n_pred", "n_both"])
    return table.rename_axis("condition")


def measures(table: pd.DataFrame) -> pd.DataFrame:
    """What the numbers of :func:`calls` say of each condition, a column for each of `MEASURES`; NaN where undefined."""
    inert, active = table["n_real"] == 0, table["n_real"] > 0
    n_pred, n_both = table["n_pred"], table["n_both"]
    found = pd.DataFrame(index=table.index)
    found["de_false_calls"] = n_pred.where(inert)
    found["de_false_share"] = (n_pred / table["n_tested"]).where(inert)
    found["de_false_any"] = (n_pred > 0).astype(float).where(inert)
    found["de_fdr"] = ((n_pred - n_both) / n_pred.clip(lower=1)).where(active)
    found["de_recall_active"] = (n_both / table["n_real"]).where(active)
    found["de_silent"] = (n_pred == 0).astype(float).where(active)
    return found


def _of_group(pair: Pair, group: str, *, name: str) -> np.ndarray:
    """(P,) values of a measure."""
    return np.asarray(measures(calls(pair)).loc[pair.names(group), name], dtype=float)


for _name, _measure in MEASURES.items():
    _best = float(_measure.direction == "higher")
    metric(_name, best=_best, reference=REFERENCE, **_measure._asdict())(partial(_of_group, name=_name))


@metric(
    "de_recall_at_fdr",
    label="DE recall at FDR .1",
    **SHARE,
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


def false_discoveries(
    pred: AnyCells,
    real: AnyCells,
    design: Design,
    *,
    target_genes: TargetGenes | None = None,
    controls: Literal["real", "pred"] = "real",
    scale: Scale = "auto",
) -> pd.Series:
    """How many genes a prediction calls that the real cells do not, and how many it finds, over all conditions.

    Of a condition with more predicted than real cells as many are taken as there are real ones, with a fixed seed.

    Parameters
    ----------
    pred, real, design, target_genes, controls
        As in :func:`invirtuo.metrics.vcc2026`.
    scale
        What the values are: "counts", or "log1p", taken for what they are the logarithm of, so that cells of all depths
        weigh alike, as in :func:`evaluate`. "auto": whichever both files seem to hold; an error if they disagree.

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
    found = measures(table)
    active = table[table["n_real"] > 0]
    n_calls = active["n_pred"].sum()
    means = found.mean()
    summary: dict[str, float] = {"n_inert": len(table) - len(active), "n_active": len(active)}
    # inert conditions
    summary["false_calls_mean"] = means["de_false_calls"]
    summary["false_calls_median"] = found["de_false_calls"].median()
    summary["false_call_share"] = means["de_false_share"]
    summary["inert_with_any_call"] = means["de_false_any"]
    # active ones
    summary["fdr"] = means["de_fdr"]
    summary["fdr_pooled"] = 1 - active["n_both"].sum() / n_calls if n_calls else np.nan
    summary["recall"] = means["de_recall_active"]
    summary["n_active_without_call"] = int(found["de_silent"].sum())
    result = pd.Series(summary, name="value").rename_axis("measure")
    result.attrs["calls"] = Attached(table)
    return result

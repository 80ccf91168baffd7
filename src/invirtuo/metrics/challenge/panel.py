"""The table of the Virtual Cell Challenge 2026: counts checked as it does, six metrics under their official names."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics.attached import Attached
from invirtuo.metrics.cells import Cells, Scale, common_scale, labels_of, read_cells
from invirtuo.metrics.measures.vcc2026 import OFFICIAL, expression_errors
from invirtuo.metrics.pair import CountOptions, Pair, TargetGenes
from invirtuo.metrics.registry import METRICS

__all__ = [
    "LFC_ERROR",
    "RATIO",
    "official",
    "panels",
    "read_counts",
    "read_real_counts",
    "require_targets",
    "vcc2026",
]

logger = logging.getLogger(__name__)

FRACTION = 1e-6  # how far a count may lie from a whole number
MAX_DEPTH = 1e6  # largest total of a cell

RATIO, ERROR, DISTANCE = "expr_mse_unbiased_capped_norm", "expr_mse_unbiased_capped", "expr_distance_unbiased"
LFC_ERROR = "de_wilcoxon_lfc_nmae"


def vcc2026(
    pred: AnyCells,
    real: AnyCells,
    design: Design,
    *,
    bulk_target_sum: float = 50_000.0,
    target_genes: TargetGenes | None = None,
    controls: Literal["real", "pred"] = "real",
    scale: Scale = "counts",
    fractional: bool = False,
) -> pd.DataFrame:
    """Score predicted counts by the six metrics of the Virtual Cell Challenge 2026.

    Parameters
    ----------
    pred, real
        Cells from anyone, as in :func:`invirtuo.evaluate`. Both hold the same genes and the same perturbations, in any
        order; control cells of `pred` are looked at only with ``controls="pred"``.
    design
        Says which column of obs holds perturbations. Every combination of covariates is a context of its own.
    bulk_target_sum
        Counts to which pseudobulks are brought. The official 50,000 is made for whole transcriptomes; on a panel of a
        few hundred genes take about ten times the counts of a cell.
    target_genes
        Label to the gene that it targets; None if that gene is not measured, ``{"*": None}`` for all labels that are
        not named. Without an entry a label is looked up among the genes. "parts": so are the parts of combinations.
    controls
        "real": the real control cells stand on both sides (official). "pred": each file's own.
    scale
        "counts": raw counts, whole numbers (official). "log1p": counts are what the values are the logarithm of, so
        that cells of all depths weigh alike. "auto": whichever both files seem to hold.
    fractional
        Take counts with fractions, which the mean response has (:func:`invirtuo.metrics.mean_response`).

    Returns
    -------
    pd.DataFrame
        Columns `condition`, `perturbation` (as `real` writes it), one per covariate, `metric` (official name), `value`.
        Beside the six stand `expr_mse_unbiased_capped` and `expr_distance_unbiased`, whose sums over perturbations are
        divided in `expr_mse_unbiased_capped_norm`. Errors of fold changes have no row for fewer than 10 real DE genes.
        ``attrs["panel"]`` maps each of the six to its value for all perturbations, the mean over contexts;
        ``attrs["contexts"]`` holds it by context, ``attrs["reasons"]`` says why a value is NaN.

    Raises
    ------
    ValueError
        If genes or labels differ, values are no counts, a cell has more than a million of them, or no perturbation has
        a gene of its own and `target_genes` does not say so.

    References
    ----------
    Virtual Cell Challenge 2026; cell-eval2 0.20.
    """
    options = CountOptions(bulk_target_sum, target_genes)
    sides = read_counts(pred, real, design, scale=scale, fractional=fractional)
    pair = Pair(*sides, design, controls=controls, counts=options)
    require_targets(pair)
    return official(pair)


def read_counts(
    pred: AnyCells, real: AnyCells, design: Design, *, scale: Scale = "counts", fractional: bool = False
) -> tuple[Cells, Cells]:
    """Both files with counts, checked as the challenge does, genes in alphabetical order.

    Raises
    ------
    ValueError
        See :func:`vcc2026`.
    """
    truth = read_cells("real", real, design)
    guess = read_cells("pred", pred, design, genes=truth.genes)
    stated = common_scale(scale, truth, guess)
    _require_same("genes", set(guess.source.genes), set(truth.source.genes))
    _require_same("perturbations", set(guess.rows), set(truth.rows))
    return _checked(guess, stated, fractional=fractional), _checked(truth, stated, fractional=fractional)


def read_real_counts(
    real: AnyCells | Cells, design: Design, *, scale: Scale = "counts", fractional: bool = False
) -> Cells:
    """The real file with counts, checked alike; one that is read already is not read again."""
    if isinstance(real, Cells):
        return real
    cells = read_cells("real", real, design)
    return _checked(cells, common_scale(scale, cells), fractional=fractional)


def _require_same(kind: str, of_pred: set[str], of_real: set[str]) -> None:
    if of_pred != of_real:
        alone = {"pred": preview(sorted(of_pred - of_real)), "real": preview(sorted(of_real - of_pred))}
        found = "; ".join(f"in {side} only: {names}" for side, names in alone.items() if names)
        raise ValueError(f"pred and real must hold the same {kind}; found {found}")


def _checked(cells: Cells, scale: Literal["log1p", "counts"], *, fractional: bool) -> Cells:
    """One file on the stated scale."""
    found = cells.found
    if scale == "log1p":
        return cells.on_scale(scale)
    if found.smallest < 0 or not (fractional or found.fraction <= FRACTION):
        raise ValueError(
            f"{cells.name}: X does not hold raw counts (values from {found.smallest:.4g} to {found.largest:.4g}, up to "
            f"{found.fraction:.2g} from a whole number); expected whole numbers >= 0. Pass scale='log1p' if both files "
            "hold log1p values"
        )
    if found.depths.max(initial=0) > MAX_DEPTH:
        raise ValueError(
            f"{cells.name}: a cell has {found.depths.max():,.0f} counts; expected at most {MAX_DEPTH:,.0f} in a cell"
        )
    return cells.with_scale("counts")


def require_targets(pair: Pair) -> None:
    """Labels without a measured gene are named; an error if no gene at all is left out and nobody said so."""
    nowhere = [name for name in pair.conditions.index if not len(pair.own_genes(name))]
    unknown = [pair.conditions.at[name, "_label"] for name in nowhere if pair.targets(name)]
    if len(unknown) == len(pair.conditions):
        raise ValueError(
            f"no perturbation is named after a measured gene: {preview(unknown)}. Pass target_genes={{label: gene}}, "
            "or target_genes={'*': None} if none of them has one"
        )
    if unknown:
        logger.warning("no gene of its own is left out for %s: not among the genes", preview(unknown))


def official(pair: Pair) -> pd.DataFrame:
    """The table of :func:`vcc2026` for a Pair that is already made."""
    pieces, reasons = [], {}
    for group in pair.groups:
        columns = {}
        for name, published in OFFICIAL.items():
            if published != RATIO:
                columns[published] = np.asarray(METRICS[name].values(pair, group), dtype=float)
        # a ratio of sums has no value for one perturbation; its terms stand in its place
        columns[ERROR], columns[DISTANCE] = expression_errors(pair, group)
        pieces.append(_rows(pair, group, columns))
        if not columns[DISTANCE].sum() > 0:
            reasons[RATIO] = (
                f"the noise of the pseudobulks exceeds their distance from the control at bulk_target_sum="
                f"{pair.counts.target_sum:g}; take about ten times the counts of a cell"
            )
    table = pd.concat(pieces, ignore_index=True)
    contexts = Attached(panels(table))
    table.attrs = {"panel": contexts.mean().to_dict(), "contexts": contexts, "reasons": reasons, "input": pair.scale}
    for name, reason in reasons.items():
        logger.warning("%s is NaN: %s", name, reason)
    return table


def panels(table: pd.DataFrame) -> pd.DataFrame:
    """Value of each of the six metrics for all perturbations together, contexts by metrics, from :func:`vcc2026`."""
    keys = [name for name in table.columns if name not in ("condition", "perturbation", "metric", "value")]
    names = table[keys].astype(str).agg("|".join, axis=1) if keys else pd.Series("all", table.index)
    means = table["value"].groupby([names, table["metric"]]).agg(["mean", "sum"]).unstack()
    # a gate may leave a metric without any row
    wide = means["mean"].reindex(columns=list(OFFICIAL.values()))
    distance = means["sum", DISTANCE]
    wide[RATIO] = (means["sum", ERROR] / distance).where(distance > 0)
    return wide.rename_axis(index="context", columns=None)


def _rows(pair: Pair, group: str, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """Tidy rows of a context; values that do not exist have none."""
    wide = labels_of(pair.conditions.loc[pair.names(group)], pair.design, as_written=True)
    keys = list(wide.columns)
    tidy = wide.assign(**columns).melt(keys, var_name="metric").sort_values("condition", kind="stable")
    return tidy[(tidy["metric"] != LFC_ERROR) | tidy["value"].notna()]

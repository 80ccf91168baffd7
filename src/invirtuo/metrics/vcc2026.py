"""The six metrics of the Virtual Cell Challenge 2026, on raw counts, condition by condition.

`METRICS` holds them under names that are unique among all metrics (`pds_cosine` is that of 2025); :func:`vcc2026` gives
them under the official names. Genes that a perturbation targets do not count.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from invirtuo.errors import preview
from invirtuo.metrics.attached import Attached
from invirtuo.metrics.cells import Cells, common_scale, read_cells
from invirtuo.metrics.core import METRICS, CountOptions, Pair, metric
from invirtuo.metrics.counts import CountTests, control_bulk, of_tests

if TYPE_CHECKING:
    from invirtuo.cells.source import AnyCells
    from invirtuo.design import Design
    from invirtuo.metrics.cells import Scale
    from invirtuo.metrics.core import TargetGenes

__all__ = [
    "LFC_ERROR",
    "OFFICIAL",
    "RATIO",
    "VCC2026",
    "official",
    "panels",
    "read_counts",
    "read_real_counts",
    "require_targets",
    "vcc2026",
]

logger = logging.getLogger(__name__)

REFERENCE = "Virtual Cell Challenge 2026; cell-eval2 0.20"
FRACTION = 1e-6  # how far a count may lie from a whole number
MAX_DEPTH = 1e6  # largest total of a cell
MIN_GENES = 10  # real DE genes below which errors of fold changes are not taken
PURITY = 0.9  # share of right signs that a ranking must keep

RATIO, ERROR, DISTANCE = "expr_mse_unbiased_capped_norm", "expr_mse_unbiased_capped", "expr_distance_unbiased"
LFC_ERROR = "de_wilcoxon_lfc_nmae"

OFFICIAL = {  # name in METRICS to official name
    "pds_cosine_panel": "pds_cosine",
    "expr_mse_unbiased_capped_norm": "expr_mse_unbiased_capped_norm",
    "de_wilcoxon_direction_fidelity_yield_raw": "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw": "de_wilcoxon_direction_reach_raw",
    "de_wilcoxon_sig_jaccard": "de_wilcoxon_sig_jaccard",
    "de_wilcoxon_lfc_nmae": "de_wilcoxon_lfc_nmae",
}
VCC2026 = tuple(OFFICIAL)


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
    labels = pair.conditions.loc[pair.names(group)]
    design = pair.design
    wide = pd.DataFrame({"condition": labels.index, "perturbation": labels["_label"].to_numpy()})
    for name in design.columns:
        if name != design.perturbation:
            wide[name] = labels[name].to_numpy()
    keys = list(wide.columns)
    tidy = wide.assign(**columns).melt(keys, var_name="metric").sort_values("condition", kind="stable")
    return tidy[(tidy["metric"] != LFC_ERROR) | tidy["value"].notna()]


@metric(
    "pds_cosine_panel",
    label="PDS cosine (2026)",
    direction="higher",
    range=(0.0, 1.0),
    best=1.0,
    definition="1 minus the share of the other real effects of the group closer (cosine) to the predicted effect than "
    "its own, effects of log pseudobulks of counts, without the genes that any perturbation of the group targets; ties "
    "count half",
    reference=REFERENCE,
    default=False,
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
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(norms > 0, 1 - pred @ real.T / norms, 1.0)
    distance = np.clip(distance, 0.0, 2.0)
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
    reference=REFERENCE,
    default=False,
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
    direction="higher",
    range=(0.0, 1.0),
    best=1.0,
    definition="Predicted DE genes whose fold change has the real sign, over the larger of the numbers of predicted "
    "and real DE genes; NaN if there are none of both",
    reference=REFERENCE,
    default=False,
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
    direction="higher",
    range=(0.0, 1.0),
    best=1.0,
    definition="Share of the real DE genes that one can walk down, the predicted strongest first, with 90 % of the "
    "signs right; NaN without real DE genes",
    reference=REFERENCE,
    default=False,
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
    direction="higher",
    range=(0.0, 1.0),
    best=1.0,
    definition="DE genes of both sides over DE genes of either; 1 if there are none",
    reference=REFERENCE,
    default=False,
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
    direction="lower",
    range=(0.0, np.inf),
    best=0.0,
    definition="Absolute error of the predicted log2 fold changes over the absolute real ones, summed over the real DE "
    "genes; NaN for fewer than 10",
    reference=REFERENCE,
    default=False,
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

"""Tidy tables of scores: which metrics, of which cells, and their means."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics.cells import Layer, Scale, labels_of
from invirtuo.metrics.measures import de, mean
from invirtuo.metrics.measures.false_calls import FALSE_DISCOVERIES
from invirtuo.metrics.measures.vcc2026 import VCC2026
from invirtuo.metrics.pair import Pair
from invirtuo.metrics.registry import METRICS, Metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


__all__ = ["FLOOR", "PROFILES", "ceiling", "choose", "evaluate", "noise_floor", "score", "summarize", "values_of"]

logger = logging.getLogger(__name__)

_PERTURBENCH = [name for name, record in METRICS.items() if record.default and record.reference == mean.PERTURBENCH]
_CELL_EVAL = [name for name, record in METRICS.items() if record.reference == mean.CELL_EVAL]
PROFILES: dict[str, tuple[str, ...]] = {  # names of several metrics, which may be given instead of these
    "perturbench": tuple(_PERTURBENCH),
    "cell_eval": tuple(_CELL_EVAL),
    "minimal": (
        *("pearson_delta", "mse", "mae", "pds_l1", "de_overlap_n", "de_precision_n"),
        *("de_nsig_real", "de_nsig_pred"),
    ),
    "vcc2025": ("mae", "pds_l1", "de_overlap_n"),
    "vcc": ("mae", "pds_l1", "de_overlap_n"),  # its former name
    "vcc2026": VCC2026,
    "false_discoveries": FALSE_DISCOVERIES,
    "generation": (
        *("mmd_rbf_disjoint", "wasserstein2_disjoint", "c2st", "correlation_error", "zeros_distance", "rmse_logvar"),
        *("rmse_mean", "variance_ratio", "mmd_rbf", "mmd_rbf_unbiased", "mmd_rbf_median", "mmd_linear"),
        *("wasserstein2", "knn_recall", "knn_precision", "knn_recall_disjoint", "knn_precision_disjoint"),
    ),
}

# of these cell-eval extrapolates the agreement of two halves to that of two full sets of cells
EXTRAPOLATED = {
    *("pearson_delta", "pds_l1", "pds_l2", "pds_cosine"),
    *(name for name in METRICS if name.startswith(("de_overlap_", "de_precision_"))),
    *("de_spearman_size", "de_spearman_lfc", "de_direction_match", "de_recall", "de_pr_auc", "de_roc_auc"),
}
MEASURED = ("value", "direction", "n_pred", "n_real")  # columns that say nothing of which cells, or which metric
FLOOR = "noise_floor"  # what its rows are called beside models
FLOOR_NOTE = (
    "The noise floor is half of the real cells of a condition against the other half: fewer cells on each side than "
    "models are scored with. Distances grow and effects blur with fewer cells, so that a model may score better than "
    "it, above all where effects are small. It is a mark, not a limit."
)
ARROWS = {"higher": "↑", "lower": "↓"}
ABSENT = ("de_direction_match", "de_recall", "de_spearman_lfc")  # no value, not NaN, without real DE genes in cell-eval


def evaluate(
    pred: AnyCells,
    real: AnyCells,
    design: Design,
    metrics: Sequence[str] | str | None = None,
    *,
    n_pcs: int = 30,
    controls: Literal["real", "pred"] = "real",
    scale: Scale = "log1p",
    layer: Layer = None,
) -> pd.DataFrame:
    """Score predicted cells against real cells, condition by condition.

    Parameters
    ----------
    pred, real
        AnnData, backed or not, a :class:`~invirtuo.CellStore`, or the path of an h5ad or zarr, of a folder of them, or
        a list of paths; from anyone. X holds log1p-normalised expression. Genes are matched by name.
        `real` needs control cells in every scored covariate group; those of `pred` are not looked at unless `controls`
        is "pred".
    design
        Says which columns of obs hold perturbation and covariates. Without a perturbation, populations are scored class
        by class (or all cells together, without covariates).
    metrics
        Names from `METRICS` or `PROFILES` ("vcc2026", ...); None for all that are computed by default, for a
        Design without perturbation the profile "generation".
    n_pcs
        Principal components for metrics in that space, fitted once on all cells of `real`, controls included.
    controls
        "real": effects of both sides are taken against the real control cells. "pred": against each file's own.
    scale
        "log1p": the values are used as they are. "counts": each file is normalised to its median depth (over all its
        genes and cells) and log1p is taken. "auto": whichever both files seem to hold; an error if they disagree.
    layer
        None: the values stand in X. Otherwise the name of a layer or of an entry of obsm, for both files or by file
        (``{"pred": "X_hvg", "real": None}``). The columns of obsm are the genes, in order, of var_names, of those
        marked ``var["highly_variable"]``, or of the DataFrame, whichever has as many.

    Returns
    -------
    pd.DataFrame
        One row per condition and metric: `condition`, `perturbation`, one column per covariate, `metric`, `value`,
        `direction` ("lower" or "higher" is better; missing where a metric only describes), `n_pred`, `n_real`.
        ``attrs["skipped"]`` maps every condition that is in one file only to the reason,
        ``attrs["n_scored"]`` and ``attrs["n_nan"]`` count values and missing values (NaN) per metric, and
        ``attrs["reasons"]`` says of metrics that mean nothing here (ranks of a single perturbation, the top 50 of 50
        genes) why they are NaN.

    Raises
    ------
    ValueError
        If the files cannot be compared; the message says why and what to do.

    Notes
    -----
    An h5ad named by its path stays on disk if its X takes more than 512 MiB and is not stored by columns; backed files,
    zarr, folders, lists and stores always do. Then only `obs` is in memory, and the cells of one condition at a time
    (dense where a metric takes distances); each condition is read once or more for each metric. Nothing is sampled:
    moments of many cells and principal axes come from passes over all cells. Scores are those of the same cells in
    memory; a store reads values as CSR in float32, and for other files and for more than 2,048 genes "the same" is up
    to rounding. Cells of a condition that lie scattered in a compressed file are slow to read: shuffle it to a store.
    """
    chosen = choose(metrics, design)
    pair = Pair(pred, real, design, n_pcs=n_pcs, controls=controls, scale=scale, layer=layer)
    return score(pair, chosen)


def noise_floor(
    real: AnyCells,
    design: Design,
    metrics: Sequence[str] | str | None = None,
    *,
    n_pcs: int = 30,
    seed: int = 0,
    scale: Scale = "log1p",
    layer: Layer = None,
) -> pd.DataFrame:
    """Score a random half of each real condition against the other half: what a perfect model would reach.

    Distances between cell populations depend on the number of cells, so the floor of a large condition is lower.
    Conditions with a single cell are listed in ``attrs["skipped"]``.

    Parameters
    ----------
    real, design, metrics, n_pcs, scale, layer
        As in :func:`evaluate`.
    seed
        Seed of the halves.

    Returns
    -------
    pd.DataFrame
        As from :func:`evaluate`.
    """
    chosen = choose(metrics, design)
    return score(Pair.halves(real, design, n_pcs=n_pcs, seed=seed, scale=scale, layer=layer), chosen)


def ceiling(
    real: AnyCells,
    design: Design,
    metrics: Sequence[str] | str | None = "cell_eval",
    *,
    n_pcs: int = 30,
    seed: int = 0,
    scale: Scale = "log1p",
    layer: Layer = None,
    compat: bool = False,
) -> pd.DataFrame:
    """What agreement the real cells allow, extrapolated from two halves of equal size; controls are divided as well.

    With r the mean over conditions of half against half, ``2 r / (1 + r)`` (Spearman-Brown) is the agreement expected
    of two sets as large as the whole. It is defined for r > 0 and given for correlations, overlaps and areas only.

    Parameters
    ----------
    real, design, metrics, n_pcs, scale, layer
        As in :func:`evaluate`. ``score(Pair.equal_halves(...))`` gives the values of each condition.
    seed
        Seed of the halves.
    compat
        As in :func:`summarize`.

    Returns
    -------
    pd.DataFrame
        As from :func:`summarize` for `metric`, and a column `ceiling`, NaN where it is not defined.

    References
    ----------
    cell-eval 0.8; Spearman 1910 and Brown 1910, on the reliability of halves.
    """
    chosen = choose(metrics, design)
    pair = Pair.equal_halves(real, design, n_pcs=n_pcs, seed=seed, scale=scale, layer=layer)
    table = summarize(score(pair, chosen), compat=compat)
    defined = table.index.isin(EXTRAPOLATED) & (table["mean"] > 0)
    return table.assign(ceiling=(2 * table["mean"] / (1 + table["mean"])).where(defined))


def score(pair: Pair, metrics: Sequence[str] | str | None = None) -> pd.DataFrame:
    """The table of :func:`evaluate` for a Pair that is already made."""
    chosen = choose(metrics, pair.design)

    # one row per condition and metric, conditions by name, metrics as asked for
    values = values_of(pair, {name: METRICS[name] for name in chosen})
    table = values.rename_axis("condition").reset_index().melt("condition", var_name="metric")
    table["metric"] = pd.Categorical(table["metric"], categories=chosen)
    table = table.sort_values(["condition", "metric"], ignore_index=True).astype({"metric": str})
    result = labels_of(pair.conditions.loc[table["condition"]], pair.design)
    result[["metric", "value"]] = table[["metric", "value"]]
    result["direction"] = result["metric"].map({name: METRICS[name].direction for name in chosen})
    for side in ("pred", "real"):
        n_cells = {name: pair.n_cells(side, name) for name in pair.conditions.index}
        result[f"n_{side}"] = result["condition"].map(n_cells)

    # what a reader of the table must know travels with it
    counts, reasons = summarize(result), _reasons(pair, chosen)
    result.attrs = {"skipped": dict(pair.skipped), "reasons": reasons}
    result.attrs |= {name: counts[name].to_dict() for name in ("n_scored", "n_nan")}
    for reason in dict.fromkeys(reasons.values()):
        logger.warning("NaN for %s: %s", preview([name for name in reasons if reasons[name] == reason]), reason)
    return result


def directions(scores: pd.DataFrame) -> dict[str, str]:
    """Metrics of a table to "lower" or "higher" is better, those left out that only describe.

    What the table says in its column ``direction`` goes before what is known of the metric.
    """
    present = dict.fromkeys(scores["metric"])
    known = {name: METRICS[name].direction for name in present if name in METRICS}
    if "direction" in scores:
        said = scores[scores["direction"].isin(ARROWS)]
        known |= dict(zip(said["metric"], said["direction"], strict=True))
    return {name: str(known[name]) for name in present if known.get(name)}


def floor_note(scores: pd.DataFrame) -> str:
    """What a reader must know of the noise floor of a table; "" if it has none, or one of another kind."""
    return FLOOR_NOTE if "n_real" in scores and (scores["model"] == FLOOR).any() else ""


def values_of(pair: Pair, records: Mapping[str, Metric]) -> pd.DataFrame:
    """Conditions by metrics, group by group; NaN where a metric means nothing."""
    columns = {}
    # a rank needs the whole matrix of its metric, whose diagonal then serves the metric itself
    for name in sorted(records, key=lambda name: not name.endswith("_rank")):
        columns[name] = np.concatenate([_values(records[name], pair, group) for group in pair.groups])
    conditions = [condition for group in pair.groups for condition in pair.names(group)]
    return pd.DataFrame(columns, index=conditions)


def _values(record: Metric, pair: Pair, group: str) -> np.ndarray:
    """(P,) values of a metric in a group; NaN where it means nothing."""
    n_conditions = len(pair.names(group))
    if record.relative and n_conditions < 2:
        return np.full(n_conditions, np.nan)
    return np.asarray(record.values(pair, group), dtype=float)


def _reasons(pair: Pair, chosen: Sequence[str]) -> dict[str, str]:
    """Metric to why it is NaN, where that can be said beforehand."""
    alone = [group for group in pair.groups if len(pair.names(group)) < 2]
    reasons = {}
    for name in chosen:
        if METRICS[name].relative and alone:
            reasons[name] = f"a place among others needs two perturbations; there is one in {preview(alone)}"
        if name.startswith("deg_recall") and len(pair.genes) <= de.TOP:
            reasons[name] = f"the top {de.TOP} of {len(pair.genes)} genes are the same for every prediction"
    return reasons


def summarize(scores: pd.DataFrame, by: Sequence[str] = ("metric",), *, compat: bool = False) -> pd.DataFrame:
    """Mean of each metric over conditions, every condition with the same weight; NaN is left out and counted.

    Parameters
    ----------
    scores
        Table from :func:`evaluate`, or several joined with further columns (model, seed).
    by
        Columns that tell means apart, for example ``["model", "metric"]`` or a covariate.
    compat
        As cell-eval: a single NaN makes the mean NaN. Direction, recall and Spearman LFC of a condition without real DE
        genes are absent there and do not count as NaN; for Spearman LFC this is known if `scores` has `de_recall` too.

    Returns
    -------
    pd.DataFrame
        Columns `mean`, `n_scored` (conditions in the mean), `n_nan`; one row per combination of `by`, in the order of
        first appearance.
    """
    values = scores.groupby(list(by), sort=False, observed=True)["value"]
    table = pd.DataFrame({"mean": values.mean(), "n_scored": values.count(), "n_nan": values.size() - values.count()})
    if compat:
        # cell-eval: one NaN makes the mean NaN, a value that does not exist is left out
        spoiled = scores["value"].isna() & ~_absent(scores)
        spoiled = spoiled.groupby([scores[column] for column in by], sort=False, observed=True).any()
        table["mean"] = table["mean"].mask(spoiled)
    return table


def _absent(scores: pd.DataFrame) -> pd.Series:
    """Which values do not exist because the condition has no real DE gene."""
    # all columns that name a condition, also model, task and seed
    keys = [column for column in scores.columns if column not in ("metric", *MEASURED)]
    # de_recall is NaN where the condition has no real DE gene
    no_genes = (scores["metric"] == "de_recall") & scores["value"].isna()
    condition_without = no_genes
    if keys:
        condition_without = no_genes.groupby([scores[key] for key in keys], observed=True).transform("any")
    is_absent = condition_without | (scores["metric"] == "de_direction_match")
    return no_genes | scores["metric"].isin(ABSENT) & is_absent


def choose(metrics: Sequence[str] | str | None, design: Design | None = None) -> list[str]:
    """Names of metrics, profiles resolved; None stands for those that are computed by default.

    For a Design without perturbation these are the profile "generation".

    Raises
    ------
    ValueError
        If a name is neither a metric nor a profile.
    """
    if metrics is None and design is not None and design.perturbation is None:
        return list(PROFILES["generation"])
    if metrics is None:
        return [name for name, record in METRICS.items() if record.default]
    asked = [metrics] if isinstance(metrics, str) else metrics
    names = list(dict.fromkeys(name for entry in asked for name in PROFILES.get(entry, (entry,))))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(
            f"unknown metrics: {', '.join(unknown) or 'none named'}; known: {', '.join([*METRICS, *PROFILES])}"
        )
    return names

"""Scores between two anchors: 0 the mean response to all perturbations, 1 a replicate of the experiment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics.attached import Attached
from invirtuo.metrics.cells import Scale, read_cells
from invirtuo.metrics.challenge.anchors import mean_response, replicates
from invirtuo.metrics.challenge.panel import LFC_ERROR, RATIO, official, panels, read_counts, require_targets
from invirtuo.metrics.challenge.real_side import fingerprint, kept_table, with_real_side
from invirtuo.metrics.measures.vcc2026 import OFFICIAL
from invirtuo.metrics.pair import CountOptions, Pair, TargetGenes
from invirtuo.metrics.registry import METRICS

__all__ = ["anchored", "challenge_score"]

Scores: TypeAlias = pd.DataFrame | pd.Series | Mapping[str, float]
TRUSTED = 3.0  # standard deviations of the replicate that the anchors must lie apart


@dataclass(frozen=True)
class _Rule:
    """What the challenge does with a scaled score beyond the anchors, and with a metric that is not defined."""

    floor: float = -np.inf
    ceiling: float = np.inf
    undefined: float | None = None  # score of a prediction without a value; None: that of the value 0


RULES = {name: _Rule() for name in OFFICIAL.values()}
RULES[RATIO] = _Rule(floor=0.0, ceiling=1.0, undefined=0.0)
RULES[LFC_ERROR] = _Rule(floor=-6.0, undefined=-6.0)


def challenge_score(
    pred: AnyCells,
    real: AnyCells,
    design: Design,
    *,
    bulk_target_sum: float = 50_000.0,
    target_genes: TargetGenes | None = None,
    emission: Literal["dispersed", "tile"] = "dispersed",
    n_splits: int = 5,
    seed: int = 0,
    scale: Scale = "counts",
    cache: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Score predicted counts as the Virtual Cell Challenge 2026 does: six metrics, two anchors, one number.

    Parameters
    ----------
    pred, real, design, bulk_target_sum, target_genes, scale
        As in :func:`invirtuo.metrics.vcc2026`.
    emission, seed
        How the mean response becomes cells, see :func:`mean_response`.
    n_splits
        Divisions of the real cells for the replicate, see :func:`replicates`.
    cache
        Folder in which what depends on the real cells alone is kept, by their content: later predictions of the same
        cells take a third of the time.

    Returns
    -------
    pd.DataFrame
        As from :func:`anchored`; ``attrs["scores"]`` holds the table of :func:`invirtuo.metrics.vcc2026`.
    """
    guess, truth = read_counts(pred, real, design, scale=scale)
    options: dict[str, Any] = {"bulk_target_sum": bulk_target_sum, "target_genes": target_genes}
    folder = None
    if cache is not None:
        folder = Path(cache) / fingerprint(truth, scale=truth.scale, **options)

    pair = Pair(guess, truth, design, counts=CountOptions(bulk_target_sum, target_genes))
    require_targets(pair)
    scores = official(with_real_side(pair, folder))

    def baseline() -> pd.DataFrame:
        cells = mean_response(truth, design, emission=emission, seed=seed, target_genes=target_genes)
        found = read_cells("pred", cells, design, genes=truth.genes)
        return official(pair.against(found.with_scale(truth.scale)))

    def divided() -> pd.DataFrame:
        return replicates(truth, design, n_splits=n_splits, **options)

    base = kept_table(folder, f"baseline-{emission}-{seed}", baseline)
    table = anchored(scores, base, kept_table(folder, f"replicates-{n_splits}", divided))
    table.attrs["scores"] = Attached(scores)
    return table


def anchored(scores: Scores, baseline: Scores, replicate: Scores | Sequence[Scores]) -> pd.DataFrame:
    """How far scores come from a baseline (0) to a replicate of the experiment (1), metric by metric.

    ``(score - baseline) / (replicate - baseline)``, whichever direction is better; better than a replicate is above 1.
    For the metrics of the Virtual Cell Challenge 2026 its rules hold: the expression error stays within 0 and 1, the
    error of fold changes is at least -6, and what is not defined counts as the value 0 (the errors: as 0 and -6).

    Parameters
    ----------
    scores, baseline
        Tables from :func:`invirtuo.metrics.vcc2026` or :func:`invirtuo.evaluate`, or metric to value. All with the same
        metrics.
    replicate
        Likewise, or a table from :func:`replicates`, or a list with one of these for each split: their mean is taken.

    Returns
    -------
    pd.DataFrame
        Index `metric`, last row "average"; columns `score`, `user`, `baseline`, `replicate`, `replicate_sd` (over
        splits), `n_splits`, `trusted` and `reason`. The score is NaN, with the reason, where the replicate is not
        better than the baseline. Not `trusted` is a score whose anchors lie less than three standard deviations of the
        replicate apart. Several contexts are scored one by one, and their mean is given; ``attrs["contexts"]`` holds
        the scores of each, ``attrs["n_averaged"]`` the number of metrics in the average.

    Raises
    ------
    ValueError
        If a metric is missing in one of the three, or has no direction.

    Examples
    --------
    >>> table = anchored({"mse": 0.04}, {"mse": 0.10}, [{"mse": 0.02}, {"mse": 0.03}])
    >>> table.loc["mse", ["score", "replicate"]].astype(float).round(3).to_list()
    [0.8, 0.025]

    References
    ----------
    Virtual Cell Challenge 2026; cell-eval2 0.20.
    """
    user, base = _by_context(scores), _by_context(baseline)
    splits = _by_split(replicate)
    names = [name for name in user.columns if _direction(name)]
    _require_alike(names, base, splits)

    # one table of scores for each context
    tables = {}
    for context in user.index:
        ends = pd.DataFrame([one.loc[_row(one, context), names].to_numpy() for one in splits], columns=names)
        table = pd.DataFrame({"user": user.loc[context, names], "baseline": base.loc[_row(base, context), names]})
        table["replicate"] = ends.mean()
        table["replicate_sd"] = ends.std(ddof=0) if len(splits) > 1 else np.nan
        tables[context] = _scored(table.astype(float))

    # of several contexts the mean, trusted if each of them is
    result = next(iter(tables.values())).copy()
    if len(tables) > 1:
        numbers = result.select_dtypes("number").columns
        result[numbers] = np.mean([table[numbers] for table in tables.values()], axis=0)
        result["trusted"] = np.all([table["trusted"] for table in tables.values()], axis=0)
    result.insert(5, "n_splits", len(splits))

    # the mean over metrics, context by context
    average = {context: table["score"].mean() for context, table in tables.items()}
    result.loc["average", "score"] = np.mean(list(average.values()))
    contexts = pd.DataFrame({context: table["score"] for context, table in tables.items()}).T
    result.attrs = {"contexts": Attached(contexts)}
    result.attrs["n_averaged"] = int(result["score"].iloc[:-1].notna().sum())
    return result.rename_axis("metric")


def _scored(table: pd.DataFrame) -> pd.DataFrame:
    """Scores of one context from the columns `user`, `baseline` and both of the replicate."""
    span = table["replicate"] - table["baseline"]
    towards = pd.Series({name: 1.0 if _direction(name) == "higher" else -1.0 for name in table.index})
    usable = span * towards > 0
    user = table["user"].copy()
    for name in table.index[user.isna()]:
        user[name] = 0.0 if name in RULES and RULES[name].undefined is None else np.nan
    score = ((user - table["baseline"]) / span).where(usable)

    # the rules of the challenge, and what a reader must know
    reason = pd.Series("", table.index)
    for name in table.index:
        rule = RULES.get(name, _Rule(undefined=np.nan))
        if not usable[name]:
            reason[name] = "the replicate is not better than the baseline"
        elif np.isnan(table.at[name, "user"]):
            reason[name] = "the prediction has no value"
            score[name] = score[name] if rule.undefined is None else rule.undefined
        score[name] = np.clip(score[name], rule.floor, rule.ceiling)
    trusted = usable & ~(span.abs() < TRUSTED * table["replicate_sd"])
    result = table.assign(trusted=trusted, reason=reason)
    result.insert(0, "score", score)
    return result


def _direction(name: str) -> Literal["lower", "higher"] | None:
    """Which values of a metric are better; official names are known too."""
    here = {published: own for own, published in OFFICIAL.items()}
    record = METRICS.get(here.get(name, name))
    if record is None:
        raise ValueError(f"unknown metric {name!r}; expected one of METRICS or an official name: {', '.join(here)}")
    return record.direction


def _by_context(scores: Scores) -> pd.DataFrame:
    """Contexts by metrics; what is no table of vcc2026 is one context."""
    if isinstance(scores, pd.DataFrame) and "metric" in scores.columns:
        if {"expr_mse_unbiased_capped", "expr_distance_unbiased"} <= set(scores["metric"]):
            return panels(scores)
        return scores.groupby("metric", sort=False)["value"].mean().to_frame("all").T
    return pd.Series(scores, dtype=float).to_frame("all").T


def _by_split(replicate: Scores | Sequence[Scores]) -> list[pd.DataFrame]:
    """Contexts by metrics, one table for each division of the real cells."""
    if isinstance(replicate, pd.DataFrame) and "split" in replicate.columns:
        wide = replicate.pivot(index=["split", "context"], columns="metric", values="value")
        return [wide.xs(split, level="split") for split in wide.index.unique("split")]
    if isinstance(replicate, pd.DataFrame | pd.Series | Mapping):
        return [_by_context(replicate)]
    return [_by_context(split) for split in replicate]


def _row(table: pd.DataFrame, context: str) -> str:
    """The row of a context; a table without contexts stands for all."""
    is_known = context in table.index or len(table) > 1
    return context if is_known else str(table.index[0])


def _require_alike(names: Sequence[str], baseline: pd.DataFrame, splits: Sequence[pd.DataFrame]) -> None:
    """The anchors must hold every metric that is scored."""
    if not splits:
        raise ValueError("replicate holds no split; expected at least one")
    for kind, table in (("baseline", baseline), *(("replicate", split) for split in splits)):
        if missing := [name for name in names if name not in table.columns]:
            raise ValueError(f"{kind} lacks metrics of the scores: {preview(missing)}; score all three alike")

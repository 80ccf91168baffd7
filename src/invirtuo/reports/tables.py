"""Scores as a reader wants them: averaged, best and second best marked, baselines and the noise floor set apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from invirtuo.metrics import METRICS
from invirtuo.metrics.scores import ARROWS, FLOOR, directions

__all__ = ["Cell", "Column", "Row", "ScoreTable", "condition_tables", "headline", "published_table", "score_table"]

BASELINES = (  # what everybody must beat
    "context_mean",
    "fold_change",
    "magnitude_only",
    "no_change",
    "perturbation_mean",
    "perturbation_mean:move-cells",
    "perturbation_mean:shift-cells",
    "ridge",
    "ridge:move-cells",
)
WEAK = 0.3  # dynamic range fraction below which a metric crowns nobody
MAX_CONDITIONS = 200  # rows of a per-condition table; the rest stays in scores.csv


@dataclass(frozen=True)
class Column:
    """A metric, or in a per-condition table a model: heading of a column."""

    name: str
    label: str
    direction: str | None = None  # "lower" or "higher" is better; None: not known
    definition: str = ""
    n: int = 0
    drf: float = np.nan  # dynamic range fraction, if it is known
    of_mistakes: bool = False  # a prediction that says nothing is perfect

    @property
    def is_weak(self) -> bool:
        """Whether the metric can hardly tell a replicate of the experiment from an answer that knows nothing."""
        return self.drf < WEAK

    @property
    def crowns(self) -> str | None:
        """Which values win; None if a good value alone says nothing."""
        return None if self.is_weak or self.of_mistakes else self.direction

    @property
    def arrow(self) -> str:
        return ARROWS.get(self.direction or "", "")


@dataclass(frozen=True)
class Cell:
    """A number and how it stands out."""

    text: str
    mark: str = ""  # "best" or "second"
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    kind: str  # "model", "baseline" or "floor"
    cells: list[Cell]  # none: the model has no scores
    note: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """Models x metrics, each value a mean over conditions."""

    columns: list[Column]
    rows: list[Row]
    n_conditions: int
    wins: dict[str, list[str]] = field(default_factory=dict)  # model to the labels of the metrics it is best in
    ties: list[str] = field(default_factory=list)  # labels of metrics whose best value is shared
    equal: list[str] = field(default_factory=list)  # labels of metrics left out: the same for all, floor included
    means: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def weak(self) -> list[str]:
        """Labels of metrics that hardly discriminate here, with their dynamic range fraction."""
        return [f"{column.label} ({number(column.drf, 2)})" for column in self.columns if column.is_weak]

    @property
    def kinds(self) -> dict[str, str]:
        """Name of each row to its kind."""
        return {row.name: row.kind for row in self.rows}


def score_table(
    scores: pd.DataFrame,
    baselines: Iterable[str] = BASELINES,
    floor: str | Sequence[str] = FLOOR,
    failed: Mapping[str, str] | None = None,
    discrimination: Mapping[str, float] | None = None,
) -> ScoreTable:
    """Average tidy scores over conditions (and seeds) and mark the best two of each metric, the floor left out.

    Parameters
    ----------
    scores
        Columns ``condition``, ``metric``, ``value``, ``model``; optionally ``seed`` and ``direction``.
    baselines, floor
        Names in ``model`` that are set apart: what everybody must beat, and real cells, which nobody is to beat.
    failed
        Model to what failed of it; one without scores gets a row that says so.
    discrimination
        Metric to its dynamic range fraction; below .3 nobody is marked as best.
    """
    failed = dict(failed or {})
    floors = [floor] if isinstance(floor, str) else list(floor)
    means = _means(scores)
    columns = [replace(column, drf=(discrimination or {}).get(column.name, np.nan)) for column in _columns(scores)]

    # metrics that are the same for all say nothing
    differs = {column.name: len(means) < 2 or means[column.name].nunique(dropna=False) > 1 for column in columns}
    equal = [column.label for column in columns if not differs[column.name]] if any(differs.values()) else []
    columns = [column for column in columns if column.label not in equal]
    names = [column.name for column in columns]
    means = means.reindex(columns=names)

    # notes: how many values are missing, and how much seeds differ
    missing = scores["value"].isna().groupby([scores["model"], scores["metric"]]).agg(["sum", "size"])
    spread = _seed_spread(scores)

    # best and second best of every metric
    marks: dict[str, dict[str, str]] = {}
    wins: dict[str, list[str]] = {name: [] for name in means.index if name not in floors}
    ties = []
    for column in columns:
        marks[column.name], winners = _marks(means[column.name].drop(floors, errors="ignore"), column.crowns)
        if len(winners) == 1:
            wins[winners[0]].append(column.label)
        elif winners:
            ties.append(column.label)

    # models, then baselines, then the floor: most wins first, then best mean rank
    every = [*means.index, *(name for name in failed if name not in means.index)]
    kinds = dict.fromkeys(every, "model") | {name: "baseline" for name in every if name in set(baselines)}
    kinds |= {name: "floor" for name in every if name in floors}
    mean_rank = _mean_ranks(means.drop(floors, errors="ignore"), columns)

    def order(name: str) -> tuple[int, int, float, str]:
        n_wins = len(wins.get(name, ()))
        return _KINDS.index(kinds[name]), -n_wins, mean_rank.get(name, np.inf), name

    # a row each; of a model without scores the reason stands in their place
    rows = []
    for name in sorted(every, key=order):
        cells: list[Cell] = []
        if name not in means.index:
            rows.append(Row(name, kinds[name], cells, failed[name]))
            continue
        for metric in names:
            n_missing, n = missing.loc[(name, metric)] if (name, metric) in missing.index else (0, 0)
            note = f"{n_missing} of {n} missing" if n_missing else ""
            if (name, metric) in spread:
                deviation = f"±\u00a0{number(spread[name, metric], 2)}"
                note = f"{deviation}\n{note}" if note else deviation
            cells.append(Cell(number(means.loc[name, metric]), marks[metric].get(name, ""), note))
        rows.append(Row(name, kinds[name], cells, failed.get(name, "")))
    return ScoreTable(columns, rows, scores["condition"].nunique(), wins, ties, equal, means)


def _means(scores: pd.DataFrame) -> pd.DataFrame:
    """Models x metrics: mean over conditions, then over seeds."""
    if "seed" in scores and scores["seed"].nunique() > 1:
        scores = scores.groupby(["model", "metric", "seed"], as_index=False, dropna=False)["value"].mean()
    return scores.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", dropna=False)


def _mean_ranks(means: pd.DataFrame, columns: list[Column]) -> dict[str, float]:
    """Mean over the metrics of the rank of each model, no value last."""
    ranks = []
    for column in columns:
        if column.crowns:
            ranks.append(means[column.name].rank(ascending=column.direction == "lower", na_option="bottom"))
    return pd.concat(ranks, axis=1).mean(axis=1).to_dict() if ranks else {}


_KINDS = ("model", "baseline", "floor")


def headline(table: ScoreTable) -> str:
    """Say in a sentence or two which model is best in what, and what the simple baselines and real cells reach."""
    kinds = table.kinds
    if len(table.wins) < 2:
        return f"{next(iter(table.wins), 'Nothing')} was scored on {_plural(table.n_conditions, 'condition')}."
    n = sum(map(len, table.wins.values()))
    if n == 0:
        return "No model is ahead of another in any score."

    # most wins first
    winners = [(name, won) for name, won in table.wins.items() if won]
    ranked = sorted(winners, key=lambda item: (-len(item[1]), item[0]))
    first, won = ranked[0]
    scored = n + len(table.ties)
    text = f"{first} is best in {len(won)} of {_plural(scored, 'score')} ({_listing(won)})"
    others = [f"{name} in {len(labels)} ({_listing(labels)})" for name, labels in ranked[1:4]]
    text += f"; {_listing(others, 3)}." if others else "."
    if kinds[first] == "baseline" and "model" in kinds.values():
        text += " No model beats the simple baselines overall."
    return text + _gap(table, first, kinds)


def condition_tables(scores: pd.DataFrame, table: ScoreTable) -> list[dict[str, Any]]:
    """Per metric, a table conditions x models in the order of the score table."""
    models = [row.name for row in table.rows if row.cells]
    found = []
    for column in table.columns:
        # mean over seeds
        wide = scores[scores["metric"] == column.name].pivot_table(
            index="condition", columns="model", values="value", aggfunc="mean", dropna=False
        )
        wide = wide.reindex(columns=models)
        rows = []
        for condition, values in wide.iloc[:MAX_CONDITIONS].iterrows():
            floor = [row.name for row in table.rows if row.kind == "floor" and row.cells]
            marks, _ = _marks(values.drop(floor), column.crowns)
            cells = [Cell(number(values[model]), marks.get(model, "")) for model in models]
            rows.append(Row(str(condition), "", cells))
        left_out = max(len(wide) - MAX_CONDITIONS, 0)
        found.append({"column": column, "models": models, "rows": rows, "left_out": left_out})
    return found


def published_table(published: pd.DataFrame, table: ScoreTable) -> dict[str, Any] | None:
    """Models by metrics: what a paper printed, ours, and the difference; None if no number of the paper is met by ours.

    Parameters
    ----------
    published
        Of one task, columns ``model``, ``name``, ``metric``, ``published``, ``published_sd``, ``ours``, ``ours_sd``,
        ``difference``, ``source``.
    table
        The scores of that task, for the names of metrics.
    """
    met = published[published["ours"].notna()]
    if met.empty:
        return None
    columns = [column for column in table.columns if column.name in set(met["metric"])]
    by_model = met.set_index(["model", "metric"])
    rows = []
    for model, name in met[["model", "name"]].drop_duplicates().itertuples(index=False):
        cells: list[tuple[Cell, Cell, Cell] | None] = []
        for column in columns:
            if (model, column.name) not in by_model.index:
                cells.append(None)
                continue
            values = by_model.loc[(model, column.name)]
            theirs = Cell(number(values["published"], 2), note=_deviation(values["published_sd"]))
            ours = Cell(number(values["ours"], 2), note=_deviation(values["ours_sd"]))
            cells.append((theirs, ours, Cell(number(values["difference"], 2))))
        rows.append({"model": model, "name": name, "cells": cells})
    return {"columns": columns, "rows": rows, "sources": list(dict.fromkeys(met["source"]))}


def _deviation(value: float) -> str:
    return f"±\u00a0{number(value, 1)}" if np.isfinite(value) else ""


def number(value: float, significant: int = 3) -> str:
    """Three significant digits, or another number of them, without an exponent where that stays short."""
    if not np.isfinite(value):
        return "n/a" if np.isnan(value) else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        digits = 2 if value == 0 else max(significant - 1 - int(np.floor(np.log10(abs(value)))), 0)
        return f"{value:.{digits}f}"
    return f"{value:.{significant - 1}e}"


def _columns(scores: pd.DataFrame) -> list[Column]:
    """The metrics, known ones first in the order of their registry."""
    present = list(dict.fromkeys(scores["metric"]))
    order = [name for name in METRICS if name in present]
    order += [name for name in present if name not in METRICS]
    known = directions(scores)
    counted = scores[scores["value"].notna()].groupby("metric")["condition"].nunique()
    columns = []
    for name in order:
        record = METRICS.get(name)  # scores of metrics from elsewhere are shown all the same
        label = getattr(record, "label", name)
        definition = getattr(record, "definition", "")
        of_mistakes = getattr(record, "of_mistakes", False)
        columns.append(
            Column(name, label, known.get(name), definition, int(counted.get(name, 0)), of_mistakes=of_mistakes)
        )
    return columns


def _marks(values: pd.Series, direction: str | None) -> tuple[dict[str, str], list[str]]:
    """Marks of the best and second best of one metric, and who shares the best value; nothing if all are equal."""
    values = values.dropna()
    if direction not in ("lower", "higher") or values.nunique() < 2:
        return {}, list(values.index) if len(values) > 1 and direction else []
    levels = np.sort(values.unique())
    best, second = levels[:2] if direction == "lower" else levels[::-1][:2]
    winners = list(values.index[values == best])
    marks = dict.fromkeys(winners, "best")
    if len(winners) == 1:
        marks |= dict.fromkeys(values.index[values == second], "second")
    return marks, winners


def _seed_spread(scores: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Standard deviation over seeds of the mean over conditions."""
    if "seed" not in scores or scores["seed"].nunique() < 2:
        return {}
    spread = scores.groupby(["model", "metric", "seed"])["value"].mean().groupby(["model", "metric"]).std()
    deviations: dict[tuple[str, str], float] = spread.dropna().to_dict()
    return deviations


def _gap(table: ScoreTable, first: str, kinds: dict[str, str]) -> str:
    """One metric in numbers: the winner, the best baseline, the noise floor."""
    column = next((c for c in table.columns if c.direction and c.label in table.wins[first]), None)
    if column is None:
        return ""
    values = table.means[column.name].dropna()

    # what to hold the winner against
    best = values[[name for name in values.index if kinds[name] == "baseline" and name != first]]
    others = []
    if len(best):
        name = best.idxmin() if column.direction == "lower" else best.idxmax()
        which = "best other" if kinds[first] == "baseline" else "best"
        others.append(f"the {which} baseline ({name}) {number(best[name])}")
    floor = [name for name, kind in kinds.items() if kind == "floor" and name in values.index]
    if floor:
        others.append(f"real cells against real cells {number(values[floor[0]])}")
    if not others:
        return ""
    return f" In {column.label} it reaches {number(values[first])}, {' and '.join(others)}."


def _listing(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"

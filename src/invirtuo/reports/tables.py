"""Scores as a reader wants them: averaged, best and second best marked, baselines and the noise floor set apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

__all__ = ["Cell", "Column", "Row", "ScoreTable", "condition_tables", "headline", "score_table"]

BASELINES = (  # what everybody must beat
    "context_mean",
    "no_change",
    "perturbation_mean",
    "perturbation_mean:shift-cells",
    "ridge",
)
FLOOR = "noise_floor"
MAX_CONDITIONS = 200  # rows of a per-condition table; the rest stays in scores.csv


@dataclass(frozen=True)
class Column:
    """A metric, or in a per-condition table a model: heading of a column."""

    name: str
    label: str
    direction: str | None = None  # "lower" or "higher" is better; None: not known
    definition: str = ""
    n: int = 0

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑"}.get(self.direction or "", "")


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
    def kinds(self) -> dict[str, str]:
        """Name of each row to its kind."""
        return {row.name: row.kind for row in self.rows}


def score_table(
    scores: pd.DataFrame,
    baselines: Iterable[str] = BASELINES,
    floor: str = FLOOR,
    failed: Mapping[str, str] | None = None,
) -> ScoreTable:
    """Average tidy scores over conditions (and seeds) and mark the best two of each metric, the floor left out.

    Parameters
    ----------
    scores
        Columns ``condition``, ``metric``, ``value``, ``model``; optionally ``seed`` and ``direction``.
    baselines, floor
        Names in ``model`` that are set apart.
    failed
        Model to what failed of it; one without scores gets a row that says so.
    """
    failed = dict(failed or {})
    means = _means(scores)
    columns = _columns(scores)
    tells = {column.name: len(means) < 2 or means[column.name].nunique(dropna=False) > 1 for column in columns}
    equal = [column.label for column in columns if not tells[column.name]] if any(tells.values()) else []
    columns = [column for column in columns if column.label not in equal]
    names = [column.name for column in columns]
    means = means.reindex(columns=names)
    missing = scores["value"].isna().groupby([scores["model"], scores["metric"]]).agg(["sum", "size"])
    spread = _seed_spread(scores)
    marks: dict[str, dict[str, str]] = {}
    wins: dict[str, list[str]] = {name: [] for name in means.index if name != floor}
    ties = []
    for column in columns:
        marks[column.name], winners = _marks(means[column.name].drop(floor, errors="ignore"), column.direction)
        if len(winners) == 1:
            wins[winners[0]].append(column.label)
        elif winners:
            ties.append(column.label)
    every = [*means.index, *(name for name in failed if name not in means.index)]
    kinds = {name: "floor" if name == floor else "baseline" if name in set(baselines) else "model" for name in every}
    place = _mean_places(means.drop(floor, errors="ignore"), columns)
    order = sorted(
        every, key=lambda name: (_KINDS.index(kinds[name]), -len(wins.get(name, ())), place.get(name, np.inf), name)
    )
    rows = []
    for name in order:
        cells: list[Cell] = []
        if name not in means.index:
            rows.append(Row(name, kinds[name], cells, failed[name]))
            continue
        for metric in names:
            n_missing, n = missing.loc[(name, metric)] if (name, metric) in missing.index else (0, 0)
            note = f"{n_missing} of {n} missing" if n_missing else ""
            plus = spread.get((name, metric))
            note = "\n".join(filter(None, [f"±\u00a0{number(plus, 2)}" if plus is not None else "", note]))
            cells.append(Cell(number(means.loc[name, metric]), marks[metric].get(name, ""), note))
        rows.append(Row(name, kinds[name], cells, failed.get(name, "")))
    return ScoreTable(columns, rows, scores["condition"].nunique(), wins, ties, equal, means)


def _means(scores: pd.DataFrame) -> pd.DataFrame:
    """Models x metrics: mean over conditions, then over seeds."""
    if "seed" in scores and scores["seed"].nunique() > 1:
        scores = scores.groupby(["model", "metric", "seed"], as_index=False, dropna=False)["value"].mean()
    return scores.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", dropna=False)


def _mean_places(means: pd.DataFrame, columns: list[Column]) -> dict[str, float]:
    """Mean over the metrics of the place of each model, no value last."""
    places = [
        means[column.name].rank(ascending=column.direction == "lower", na_option="bottom")
        for column in columns
        if column.direction
    ]
    return pd.concat(places, axis=1).mean(axis=1).to_dict() if places else {}


_KINDS = ("model", "baseline", "floor")


def headline(table: ScoreTable) -> str:
    """Say in a sentence or two which model is best in what, and what the simple baselines and real cells reach."""
    kinds = table.kinds
    if len(table.wins) < 2:
        return f"{next(iter(table.wins), 'Nothing')} was scored on {_plural(table.n_conditions, 'condition')}."
    n = sum(map(len, table.wins.values()))
    if n == 0:
        return "No model is ahead of another in any score."
    ranked = sorted(((name, won) for name, won in table.wins.items() if won), key=lambda item: (-len(item[1]), item[0]))
    first, won = ranked[0]
    scored = n + len(table.ties)
    text = f"{first} is best in {len(won)} of {_plural(scored, 'score')} ({_listing(won)})"
    others = [f"{name} in {len(labels)} ({_listing(labels)})" for name, labels in ranked[1:4]]
    text += f"; {_listing(others, 3)}." if others else "."
    if kinds[first] == "baseline" and "model" in kinds.values():
        text += " No model beats the simple baselines overall."
    return text + _gap(table, first, kinds)


def condition_tables(scores: pd.DataFrame, table: ScoreTable) -> list[dict]:
    """Per metric, a table conditions x models in the order of the score table."""
    models = [row.name for row in table.rows if row.cells]
    found = []
    for column in table.columns:
        wide = scores[scores["metric"] == column.name].pivot_table(
            index="condition", columns="model", values="value", aggfunc="mean", dropna=False
        )
        wide = wide.reindex(columns=models)
        rows = []
        for condition, values in wide.iloc[:MAX_CONDITIONS].iterrows():
            floor = [row.name for row in table.rows if row.kind == "floor" and row.cells]
            marks, _ = _marks(values.drop(floor), column.direction)
            rows.append(Row(str(condition), "", [Cell(number(values[m]), marks.get(m, "")) for m in models]))
        found.append({"column": column, "models": models, "rows": rows, "left_out": max(len(wide) - MAX_CONDITIONS, 0)})
    return found


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
    records = _records()
    present = list(dict.fromkeys(scores["metric"]))
    order = [name for name in records if name in present] + [name for name in present if name not in records]
    given = scores.groupby("metric")["direction"].first() if "direction" in scores else {}
    counted = scores[scores["value"].notna()].groupby("metric")["condition"].nunique()
    columns = []
    for name in order:
        record = records.get(name)
        direction = given.get(name) or getattr(record, "direction", None)
        label, definition = getattr(record, "label", name), getattr(record, "definition", "")
        columns.append(Column(name, label, direction, definition, int(counted.get(name, 0))))
    return columns


def _records() -> dict:
    """The registry of metrics; scores of metrics it does not know are shown all the same."""
    try:
        from invirtuo.metrics import METRICS
    except ImportError:  # the table may come from elsewhere
        return {}
    return METRICS


def _marks(values: pd.Series, direction: str | None) -> tuple[dict[str, str], list[str]]:
    """Marks of the best and second best of one metric, and who shares the best value; nothing if all are equal."""
    values = values.dropna()
    if direction not in ("lower", "higher") or values.nunique() < 2:
        return {}, list(values.index) if len(values) > 1 and direction else []
    levels = np.sort(values.unique())
    best, second = levels[:2] if direction == "lower" else levels[::-1][:2]
    winners = list(values.index[values == best])
    marks = dict.fromkeys(winners, "best")
    return marks | (dict.fromkeys(values.index[values == second], "second") if len(winners) == 1 else {}), winners


def _seed_spread(scores: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Standard deviation over seeds of the mean over conditions."""
    if "seed" not in scores or scores["seed"].nunique() < 2:
        return {}
    spread = scores.groupby(["model", "metric", "seed"])["value"].mean().groupby(["model", "metric"]).std()
    return spread.dropna().to_dict()


def _gap(table: ScoreTable, first: str, kinds: dict[str, str]) -> str:
    """One metric in numbers: the winner, the best baseline, the noise floor."""
    column = next((c for c in table.columns if c.direction and c.label in table.wins[first]), None)
    if column is None:
        return ""
    values = table.means[column.name].dropna()
    best = values[[name for name in values.index if kinds[name] == "baseline" and name != first]]
    parts = []
    if len(best):
        name = best.idxmin() if column.direction == "lower" else best.idxmax()
        which = "best other" if kinds[first] == "baseline" else "best"
        parts.append(f"the {which} baseline ({name}) {number(best[name])}")
    floor = [name for name, kind in kinds.items() if kind == "floor" and name in values.index]
    if floor:
        parts.append(f"real cells against real cells {number(values[floor[0]])}")
    if not parts:
        return ""
    return f" In {column.label} it reaches {number(values[first])}, {' and '.join(parts)}."


def _listing(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"

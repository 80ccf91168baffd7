"""What a reader asks of a benchmark: who is ahead overall, by how much, for sure or by chance, and at what cost.

It works on the score tables of the tasks and on the tables of costs and comparisons; the drawing is in `charts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from invirtuo.reports import charts
from invirtuo.reports.tables import Cell, Column, ScoreTable, number
from invirtuo.reports.verdict import MAIN

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = [
    "costs_section",
    "failed_models",
    "failures",
    "heat",
    "is_benchmark",
    "overview",
    "places",
    "positions",
    "task_section",
]

STEPS, SHADES = (0.5, 0.7), ("low", "middle", "high")  # where text changes its colour on a dark and on a light page
FEW = 3  # fewer conditions are not worth a scatter plot
ERROR_LENGTH = 200


def overview(tables: Mapping[str, ScoreTable]) -> dict[str, Any]:
    """Mean rank of each model over all metrics and tasks, and its mean position within each task.

    Parameters
    ----------
    tables
        Task to its score table.
    """
    ranked = places(tables)
    by_model = ranked.groupby("model")["place"]
    mean_rank = by_model.mean()
    kinds = {name: kind for table in tables.values() for name, kind in table.kinds.items() if kind != "floor"}
    order = sorted(kinds, key=lambda name: (mean_rank.get(name, np.inf), name))

    # a row for each model: its mean rank, and its mean position in every task
    mean_positions = [positions(table).mean(axis=1) for table in tables.values()]
    rows = []
    for name in order:
        reached = [values.get(name, np.nan) for values in mean_positions]
        cells = [_shaded(value, number(value)) for value in reached]
        rank = number(mean_rank.get(name, np.nan))
        rows.append({"name": name, "kind": kinds[name], "place": rank, "cells": cells})

    # all ranks of each model
    spread = []
    for name in order:
        if name in by_model.groups:
            spread.append(charts.Spread(name, kinds[name], by_model.get_group(name).to_numpy(float)))
    last = float(ranked["place"].max()) if len(ranked) else 1.0
    chart = charts.spreads(spread, 1.0, max(last, 2.0), reference=None, axis="place (1 is best)") if spread else ""
    n_ranked = ranked.groupby(["task", "metric"]).ngroups
    return {"tasks": list(tables), "rows": rows, "chart": chart, "n_places": n_ranked}


def positions(table: ScoreTable) -> pd.DataFrame:
    """Where each mean lies between the worst simple baseline (0) and the noise floor (1), cut off at both ends.

    Without baselines the worst row stands for 0, without a floor the best row for 1. NaN where the two ends are the
    same or the wrong way round, or the direction of the metric is not known.
    """
    found = pd.DataFrame(np.nan, index=table.means.index, columns=[column.name for column in table.columns])
    for column in table.columns:
        ends = _ends(table, column)
        if ends is not None:
            low, high = ends
            found[column.name] = ((table.means[column.name] - low) / (high - low)).clip(0, 1)
    return found


def places(tables: Mapping[str, ScoreTable]) -> pd.DataFrame:
    """Place of each model and baseline in each metric of each task, ties in the middle, no value last.

    Returns
    -------
    DataFrame with columns ``task``, ``metric``, ``model``, ``place``.
    """
    found = []
    for task, table in tables.items():
        names = [row.name for row in table.rows if row.kind != "floor"]
        for column in table.columns:
            values = table.means[column.name].reindex(names)
            if column.direction is None or values.notna().sum() < 2:
                continue
            rank = values.rank(ascending=column.direction == "lower", na_option="bottom")
            found.append(pd.DataFrame({"task": task, "metric": column.name, "model": names, "place": rank.to_numpy()}))
    if not found:
        return pd.DataFrame(columns=["task", "metric", "model", "place"])
    return pd.concat(found, ignore_index=True)


def heat(table: ScoreTable) -> dict[str, Any]:
    """Models x metrics, each cell coloured by its position; best mean position first."""
    reached = positions(table)
    mean = reached.mean(axis=1)
    kind_of = table.kinds
    order = -mean.fillna(-1)
    rows = []
    for name in sorted(reached.index, key=lambda name: (kind_of[name] == "floor", order[name], name)):
        cells = []
        for column in table.columns:
            value = number(table.means.loc[name, column.name])
            cells.append(_shaded(reached.loc[name, column.name], value))
        rows.append(
            {"name": name, "kind": kind_of[name], "cells": cells, "mean": _shaded(mean[name], number(mean[name]))}
        )

    # what 0 and 1 stand for
    kinds = set(kind_of.values())
    low = "the worst simple baseline" if "baseline" in kinds else "the worst row"
    high = "the noise floor" if "floor" in kinds else "the best row (there is no noise floor)"
    return {"columns": table.columns, "rows": rows, "low": low, "high": high}


def task_section(scores: pd.DataFrame, table: ScoreTable, comparisons: pd.DataFrame | None) -> dict[str, Any]:
    """Everything drawn about one task.

    Parameters
    ----------
    scores
        Of this task.
    table
        Made from them.
    comparisons
        Of this task; None if there are none.
    """
    # conditions by models, for every metric
    wide = {}
    for metric, own in scores.groupby("metric"):
        wide[metric] = own.pivot_table(index="condition", columns="model", values="value", aggfunc="mean", dropna=False)
    section: dict[str, Any] = {"heat": heat(table), "ranks": _rank_charts(wide, table)}
    section |= {"scatters": [], "best_model": ""}

    # the model with the best mean rank is set against the baselines
    mean_rank = places({"": table}).groupby("model")["place"].mean()
    models = [name for name in mean_rank.index if table.kinds.get(name) == "model" and name in table.means.index]
    if models:
        best = min(models, key=lambda name: (mean_rank[name], name))
        section |= {"best_model": best, "scatters": _scatters(wide, table, best)}
    return section | _differences(comparisons, table)


def costs_section(costs: pd.DataFrame, tables: Mapping[str, ScoreTable]) -> dict[str, Any]:
    """A chart per task, quality over seconds, and a table of seconds, memory and parameters.

    Parameters
    ----------
    costs
        Columns ``task``, ``model`` and any of ``fit_seconds``, ``predict_seconds``, ``peak_memory_mib``,
        ``parameters``.
    tables
        Task to its score table.
    """
    numbers = {name: i for i, name in enumerate(dict.fromkeys(costs["model"]), 1)}
    seconds = costs.assign(seconds=costs[["fit_seconds", "predict_seconds"]].sum(axis=1, min_count=1))
    seconds = seconds.groupby(["task", "model"])["seconds"].mean()
    drawn = []
    for task, table in tables.items():
        chart = _cost_chart(seconds[task], table, numbers) if task in seconds.index else None
        if chart:
            drawn.append({"task": task, "chart": chart})

    # a row for each model: seconds in every task, and the most that it took anywhere
    kinds: dict[str, str] = {}
    for table in tables.values():
        kinds = table.kinds | kinds
    largest = costs.groupby("model")[["peak_memory_mib", "parameters"]].max()
    rows = []
    for name, i in numbers.items():
        cells = [_seconds(seconds.get((task, name), np.nan)) for task in tables]
        cells += [_amount(largest.loc[name, column]) for column in largest]
        rows.append({"number": i, "name": name, "kind": kinds.get(name, "model"), "cells": cells})
    return {"charts": drawn, "tasks": list(tables), "rows": rows}


def failures(costs: pd.DataFrame) -> list[dict[str, str]]:
    """Cells of the grid that failed, with what they said."""
    failed = costs.loc[costs["status"] == "failed", ["task", "model", "seed", "error"]]
    rows = []
    for task, model, seed, error in failed.itertuples(index=False):
        seed = f"{seed:g}" if isinstance(seed, float) else str(seed)
        rows.append({"task": task, "model": model, "seed": seed, "error": _cut(error)})
    return rows


def _ends(table: ScoreTable, column: Column) -> tuple[float, float] | None:
    """Values of one metric that stand for 0 and 1."""
    values = table.means[column.name].dropna()
    if column.direction is None or values.empty:
        return None
    # 0 is the worst simple baseline, else the worst row; 1 is the noise floor, else the best row
    kind = pd.Series(table.kinds).reindex(values.index)
    baselines = values[kind == "baseline"]
    floors = values[kind == "floor"]
    weak = baselines if len(baselines) else values
    strong = floors[:1] if len(floors) else values
    if column.direction == "lower":
        low = float(weak.max())
        high = float(strong.min())
        apart = low - high
    else:
        low = float(weak.min())
        high = float(strong.max())
        apart = high - low
    return (low, high) if apart > 1e-12 * max(abs(low), abs(high)) else None


def _best_baseline(table: ScoreTable, column: Column) -> str | None:
    """Name of the simple baseline with the best mean in a metric, if there is one."""
    values = table.means[column.name].dropna()
    values = values[[name for name in values.index if table.kinds[name] == "baseline"]]
    if values.empty or column.direction is None:
        return None
    return str(values.idxmin() if column.direction == "lower" else values.idxmax())


def _rank_charts(wide: Mapping[str, pd.DataFrame], table: ScoreTable) -> list[Markup]:
    """A chart for every metric that ranks predictions, best model first."""
    drawn = []
    for column in table.columns:
        if not column.name.endswith("_rank"):
            continue
        by_model = wide[column.name]
        names = table.means[column.name].dropna().sort_values().index
        rows = [charts.Spread(name, table.kinds[name], by_model[name].to_numpy(float)) for name in names]
        if rows:
            drawn.append(charts.spreads(rows, 0.0, 1.0, reference=0.5, axis=f"{column.label} (0 is best)"))
    return drawn


def _scatters(wide: Mapping[str, pd.DataFrame], table: ScoreTable, model: str) -> list[dict[str, Any]]:
    """The model against the best simple baseline of each metric, condition by condition."""
    drawn = []
    for column in table.columns:
        baseline = _best_baseline(table, column)
        if baseline is None or column.name.endswith("_rank") or model not in wide[column.name]:
            continue
        # conditions that both have
        both = wide[column.name][[baseline, model]].set_axis(["x", "y"], axis=1).dropna()
        if len(both) < FEW:
            continue
        ahead = both["y"] < both["x"] if column.direction == "lower" else both["y"] > both["x"]
        x = both["x"].to_numpy(float)
        y = both["y"].to_numpy(float)
        chart = charts.scatter(x, y, [str(name) for name in both.index], x_axis=baseline, y_axis=model)
        side = "below" if column.direction == "lower" else "above"
        drawn.append({"column": column, "chart": chart, "ahead": int(ahead.sum()), "n": len(both), "side": side})
    return drawn


def _differences(comparisons: pd.DataFrame | None, table: ScoreTable) -> dict[str, Any]:
    """Models against the best simple baseline of each metric: charts, all numbers, and how often each is ahead."""
    empty: dict[str, Any] = {"forests": [], "differences": [], "verdicts": []}
    if comparisons is None:
        return empty
    models = [row.name for row in table.rows if row.kind == "model"]
    forests, lines = [], []
    for column in table.columns:
        # comparisons with the best baseline, models in the order of the table
        baseline = _best_baseline(table, column)
        chosen = comparisons[(comparisons["metric"] == column.name) & (comparisons["against"] == baseline)]
        chosen = chosen.drop_duplicates("model").set_index("model")
        rows = []
        for model in models:
            if model not in chosen.index:
                continue
            comparison = chosen.loc[model]
            value, low, high = (float(comparison[name]) for name in ("difference", "low", "high"))
            rows.append(charts.Interval(model, value, low, high, column.direction))

            line = {"model": model, "metric": column.label, "baseline": baseline, "difference": number(value)}
            line["interval"] = f"{number(low)} to {number(high)}" if np.isfinite(low + high) else "no interval"
            line |= {"n": f"{comparison['n_conditions']:g}", "verdict": rows[-1].verdict}
            lines.append(line)
        if rows:
            chart = charts.forest(rows, axis=f"model minus {baseline}", lower_is_better=column.direction == "lower")
            forests.append({"column": column, "chart": chart})

    # how often each model is ahead or behind
    verdicts = []
    for model in models:
        counts = Counter(line["verdict"] for line in lines if line["model"] == model)
        if counts:
            verdicts.append({"model": model} | {name: counts[name] for name in ("better", "worse", "open")})
    return {"forests": forests, "differences": lines, "verdicts": verdicts}


def _cost_chart(seconds: pd.Series, table: ScoreTable, numbers: Mapping[str, int]) -> Markup | None:
    """The main metric of a task over the seconds that each model took; None if nothing can be drawn."""
    # the first of the main metrics that is there, else the first that has a direction
    names = {column.name: column for column in table.columns if column.direction}
    column = next((names[name] for name in (*MAIN, *names) if name in names), None)
    if column is None:
        return None
    values = table.means[column.name]
    dots = []
    for name, value in values.dropna().items():
        if np.isfinite(seconds.get(name, np.nan)):
            x = max(float(seconds[name]), 1e-3)  # the axis is logarithmic
            dots.append(charts.Dot(numbers[name], name, table.kinds[name], x, float(value)))
    if not dots:
        return None
    floor = next((float(values[name]) for name, kind in table.kinds.items() if kind == "floor"), np.nan)
    axes = {"x_axis": "seconds to fit and predict", "y_axis": f"{column.label} ({column.direction} is better)"}
    return charts.quality_by_cost(dots, floor=floor if np.isfinite(floor) else None, **axes)


def _shaded(position: float, text: str) -> dict[str, str]:
    """Text with its position in percent, and how dark that is; no colour where there is none."""
    if not np.isfinite(position):
        return {"text": text, "at": "", "shade": ""}
    return {"text": text, "at": f"{100 * position:.0f}%", "shade": SHADES[int(np.searchsorted(STEPS, position))]}


def _seconds(value: float) -> Cell:
    return Cell("" if not np.isfinite(value) else number(value))


def _amount(value: float) -> Cell:
    return Cell("" if not np.isfinite(value) else f"{value:,.0f}")


def _cut(error: object) -> str:
    text = "no message" if pd.isna(error) else str(error)
    return text if len(text) <= ERROR_LENGTH else f"{text[:ERROR_LENGTH]}…"


def failed_models(costs: pd.DataFrame) -> dict[str, str]:
    """Model of one task to what failed of it."""
    found = {}
    for model, runs in costs.groupby("model", sort=False):
        failed = runs[runs["status"] == "failed"]
        if len(failed) == len(runs):
            found[str(model)] = f"failed: {_cut(failed['error'].iloc[0])}"
        elif len(failed):
            found[str(model)] = f"{len(failed)} of {len(runs)} seeds failed"
    return found


def is_benchmark(scores: pd.DataFrame, others: Iterable[object]) -> bool:
    """Whether a folder holds more than one comparison of models."""
    return scores["task"].nunique() > 1 or any(other is not None for other in others)

"""A picture and a page of a ranking of perturbations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invirtuo.plots.style import PREDICTED
from invirtuo.reports.answer import answer_page
from invirtuo.reports.charts import Interval, forest
from invirtuo.reports.figures import save
from invirtuo.reports.tables import number

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["plot_screen", "screen_page"]

SHOWN = 30  # conditions that are drawn
IN_CHART = 15  # conditions in the chart of a group
FDR = 0.1
COLUMNS = {
    "condition": "what is tried, and in which cells",
    "change": "of the score of the cells, against the control cells of the same group",
    "low": "lower end of the interval of the change",
    "high": "its upper end",
    "q_value": "false discovery rate if this condition and all with a smaller value are taken for improvements",
    "rank": "by the change",
    "rank_magnitude": "by the length of the effect on all genes, whatever it does to the score",
    "rank_mean": "by the mean change that was measured under the same perturbation in other groups",
}


def plot_screen(table: pd.DataFrame, out: str | os.PathLike[str], *, n: int = SHOWN) -> None:
    """Draw the best conditions of a screen: how the score changes, with its interval.

    Parameters
    ----------
    table
        As :func:`invirtuo.screen` gives it.
    out
        Picture to write (.png, .pdf or .svg).
    n
        Conditions that are drawn.

    Raises
    ------
    ValueError
        If columns are missing.
    """
    from matplotlib.figure import Figure

    _check(table)
    best = table.head(n).iloc[::-1]
    row = np.arange(len(best))
    figure = Figure(figsize=(6, 0.24 * len(best) + 1), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.8", linewidth=0.8)
    if best["low"].notna().any():
        axes.hlines(row, best["low"], best["high"], color=PREDICTED, alpha=0.4, linewidth=3)
    axes.plot(best["change"], row, "o", color=PREDICTED, markersize=4)
    axes.set_yticks(row, best["condition"].astype(str), fontsize=8)
    axes.set_xlabel("change of the score against control cells")
    save(figure, out)


def screen_page(
    table: pd.DataFrame, out: str | os.PathLike[str], *, title: str = "Which perturbation to try next?"
) -> Path:
    """Write one self-contained HTML page about a screen: the answer in a sentence, a chart for each group, the table.

    Parameters
    ----------
    table
        As :func:`invirtuo.screen` gives it.
    out
        The page to write.
    title
        Its heading.

    Returns
    -------
    Path of the page.

    Raises
    ------
    ValueError
        If columns are missing.
    """
    _check(table)
    table = table.sort_values("rank", kind="stable")
    group = table["condition"].str.rpartition("|")[0]
    charts = []
    for name, own in table.groupby(group, sort=False):
        label = own["condition"].str.rpartition("|")[2]
        best = own.assign(label=label).head(IN_CHART)[["label", "change", "low", "high"]]
        rows = [Interval(*row) for row in best.itertuples(index=False)]
        charts.append((str(name), forest(rows, axis="change of the score", lower_is_better=False)))
    meanings = {name: meaning for name, meaning in COLUMNS.items() if name in table}
    return answer_page(out, title, _answer(table), charts, table, meanings, further=_rivals(table))


def _check(table: pd.DataFrame) -> None:
    if missing := [name for name in ("condition", "change", "low", "high", "q_value", "rank") if name not in table]:
        raise ValueError(f"the table has no column {', '.join(missing)}; expected one made by invirtuo.screen")


def _answer(table: pd.DataFrame) -> str:
    """The best condition, and how many improve the score."""
    best = table.iloc[0]
    interval = "" if np.isnan(best["low"]) else f" ({number(best['low'])} to {number(best['high'])})"
    first = (
        f"Best of {len(table):,}: {best['condition']}, which changes the score by {number(best['change'])}{interval}."
    )
    if table["q_value"].isna().all():
        return f"{first} No validation condition was held out whose change is known, so there are no intervals."
    n_found = int((table["q_value"] <= FDR).sum())
    return f"{first} {n_found:,} improve{'s' if n_found == 1 else ''} it at a false discovery rate of {FDR}."


def _rivals(table: pd.DataFrame) -> list[str]:
    """What simpler rankings would have said."""
    best, found = table.iloc[0], []
    for column, name in (
        ("rank_magnitude", "The size of the effect alone"),
        ("rank_mean", "The mean over other groups"),
    ):
        if column in table:
            other = table.sort_values(column, kind="stable").iloc[0]["condition"]
            then = "" if other == best["condition"] else f", and {best['condition']} at rank {best[column]}"
            found.append(f"{name} would have put {other} first{then}.")
    return found

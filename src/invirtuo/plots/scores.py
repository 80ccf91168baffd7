"""Scores of models, and how losses fell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invirtuo.errors import preview
from invirtuo.metrics.scores import ARROWS, directions
from invirtuo.plots.style import GREY, LINES, PREDICTED, axes_or_new, clean

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["curves", "history", "quantities", "scores"]


def scores(table: pd.DataFrame, metric: str | None = None, *, ax: Axes | None = None) -> Axes:
    """A metric by model: a dot for each condition (and seed), a line at the mean; the best on top.

    Which values are better says the column ``direction`` of the table, else the metric; where neither does, models keep
    the order of the table.

    Parameters
    ----------
    table
        Tidy scores with ``metric``, ``value`` and ``model``; without the last those of one model.
    metric
        Its name; None takes the first of the table.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If the table has no scores of the metric.
    """
    wanted = table["metric"].iloc[0] if metric is None else metric
    own = table[table["metric"] == wanted]
    if not len(own):
        raise ValueError(f"no scores of {wanted!r} in the table; found {preview(sorted(set(table['metric'])))}")
    if "model" not in own:
        own = own.assign(model="")
    direction = directions(own).get(wanted)
    means = own.groupby("model", sort=False)["value"].mean()
    if direction:
        means = means.sort_values(ascending=direction == "higher")
    drawn = axes_or_new(ax, 4.5, 0.3 * len(means) + 0.9)
    for row, (model, mean) in enumerate(means.items()):
        values = own.loc[own["model"] == model, "value"]
        drawn.plot(values, np.full(len(values), row), "o", color=GREY, markersize=4)
        drawn.plot([mean, mean], [row - 0.3, row + 0.3], color=PREDICTED, linewidth=2)
    drawn.set_yticks(range(len(means)), list(map(str, means.index)), fontsize=8)
    better = f" {ARROWS[direction]} ({direction} is better)" if direction else ""
    drawn.set_xlabel(f"{wanted}{better}", fontsize=8)
    return clean(drawn)


def history(model: Any, quantity: str = "total", *, ax: Axes | None = None) -> Axes:
    """How a quantity changed during the fit; validation dashed.

    Parameters
    ----------
    model
        A fitted model, or its ``history``; of several models with a column ``model``.
    quantity
        A loss, without ``train_`` and ``val_`` before it.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If nothing was trained, or the quantity is unknown.
    """
    table = getattr(model, "history", model)
    known = quantities(table)
    if quantity not in known:
        raise ValueError(f"no {quantity!r} in the history; found {preview(known) if known else 'nothing trained'}")
    drawn = curves(axes_or_new(ax), table, known[quantity])
    drawn.set_ylabel(quantity, fontsize=9)
    if len(drawn.get_legend_handles_labels()[1]) > 1:
        drawn.legend(frameon=False, fontsize=8)
    return drawn


def quantities(table: pd.DataFrame) -> dict[str, list[str]]:
    """Quantities of a history to their columns, training and validation together; the total loss first."""
    skip = {"step", "model", "seconds", "epoch", "seed", "lr"}
    found: dict[str, list[str]] = {}
    for column in table.select_dtypes("number").columns:
        if column not in skip:
            found.setdefault(column.removeprefix("train_").removeprefix("val_"), []).append(column)
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "total", name != "loss", name))}


def curves(ax: Axes, table: pd.DataFrame, columns: list[str]) -> Axes:
    """Columns of a history over steps, a colour for each model, validation dashed."""
    parts = table.groupby("model", sort=False) if "model" in table else [("", table)]
    for color, (model, part) in zip(LINES * 9, parts, strict=False):
        for column in columns:
            line = part[["step", column]].dropna()
            is_validation = column.startswith("val_")
            label = None if is_validation else str(model)
            style = "--" if is_validation else "-"
            marker = "o" if len(line) == 1 else None  # a line needs two points
            ax.plot(line["step"], line[column], color=color, ls=style, lw=1.4, marker=marker, label=label)
    ax.set_xlabel("step", fontsize=9)
    return clean(ax)

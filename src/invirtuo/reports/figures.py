"""Pictures of the report as PNG in a data address: PCA panels, populations and training curves."""

from __future__ import annotations

import base64
import io
import os
from typing import TYPE_CHECKING

import numpy as np

from invirtuo.cells.files import writing
from invirtuo.plots.cells import points
from invirtuo.plots.scores import curves as draw_curves
from invirtuo.plots.scores import quantities
from invirtuo.plots.style import GREY, PREDICTED, clean

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["as_png", "condition_panels", "curves", "new_figure", "panels", "populations", "save"]

MAX_ROWS, MAX_COLUMNS = 12, 6
COLOURS = 256  # of a picture in a page
PER_ROW = 5  # models beside each other, where those of one condition fill several rows


def panels(table: pd.DataFrame) -> tuple[str, int, str]:
    """Small multiples of cells on two principal components: a row per condition, a column per model.

    Parameters
    ----------
    table
        Columns ``pc1``, ``pc2``, ``kind`` ("background", "real" or "predicted"), ``model``, ``condition``. Background
        cells without a condition are drawn in every panel, real cells in the panels of their condition.

    Returns
    -------
    The picture, its number of columns, and a note on what was left out ("" if nothing).
    """
    predicted = table[table["kind"] == "predicted"]
    models = list(dict.fromkeys(predicted["model"]))
    conditions = list(dict.fromkeys(predicted["condition"]))

    # as many as a page holds; the note says what is left out
    rows = conditions[:MAX_ROWS]
    columns = models[:MAX_COLUMNS]
    figure = new_figure(1.0 + 2.3 * len(columns), 0.7 + 2.2 * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for i, condition in enumerate(rows):
        for j, model in enumerate(columns):
            _panel(grid[i][j], table, condition, model)
        grid[i][0].set_ylabel(str(condition).replace("|", "\n"), fontsize=9)

    for j, model in enumerate(columns):
        grid[0][j].set_title(_title(model), fontsize=10, fontweight="bold")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9, markerscale=4)
    left_out = [(len(conditions) - len(rows), "conditions"), (len(models) - len(columns), "models")]
    note = " and ".join(f"{n} more {what}" for n, what in left_out if n > 0)
    return as_png(figure), len(columns), f"{note} not drawn" if note else ""


def condition_panels(table: pd.DataFrame, condition: str, lines: Mapping[str, str]) -> str:
    """One condition, a panel for each model, as many rows as that takes.

    Parameters
    ----------
    table
        As for :func:`panels`; background and real cells are those of the condition.
    condition
        Its name.
    lines
        Model to what stands under its name.
    """
    own = table[table["condition"] == condition]
    models = list(dict.fromkeys(own.loc[own["kind"] == "predicted", "model"]))
    n_rows = -(-len(models) // PER_ROW)
    n_columns = min(len(models), PER_ROW)
    figure = new_figure(0.4 + 2.3 * n_columns, 0.7 + 2.75 * n_rows)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, model in zip(axes, models, strict=False):
        _panel(ax, own, condition, model)
        ax.set_title(f"{_title(model)}\n{lines.get(model, '')}", fontsize=8)
    for ax in axes[len(models) :]:
        ax.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9, markerscale=4)
    return as_png(figure)


def curves(history: pd.DataFrame) -> str:
    """Training curves: a panel per quantity, a line per model; validation dashed.

    Parameters
    ----------
    history
        Columns ``step``, ``model`` and one per quantity; ``train_x`` and ``val_x`` share a panel.
    """
    columns = dict(list(quantities(history).items())[:MAX_COLUMNS])
    per_row = min(3, len(columns))
    n_rows = -(-len(columns) // per_row)
    figure = new_figure(3.4 * per_row + 0.4, 2.5 * n_rows + 0.5)
    axes = figure.subplots(n_rows, per_row, squeeze=False).ravel()
    for ax, (name, own) in zip(axes, columns.items(), strict=False):
        draw_curves(ax, history, own).set_title(name, fontsize=10)

    # panels that nothing is left for
    for ax in axes[len(columns) :]:
        ax.set_axis_off()
    axes[0].legend(frameon=False, fontsize=8)
    return as_png(figure)


def populations(genes: pd.DataFrame, cells: pd.DataFrame) -> tuple[str, int]:
    """A column per origin: variance against mean, share of empty cells against mean, empty genes of single cells.

    Parameters
    ----------
    genes
        Columns ``model`` (among them "real"), ``gene``, ``mean``, ``variance``, ``zeros``.
    cells
        Columns ``model``, ``zeros``.

    Returns
    -------
    The picture and its number of columns.
    """
    models = [name for name in dict.fromkeys(genes["model"]) if name != "real"][:MAX_COLUMNS]
    figure = new_figure(0.6 + 2.6 * len(models), 7.2)
    grid = figure.subplots(3, len(models), squeeze=False, sharex="row", sharey="row")

    # the same bins for all, so that columns compare
    bins = np.linspace(cells["zeros"].min(), cells["zeros"].max(), 41)
    for j, model in enumerate(models):
        for name, color, label in (("real", GREY, "real"), (model, PREDICTED, "generated")):
            part = genes[(genes["model"] == name) & (genes["mean"] > 0)]
            grid[0][j].scatter(part["mean"], part["variance"], s=2, color=color, alpha=0.5, linewidths=0, label=label)
            grid[1][j].scatter(part["mean"], part["zeros"], s=2, color=color, alpha=0.5, linewidths=0)
            share = cells.loc[cells["model"] == name, "zeros"]
            weights = np.full(len(share), 1 / max(len(share), 1))
            grid[2][j].hist(share, bins, weights=weights, histtype="stepfilled", color=color, alpha=0.6)
        grid[0][j].set(xscale="log", yscale="log")
        grid[1][j].set(xscale="log")
        grid[0][j].set_title(_title(model), fontsize=10, fontweight="bold")
        for row, name in zip(grid, ("mean of a gene", "mean of a gene", "share of empty genes"), strict=True):
            row[j].set_xlabel(name, fontsize=8)
            clean(row[j])

    # labels and legend once for all columns
    for row, name in zip(grid, ("variance", "share of cells without it", "share of cells"), strict=True):
        row[0].set_ylabel(name, fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9, markerscale=6)
    return as_png(figure), len(models)


def _panel(ax: Axes, table: pd.DataFrame, condition: str, model: str) -> None:
    here = table["condition"].isin([condition, ""]) & table["model"].isin([model, ""])
    points(ax, table[here])


def _title(model: object) -> str:
    """Name of a model above its column; the preset on a line of its own, so that neighbours do not touch."""
    return str(model).replace(":", ":\n")


def new_figure(width: float, height: float) -> Figure:
    """Make a figure without pyplot: nothing global, no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, out: str | os.PathLike[str]) -> None:
    """Write a picture in the format that its name ends in."""
    with writing(out) as path:
        figure.savefig(path, dpi=150, format=os.path.splitext(out)[1].removeprefix(".") or "png")


def as_png(figure: Figure) -> str:
    """The figure as a data address, in so few colours that the page stays small."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    picture = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(packed, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()

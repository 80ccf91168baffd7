"""A picture of predicted effects with their intervals."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import numpy as np

from invirtuo.reports.figures import PREDICTED, REAL, save

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coverage", "effects_figure", "plot_effects"]

MAX_CONDITIONS, COLUMNS = 12, 3


def plot_effects(table: pd.DataFrame, out: str | os.PathLike[str], *, n_genes: int = 20) -> None:
    """Draw the genes with the largest predicted effects of each condition: effect, interval, and what was seen.

    Parameters
    ----------
    table
        As :func:`invirtuo.bench.effects` gives it: ``condition``, ``gene``, ``effect``, ``low``, ``high``, ``real``.
    out
        Picture to write (.png, .pdf or .svg); the first 12 conditions are drawn.
    n_genes
        Genes in a panel.

    Raises
    ------
    ValueError
        If columns are missing.
    """
    if missing := [name for name in ("condition", "gene", "effect", "low", "high", "real") if name not in table]:
        raise ValueError(f"the table has no column {', '.join(missing)}; expected one made by bench.effects")
    figure = effects_figure(table, n_genes)
    save(figure, out)


def effects_figure(table: pd.DataFrame, n_genes: int) -> Figure:
    """A panel for each of the first 12 conditions, at most `COLUMNS` in a row."""
    from matplotlib.figure import Figure

    # a grid of panels, the last row filled up with empty ones
    conditions = list(dict.fromkeys(table["condition"]))[:MAX_CONDITIONS]
    columns = min(len(conditions), COLUMNS)
    rows = -(-len(conditions) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, (0.22 * n_genes + 0.9) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, condition in zip(axes, conditions, strict=False):
        _panel(panel, table[table["condition"] == condition], n_genes)
        panel.set_title(str(condition), fontsize=9)
    for panel in axes[len(conditions) :]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def coverage(table: pd.DataFrame) -> float:
    """Share of the effects seen that lie in their intervals; NaN without intervals or real cells."""
    known = table.dropna(subset=["low", "high", "real"])
    return float(known["real"].between(known["low"], known["high"]).mean()) if len(known) else math.nan


def _panel(axes: Axes, table: pd.DataFrame, n_genes: int) -> None:
    """The genes with the largest effects of one condition, the largest on top."""
    largest = table["effect"].abs().sort_values(ascending=False).index[:n_genes]
    shown = table.reindex(largest).iloc[::-1]
    row = np.arange(len(shown))
    axes.axvline(0, color="0.8", linewidth=0.8)
    if shown["low"].notna().any():
        axes.hlines(row, shown["low"], shown["high"], color=PREDICTED, alpha=0.4, linewidth=3)
    axes.plot(shown["effect"], row, "o", color=PREDICTED, markersize=4, label="predicted")
    if shown["real"].notna().any():
        axes.plot(shown["real"], row, "D", markerfacecolor="none", color=REAL, markersize=5, label="seen")
    axes.set_yticks(row, shown["gene"], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("change of mean log expression", fontsize=8)

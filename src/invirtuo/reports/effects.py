"""A picture of predicted effects with their intervals."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from invirtuo.plots.effects import check_effects, effects
from invirtuo.reports.figures import save

if TYPE_CHECKING:
    import pandas as pd
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
    check_effects(table)
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
        effects(table, condition, n_genes=n_genes, ax=panel)
    for panel in axes[len(conditions) :]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def coverage(table: pd.DataFrame) -> float:
    """Share of the effects seen that lie in their intervals; NaN without intervals or real cells."""
    known = table.dropna(subset=["low", "high", "real"])
    return float(known["real"].between(known["low"], known["high"]).mean()) if len(known) else math.nan

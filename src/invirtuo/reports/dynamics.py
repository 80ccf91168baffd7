"""Pictures of dynamics as PNG in a data address: forecasts, networks, interventions, sparsity against error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.plots.dynamics import MAX_COURSES, MAX_EDGES, courses, labels_of
from invirtuo.plots.dynamics import network as draw_network
from invirtuo.plots.style import LINES, PREDICTED, REAL, clean
from invirtuo.reports.figures import as_png, new_figure

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

__all__ = ["forecast", "forecast_figure", "intervention", "network", "network_figure", "tradeoff"]

MAX_GENES = 12


def forecast(
    predicted: AnnData, observed: AnnData | None = None, genes: Sequence[str] | None = None, *, time: str
) -> str:
    """A panel per gene and a line per course, with intervals; bins of observed cells as dots.

    Parameters
    ----------
    predicted
        What `forecast` of a model gave.
    observed
        Cells of the same courses and genes.
    genes
        To show; None takes those that change most.
    time
        Column with time.
    """
    return as_png(forecast_figure(predicted, observed, genes, time=time))


def forecast_figure(
    predicted: AnnData, observed: AnnData | None = None, genes: Sequence[str] | None = None, *, time: str
) -> Figure:
    """The figure of :func:`forecast`."""
    # unless genes are named, those that change most along a course
    names = labels_of(predicted.obs, time)
    x = pd.DataFrame(np.asarray(predicted.X), columns=predicted.var_names)
    move = x.groupby(names.to_numpy()).agg(np.ptp).max()
    chosen = list(genes) if genes is not None else list(move.sort_values(ascending=False).index[:MAX_GENES])
    axes, figure = _grid(len(chosen))
    for ax, gene in zip(axes, chosen, strict=False):
        courses(predicted, gene, time=time, observed=observed, ax=ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=MAX_COURSES, frameon=False, fontsize=8)
    return figure


def network(edges: pd.DataFrame) -> str:
    """The strongest edges as a table of dots: regulators by targets, colour by sign, size by score.

    Parameters
    ----------
    edges
        What `network` of a model gave.
    """
    return as_png(network_figure(edges))


def network_figure(edges: pd.DataFrame) -> Figure:
    """The figure of :func:`network`."""
    top = edges.head(MAX_EDGES)
    n_targets, n_regulators = top["target"].nunique(), top["regulator"].nunique()
    figure = new_figure(2.0 + 0.24 * n_targets, 1.6 + 0.22 * n_regulators)
    draw_network(edges, n_edges=MAX_EDGES, ax=figure.subplots())
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def intervention(change: AnnData, *, time: str) -> str:
    """The genes that change most at the end, as bars, and their change along time.

    Parameters
    ----------
    change
        What `knock_out` or `overexpress` of a model gave.
    time
        Column with time.
    """
    # bars: the change at the end
    effect = change.var.loc[~change.var["is_clamped"].astype(bool), "effect"]
    top = effect.reindex(effect.abs().sort_values(ascending=False).index[:MAX_GENES])
    figure = new_figure(9.5, 0.9 + 0.28 * len(top))
    bars, lines = figure.subplots(1, 2)
    rising = top[::-1]  # bars are drawn from below
    colors = [PREDICTED if effect > 0 else REAL for effect in rising]
    bars.barh(list(rising.index), rising.to_numpy(), color=colors)
    bars.set_xlabel("change at the end (sd)", fontsize=8)

    # lines: the change along time, a colour for each gene
    names = labels_of(change.obs, time)
    for color, gene in zip(LINES, list(top.index)[: len(LINES)], strict=False):
        column = change.var_names.get_loc(gene)
        for k, name in enumerate(dict.fromkeys(names)):
            rows = (names == name).to_numpy()
            t = change.obs[time].to_numpy(float)[rows]
            y = np.asarray(change.X)[rows, column]
            lines.plot(t, y, color=color, lw=1.2, alpha=0.8, label=gene if k == 0 else None)
    lines.set_xlabel(time, fontsize=8)
    lines.set_ylabel("change", fontsize=8)
    lines.legend(frameon=False, fontsize=7)
    for ax in (bars, lines):
        clean(ax)
    return as_png(figure)


def tradeoff(table: pd.DataFrame, lines: Sequence[str] = ("training_mean", "linear_in_time", "smoother")) -> str:
    """Error against open inputs, in and out of distribution: a dot per weight of the penalty, a line per baseline.

    Parameters
    ----------
    table
        What :func:`invirtuo.models.sparse_ode.tradeoff` gave.
    lines
        Baselines to draw; those that the table lacks are left out.
    """
    fits = table[table["lam"].notna()].sort_values("open_inputs")
    if fits.empty:
        raise ValueError("the table has no fits (rows with lam); pass what invirtuo.models.sparse_ode.tradeoff returns")
    figure = new_figure(9.5, 3.6)
    panels = figure.subplots(1, 2)
    for ax, column, title in zip(panels, ("inside", "outside"), ("held-out cells", "other courses"), strict=True):
        ax.plot(fits["open_inputs"], fits[column], marker="o", color=LINES[0], label=fits["model"].iloc[0])
        for row in fits.itertuples():
            point = (row.open_inputs, getattr(row, column))
            ax.annotate(f"{row.lam:g}", point, (3, 4), textcoords="offset points", fontsize=7)
        # baselines have no penalty: a line each
        known = table[table["model"].isin(list(lines))].set_index("model")[column]
        for color, (name, value) in zip(LINES[1:], known.items(), strict=False):
            ax.axhline(value, color=color, ls="--", lw=1, label=str(name))
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(0, 2 * max(fits["open_inputs"].max(), 1))
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("open inputs of a target", fontsize=8)
        clean(ax)
    panels[0].set_ylabel("error", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return as_png(figure)


def _grid(n: int) -> tuple[np.ndarray, Figure]:
    per_row = min(4, n)
    n_rows = -(-n // per_row)
    figure = new_figure(2.7 * per_row + 0.3, 2.1 * n_rows + 0.3)
    axes = figure.subplots(n_rows, per_row, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.set_axis_off()
    return axes, figure

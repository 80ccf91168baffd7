"""Pictures of dynamics as PNG in a data address: forecasts, networks, interventions, sparsity against error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.reports.figures import GREY, LINES, PREDICTED, REAL, _clean, _figure, as_png

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

__all__ = ["forecast", "intervention", "network", "tradeoff"]

MAX_GENES, MAX_COURSES, MAX_EDGES = 12, 6, 40


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
    names = _courses(predicted.obs, time)
    seen = None if observed is None else _courses(observed.obs, time, [c for c in predicted.obs if c in observed.obs])

    # unless genes are named, those that change most along a course
    x = pd.DataFrame(np.asarray(predicted.X), columns=predicted.var_names)
    move = x.groupby(names.to_numpy()).agg(np.ptp).max()
    chosen = list(genes) if genes is not None else list(move.sort_values(ascending=False).index[:MAX_GENES])

    # a panel for each gene, a colour for each course: range, mean and observed bins
    axes, figure = _grid(len(chosen))
    for ax, gene in zip(axes, chosen, strict=False):
        column = predicted.var_names.get_loc(gene)
        for color, name in zip(LINES, list(dict.fromkeys(names))[:MAX_COURSES], strict=False):
            rows = (names == name).to_numpy()
            t = predicted.obs[time].to_numpy(float)[rows]
            lower, upper = (np.asarray(predicted.layers[k])[rows, column] for k in ("lower", "upper"))
            ax.fill_between(t, lower, upper, color=color, alpha=0.15, linewidth=0)
            ax.plot(t, np.asarray(predicted.X)[rows, column], color=color, lw=1.5, label=name or "forecast")
            if seen is not None and observed is not None and gene in observed.var_names:
                ax.plot(*_dots(observed, seen == name, gene, time), ls="", marker="o", ms=2.5, color=color, alpha=0.7)
        ax.set_title(str(gene), fontsize=10)
        ax.set_xlabel(time, fontsize=8)
        _clean(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=MAX_COURSES, frameon=False, fontsize=8)
    return as_png(figure)


def network(edges: pd.DataFrame) -> str:
    """The strongest edges as a table of dots: regulators by targets, colour by sign, size by score.

    Parameters
    ----------
    edges
        What `network` of a model gave.
    """
    if not len(edges):
        raise ValueError("the table of edges is empty; there is nothing to draw")

    # regulators and targets in the order of their strongest edge
    top = edges.head(MAX_EDGES)
    rows = list(dict.fromkeys(top["regulator"]))
    columns = list(dict.fromkeys(top["target"]))
    figure = _figure(2.0 + 0.24 * len(columns), 1.6 + 0.22 * len(rows))
    ax = figure.subplots()

    # a dot for each edge: its colour is the sign, its size the score, its opacity the consistency
    for sign, color, label in ((1, PREDICTED, "raises"), (-1, REAL, "lowers"), (0, GREY, "either")):
        signed = top[top["sign"] == sign]
        if len(signed):
            x = [columns.index(target) for target in signed["target"]]
            y = [rows.index(regulator) for regulator in signed["regulator"]]
            size = (90 * signed["score"] / edges["score"].max()).clip(lower=6)
            alpha = signed["consistency"].clip(0.3, 1).tolist()
            ax.scatter(x, y, s=size, color=color, alpha=alpha, label=label)
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_xlabel(f"target ({edges['support'].iloc[0]})", fontsize=8)
    ax.set_ylabel("regulator", fontsize=8)
    _clean(ax)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return as_png(figure)


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
    figure = _figure(9.5, 0.9 + 0.28 * len(top))
    bars, lines = figure.subplots(1, 2)
    rising = top[::-1]  # bars are drawn from below
    colors = [PREDICTED if effect > 0 else REAL for effect in rising]
    bars.barh(list(rising.index), rising.to_numpy(), color=colors)
    bars.set_xlabel("change at the end (sd)", fontsize=8)

    # lines: the change along time, a colour for each gene
    names = _courses(change.obs, time)
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
        _clean(ax)
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
    figure = _figure(9.5, 3.6)
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
        _clean(ax)
    panels[0].set_ylabel("error", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return as_png(figure)


def _courses(obs: pd.DataFrame, time: str, columns: Sequence[str] | None = None) -> pd.Series:
    """Name of the course of each row: its labels joined by ``|``."""
    labels = [c for c in (obs.columns if columns is None else columns) if c not in (time, "scaled_time")]
    if not labels:
        return pd.Series("", index=obs.index)
    return obs[labels].astype(str).agg("|".join, axis=1)


def _dots(observed: AnnData, is_course: pd.Series, gene: str, time: str, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Means of the cells of a course in bins of time."""
    cells = observed[is_course.to_numpy(), gene]
    x = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
    t = cells.obs[time].to_numpy(float)
    bins = np.zeros(0, int)
    if len(t):
        share = (t - t.min()) / max(np.ptp(t), 1e-12)
        bins = np.clip((share * n).astype(int), 0, n - 1)
    means = pd.DataFrame({"t": t, "x": x.ravel()}).groupby(bins).mean()
    return means["t"].to_numpy(), means["x"].to_numpy()


def _grid(n: int) -> tuple[np.ndarray, Figure]:
    per_row = min(4, n)
    n_rows = -(-n // per_row)
    figure = _figure(2.7 * per_row + 0.3, 2.1 * n_rows + 0.3)
    axes = figure.subplots(n_rows, per_row, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.set_axis_off()
    return axes, figure

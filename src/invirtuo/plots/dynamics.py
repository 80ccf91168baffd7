"""Networks, and genes along time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.metrics.cells import compare_populations
from invirtuo.plots.style import GREY, LINES, PREDICTED, REAL, axes_or_new, clean

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["courses", "labels_of", "network"]

MAX_COURSES, MAX_EDGES = 6, 40


def courses(
    predicted: AnnData, gene: str, *, time: str, observed: AnnData | None = None, ax: Axes | None = None
) -> Axes:
    """A gene along time: a line for each forecast course with its interval, bins of observed cells as dots.

    Parameters
    ----------
    predicted
        What `forecast` of a model gave.
    gene
        Its name.
    time
        Column with time.
    observed
        Cells of the same courses.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If the gene is not among the predicted ones, or scales differ; where they only seem to, a warning is logged.
    """
    if gene not in predicted.var_names:
        raise ValueError(f"gene {gene!r} is not among the {predicted.n_vars:,} predicted genes")
    if observed is not None:
        compare_populations({"observed": observed, "forecast": predicted})
    names = labels_of(predicted.obs, time)
    shared = None if observed is None else [column for column in predicted.obs if column in observed.obs]
    seen = None if observed is None else labels_of(observed.obs, time, shared)
    drawn, column = axes_or_new(ax), predicted.var_names.get_loc(gene)
    for color, name in zip(LINES, list(dict.fromkeys(names))[:MAX_COURSES], strict=False):
        # range, mean and observed bins of one course
        rows = (names == name).to_numpy()
        t = predicted.obs[time].to_numpy(float)[rows]
        lower, upper = (np.asarray(predicted.layers[k])[rows, column] for k in ("lower", "upper"))
        drawn.fill_between(t, lower, upper, color=color, alpha=0.15, linewidth=0)
        drawn.plot(t, np.asarray(predicted.X)[rows, column], color=color, lw=1.5, label=name or "forecast")
        if seen is not None and observed is not None and gene in observed.var_names:
            dots = _bins(observed, seen == name, gene, time)
            drawn.plot(*dots, ls="", marker="o", ms=2.5, color=color, alpha=0.7)
    drawn.set_title(str(gene), fontsize=10)
    drawn.set_xlabel(time, fontsize=8)
    return clean(drawn)


def network(edges: pd.DataFrame, *, n_edges: int = MAX_EDGES, ax: Axes | None = None) -> Axes:
    """The strongest edges as a table of dots: regulators by targets, colour by sign, size by score.

    Parameters
    ----------
    edges
        What `network` of a model gave.
    n_edges
        Edges that are drawn.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If there is no edge.
    """
    if not len(edges):
        raise ValueError("the table of edges is empty; there is nothing to draw")

    # regulators and targets in the order of their strongest edge
    top = edges.head(n_edges)
    rows = list(dict.fromkeys(top["regulator"]))
    columns = list(dict.fromkeys(top["target"]))
    drawn = axes_or_new(ax, 2.0 + 0.24 * len(columns), 1.6 + 0.22 * len(rows))

    # a dot for each edge: its colour is the sign, its size the score, its opacity the consistency
    for sign, color, label in ((1, PREDICTED, "raises"), (-1, REAL, "lowers"), (0, GREY, "either")):
        signed = top[top["sign"] == sign]
        if len(signed):
            x = [columns.index(target) for target in signed["target"]]
            y = [rows.index(regulator) for regulator in signed["regulator"]]
            size = (90 * signed["score"] / edges["score"].max()).clip(lower=6)
            alpha = signed["consistency"].clip(0.3, 1).tolist()
            drawn.scatter(x, y, s=size, color=color, alpha=alpha, label=label)
    drawn.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    drawn.set_yticks(range(len(rows)), rows, fontsize=8)
    words = [f"{n} {word}" for word, n in top["support"].value_counts().items()]
    drawn.set_xlabel(f"target (edges: {'; '.join(words)})", fontsize=8)
    drawn.set_ylabel("regulator", fontsize=8)
    return clean(drawn)


def labels_of(obs: pd.DataFrame, time: str, columns: Sequence[str] | None = None) -> pd.Series:
    """Name of the course of each row: its labels joined by ``|``."""
    labels = [c for c in (obs.columns if columns is None else columns) if c not in (time, "scaled_time")]
    if not labels:
        return pd.Series("", index=obs.index)
    return obs[labels].astype(str).agg("|".join, axis=1)


def _bins(observed: AnnData, is_course: pd.Series, gene: str, time: str, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
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

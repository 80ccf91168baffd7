"""Cells on two components, and the values of one gene."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from invirtuo.errors import preview
from invirtuo.metrics.cells import compare_populations
from invirtuo.metrics.numerics.axes import principal_axes
from invirtuo.metrics.numerics.streamed import dense
from invirtuo.plots.style import GREY, LINES, PREDICTED, REAL, axes_or_new, clean

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from invirtuo.design import Design

__all__ = ["cells", "gene", "points"]

MAX_POINTS = 4000
KINDS = {  # of points: label, colour, size, opacity; the first lie below
    "background": ("all cells", GREY, 3, 0.5),
    "real": ("real cells of the condition", REAL, 4, 0.7),
    "predicted": ("predicted cells", PREDICTED, 4, 0.6),
}


def cells(
    predicted: AnnData, real: AnnData, design: Design, condition: str | None = None, *, ax: Axes | None = None
) -> Axes:
    """Real and predicted cells of a condition on the first two principal components of all real cells.

    Parameters
    ----------
    predicted, real
        Cells with the same genes in the same space.
    design
        Which columns mean what.
    condition
        Its name, like ``"B cell|IFN-beta"``; None takes the first that was predicted.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If the condition has no predicted cells, or genes or scales differ. Where scales only seem to, a warning is
        logged, as by :func:`invirtuo.evaluate`.
    """
    names = design.names(predicted.obs)
    wanted = str(names.iloc[0]) if condition is None else condition
    if wanted not in set(names):
        raise ValueError(f"condition {wanted!r} has no predicted cells; found {preview(sorted(set(names)))}")
    if list(predicted.var_names) != list(real.var_names):
        raise ValueError("predicted and real cells have other genes, or an other order of them; select the same ones")
    compare_populations({"real": real, "predicted": predicted})
    is_real = (design.names(real.obs) == wanted).to_numpy()
    is_predicted = (names == wanted).to_numpy()
    parts = {"background": real, "real": real[is_real], "predicted": predicted[is_predicted]}
    centre, axes = principal_axes(real.X, 2)
    tables = []
    for kind, part in parts.items():
        pc1, pc2 = ((dense(part.X) - centre) @ axes).T
        tables.append(pd.DataFrame({"pc1": pc1, "pc2": pc2, "kind": kind}))
    drawn = points(axes_or_new(ax), pd.concat(tables, ignore_index=True))
    drawn.set_title(wanted, fontsize=9)
    drawn.legend(frameon=False, fontsize=8, markerscale=3)
    return drawn


def points(ax: Axes, table: pd.DataFrame) -> Axes:
    """Points of all kinds on two components.

    Parameters
    ----------
    ax
        Axes to draw on.
    table
        Columns ``pc1``, ``pc2``, ``kind`` ("background", "real" or "predicted").
    """
    for kind, (label, color, size, alpha) in KINDS.items():
        own = table[table["kind"] == kind]
        if len(own) > MAX_POINTS:
            own = own.sample(MAX_POINTS, random_state=0)
        if kind == "predicted" and _spread(own) < 1e-3 * _spread(table):
            size, alpha = 45, 1.0  # one profile for all cells: a dot that can be seen
        ax.scatter(own["pc1"], own["pc2"], s=size, color=color, alpha=alpha, linewidths=0, label=label)
    ax.set_xticks([])
    ax.set_yticks([])
    return clean(ax)


def gene(name: str, cells: Mapping[str, AnnData], *, ax: Axes | None = None) -> Axes:
    """How a gene is expressed in several populations: violins of the cells that have it, and the share of those.

    Parameters
    ----------
    name
        The gene.
    cells
        Label to population, for example control, seen and predicted cells.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If a population lacks the gene, or scales differ; where they only seem to, a warning is logged.
    """
    if missing := [label for label, population in cells.items() if name not in population.var_names]:
        raise ValueError(f"gene {name!r} is not among the genes of {preview(missing)}")
    compare_populations(cells)
    drawn = axes_or_new(ax, 1.2 + 1.1 * len(cells))
    for place, population in enumerate(cells.values()):
        values = dense(population[:, name].X).ravel()
        expressed = values[values > 0]
        color = LINES[place % len(LINES)]
        if len(np.unique(expressed)) > 1:  # of one value there is no density
            violin: dict[str, Any] = drawn.violinplot(expressed, [place], showextrema=False, showmedians=True)
            for part in (*violin["bodies"], violin["cmedians"]):
                part.set(color=color, alpha=0.5)
        elif len(expressed):
            drawn.plot(place, expressed[0], "o", color=color)
        share = f"in {np.mean(values > 0):.0%}" if len(values) else "no cells"
        drawn.annotate(share, (place, 0), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
    drawn.set_xticks(range(len(cells)), list(cells), fontsize=8)
    drawn.set_ylim(bottom=0)
    drawn.set_ylabel(name, fontsize=9)
    return clean(drawn)


def _spread(table: pd.DataFrame) -> float:
    """Larger standard deviation of both components."""
    return float(table[["pc1", "pc2"]].std().max())

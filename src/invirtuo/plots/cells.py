"""Cells on two components, and the values of one gene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

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

__all__ = ["MAPPED", "cells", "gene", "points", "some", "umap_of"]

MAX_POINTS = 4000
MAPPED = {"background": 1500, "real": 500, "predicted": 500}  # most cells on a map, so that it takes seconds
PCS = 50
KINDS = {  # of points: label, colour, size, opacity; the first lie below
    "background": ("all cells", GREY, 3, 0.5),
    "real": ("real cells of the condition", REAL, 4, 0.7),
    "predicted": ("predicted cells", PREDICTED, 4, 0.6),
}


def cells(
    predicted: AnnData,
    real: AnnData,
    design: Design,
    condition: str | None = None,
    *,
    basis: Literal["pca", "umap"] = "pca",
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Real and predicted cells of a condition in the plane: principal components of all real cells, or UMAP.

    Parameters
    ----------
    predicted, real
        Cells with the same genes in the same space.
    design
        Which columns mean what.
    condition
        Its name, like ``"B cell|IFN-beta"``; None takes the first that was predicted.
    basis
        "pca": the first two principal components. "umap": a map of at most 2,000 real and 500 predicted cells, as
        :func:`umap_of` makes it; distances far apart mean nothing on it.
    seed
        Of the cells that are drawn by UMAP, and of the map.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If the basis is unknown, the condition has no predicted cells, or genes or scales differ. Where scales only seem
        to, a warning is logged, as by :func:`invirtuo.evaluate`.
    """
    if basis not in ("pca", "umap"):
        raise ValueError(f"basis is {basis!r}; expected 'pca' or 'umap'")
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
    if basis == "umap":
        parts["background"] = real[~is_real]  # every cell once
        parts = {kind: some(part, MAPPED[kind], seed) for kind, part in parts.items()}
        places = umap_of(list(parts.values()), seed)
    else:
        centre, axes = principal_axes(real.X, 2)
        places = [(dense(part.X) - centre) @ axes for part in parts.values()]
    tables = []
    for kind, place in zip(parts, places, strict=True):
        tables.append(pd.DataFrame({"pc1": place[:, 0], "pc2": place[:, 1], "kind": kind}))
    drawn = points(axes_or_new(ax), pd.concat(tables, ignore_index=True))
    drawn.set_title(wanted, fontsize=9)
    drawn.legend(frameon=False, fontsize=8, markerscale=3)
    return drawn


def some(cells: AnnData, n: int, seed: int) -> AnnData:
    """At most n of the cells, drawn by the seed."""
    rows = np.random.default_rng(seed).permutation(cells.n_obs)[:n]
    return cells[np.sort(rows)]


def umap_of(parts: Sequence[AnnData], seed: int = 0) -> list[np.ndarray]:
    """Cells of several populations on one UMAP, (n, 2) each, from at most 50 principal components of all of them.

    All are embedded together. Predicted cells that are placed on a map of the real ones land among these wherever they
    come from; embedded with them, cells that are like no real ones make an island of their own.

    Parameters
    ----------
    parts
        Populations with the same genes; some thousand cells in all take seconds.
    seed
        Of the map.

    References
    ----------
    McInnes et al. 2018, arXiv:1802.03426, as scanpy computes it.
    """
    import anndata
    import scanpy

    values = [dense(part.X).astype(np.float32) for part in parts]
    together = anndata.AnnData(np.concatenate(values))
    scanpy.pp.pca(together, min(PCS, *(n - 1 for n in together.shape)), random_state=seed)
    scanpy.pp.neighbors(together, use_rep="X_pca", random_state=seed)
    scanpy.tl.umap(together, random_state=seed)
    ends = np.cumsum([len(own) for own in values])[:-1]
    return np.split(together.obsm["X_umap"], ends)


def points(ax: Axes, table: pd.DataFrame) -> Axes:
    """Points of all kinds on two components, or on a map.

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

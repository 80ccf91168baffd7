"""Cells on the two leading principal components of real cells, as reports draw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd

from invirtuo.metrics.numerics.axes import principal_axes
from invirtuo.plots.cells import MAPPED, some, umap_of
from invirtuo.reports.figures import MAX_ROWS

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["PAPER_CELLS", "Axes", "panels", "predicted_points", "real_points", "tested_points", "umap_points"]

Axes: TypeAlias = tuple[np.ndarray, np.ndarray]  # (g,) centre and (g, 2) directions

PANEL_CELLS = 400  # most real, and most predicted, cells of a condition drawn in one panel
PAPER_CELLS = 100  # of each model in the figures of PRiMeFlow
COLUMNS = ["pc1", "pc2", "kind", "model", "condition"]


def real_points(adata: AnnData, real: AnnData, design: Design, axes: Axes, seed: int) -> pd.DataFrame:
    """Real cells on two components: a sample of all as background, and those of every held-out condition."""
    names = design.names(real.obs)
    tables = [_projected(adata, axes, seed, kind="background", limit=4 * PANEL_CELLS)]
    for condition in names[~design.is_control(real.obs)].unique():
        cells = real[(names == condition).to_numpy()]
        tables.append(_projected(cells, axes, seed, kind="real", condition=condition))
    return pd.concat(tables, ignore_index=True)


def predicted_points(
    predicted: AnnData, label: str, design: Design, axes: Axes, seed: int, limit: int = PANEL_CELLS
) -> pd.DataFrame:
    """Predicted cells on the same two components, at most `limit` of each condition."""
    names = design.names(predicted.obs)
    tables = []
    for condition in names.unique():
        cells = predicted[(names == condition).to_numpy()]
        points = _projected(cells, axes, seed, kind="predicted", condition=condition, model=label, limit=limit)
        tables.append(points)
    return pd.concat(tables, ignore_index=True)


def panels(
    adata: AnnData, real: AnnData, predictions: Mapping[str, AnnData], design: Design, seed: int
) -> pd.DataFrame:
    """Cells on the two leading components of all cells: all (background), real and predicted per condition."""
    axes = principal_axes(adata.X, 2)
    tables = [real_points(adata, real, design, axes, seed)]
    for label, predicted in predictions.items():
        tables.append(predicted_points(predicted, label, design, axes, seed))
    return pd.concat(tables, ignore_index=True)


def umap_points(
    predicted: AnnData, label: str, adata: AnnData, real: AnnData, design: Design, seed: int
) -> pd.DataFrame:
    """Real cells and those of a model, for the conditions that a page draws, on one map: UMAP, in the same columns."""
    drawn = list(dict.fromkeys(design.names(predicted.obs)))[:MAX_ROWS]
    others = adata[~design.names(adata.obs).isin(drawn).to_numpy()]
    parts, labels = [some(others, MAPPED["background"], seed)], [("background", "", "")]
    for condition in drawn:
        for kind, cells, model in (("real", real, ""), ("predicted", predicted, label)):
            own = cells[(design.names(cells.obs) == condition).to_numpy()]
            parts.append(some(own, MAPPED[kind] // len(drawn), seed))
            labels.append((kind, model, condition))

    tables = []
    for place, (kind, model, condition) in zip(umap_of(parts, seed), labels, strict=True):
        pc1, pc2 = place.T.round(4)
        tables.append(pd.DataFrame({"pc1": pc1, "pc2": pc2, "kind": kind, "model": model, "condition": condition}))
    return pd.concat(tables, ignore_index=True)


def _projected(
    cells: AnnData, axes: Axes, seed: int, *, kind: str, condition: str = "", model: str = "", limit: int = PANEL_CELLS
) -> pd.DataFrame:
    """At most `limit` of the cells, drawn by the seed, on two components."""
    centre, directions = axes
    rows = np.sort(np.random.default_rng(seed).permutation(cells.n_obs)[:limit])
    x = cells.X[rows]
    dense = np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float64)
    pc1, pc2 = ((dense - centre) @ directions).T.round(4)
    return pd.DataFrame({"pc1": pc1, "pc2": pc2, "kind": kind, "model": model, "condition": condition})


def tested_points(real: AnnData, design: Design, axes: Axes, conditions: Sequence[str], seed: int) -> pd.DataFrame:
    """Real cells of some tested conditions, each before all tested cells, as in figures 1 to 5 of PRiMeFlow."""
    names = design.names(real.obs)
    tables = [pd.DataFrame(columns=COLUMNS)]
    for condition in conditions:
        own = real[(names == condition).to_numpy()]
        if own.n_obs:
            tables.append(_projected(real, axes, seed, kind="background", condition=condition, limit=4 * PANEL_CELLS))
            tables.append(_projected(own, axes, seed, kind="real", condition=condition))
    return pd.concat(tables[1:] or tables, ignore_index=True)

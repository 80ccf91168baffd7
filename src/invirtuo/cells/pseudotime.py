"""Diffusion pseudotime: an order of cells by expression, from a root."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.cells.checks import labels
from invirtuo.cells.values import require_log
from invirtuo.errors import preview

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pseudotime"]

log = logging.getLogger(__name__)


def pseudotime(
    adata: AnnData,
    root: str | Mapping[str, str],
    *,
    by: str | None = None,
    n_pcs: int = 30,
    n_neighbors: int = 30,
    n_components: int = 10,
    column: str = "pseudotime",
) -> AnnData:
    """Order cells along a process by scanpy's diffusion pseudotime; a new object, the given one stays as it is.

    Parameters
    ----------
    adata
        Log-normalised expression in X.
    root
        Name of the cell where the process begins, or a mapping of an obs column to a label: ``{"cell_type": "HSC"}``
        takes the cell of that label that lies nearest to the mean of its label.
    by
        Column of obs, for example the donor: every label is ordered by itself, as batches are not comparable.
    n_pcs, n_neighbors, n_components
        Of the neighbourhood graph, and diffusion components of the distance.
    column
        Of obs, where the result goes: 0 at the root, 1 at the farthest cell.

    Returns
    -------
    AnnData without the cells that are not connected to their root (their number is logged).

    Raises
    ------
    ValueError
        If there is no such root, or more than half of the cells are not connected to it.

    References
    ----------
    Haghverdi et al. 2016, Nature Methods, doi:10.1038/nmeth.3971.
    """
    require_log(adata)
    groups = np.full(adata.n_obs, "all") if by is None else labels(adata, by)
    time = np.full(adata.n_obs, np.nan)
    for _, rows in pd.Series(groups).groupby(groups).indices.items():
        time[rows] = _ordered(adata[rows], root, n_pcs, n_neighbors, n_components)

    # cells that no path leads to have infinite pseudotime
    connected = np.isfinite(time)
    if connected.mean() < 0.5:
        raise ValueError(
            f"{int((~connected).sum())} of {len(time)} cells are not connected to the root; take more neighbours, or "
            "leave out cell types that do not belong to the process"
        )
    if not connected.all():
        log.warning("%d cells are not connected to the root and were left out", int((~connected).sum()))
    new = adata[connected].copy()
    new.obs[column] = time[connected]
    return new


def _ordered(
    adata: AnnData, root: str | Mapping[str, str], n_pcs: int, n_neighbors: int, n_components: int
) -> np.ndarray:
    """(n,) pseudotime of the cells of one group; infinity for those that are not connected to the root."""
    import scanpy
    from anndata import AnnData

    cells = AnnData(adata.X, obs=adata.obs[[]])
    n_pcs = min(n_pcs, *(n - 1 for n in cells.shape))
    scanpy.pp.pca(cells, n_comps=n_pcs, random_state=0)
    cells.uns["iroot"] = _root(adata, cells.obsm["X_pca"], root)
    scanpy.pp.neighbors(cells, n_neighbors=n_neighbors, n_pcs=n_pcs, random_state=0)
    scanpy.tl.diffmap(cells, n_comps=max(n_components, 15), random_state=0)
    scanpy.tl.dpt(cells, n_dcs=n_components)
    time: np.ndarray = cells.obs["dpt_pseudotime"].to_numpy(float)
    return time


def _root(adata: AnnData, coordinates: np.ndarray, root: str | Mapping[str, str]) -> int:
    """Row of the cell to begin at: the named one, or of those with a label the most central one."""
    if isinstance(root, str):
        if root not in adata.obs_names:
            raise ValueError(f"there is no cell {root!r} to begin at; pass the name of a cell, or {{column: label}}")
        return int(adata.obs_names.get_loc(root))
    ((column, label),) = root.items()
    known = labels(adata, column)
    labelled = np.flatnonzero(known == str(label))
    if not len(labelled):
        raise ValueError(f"no cell has {column} = {label!r}; found {preview(sorted(set(known)))}")
    offset = coordinates[labelled] - coordinates[labelled].mean(axis=0)
    return int(labelled[(offset**2).sum(axis=1).argmin()])

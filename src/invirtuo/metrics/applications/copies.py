"""Does a generator copy, or miss: how near its cells are to those it learned from, and to those of other classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from invirtuo.cells.checks import labels
from invirtuo.cells.pseudobulk import group_sums
from invirtuo.errors import preview
from invirtuo.metrics.cells import per_10k
from invirtuo.metrics.numerics.axes import principal_axes, projected
from invirtuo.metrics.numerics.distances import nearest

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["copying", "resemblance"]

NEAR = 0.05  # share of real cells that counts as near by


def copying(
    generated: AnnData, training: AnnData, held_out: AnnData | None = None, *, by: str, n_pcs: int = 30
) -> pd.DataFrame:
    """Distance of generated cells to their nearest training cell, beside that of real cells nobody learned from.

    Distances are Euclidean, on principal components of the training cells (log1p of counts per 10,000). A generator
    that copies lies nearer to training cells than other real cells of the class do.

    Parameters
    ----------
    generated, training
        Raw counts in X, `by` in obs. Genes are those of `training`.
    held_out
        Real cells, not learned from. Classes without any, or None: training cells, each without itself.
    by
        Column of obs with the classes.
    n_pcs
        Principal components.

    Returns
    -------
    DataFrame with a row for each class of generated cells: its name in the column `by`, the numbers of cells
    ``n_generated``, ``n_training``, ``n_held_out``; median distances ``generated`` and ``real``; their ``ratio``; and
    ``near``, the share of generated cells nearer than 95 % of the real ones: 0.05 if they are like these, 1 for copies.
    Classes without another real cell have NaN.

    Raises
    ------
    ValueError
        If genes or the column are missing.

    Examples
    --------
    >>> import invirtuo as iv
    >>> cells = iv.datasets.toy(n_cells=200)
    >>> table = copying(cells[:100], cells[:100], cells[100:], by="cell_type", n_pcs=5)
    >>> bool((table["generated"] == 0).all() and (table["near"] == 1).all())
    True
    """
    sides = {"generated": generated, "training": training}
    if held_out is not None:
        sides["held_out"] = held_out
    for name, adata in sides.items():
        _check(name, adata, training.var_names, by)

    # distances on the principal axes of the training cells
    logged = {name: per_10k(adata[:, training.var_names].X) for name, adata in sides.items()}
    centre, axes = principal_axes(logged["training"], n_pcs)
    cells = {name: projected(x, centre, axes) for name, x in logged.items()}
    label = {name: adata.obs[by].astype(str).to_numpy() for name, adata in sides.items()}
    distance = {name: nearest(x, cells["training"]) for name, x in cells.items() if name != "training"}

    # class by class, beside real cells that nobody learned from
    rows = []
    for name in sorted(set(label["generated"])):
        made = distance["generated"][label["generated"] == name]
        is_own = label["training"] == name
        if held_out is not None and (label["held_out"] == name).any():
            real = distance["held_out"][label["held_out"] == name]
            n_real = len(real)
        else:  # training cells stand in, each beside the others
            real = nearest(cells["training"][is_own], cells["training"], itself=np.flatnonzero(is_own))
            n_real = 0
        row = {by: name, "n_generated": len(made), "n_training": int(is_own.sum()), "n_held_out": n_real}
        rows.append(row | _compared(made, real))
    return pd.DataFrame(rows)


def resemblance(generated: AnnData, training: AnnData, *, by: str, n_pcs: int = 30) -> pd.DataFrame:
    """Share of generated cells that are nearest to the centroid of the class they were drawn for, beside real cells.

    Distances are Euclidean, on principal components of the training cells (log1p of counts per 10,000), each divided by
    its standard deviation within classes. A real cell is compared with the centroid of the others of its class.

    Parameters
    ----------
    generated, training
        Raw counts in X, `by` in obs. Genes are those of `training`.
    by
        Column of obs with the classes.
    n_pcs
        Principal components.

    Returns
    -------
    DataFrame with a row for each class of generated cells that has two training cells or more: its name in the column
    `by`, ``n_generated``, ``n_training``, the shares ``generated`` and ``real``, and ``unlike``: whether the former is
    smaller by more than a tenth and 1 / sqrt(``n_training``), two standard errors of the latter at most.

    Raises
    ------
    ValueError
        If genes or the column are missing.

    Examples
    --------
    >>> import invirtuo as iv
    >>> cells = iv.datasets.toy(n_cells=200)
    >>> bool(resemblance(cells[:100], cells[100:], by="cell_type", n_pcs=5)["unlike"].any())
    False
    """
    sides = {"generated": generated, "training": training}
    for name, adata in sides.items():
        _check(name, adata, training.var_names, by)
    logged = {name: per_10k(adata[:, training.var_names].X) for name, adata in sides.items()}
    centre, axes = principal_axes(logged["training"], n_pcs)
    cells = {name: projected(x, centre, axes) for name, x in logged.items()}
    label = {name: adata.obs[by].astype(str).to_numpy() for name, adata in sides.items()}

    # centroids, on axes where classes have variance 1
    names, own = np.unique(label["training"], return_inverse=True)
    sizes = np.bincount(own)
    centroids = group_sums(cells["training"], own, len(names)) / sizes[:, None]
    spread = np.maximum((cells["training"] - centroids[own]).std(axis=0), 1e-12)
    squares = {}
    for name, x in cells.items():
        squares[name] = cdist(x / spread, centroids / spread, "sqeuclidean")

    # without the cell itself the centroid of its class is n / (n - 1) times as far
    rows = np.arange(len(own))
    further = sizes / np.maximum(sizes - 1, 1)
    squares["training"][rows, own] *= further[own] ** 2
    nearest_class = {name: names[square.argmin(axis=1)] for name, square in squares.items()}
    table = []
    for name in sorted(set(label["generated"]) & set(names[sizes > 1])):
        share, n_cells = {}, {}
        for side in sides:
            is_own = label[side] == name
            n_cells[f"n_{side}"] = int(is_own.sum())
            share[side] = float((nearest_class[side][is_own] == name).mean())
        margin = max(0.1, n_cells["n_training"] ** -0.5)
        unlike = share["generated"] < share["training"] - margin
        found = {"generated": share["generated"], "real": share["training"], "unlike": unlike}
        table.append({by: name, **n_cells, **found})
    return pd.DataFrame(table, columns=[by, "n_generated", "n_training", "generated", "real", "unlike"])


def _compared(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    real = real[np.isfinite(real)]
    if not len(real):
        return {"generated": float(np.median(made)), "real": np.nan, "ratio": np.nan, "near": np.nan}
    middle = float(np.median(real))
    ratio = float(np.median(made)) / middle if middle > 0 else np.nan
    near = float((made <= np.quantile(real, NEAR)).mean())
    return {"generated": float(np.median(made)), "real": middle, "ratio": ratio, "near": near}


def _check(name: str, adata: AnnData, genes: pd.Index, by: str) -> None:
    labels(adata, by, name)
    if missing := [gene for gene in genes if gene not in adata.var_names]:
        raise ValueError(f"{name} lacks {len(missing)} genes of the training cells: {preview(missing)}")

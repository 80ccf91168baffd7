"""Drawn cells, block by block, put together in memory or written to a file as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from invirtuo.cells.files import append_rows, writing_h5ad

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["Block", "assembled", "in_rows", "write_cells"]


@dataclass(frozen=True)
class Block:
    """Drawn cells: counts, expected counts where they are asked for, latent vectors where the model has them."""

    counts: sparse.csr_matrix
    mean: np.ndarray | None
    latent: np.ndarray | None


def in_rows(x: Tensor) -> sparse.csr_matrix:
    """(n, g) counts as CSR, int32; compressed on the device that holds them."""
    rows, columns = x.nonzero(as_tuple=True)
    values = x[rows, columns].to(torch.int32).cpu().numpy()
    indices = columns.to(torch.int32).cpu().numpy()
    ends = torch.bincount(rows, minlength=len(x)).cumsum(0).cpu().numpy()
    indptr = np.concatenate([[0], ends]).astype(np.int32)
    return sparse.csr_matrix((values, indices, indptr), shape=tuple(x.shape))


def assembled(
    blocks: list[Block], obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any], output: str, latent: bool
) -> AnnData:
    """All cells in memory; `output` is "counts", "mean" or "both", as in `CountGenerator.generate`."""
    import anndata

    layers = {}
    x: Any = sparse.vstack([block.counts for block in blocks], format="csr")
    if output == "mean":
        x = np.concatenate([block.mean for block in blocks])
    elif output == "both":
        layers["mean"] = np.concatenate([block.mean for block in blocks])
    adata = anndata.AnnData(x, obs=obs, var=var, layers=layers, uns={"invirtuo": uns})
    if latent and blocks[0].latent is not None:
        adata.obsm["z"] = np.concatenate([block.latent for block in blocks])
    return adata


def write_cells(
    path: Path,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    uns: dict[str, Any],
    blocks: Iterable[Block],
    chunk_size: int,
    latent: bool,
) -> None:
    """Write cells as they come; the file appears when all are there."""
    from anndata.io import write_elem

    vectors: list[np.ndarray] = []
    with writing_h5ad(path, obs, var, {"invirtuo": uns}) as file:
        for counts in _gathered(blocks, chunk_size, vectors if latent else None):
            append_rows(file, counts)
        if vectors:
            write_elem(file, "obsm/z", np.concatenate(vectors))


def _gathered(
    blocks: Iterable[Block], chunk_size: int, vectors: list[np.ndarray] | None
) -> Iterator[sparse.csr_matrix]:
    """Counts of at least `chunk_size` cells at a time; latent vectors are appended to `vectors`."""
    gathered: list[sparse.csr_matrix] = []
    n_cells = 0
    for block in blocks:
        gathered.append(block.counts)
        n_cells += block.counts.shape[0]
        if vectors is not None and block.latent is not None:
            vectors.append(block.latent)
        if n_cells >= chunk_size:
            yield sparse.vstack(gathered, format="csr")
            gathered, n_cells = [], 0
    if gathered:
        yield sparse.vstack(gathered, format="csr")

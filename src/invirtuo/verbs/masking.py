"""Masking entries of a count matrix, and the layer with their imputed values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from invirtuo.verbs.generate import counted

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.cells.values import AnyMatrix

__all__ = ["ImputedLayer", "mask_entries"]


class ImputedLayer:
    """Collects imputed means, all of them or those at masked entries, block of cells by block."""

    def __init__(self, adata: AnnData, mask: sparse.csr_matrix | None, columns: np.ndarray):
        if mask is not None and mask.shape != adata.shape:
            raise ValueError(f"mask has shape {mask.shape}; expected that of the data, {adata.shape}")
        self.x = counted(adata).X
        self.mask = mask
        self.columns = columns  # of the genes of the model
        self.blocks: list[Any] = []

    def add(self, rows: slice, mean: np.ndarray) -> None:
        """Append the next rows, whose means (n, number of genes of the model) are given."""
        block = sparse.csr_matrix(self.x[rows]).toarray().astype(np.float32)
        if self.mask is None:
            block[:, self.columns] = mean
            self.blocks.append(block)
        else:
            is_masked = self.mask[rows].toarray()[:, self.columns]
            block[:, self.columns] = np.where(is_masked, mean, block[:, self.columns])
            self.blocks.append(sparse.csr_matrix(block))

    def layer(self) -> AnyMatrix:
        """(n, g) all rows: dense, or sparse with a mask."""
        return np.concatenate(self.blocks) if self.mask is None else sparse.vstack(self.blocks, format="csr")


def mask_entries(
    adata: AnnData, fraction: float = 0.1, *, which: Literal["nonzero", "all"] = "nonzero", seed: int = 0
) -> tuple[AnnData, sparse.csr_matrix]:
    """Mask entries of a count matrix, to see how well they are imputed.

    Parameters
    ----------
    adata
        Raw counts in X; not changed.
    fraction
        Share of the entries of each cell, among those that are not zero or among all.

    Returns
    -------
    The cells with masked entries set to 0, and the mask, (n, g) bool. Fit on the former.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix I.6; it does not say which entries are drawn.
    """
    if not 0 < fraction < 1 or which not in ("nonzero", "all"):
        raise ValueError(f"fraction={fraction}, which={which!r}; expected a share between 0 and 1, nonzero or all")
    # the same share of every cell
    rng = np.random.default_rng(seed)
    x = sparse.csr_matrix(counted(adata).X, copy=True)
    n_cells, n_genes = x.shape
    rows, columns = [], []
    for i in range(n_cells):
        own = slice(x.indptr[i], x.indptr[i + 1])
        entries = x.indices[own] if which == "nonzero" else np.arange(n_genes)
        masked = rng.choice(entries, round(fraction * len(entries)), replace=False)
        rows.append(np.full(len(masked), i))
        columns.append(masked)
    indices = (np.concatenate(rows), np.concatenate(columns))
    is_masked = np.ones(len(indices[0]), dtype=bool)
    mask = sparse.csr_matrix((is_masked, indices), shape=x.shape)

    # masked entries look as if they had not been counted
    new = counted(adata).copy()
    new.X = (x - x.multiply(mask)).tocsr()
    new.X.eliminate_zeros()
    return new, mask

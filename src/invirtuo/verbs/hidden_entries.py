"""Entries of a count matrix that are hidden, and what is put in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from invirtuo.verbs.generate import counted

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Filled", "mask_entries"]


class Filled:
    """Collects imputed means, all of them or those at masked entries."""

    def __init__(self, adata: AnnData, mask: sparse.csr_matrix | None, columns: np.ndarray):
        if mask is not None and mask.shape != adata.shape:
            raise ValueError(f"mask has shape {mask.shape}; expected that of the data, {adata.shape}")
        self.x, self.mask, self.columns = counted(adata).X, mask, columns
        self.parts: list[Any] = []

    def add(self, rows: slice, mean: np.ndarray) -> None:
        block = sparse.csr_matrix(self.x[rows]).toarray().astype(np.float32)
        where = np.ones(block.shape, dtype=bool) if self.mask is None else self.mask[rows].toarray()
        where = where[:, self.columns]
        block[:, self.columns] = np.where(where, mean, block[:, self.columns])
        self.parts.append(block if self.mask is None else sparse.csr_matrix(block))

    def layer(self):
        return np.concatenate(self.parts) if self.mask is None else sparse.vstack(self.parts, format="csr")


def mask_entries(
    adata: AnnData, fraction: float = 0.1, *, which: Literal["nonzero", "all"] = "nonzero", seed: int = 0
) -> tuple[AnnData, sparse.csr_matrix]:
    """Hide entries of a count matrix, to see how well they are imputed.

    Parameters
    ----------
    adata
        Raw counts in X; not changed.
    fraction
        Share of the entries of each cell, among those that are not zero or among all.

    Returns
    -------
    The cells with hidden entries set to 0, and the mask, (n, g) bool. Fit on the former.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix I.6; it does not say which entries are drawn.
    """
    if not 0 < fraction < 1 or which not in ("nonzero", "all"):
        raise ValueError(f"fraction={fraction}, which={which!r}; expected a share between 0 and 1, nonzero or all")
    rng = np.random.default_rng(seed)
    x = sparse.csr_matrix(counted(adata).X, copy=True)
    rows, columns = [], []
    for i in range(x.shape[0]):
        entries = x.indices[x.indptr[i] : x.indptr[i + 1]] if which == "nonzero" else np.arange(x.shape[1])
        hidden = rng.choice(entries, round(fraction * len(entries)), replace=False)
        rows.append(np.full(len(hidden), i))
        columns.append(hidden)
    where = (np.concatenate(rows), np.concatenate(columns))
    mask = sparse.csr_matrix((np.ones(len(where[0]), dtype=bool), where), shape=x.shape)
    new = counted(adata).copy()
    new.X = (x - x.multiply(mask)).tocsr()
    new.X.eliminate_zeros()
    return new, mask

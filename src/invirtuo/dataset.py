"""CellDataset: an AnnData and a Design, read batch by batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from invirtuo.batch import Batch
from invirtuo.design import Design
from invirtuo.preprocess import TOTAL, check_genes, check_values
from invirtuo.samplers import Layout, Rows, Sampler

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CellDataset", "to_csr"]


class CellDataset:
    """Cells in memory as CSR, dense only inside a batch. The caller's AnnData is never written to.

    Parameters
    ----------
    adata
        Cells in the data space of the model (log1p of counts per 10 000, or counts); sparse or dense, view or backed.
    design
        Which columns of obs mean what.
    split
        (n,) "train", "val", "test" for each cell, indexed like obs; None puts every cell into "train".
    signed
        Whether values below zero are data, as in synthetic systems.

    Raises
    ------
    ValueError
        If genes are not unique, values are not finite or negative, labels are unknown, or the split does not fit.

    Examples
    --------
    >>> import invirtuo as iv
    >>> adata = iv.datasets.toy()
    >>> design = iv.Design.from_adata(adata, perturbation="perturbation", control="control")
    >>> dataset = iv.CellDataset(adata, design)
    >>> batch = next(dataset.batches(iv.samplers.cells, 32, seed=0))
    >>> tuple(batch.target.shape) == (32, adata.n_vars)
    True
    """

    def __init__(self, adata: AnnData, design: Design, split: pd.Series | None = None, *, signed: bool = False):
        check_genes(adata)
        check_values(adata, allow_negative=signed)
        self.design = design
        self.obs = adata.obs
        self.genes = adata.var_names.astype(str).to_numpy()
        self.matrix = to_csr(adata)
        self.values: torch.Tensor | None = None
        self.condition = design.encode(adata.obs)
        self.split = _aligned(split, adata.obs)
        self.size_factor = torch.from_numpy(_size_factors(adata, self.matrix, self.split == "train"))

    def with_values(self, values: torch.Tensor, size_factor: torch.Tensor) -> Self:
        """The same cells with values (n, d) in place of expression (latent vectors), and other depths (n,)."""
        other = copy.copy(self)
        other.values, other.size_factor = values, size_factor
        return other

    def with_validation(self, share: float) -> Self:
        """The same cells, a share of the training cells set aside for validation; always the same ones."""
        other = copy.copy(self)
        rows = self.rows("train")
        other.split = self.split.copy()
        other.split[np.random.default_rng(0).permutation(rows)[: int(share * len(rows))]] = "val"
        return other

    def rows(self, part: str) -> np.ndarray:
        """Rows of one part of the split."""
        return np.flatnonzero(self.split == part)

    def layout(self, part: str = "train") -> Layout:
        """What samplers may know of one part of the split; groups without controls there use those of training."""
        return Layout.of(self.obs, self.design, self.rows(part), None if part == "train" else self.rows("train"))

    def batches(
        self, sampler: Sampler, batch_size: int, *, part: str = "train", seed: int | Sequence[int] = 0, skip: int = 0
    ) -> Iterator[Batch]:
        """Pass once over a part of the split; `skip` leaves out the first batches without reading them."""
        rng = np.random.default_rng(seed)
        for i, rows in enumerate(sampler(self.layout(part), batch_size, rng)):
            if i >= skip:
                yield self.take(rows)

    def take(self, rows: Rows | np.ndarray) -> Batch:
        """Read some rows as a Batch."""
        rows = rows if isinstance(rows, Rows) else Rows(np.asarray(rows))
        index = torch.from_numpy(rows.target.astype(np.int64))
        return Batch(
            condition=self.condition[index],
            target=self.dense(rows.target),
            source=None if rows.source is None else self.dense(rows.source),
            size_factor=self.size_factor[index],
            index=index,
            set_size=rows.set_size,
        )

    def dense(self, rows: np.ndarray) -> torch.Tensor:
        """(n, g) values of some rows, float32."""
        if self.values is not None:
            return self.values[torch.from_numpy(np.asarray(rows, dtype=np.int64))]
        return torch.from_numpy(self.matrix[rows].toarray())

    def pseudobulk(self, part: str = "train") -> tuple[pd.DataFrame, np.ndarray, np.ndarray, np.ndarray]:
        """Mean and variance of every condition of a part.

        Returns
        -------
        Table of the conditions (columns of the Design), their means (c, g), variances (c, g; ddof 0) and numbers of
        cells (c,), all in float64 and in the order of the condition names.
        """
        rows = self.rows(part)
        obs = self.obs.iloc[rows]
        codes, _ = pd.factorize(self.design.names(obs), sort=True)
        n_conditions = codes.max(initial=-1) + 1
        counts = np.bincount(codes, minlength=n_conditions)
        members = sparse.csr_matrix((np.ones(len(rows)), (codes, np.arange(len(rows)))), (n_conditions, len(rows)))
        x = self.matrix[rows].astype(np.float64)
        mean = (members @ x).toarray() / counts[:, None]
        variance = np.maximum((members @ x.multiply(x)).toarray() / counts[:, None] - mean**2, 0)
        table = obs[self.design.columns].iloc[[np.argmax(codes == i) for i in range(n_conditions)]]
        return table.reset_index(drop=True), mean, variance, counts

    def overdispersion(self, part: str = "train") -> np.ndarray:
        """(g,) inverse of the dispersion r of counts with variance m + m^2 / r, m = depth x share; by moments."""
        rows = self.rows(part)
        x = self.matrix[rows].astype(np.float64)
        depth = np.asarray(x.sum(axis=1)).ravel()
        total, square = (np.asarray(y.sum(axis=0)).ravel() for y in (x, x.multiply(x)))
        share = total / max(depth.sum(), 1.0)
        expected = share**2 * (depth**2).sum()
        residual = square - 2 * share * (x.T @ depth) + expected
        return np.divide(np.maximum(residual - total, 0), expected, out=np.zeros_like(expected), where=expected > 0)

    def fingerprint(self) -> str:
        """Short hash of genes, labels and values, to tell one data set from another, however it is stored."""
        digest = hashlib.blake2b(digest_size=8)
        matrix = self.matrix
        if not matrix.has_canonical_format or not matrix.data.all():
            matrix = matrix.copy()
            matrix.sum_duplicates()
            matrix.eliminate_zeros()
        for array in (matrix.data, matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)):
            digest.update(np.ascontiguousarray(array).data)
        for text in (*self.genes, *self.design.names(self.obs)):
            digest.update(str(text).encode() + b"\0")
        return digest.hexdigest()


def to_csr(adata: AnnData) -> sparse.csr_matrix:
    """X as CSR float32; a copy only where the format demands it."""
    x = adata.X if not adata.isbacked else adata.to_memory().X
    return sparse.csr_matrix(x, dtype=np.float32)


def _aligned(split: pd.Series | None, obs: pd.DataFrame) -> np.ndarray:
    """The split as an array in the order of obs, checked."""
    if split is None:
        return np.full(len(obs), "train", dtype=object)
    if not isinstance(split, pd.Series):
        split = pd.Series(np.asarray(split), index=obs.index) if len(split) == len(obs) else pd.Series(split)
    if len(split) != len(obs) or not split.index.equals(obs.index):
        if not split.index.is_unique or not obs.index.is_unique or not obs.index.isin(split.index).all():
            raise ValueError(
                f"the split has {len(split)} entries and does not name every one of the {len(obs)} cells once; "
                "make it with a function of invirtuo.splits from the same obs"
            )
        split = split.loc[obs.index]
    values = split.astype(object).where(split.notna(), "").to_numpy(dtype=object)
    unknown = sorted(set(values) - {"train", "val", "test", ""})
    if unknown:
        raise ValueError(f'the split holds {", ".join(map(repr, unknown[:5]))}; expected "train", "val", "test" or ""')
    if not (values == "train").any():
        raise ValueError('the split has no "train" cells; nothing to fit')
    return values


def _size_factors(adata: AnnData, matrix: sparse.csr_matrix, train: np.ndarray) -> np.ndarray:
    """Depth of each cell over the median depth of the training cells."""
    if TOTAL in adata.obs:
        depth = adata.obs[TOTAL].to_numpy(np.float64)
    else:
        counts = adata.layers["counts"] if "counts" in adata.layers else matrix
        depth = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    median = np.median(depth[train])
    return (depth / (median if median > 0 else 1.0)).astype(np.float32)

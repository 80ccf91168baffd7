"""Moments of the cells of every condition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from torch import Tensor

from invirtuo.batch import Condition

__all__ = ["Pseudobulk", "group_sums", "weighted_mean"]


@dataclass(frozen=True, eq=False)
class Pseudobulk:
    """Mean and variance of the cells of c conditions.

    Parameters
    ----------
    table
        (c, columns), the labels of each condition.
    condition
        The same as tensors.
    mean, variance
        (c, g), in float64; variances with ddof 0.
    n_cells
        (c,)
    """

    table: pd.DataFrame
    condition: Condition
    mean: Tensor
    variance: Tensor
    n_cells: Tensor

    def __len__(self) -> int:
        return len(self.n_cells)

    def __getitem__(self, rows: Tensor) -> Pseudobulk:
        """The conditions of a mask or of numbers."""
        moments = self.mean[rows], self.variance[rows], self.n_cells[rows]
        return Pseudobulk(self.table.iloc[rows.numpy()], self.condition[rows], *moments)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (g,) over all cells of the conditions."""
        mean = weighted_mean(self.mean, self.n_cells)
        return mean, weighted_mean(self.variance + (self.mean - mean) ** 2, self.n_cells)


def weighted_mean(values: Tensor, n_cells: Tensor) -> Tensor:
    """(g,) mean of rows (c, g), each as often as it has cells (c,)."""
    weight = n_cells.to(values)[:, None]
    return (values * weight).sum(0) / weight.sum()


def group_sums(values: sparse.csr_matrix | np.ndarray, number: np.ndarray, n_groups: int) -> np.ndarray:
    """(k, g) sums of the rows (n, g), or (k,) of numbers (n,), by the number (n,) of their group."""
    entries = np.ones(len(number)), (number, np.arange(len(number)))
    members = sparse.csr_matrix(entries, (n_groups, len(number)))
    total = members @ values
    dense: np.ndarray = total.toarray() if sparse.issparse(total) else total
    return dense

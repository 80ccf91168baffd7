"""How well hidden counts are filled in: distance and correlation at the hidden entries, beside trivial answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.checks import labels
from invirtuo.cells.pseudobulk import group_sums

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["imputation_scores", "trivial_answers"]


def imputation_scores(real: Any, imputed: Mapping[str, Any], mask: sparse.csr_matrix) -> pd.DataFrame:
    """Mean absolute difference and Pearson correlation between hidden counts and what was filled in.

    Parameters
    ----------
    real
        (n, g) counts before entries were masked.
    imputed
        Name to (n, g) values, dense or sparse; only masked entries are looked at.
    mask
        (n, g) bool, the masked entries.

    Returns
    -------
    DataFrame, a row for each name: ``l1``, ``pearson``, the same of log1p (``l1_log``, ``pearson_log``), and ``mean``,
    the mean of the imputed values; the first row is the truth. The correlation of a constant is NaN.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix I.6 and table 9.
    """
    if not mask.nnz:
        raise ValueError("mask hides no entry; expected some, as from mask_entries")
    rows = []
    truth = _at(real, mask, "real")
    for name, values in {"truth": real, **imputed}.items():
        found = _at(values, mask, name)
        row = {"model": name, "l1": _l1(found, truth), "pearson": _correlation(found, truth)}
        log_found, log_truth = np.log1p(np.stack([found, truth]))
        row |= {"l1_log": _l1(log_found, log_truth), "pearson_log": _correlation(log_found, log_truth)}
        rows.append(row | {"mean": float(found.mean())})
    return pd.DataFrame(rows)


def trivial_answers(
    masked: AnnData, by: str, *, masked_fraction: float = 0.0, split: pd.Series | None = None
) -> dict[str, np.ndarray]:
    """Answers that need no model: 0, the mean of the gene, and the share of the gene in the class times the depth.

    Parameters
    ----------
    masked
        Counts with masked entries set to 0.
    by
        Column of obs with the classes.
    masked_fraction
        Share of each cell's counts that is masked; means and depths are raised by 1 / (1 - masked_fraction).
    split
        As for fit: means and shares are those of the "train" cells, depths of every cell its own. None takes all.

    Returns
    -------
    Name to (n, g) means.
    """
    x = sparse.csr_matrix(masked.X, dtype=np.float64)
    is_train = np.ones(masked.n_obs, bool)
    if split is not None:
        is_train = split.reindex(masked.obs_names).to_numpy() == "train"
    kept = 1 - masked_fraction
    gene_mean = np.asarray(x[is_train].mean(axis=0)) / kept

    # share of every gene in the counts of its class
    names, group = np.unique(labels(masked, by), return_inverse=True)
    depth = np.asarray(x.sum(axis=1)).ravel()
    of_train = group[is_train]
    class_depth = np.maximum(group_sums(depth[is_train], of_train, len(names)), 1.0)
    share = group_sums(x[is_train], of_train, len(names)) / class_depth[:, None]
    class_mean = share[group] * depth[:, None] / kept
    return {
        "nothing (0)": np.zeros(x.shape, dtype=np.float32),
        "mean of the gene": np.broadcast_to(gene_mean, x.shape),
        "mean of the class x depth": class_mean.astype(np.float32),
    }


def _at(values: Any, mask: sparse.csr_matrix, name: str) -> np.ndarray:
    """Values at the masked entries, in their order."""
    if values.shape != mask.shape:
        raise ValueError(f"{name} has shape {values.shape}; expected that of the mask, {mask.shape}")
    rows, columns = mask.nonzero()
    if sparse.issparse(values):
        values = sparse.csr_matrix(values)
    return np.asarray(values[rows, columns], dtype=np.float64).ravel()


def _l1(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; NaN of a constant."""
    if a.std() == 0 or b.std() == 0:
        return np.nan
    return float(np.corrcoef(a, b)[0, 1])

"""What a page lets one look up of every gene: whether it changes in predicted and in real cells, and its spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from invirtuo.metrics.measures.wilcoxon import rank_sum
from invirtuo.metrics.numerics.streamed import dense
from invirtuo.reports.genes import ORIGINS

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["by_gene"]

BINS = 16  # of a distribution; the first holds zeros alone


def by_gene(
    effects: pd.DataFrame, predicted: AnnData, adata: AnnData, design: Design
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Tests of all genes against the control cells, and distributions of their values.

    Parameters
    ----------
    effects
        As :func:`invirtuo.bench.effects.effects_of` gives them for the same cells.
    predicted, adata
        Log values, predicted and real.
    design
        Which columns mean what.

    Returns
    -------
    effects
        With columns ``q`` and ``q_real``: rank-sum p-values of predicted and of real cells against the control cells of
        the same covariates, adjusted within a condition (Benjamini and Hochberg); NaN without real cells.
    distributions
        ``condition`` (c,), ``gene`` (g,), ``top`` (g,), the largest value of a gene, and ``control``, ``real``,
        ``predicted`` (c, g, 16): shares of cells with a zero, and with values in 15 equal steps from 0 to ``top``.
    """
    real_names, predicted_names = design.names(adata.obs), design.names(predicted.obs)
    groups = design.groups(adata.obs)
    is_control = design.is_control(adata.obs)
    conditions = list(dict.fromkeys(effects["condition"]))

    # cells of every condition; those of one fit in memory
    top = np.maximum(_largest(adata), _largest(predicted))
    shares = {origin: np.zeros((len(conditions), adata.n_vars, BINS), np.float32) for origin in ORIGINS}
    adjusted = np.full((2, len(conditions), adata.n_vars), np.nan)
    for i, condition in enumerate(conditions):
        drawn = predicted[(predicted_names == condition).to_numpy()]
        group = design.groups(drawn.obs).iloc[0]
        cells = {
            "control": adata[is_control & (groups == group).to_numpy()],
            "real": adata[(real_names == condition).to_numpy()],
            "predicted": drawn,
        }
        values = {origin: dense(own.X) for origin, own in cells.items()}
        for origin, own in values.items():
            shares[origin][i] = _shares(own, top)
        tested = [own for own in (values["predicted"], values["real"]) if len(own)]
        p_values, _ = rank_sum(tested, values["control"])
        adjusted[: len(tested), i] = stats.false_discovery_control(p_values, axis=1)

    q, q_real = adjusted.reshape(2, -1)
    labels = {"condition": np.array(conditions, dtype=str), "gene": np.array(adata.var_names, dtype=str)}
    return effects.assign(q=q, q_real=q_real), {**labels, "top": top, **shares}


def _largest(cells: AnnData) -> np.ndarray:
    """(g,) largest value of every gene."""
    largest = cells.X.max(axis=0)
    return np.asarray(largest.todense() if hasattr(largest, "todense") else largest, np.float32).ravel()


def _shares(values: np.ndarray, top: np.ndarray) -> np.ndarray:
    """(n, g) values to (g, bins) shares of cells."""
    n, g = values.shape
    if not n:
        return np.full((g, BINS), np.nan, np.float32)
    steps = np.ceil(values * ((BINS - 1) / np.maximum(top, 1e-6)))
    places = np.clip(steps, 0, BINS - 1).astype(np.int64) + BINS * np.arange(g)
    counts = np.bincount(places.ravel(), minlength=g * BINS).reshape(g, BINS)
    shares: np.ndarray = (counts / n).astype(np.float32)
    return shares

"""Sparsity against error: one fit for each of several weights of the penalty."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from invirtuo.errors import preview

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.fit import FitConfig
    from invirtuo.verbs.network import GeneNetwork

__all__ = ["tradeoff"]


def tradeoff(
    model: GeneNetwork,
    adata: AnnData,
    split: pd.Series,
    lams: Sequence[float] = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0),
    config: FitConfig | None = None,
    *,
    inside: str = "val",
    outside: str = "test",
    metric: str = "mse",
) -> pd.DataFrame:
    """Fit with several weights of the penalty: open connections, and errors in and out of distribution.

    Parameters
    ----------
    model
        Fitted or not; it gives design, genes and settings, and stays as it is.
    adata, split
        Cells in the data space of the model, and which of them are training cells.
    lams
        Weights of the penalty, each a fit.
    config
        Of the fits; None takes that of the model.
    inside, outside
        Parts of the split to judge: held-out cells of training courses, and other courses.
    metric
        A column of :meth:`~invirtuo.verbs.Forecaster.evaluate_forecast`, for example ``"mse_bins"``.

    Returns
    -------
    DataFrame, a row for each weight, then one for each baseline: ``model``; ``lam`` (NaN for baselines);
    ``open_inputs``, mean number of open inputs of a target, and ``open_share``, the share of open connections, both
    with gates for evaluation; ``inside`` and ``outside``, means over courses of the metric.

    Raises
    ------
    ValueError
        If there are no weights, the model has no penalty, or the split lacks a part.
    """
    if not len(lams):
        raise ValueError("lams is empty; give at least one weight of the penalty")
    if model.config.penalty == "none":
        raise ValueError("the model has no penalty to weigh; make it with another one, for example 'target_l0'")
    if missing := sorted({"train", inside, outside} - set(split)):
        raise ValueError(f"the split has no {preview(missing)} cells; found {preview(sorted(set(split)))}")

    rows, errors = [], pd.DataFrame()
    for lam in lams:
        # errors of a model with this weight, and of the baselines, which do not depend on it
        one = type(model)(model.design, model.genes, replace(model.config, lam=float(lam), null=False))
        with warnings.catch_warnings():
            for told in (".*does not forecast held-out courses", ".*closed every connection"):
                warnings.filterwarnings("ignore", message=told)  # it is in the table
            one.fit(adata, split, config or model.fit_config)
            tables = {"inside": one.evaluate_forecast(adata, split, inside)}
            tables["outside"] = one.evaluate_forecast(adata, split, outside)
        means = {name: table.groupby("model", sort=False)[metric].mean() for name, table in tables.items()}
        errors = pd.DataFrame(means)

        # open connections
        sizes = one.sparsity(1).loc["evaluation"]
        found = {"lam": float(lam), "open_inputs": sizes["open_inputs"], "open_share": 1 - sizes["features"]}
        rows.append({"model": model.name} | found | errors.loc[model.name].to_dict())
    baselines = errors.drop(index=model.name).reset_index()
    return pd.concat([pd.DataFrame(rows), baselines], ignore_index=True)

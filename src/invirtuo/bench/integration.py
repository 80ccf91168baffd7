"""scIB scores of embeddings: how well batches mix, what is left of biology (the extra ``integration``)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["integration_scores"]


def integration_scores(
    embeddings: Mapping[str, np.ndarray], uncorrected: np.ndarray, batch: Sequence[str], label: Sequence[str]
) -> pd.DataFrame:
    """Five batch and five biology scores of each embedding, and their means, not rescaled between embeddings.

    A method that is given the labels, as `correct` is, is flattered by the biology scores. scib-metrics has BRAS in
    place of the silhouette of batches, so that means are not those of earlier tables of scIB.

    Parameters
    ----------
    embeddings
        Name to (n, d).
    uncorrected
        (n, d), the cells as they were, for the comparison of principal components.
    batch, label
        (n,) batch and cell type of each cell.

    Returns
    -------
    DataFrame: `model`, `kind` ("batch" or "bio"), `metric`, `value`; metric "mean" is the mean of a kind. Higher is
    better.

    Raises
    ------
    ValueError
        If scib-metrics is not installed or numbers of cells differ.

    References
    ----------
    Luecken et al. 2022, doi:10.1038/s41592-021-01336-8; CFGen, arXiv:2407.11734, section 5.5.
    """
    import anndata

    n = len(uncorrected)
    for name, x in {**embeddings, "batch": batch, "label": label}.items():
        if len(x) != n:
            raise ValueError(f"{name} has {len(x)} rows, uncorrected has {n}; expected one for each cell")
    benchmarker = _benchmarker()

    # all embeddings of the same cells
    columns = {"batch": np.asarray(batch, str), "label": np.asarray(label, str)}
    obs = pd.DataFrame(columns, index=map(str, range(n)))
    cells = anndata.AnnData(np.asarray(uncorrected, np.float32), obs=obs.astype("category"))
    cells.obsm["uncorrected"] = cells.X
    for name, x in embeddings.items():
        cells.obsm[f"of {name}"] = np.asarray(x, np.float32)
    keys = [f"of {name}" for name in embeddings]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = benchmarker(
            cells, "batch", "label", keys, pre_integrated_embedding_obsm_key="uncorrected", progress_bar=False
        )
        run.benchmark()
        table = run.get_results(min_max_scale=False)

    # tidy scores, without the aggregates of scib-metrics
    type_names = {"Batch correction": "batch", "Bio conservation": "bio"}
    metric_types = table.loc["Metric Type"].map(type_names).dropna()
    rows = []
    for name in embeddings:
        for metric, kind in metric_types.items():
            value = float(table.loc[f"of {name}", metric])
            rows.append({"model": name, "kind": kind, "metric": metric, "value": value})
    scores = pd.DataFrame(rows)
    means = scores.groupby(["model", "kind"], sort=False, as_index=False)["value"].mean().assign(metric="mean")
    return pd.concat([scores, means], ignore_index=True)


def _benchmarker() -> Any:
    try:
        from scib_metrics.benchmark import Benchmarker
    except ImportError as error:
        raise ValueError(
            "scib-metrics is not installed; install the extra: pip install -c constraints.txt 'invirtuo[integration]'"
        ) from error
    return Benchmarker

"""Whether a metric tells a replicate of the experiment from an answer that knows nothing of the perturbation.

The real cells of every condition are divided in two: one half is the truth, a positive control is made of the other
half, a negative control of the other perturbations. DRF says which part of the way from the negative control to a
perfect prediction the positive one goes, BDS how often it wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics.attached import Attached
from invirtuo.metrics.cells import Layer, Scale
from invirtuo.metrics.pair import CountOptions, TargetGenes
from invirtuo.metrics.registry import METRICS, Metric
from invirtuo.metrics.scores import choose, values_of
from invirtuo.metrics.trust.halves import Control, Halves, halves

__all__ = ["calibrated", "calibration", "controls_of", "drf", "summary"]

# for these the mean of the other perturbations is the origin, not an answer
FROM_OTHERS = {"pearson_perturbed_mean", "r2_weighted"}
TINY = 1e-6  # added to the denominator of DRF as published


def calibration(
    real: AnyCells,
    design: Design,
    metrics: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
    min_cells: int = 30,
    n_pcs: int = 30,
    scale: Scale = "log1p",
    layer: Layer = None,
    bulk_target_sum: float = 50_000.0,
    target_genes: TargetGenes | None = None,
) -> pd.DataFrame:
    """How well metrics tell a replicate of the experiment from a prediction that ignores the perturbation.

    The cells of every condition are divided at random into two halves: the truth, and its duplicate. With q+ the score
    of a positive control against the truth, q- that of a negative control, and o the best possible value,

    - ``drf = (q- - q+) / (q- - o + 1e-6)`` where lower is better, ``(q+ - q-) / (o - q- + 1e-6)`` where higher is,
      within -1 and 1; NaN where q- is not finite or better than o;
    - ``bds``: share of the conditions in which q+ is strictly better than q-; without a value it is not.

    The controls depend on what the metric sees of a prediction. Of metrics of means (`Metric.of_means`): positive is
    the interpolated duplicate, for every gene ``a * mean of the duplicate + (1 - a) * mean of the others`` with 1 - a
    the adjusted p-value of a Welch test of the duplicate against the cells of the other perturbations; negative is the
    mean over the other perturbations of their means (`pearson_perturbed_mean` and `r2_weighted`, whose origin that is:
    the mean of the control cells). Of all other metrics, which see cells: positive is the duplicate as it is; negative
    are as many cells drawn from all other perturbations. Where a metric ranks perturbations (`Metric.relative`) leaving
    the own one out would tell it, so that nothing is left out. All of this within each covariate group. In a group with
    one perturbation the negative control, also of metrics of means, are as many control cells, and in the place of the
    others stand all control cells. Control cells as the origin of effects are shared by both sides and not divided.

    Parameters
    ----------
    real, design
        As in :func:`invirtuo.evaluate`.
    metrics
        Names and profiles, as there. Metrics without a direction or a finite best value are left out.
    seed
        Of the halves (with 42 those of scPertEval) and of the drawn cells.
    min_cells
        Conditions with fewer cells are left out; their cells still count among those of other perturbations, but not in
        the mean over perturbations.
    n_pcs, scale, layer
        As in :func:`invirtuo.evaluate`.
    bulk_target_sum, target_genes
        As in :func:`invirtuo.metrics.vcc2026`, for metrics on counts.

    Returns
    -------
    pd.DataFrame
        One row per metric: `metric`, `drf` (median over conditions), `drf_mean`, `bds`, `n` (conditions with a DRF),
        `n_nan` (those without), `positive` and `negative` (which controls). ``attrs["conditions"]`` has a row for each
        condition and metric: `condition`, `group`, `metric`, `positive`, `negative`, `positive_value`,
        `negative_value`, `drf`, `wins`, `n_truth` (cells). ``attrs["left_out"]`` maps conditions to the reason.

    Raises
    ------
    ValueError
        If no condition has enough cells, no metric can be calibrated, or control cells are needed and missing.

    References
    ----------
    Miller et al. 2025; scPertEval 0.2, doi:10.64898/2026.07.23.740433.

    Examples
    --------
    >>> import invirtuo as iv
    >>> cells = iv.datasets.toy()
    >>> design = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    >>> table = calibration(cells, design, ["mse", "mmd_gex"], min_cells=20, scale="counts")
    >>> table.set_index("metric")["positive"].to_dict()
    {'mse': 'interpolated duplicate', 'mmd_gex': 'other half of the cells'}
    """
    records = _with_best(choose(metrics, design))
    counts = CountOptions(bulk_target_sum, target_genes)
    divided = halves(real, design, seed=seed, min_cells=min_cells, n_pcs=n_pcs, scale=scale, layer=layer, counts=counts)
    # every control is scored once, by all metrics that it is for
    controls = {name: controls_of(record) for name, record in records.items()}
    wanted: dict[str, list[str]] = {}
    for name, kinds in controls.items():
        for kind in kinds:
            wanted.setdefault(kind, []).append(name)
    scored = {}
    for kind, names in wanted.items():
        scored[kind] = values_of(divided.prediction(kind), {name: records[name] for name in names})

    tables = []
    for name, (positive, negative) in controls.items():
        values = scored[positive][name], scored[negative][name]
        tables.append(calibrated(divided, records[name], *values, (positive, negative)))
    return summary(tables, divided)


def drf(
    positive: np.ndarray, negative: np.ndarray, best: float, direction: Literal["lower", "higher"] | None
) -> np.ndarray:
    """Dynamic range fraction: how far a positive control comes from a negative one to a perfect prediction.

    Parameters
    ----------
    positive, negative
        (n,) scores of both controls.
    best
        Score of a perfect prediction.
    direction
        Whether "lower" or "higher" scores are better.

    Returns
    -------
    np.ndarray
        (n,) from -1 to 1; NaN where the negative control has no finite score or one beyond perfection.

    References
    ----------
    Miller et al. 2025; scPertEval 0.2.

    Examples
    --------
    >>> drf(np.array([0.1, 0.3]), np.array([0.4, 0.2]), 0.0, "lower").round(3).tolist()
    [0.75, -0.5]
    """
    sign = 1.0 if direction == "lower" else -1.0
    room = sign * (negative - best)
    usable = np.isfinite(negative) & (room >= 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip(sign * (negative - positive) / (room + TINY), -1.0, 1.0)
    return np.where(usable, share, np.nan)


def controls_of(record: Metric) -> tuple[str, str]:
    """Names of the positive and the negative control for a metric."""
    if record.relative:
        return (Control.INTERPOLATED, Control.ALL_MEAN) if record.of_means else (Control.DUPLICATE, Control.ALL_CELLS)
    if record.of_means:
        return Control.INTERPOLATED, Control.CONTROL_MEAN if record.name in FROM_OTHERS else Control.OTHER_MEAN
    return Control.DUPLICATE, Control.OTHER_CELLS


def calibrated(
    divided: Halves, record: Metric, positive: pd.Series, negative: pd.Series, controls: tuple[str, str]
) -> pd.DataFrame:
    """DRF of a metric by condition, from the scores of both controls (index: conditions)."""
    table = pd.DataFrame({"condition": list(positive.index)})
    table["group"] = table["condition"].map(divided.group_of)
    table["metric"] = record.name
    table["positive"] = controls[0]
    table["negative"] = [divided.name_of(controls[1], name) for name in positive.index]

    # scores of both, and how they compare
    high, low = positive.to_numpy(dtype=float), negative.loc[positive.index].to_numpy(dtype=float)
    table["positive_value"], table["negative_value"] = high, low
    table["drf"] = drf(high, low, record.best, record.direction)
    table["wins"] = high < low if record.direction == "lower" else high > low
    table["n_truth"] = [len(divided.truth_rows[name]) for name in positive.index]
    return table


def summary(tables: Sequence[pd.DataFrame], divided: Halves) -> pd.DataFrame:
    """One row per metric from its table by condition."""
    rows = []
    for table in tables:
        known = table["drf"].dropna()
        row = {"metric": table["metric"].iloc[0], "drf": known.median(), "drf_mean": known.mean()}
        row |= {"bds": table["wins"].mean(), "n": len(known), "n_nan": len(table) - len(known)}
        for side in ("positive", "negative"):
            row[side] = "; ".join(table[side].unique())
        rows.append(row)
    result = pd.DataFrame(rows)
    conditions = Attached(pd.concat(tables, ignore_index=True))
    result.attrs = {"conditions": conditions, "left_out": dict(divided.left_out)}
    return result


def _with_best(names: Sequence[str]) -> dict[str, Metric]:
    """The records of those metrics that have a direction and a finite best value."""
    records = {}
    for name in names:
        record = METRICS[name]
        if record.direction is not None and np.isfinite(record.best):
            records[name] = record
    if not records:
        raise ValueError(
            f"none of {preview(names)} has a direction and a finite best value; name metrics that judge, for example "
            "metrics=['mse', 'pearson_delta']"
        )
    return records

"""The protocols of scPertEval: its metrics, gene sets and controls, under its names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import whole_number, with_likely
from invirtuo.metrics.cells import Layer, Scale
from invirtuo.metrics.measures.others import (
    SCPERTEVAL,
    Tests,
    others_of,
    r2_weighted,
    tests_of,
    weighted_mse,
    weights,
    welch,
)
from invirtuo.metrics.measures.wilcoxon import area
from invirtuo.metrics.pair import Pair
from invirtuo.metrics.registry import METRICS, Metric, each_condition
from invirtuo.metrics.scores import values_of
from invirtuo.metrics.trust.calibration import calibrated, summary
from invirtuo.metrics.trust.halves import Control, Halves, Test, halves, rank_sum_tests

__all__ = ["PROTOCOLS", "scperteval", "weighted_pearson"]

Compare = Callable[[np.ndarray, np.ndarray, np.ndarray], float]
Origin = Literal["zero", "control", "others"]
Genes = Literal["all", "top_k", "degs_padj", "exp1", "exp2", "exp4"]


class Protocol(NamedTuple):
    """A comparison of two means: which, of what, and how much each gene weighs."""

    compare: Literal["mse", "pearson", "r2"]
    origin: Origin
    genes: Genes


class Options(NamedTuple):
    """Number of top genes, and level of significance of a DE gene."""

    k: int
    level: float


MEANS: dict[str, Protocol] = {
    "mse": Protocol("mse", "zero", "all"),
    "mse_top_k": Protocol("mse", "zero", "top_k"),
    "mse_degs_padj": Protocol("mse", "zero", "degs_padj"),
    "wmse_exp1": Protocol("mse", "zero", "exp1"),
    "wmse_exp2": Protocol("mse", "zero", "exp2"),
    "wmse_exp4": Protocol("mse", "zero", "exp4"),
    "pearson": Protocol("pearson", "zero", "all"),
    "pearson_ctrl": Protocol("pearson", "control", "all"),
    "pearson_ctrl_top_k": Protocol("pearson", "control", "top_k"),
    "pearson_ctrl_degs_padj": Protocol("pearson", "control", "degs_padj"),
    "weighted_pearson_ctrl_exp2": Protocol("pearson", "control", "exp2"),
    "pearson_pert": Protocol("pearson", "others", "all"),
    "pearson_pert_top_k": Protocol("pearson", "others", "top_k"),
    "pearson_pert_degs_padj": Protocol("pearson", "others", "degs_padj"),
    "weighted_pearson_pert_exp2": Protocol("pearson", "others", "exp2"),
    "r2_ctrl": Protocol("r2", "control", "all"),
    "r2_ctrl_top_k": Protocol("r2", "control", "top_k"),
    "r2_ctrl_degs_padj": Protocol("r2", "control", "degs_padj"),
    "weighted_r2_ctrl_exp2": Protocol("r2", "control", "exp2"),
    "r2_pert": Protocol("r2", "others", "all"),
    "r2_pert_top_k": Protocol("r2", "others", "top_k"),
    "r2_pert_degs_padj": Protocol("r2", "others", "degs_padj"),
    "weighted_r2_pert_exp2": Protocol("r2", "others", "exp2"),
}
RANKS = {"rank": "rmse_mean_rank", "nir": "centroid_accuracy"}  # protocol to the same metric of ours
TESTS = ("de_auprc", "de_auroc", "de_overlap_k")
PROTOCOLS = (*MEANS, *RANKS, *TESTS)


def scperteval(
    real: AnyCells,
    design: Design,
    protocols: Sequence[str] | str | None = None,
    *,
    k: int = 50,
    level: float = 0.05,
    test: Test = "t-test",
    seed: int = 42,
    min_cells: int = 30,
    scale: Scale = "log1p",
    layer: Layer = None,
) -> pd.DataFrame:
    """DRF and BDS of the protocols of scPertEval, with its halves, controls and tests.

    Of those on means the positive control is the interpolated duplicate of :func:`invirtuo.metrics.calibration`, the
    negative one the mean of the other perturbations (that of the control cells where the former is the origin, `pert`).
    Of those on tests (`de_auprc`, `de_auroc`, `de_overlap_k`), which rank genes by their absolute statistic against the
    cells of the other perturbations, positive is the other half of the cells, and negative are the cells of the other
    perturbations tested against the control cells. Genes of `top_k`, `degs_padj` and the weights `exp` are those of the
    truth.

    Differs: ties of `rank` and `nir` count half, so that their negative control has 0.5, in the place of random
    noise; a condition without a DE gene has NaN in the place of an error; all cells of other perturbations are used,
    not a sample of 8,192; several covariate groups are calibrated one by one.

    Parameters
    ----------
    real, design, min_cells, scale, layer
        As in :func:`invirtuo.metrics.calibration`.
    protocols
        Names from `PROTOCOLS`; None: all.
    k
        Number of genes of `top_k` and `overlap_k`.
    level
        Adjusted p-value below which a gene counts in `degs_padj`.
    test
        "t-test" (Welch), or "rank-sum" (Mann-Whitney), whose statistic is Cliff's delta.
    seed
        Of the halves.

    Returns
    -------
    pd.DataFrame
        As from :func:`invirtuo.metrics.calibration`.

    References
    ----------
    scPertEval 0.2, doi:10.64898/2026.07.23.740433.
    """
    asked = [protocols] if isinstance(protocols, str) else list(protocols or PROTOCOLS)
    for name in asked:
        if name not in PROTOCOLS:
            raise ValueError(f"unknown protocol {name!r}; known: {with_likely(name, PROTOCOLS)}")
    options = Options(whole_number("k", k), level)
    divided = halves(real, design, seed=seed, min_cells=min_cells, test=test, n_pcs=1, scale=scale, layer=layer)
    tables = [_table(name, divided, options) for name in asked]
    return summary(tables, divided)


def _table(name: str, divided: Halves, options: Options) -> pd.DataFrame:
    """Scores of both controls in one protocol."""
    if name in TESTS:
        controls = (Control.DUPLICATE, Control.OTHER_CELLS)
        record = _record(name, "higher", 1.0, _nothing)
        found = _scores_of_tests(name, divided, options)
        return calibrated(divided, record, found["positive"], found["negative"], controls)
    if name in RANKS:
        controls = (Control.INTERPOLATED, Control.ALL_MEAN)
        published = METRICS[RANKS[name]]
        record = _record(name, published.direction, published.best, published.values)
    else:
        protocol = MEANS[name]
        controls = (Control.INTERPOLATED, Control.CONTROL_MEAN if protocol.origin == "others" else Control.OTHER_MEAN)
        lower = protocol.compare == "mse"
        values = each_condition(partial(_value, protocol=protocol, options=options))
        record = _record(name, "lower" if lower else "higher", 0.0 if lower else 1.0, values)
    positive, negative = (values_of(divided.prediction(control), {name: record})[name] for control in controls)
    return calibrated(divided, record, positive, negative, controls)


def _record(
    name: str,
    direction: Literal["lower", "higher"] | None,
    best: float,
    values: Callable[[Pair, str], np.ndarray],
) -> Metric:
    """A protocol as a metric that is in no registry."""
    return Metric(name, name, direction, (-np.inf, np.inf), best, name, SCPERTEVAL, values)


def _nothing(pair: Pair, group: str) -> np.ndarray:
    return np.full(len(pair.names(group)), np.nan)


def _value(pair: Pair, name: str, *, protocol: Protocol, options: Options) -> float:
    """Score of a condition."""
    compare: dict[str, Compare] = {"mse": weighted_mse, "pearson": weighted_pearson, "r2": r2_weighted}
    weight = _weights(tests_of(pair, name), protocol.genes, options)
    if weight is None:
        return np.nan
    pred, real = pair.both("mean", name)
    origin = _origin(pair, name, protocol.origin)
    return compare[protocol.compare](pred - origin, real - origin, weight)


def _origin(pair: Pair, name: str, origin: Origin) -> np.ndarray:
    if origin == "zero":
        return np.zeros(len(pair.genes))
    if origin == "others":
        return others_of(pair, name).mean
    return pair.control_moments("real", pair.group_of(name))[0]


def _weights(tests: Tests, genes: Genes, options: Options) -> np.ndarray | None:
    """Weights of genes with sum 1; None if none counts."""
    size = np.abs(tests.statistic)
    if genes in ("exp1", "exp2", "exp4"):
        return weights(size, float(genes[-1]))
    counted = np.ones(len(size), dtype=bool)
    if genes == "top_k":
        counted[np.argsort(-size, kind="stable")[options.k :]] = False
    if genes == "degs_padj":
        counted = tests.p_adj < options.level
    return counted / counted.sum() if counted.any() else None


def weighted_pearson(pred: np.ndarray, real: np.ndarray, weight: np.ndarray) -> float:
    """Pearson correlation of (g,) vectors with weights of sum 1; NaN where one of them is constant."""
    x, y = pred - (weight * pred).sum(), real - (weight * real).sum()
    size = np.sqrt((weight * x * x).sum() * (weight * y * y).sum())
    return float((weight * x * y).sum() / size) if size > 0 else np.nan


def _scores_of_tests(name: str, divided: Halves, options: Options) -> pd.DataFrame:
    """Conditions by `positive` and `negative`: how well rankings of genes find the DE genes of the truth."""
    rows = {}
    for condition in divided.truth_rows:
        truth = tests_of(divided.duplicate, condition)
        duplicate = divided.tests[condition]
        others = _others_against_control(divided, condition)
        rows[condition] = [_recovery(name, truth, found, options) for found in (duplicate, others)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["positive", "negative"])


def _others_against_control(divided: Halves, condition: str) -> Tests:
    """Tests of the cells of the other perturbations against the control cells."""
    group = divided.group_of(condition)
    if divided.test == "t-test":
        control = divided.duplicate.control_moments("real", group)
        return welch(divided.others[condition].moments, control)
    others = divided.cells.read(divided.rows_of_others(condition))
    return rank_sum_tests([others], divided.duplicate.stored_control("real", group))[0]


def _recovery(name: str, truth: Tests, found: Tests, options: Options) -> float:
    """How well a ranking of genes finds the DE genes, or the strongest genes, of the truth."""
    score = np.abs(found.statistic)
    if name == "de_overlap_k":
        if options.k >= len(score):
            return np.nan
        best = np.argsort(-score, kind="stable")[: options.k]
        strongest = np.argsort(-np.abs(truth.statistic), kind="stable")[: options.k]
        return len(np.intersect1d(best, strongest)) / options.k
    return area("pr" if name == "de_auprc" else "roc", truth.significant, score)

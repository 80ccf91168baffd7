"""From predictions to the next experiment: which perturbations bring cells to a wanted state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import stats

from invirtuo.cells.conditions import as_table
from invirtuo.cells.dataset import CellDataset
from invirtuo.errors import preview
from invirtuo.metrics.measures.distribution import energy_distance
from invirtuo.metrics.numerics.streamed import dense
from invirtuo.verbs.observed import ObservedMeans
from invirtuo.verbs.predict import PerturbationModel

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["candidates_of", "screen"]

Towards: TypeAlias = "Mapping[str, float] | pd.Series | AnnData | tuple[Any, Any]"
Measure: TypeAlias = Callable[[np.ndarray], float]
Seen: TypeAlias = Callable[[str], float]


def screen(
    model: PerturbationModel,
    towards: Towards,
    candidates: Sequence[str] | pd.DataFrame | None = None,
    *,
    level: float = 0.9,
    pairs: bool = False,
    cells: AnnData | None = None,
    n_cells: int = 300,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """Rank perturbations by how near they bring control cells to a wanted state.

    Parameters
    ----------
    model
        A fitted model.
    towards
        The wanted state. Gene to weight: a signature, raised where the weight is positive and lowered where it is
        negative; the score of cells is ``mean expression . w / |w|``. A classifier of scikit-learn and one of its
        classes: the mean probability. Cells in the data space of the model: minus their energy distance.
    candidates
        Perturbations, each tried in all groups that have control cells; or conditions, as `predict` takes them. None:
        all perturbations that the model knows.
    level
        Share of the conditions whose true change lies within its interval.
    pairs
        Also all pairs of the candidates, which must be names of perturbations.
    cells
        Measured cells in the data space of the model: control cells, and where there are some those of the conditions
        that the fit held out for validation. None: their means, which the model keeps and signatures need no more than.
    n_cells, seed, progress, options
        Of `predict`.

    Returns
    -------
    pd.DataFrame
        Columns of the Design, `condition`, `change` (of the score, against the control cells of the group), `low`,
        `high`, `p_value` (that it is not above 0) and `q_value` (Benjamini and Hochberg), `rank`, and for comparison
        `magnitude` (length of the predicted effect) and `rank_magnitude`, with `cells` also `mean_response` (mean
        change that was measured under the perturbation in other groups) and `rank_mean`; best first.
        ``attrs["n_calibration"]``: the number of validation conditions from which intervals come. Without one there are
        none.

    Raises
    ------
    ValueError
        If candidates or groups are unknown, or the wanted state needs `cells`.

    References
    ----------
    Intervals: split conformal (Vovk et al. 2005), p-values: Student's t of the change over the root mean square of the
    errors on validation conditions.
    """
    design = model.design
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1")
    measure = _measure(towards, model)
    observed, seen = _known(model, cells, measure, is_linear=isinstance(towards, Mapping | pd.Series))
    table = candidates_of(model, candidates, observed.groups, pairs=pairs)

    # how the score changes, of candidates and of validation conditions whose change is known
    held_out = pd.DataFrame(model.card["held_out"]["val"], columns=design.columns)
    known = held_out[design.names(held_out).isin(observed.conditions)].reset_index(drop=True)
    asked = {"n_cells": n_cells, "seed": seed, **options}
    changes, magnitudes = _changes(model, table, measure, seen, observed, progress=progress, **asked)
    result = table[design.columns].assign(condition=design.names(table).to_numpy(), change=changes)
    result["low"] = result["high"] = result["p_value"] = result["q_value"] = np.nan
    if len(known):
        predicted, _ = _changes(model, known, measure, seen, observed, **asked)
        errors = _measured_changes(design, known, seen) - predicted
        half, p_values = _calibrated(changes, errors, level)
        result["low"], result["high"], result["p_value"] = changes - half, changes + half, p_values
        result["q_value"] = stats.false_discovery_control(p_values)
    result["rank"] = result["change"].rank(ascending=False, method="min").astype(int)
    result["magnitude"] = magnitudes
    result["rank_magnitude"] = result["magnitude"].rank(ascending=False, method="min").astype(int)
    if cells is not None:
        result["mean_response"] = _mean_responses(design, table, observed, seen)
        result["rank_mean"] = (
            result["mean_response"].rank(ascending=False, method="min", na_option="bottom").astype(int)
        )
    result = result.sort_values("rank", kind="stable", ignore_index=True)
    result.attrs["n_calibration"] = len(known)
    return result


def candidates_of(
    model: PerturbationModel, candidates: Any, groups: Sequence[str], *, pairs: bool = False
) -> pd.DataFrame:
    """Conditions to try: perturbations in every group, or conditions as they are given."""
    design, column = model.design, str(model.design.perturbation)
    names = list(model.card["perturbations"]) if candidates is None else candidates
    bare = not isinstance(names, pd.DataFrame) and all(isinstance(name, str) and "|" not in name for name in names)
    if not bare:
        if pairs:
            raise ValueError("pairs are those of perturbations; give candidates as names of perturbations")
        return model.wanted(names)
    labels = list(dict.fromkeys(names))
    if pairs:
        labels += [design.separator.join(pair) for pair in combinations(labels, 2)]
    parts = [group.split("|") for group in groups] if design.covariates else [[]]
    rows = [dict(zip(design.covariates, own, strict=True)) | {column: label} for own in parts for label in labels]
    return model.wanted(as_table(pd.DataFrame(rows)[design.columns], design))


def _measure(towards: Towards, model: PerturbationModel) -> Measure:
    """The score of cells (n, g)."""
    if isinstance(towards, Mapping | pd.Series):
        weights = pd.Series(towards, dtype=float)
        if missing := [gene for gene in weights.index if gene not in set(model.genes)]:
            raise ValueError(
                f"towards: {len(missing)} of {len(weights)} genes are not in the model: {preview(missing)}"
            )
        w = weights.reindex(model.genes).fillna(0.0).to_numpy()
        size = np.linalg.norm(w)
        if not np.isfinite(size) or size == 0:
            raise ValueError("towards: all weights of the signature are 0 or not finite; expected some gene to change")
        return lambda x: float(x.mean(axis=0, dtype=np.float64) @ (w / size))
    if isinstance(towards, tuple):
        classifier, label = towards
        classes = list(classifier.classes_)
        if label not in classes:
            raise ValueError(f"towards: {label!r} is no class of the classifier; its classes: {preview(classes)}")
        place = classes.index(label)
        return lambda x: float(classifier.predict_proba(x)[:, place].mean())
    wanted = dense(model._with_genes(towards).X)
    return lambda x: -float(energy_distance(x.astype(np.float64), wanted.astype(np.float64)))


def _known(
    model: PerturbationModel, cells: AnnData | None, measure: Measure, *, is_linear: bool
) -> tuple[ObservedMeans, Seen]:
    """Measured means, and the score of the measured controls of a group, or cells of a condition, by its name."""
    design = model.design
    if cells is None:
        if not is_linear or model._observed_means is None:
            raise ValueError("towards is a class or a population, which needs measured control cells; pass cells=")
        own = model._observed_means
        rows = dict(zip(own.groups, own.control, strict=True)) | dict(zip(own.conditions, own.mean, strict=True))
        return own, cache(lambda name: measure(rows[name][None]))
    own_cells = model._with_genes(cells)
    is_control = design.is_control(own_cells.obs)
    names = np.where(is_control, design.groups(own_cells.obs), design.names(own_cells.obs))
    observed = ObservedMeans.of(CellDataset(own_cells, design))
    return observed, cache(lambda name: measure(dense(own_cells[names == name].X)))


def _changes(
    model: PerturbationModel,
    table: pd.DataFrame,
    measure: Measure,
    seen: Seen,
    observed: ObservedMeans,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Change of the score (c,) in every condition, and the length of its effect on all genes (c,)."""
    design = model.design
    predicted = model.predict(table, **options)
    names, groups = design.names(table), design.groups(table)
    own = design.names(predicted.obs).to_numpy()
    control, _ = observed.of_control(design, table)
    changes, magnitudes = np.empty((2, len(table)))
    for i, (name, group) in enumerate(zip(names, groups, strict=True)):
        x = dense(predicted.X[own == name])
        changes[i] = measure(x) - seen(group)
        magnitudes[i] = np.linalg.norm(x.mean(axis=0, dtype=np.float64) - control[i])
    return changes, magnitudes


def _measured_changes(design: Design, table: pd.DataFrame, seen: Seen) -> np.ndarray:
    """Change of the score (c,) that was measured in every condition."""
    pairs = zip(design.names(table), design.groups(table), strict=True)
    return np.array([seen(name) - seen(group) for name, group in pairs])


def _mean_responses(design: Design, table: pd.DataFrame, observed: ObservedMeans, seen: Seen) -> np.ndarray:
    """Mean change (c,) that was measured under the perturbation in other groups; NaN where none was."""
    known = as_table(list(observed.conditions), design)
    groups = design.groups(known).to_numpy()
    changes = _measured_changes(design, known, seen)
    means = np.full(len(table), np.nan)
    for i, (label, group) in enumerate(zip(table[design.perturbation], design.groups(table), strict=True)):
        others = (known[design.perturbation] == label).to_numpy() & (groups != group)
        if others.any():
            means[i] = changes[others].mean()
    return means


def _calibrated(changes: np.ndarray, errors: np.ndarray, level: float) -> tuple[float, np.ndarray]:
    """Half-width of intervals and p-values (c,) of changes, from the errors on conditions whose change is known."""
    n = len(errors)
    place = min(int(np.ceil(level * (n + 1))), n)
    half = float(np.sort(np.abs(errors))[place - 1])
    scale = max(float(np.sqrt(np.square(errors).mean())), 1e-12)
    return half, stats.t.sf(changes / scale, df=n)

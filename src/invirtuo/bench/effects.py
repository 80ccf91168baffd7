"""Predicted effects of perturbations as a table, with intervals, and the effects that were seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.cells.checks import EFFECT_COLUMNS
from invirtuo.cells.dataset import CellDataset
from invirtuo.errors import preview
from invirtuo.verbs.effects import bounds
from invirtuo.verbs.observed import ObservedMeans
from invirtuo.verbs.predict import PerturbationModel

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["effects", "effects_of", "tabulate"]


def effects(
    models: PerturbationModel | Sequence[PerturbationModel],
    adata: AnnData,
    conditions: pd.DataFrame | str = "test",
    *,
    level: float | None = 0.9,
    calibration: pd.DataFrame | str = "val",
    n_cells: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Difference of means to the control cells of the same covariates, and how far the truth may lie from it.

    `PerturbationModel.predict(effect_level=)` gives intervals of one model beside its cells. Here several models
    are taken together, whose spread counts in the intervals, and calibration conditions may be chosen
    (:mod:`invirtuo.verbs.effects`). Intervals hold for new conditions as far as these are like the calibration
    conditions; with one or two of those, take them as a rough size of the error.

    Parameters
    ----------
    models
        One fitted model, or several of the same kind fitted with different seeds, whose mean is taken.
    adata
        Real cells in the models' data space, with control cells of every covariate group that is asked for, and the
        cells of the calibration conditions.
    conditions
        As for `predict`.
    level
        Share of genes that intervals shall cover; None gives no intervals.
    calibration
        Conditions with cells in `adata` that no model was fitted to: "val", "test", or a table.
    n_cells, seed
        Cells drawn for each condition by each model, and the seed.

    Returns
    -------
    As :func:`tabulate` gives it.

    Raises
    ------
    ValueError
        If the models differ in genes or Design, a group has no control cells, or no calibration conditions have cells.
    """
    models = [models] if not isinstance(models, Sequence) else list(models)
    if others := [model.name for model in models if not isinstance(model, PerturbationModel)]:
        raise ValueError(f"effects are those of models that predict log expression; {preview(others)} does not")
    design, genes = models[0].design, models[0].genes
    if any(model.genes != genes or model.design.to_json() != design.to_json() for model in models):
        raise ValueError("the models have different genes or Designs; give models fitted to the same data")
    if level is not None and not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, or None for no intervals")

    # real cells to which effects are differences; missing controls are refused before anything is drawn
    observed = ObservedMeans.of(CellDataset(adata[:, genes], design, signed=models[0].signed))
    wanted = _table(models[0], conditions)
    observed.of_control(design, wanted)

    # intervals come from conditions whose effects are known
    known = known_means = None
    if level is not None:
        known = _table(models[0], calibration)
        known = known[design.names(known).isin(observed.conditions)]
        if known.empty:
            raise ValueError(
                "no calibration conditions have cells in the data; hold some out for validation when fitting, name "
                "others with calibration=, or pass level=None for effects without intervals"
            )
        known_means = _means(models, known, n_cells, seed)
    means = _means(models, wanted, n_cells, seed)
    effect, half = bounds(observed, design, wanted, means, known, known_means, level)
    return tabulate(design, genes, wanted, observed, effect, half)


def tabulate(
    design: Design,
    genes: Sequence[str],
    table: pd.DataFrame,
    seen: ObservedMeans,
    effect: np.ndarray,
    half: np.ndarray,
) -> pd.DataFrame:
    """Effects as a tidy table.

    Parameters
    ----------
    table
        The c conditions.
    seen
        Real cells.
    effect, half
        (c, g) each: effects, and half-widths of their intervals.

    Returns
    -------
    One row for each condition and gene: columns of the Design, `condition`, `gene`, `control` (mean of the control
    cells), `effect`, `low`, `high`, and `real`, the effect seen (NaN for conditions without cells).
    """
    n_genes = len(genes)
    if taken := EFFECT_COLUMNS & set(design.columns) - {design.perturbation}:
        raise ValueError(f"columns {preview(sorted(taken))} clash with columns of the table of effects; rename them")

    # a row for each condition and gene
    rows = table.loc[table.index.repeat(n_genes), design.columns].reset_index(drop=True)
    if design.perturbation in EFFECT_COLUMNS:
        rows = rows.rename(columns={design.perturbation: "perturbation"})
    rows["condition"] = np.repeat(design.names(table).to_numpy(), n_genes)
    rows["gene"] = np.tile(genes, len(table))

    control, _ = seen.of_control(design, table)
    real = seen.effect(design, table)
    numbers = {"control": control, "effect": effect, "low": effect - half, "high": effect + half, "real": real}
    return rows.assign(**{name: values.ravel() for name, values in numbers.items()})


def effects_of(predicted: AnnData, adata: AnnData, design: Design) -> pd.DataFrame:
    """Effects of predicted cells, with intervals as wide as `predict` gave them, beside those of real cells.

    Parameters
    ----------
    predicted
        Cells, and with ``effect_level`` the bounds of effects in varm.
    adata
        Real cells; covariate groups without control cells are left out.

    Returns
    -------
    As :func:`tabulate` gives it.
    """
    # conditions in the order of the cells, those that have control cells
    observed = ObservedMeans.of(CellDataset(adata, design))
    codes, _ = pd.factorize(design.names(predicted.obs))
    first = np.unique(codes, return_index=True)[1]
    has_controls = design.groups(predicted.obs.iloc[first]).isin(observed.groups).to_numpy()
    first = first[has_controls]
    table = predicted.obs.iloc[first][design.columns].reset_index(drop=True)
    own = codes[first]

    means = [np.asarray(predicted.X[codes == i].mean(axis=0)).ravel() for i in own]
    control, _ = observed.of_control(design, table)
    effect = np.reshape(means, (len(own), predicted.n_vars)) - control
    half = np.full_like(effect, np.nan)
    if "effect" in predicted.varm:
        half = (predicted.varm["effect"] - predicted.varm["effect_low"]).T[own]
    return tabulate(design, list(predicted.var_names), table, observed, effect, half)


def _means(models: Sequence[PerturbationModel], table: pd.DataFrame, n_cells: int, seed: int) -> np.ndarray:
    """(m, c, g) means of the cells that each model draws."""
    means = []
    for model in models:
        cells = model.predict(table, n_cells, seed=seed).X.reshape(len(table), n_cells, -1)
        means.append(cells.mean(axis=1, dtype=np.float64))
    return np.stack(means)


def _table(model: PerturbationModel, conditions: pd.DataFrame | str) -> pd.DataFrame:
    """The conditions as `predict` takes them, without control conditions."""
    table = model.wanted(conditions)
    return table[~model.design.is_control(table)].reset_index(drop=True)

"""Predicted effects of perturbations, gene by gene, with intervals calibrated on conditions that were held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.checks import some

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design
    from invirtuo.model import Model

__all__ = ["effects"]

VARIES = 0.1  # share of the standard deviation of a gene among control cells that counts as an error of its effect
GROWS = 0.3  # share of the predicted effect that does: errors grow with effects


def effects(
    models: Model | Sequence[Model],
    adata: AnnData,
    conditions: pd.DataFrame | str = "test",
    *,
    level: float | None = 0.9,
    calibration: pd.DataFrame | str = "val",
    n_cells: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Difference of means to the control cells of the same covariates, and how far the truth may lie from it.

    Intervals are conformal: their half-width is q s, where s joins the spread of the models' predictions, a tenth of
    the standard deviation of the gene among control cells and three tenths of the predicted effect, and q is the
    smallest factor that covers the wanted share of all genes of the calibration conditions. They hold for new
    conditions as far as these are like the calibration conditions; with one or two of those, take them as a rough size
    of the error.

    Parameters
    ----------
    models
        One fitted model, or several of the same kind fitted with different seeds, whose mean is taken.
    adata
        Real cells in the models' data space, with control cells of every covariate group that is asked for, and the
        cells of the calibration conditions.
    conditions
        As for `Model.predict`.
    level
        Share of genes that intervals shall cover; None gives no intervals.
    calibration
        Conditions with cells in `adata` that no model was fitted to: "val", "test", or a table.
    n_cells, seed
        Cells drawn for each condition by each model, and the seed.

    Returns
    -------
    One row for each condition and gene: columns of the Design, `condition`, `gene`, `control` (mean of the control
    cells), `effect`, `low`, `high`, and `real`, the effect seen in `adata` (NaN where it has no such cells).

    Raises
    ------
    ValueError
        If the models differ in genes or Design, a group has no control cells, or no calibration conditions have cells.

    References
    ----------
    Split conformal prediction with scaled residuals: Lei et al. 2018, arXiv:1604.04173, section 5.2.
    """
    models = [models] if not isinstance(models, Sequence) else list(models)
    design, genes = models[0].design, models[0].genes
    if any(model.genes != genes or model.design.to_json() != design.to_json() for model in models):
        raise ValueError("the models have different genes or Designs; give models fitted to the same data")
    if level is not None and not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, or None for no intervals")
    cells = _Real(adata[:, genes], design)
    wanted = _table(models[0], conditions)
    centre, spread = _predicted(models, wanted, cells, n_cells, seed)
    factor = math.nan
    if level is not None:
        known = _table(models[0], calibration)
        known = known[design.names(known).isin(cells.means.index)]
        if known.empty:
            raise ValueError(
                "no calibration conditions have cells in the data; hold some out for validation when fitting, name "
                "others with calibration=, or pass level=None for effects without intervals"
            )
        guess, scale = _predicted(models, known, cells, n_cells, seed)
        factor = _factor(np.abs(cells.effect(known) - guess), scale, level)
    return _tidy(wanted, design, genes, cells, centre, factor * spread)


class _Real:
    """Means of the real cells: of every condition, and of the control cells of every covariate group."""

    def __init__(self, adata: AnnData, design: Design):
        self.design = design
        names, groups = design.names(adata.obs), design.groups(adata.obs)
        control = design.is_control(adata.obs)
        x = adata.X
        self.means = pd.DataFrame({name: _moments(x[rows])[0] for name, rows in names.groupby(names).indices.items()}).T
        own = groups[control]
        places = np.flatnonzero(control)
        moments = {name: _moments(x[places[rows]]) for name, rows in own.groupby(own).indices.items()}
        self.control = {name: mean for name, (mean, _) in moments.items()}
        self.sd = {name: sd for name, (_, sd) in moments.items()}

    def of_control(self, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (c, g) of the control cells of each condition."""
        groups = self.design.groups(table)
        if missing := sorted(set(groups) - set(self.control)):
            raise ValueError(f"the data hold no control cells of {some(missing)}; effects are differences to them")
        return np.stack([self.control[name] for name in groups]), np.stack([self.sd[name] for name in groups])

    def effect(self, table: pd.DataFrame) -> np.ndarray:
        """(c, g), NaN for conditions without cells."""
        return self.means.reindex(self.design.names(table)).to_numpy(np.float64) - self.of_control(table)[0]


def _predicted(
    models: Sequence[Model], table: pd.DataFrame, cells: _Real, n_cells: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the models' effects, and the scale of their errors, (c, g) each."""
    control, sd = cells.of_control(table)
    names = cells.design.names(table)
    drawn = []
    for model in models:
        predicted = model.predict(table, n_cells, seed=seed)
        rows = cells.design.names(predicted.obs).to_numpy()
        drawn.append(np.stack([_moments(predicted.X[rows == name])[0] for name in names]) - control)
    spread = np.std(drawn, axis=0, ddof=1) if len(drawn) > 1 else 0.0
    effect = np.mean(drawn, axis=0)
    return effect, np.sqrt(spread**2 + (VARIES * sd) ** 2 + (GROWS * effect) ** 2)


def _factor(error: np.ndarray, scale: np.ndarray, level: float) -> float:
    """Smallest factor by which the scale covers a share of the errors; genes that cannot vary are left out."""
    ratio = np.sort((error / np.where(scale > 0, scale, np.nan)).ravel())
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio):
        return 0.0
    return float(ratio[min(math.ceil(level * (len(ratio) + 1)), len(ratio)) - 1])


def _tidy(table: pd.DataFrame, design: Design, genes, cells: _Real, effect: np.ndarray, half: np.ndarray):
    n_genes = len(genes)
    rows = table.loc[table.index.repeat(n_genes), design.columns].reset_index(drop=True)
    front = {"condition": np.repeat(design.names(table).to_numpy(), n_genes), "gene": np.tile(genes, len(table))}
    numbers = {
        "control": cells.of_control(table)[0],
        "effect": effect,
        "low": effect - half,
        "high": effect + half,
        "real": cells.effect(table),
    }
    return rows.assign(**front, **{name: values.ravel() for name, values in numbers.items()})


def _table(model: Model, conditions: pd.DataFrame | str) -> pd.DataFrame:
    """The conditions as a table, each once, without control conditions."""
    if isinstance(conditions, str):
        held_out = model.card.get("held_out", {})
        if conditions not in held_out:
            raise ValueError(f"conditions is {conditions!r}; expected a DataFrame or one of {', '.join(held_out)}")
        conditions = pd.DataFrame(held_out[conditions], columns=model.design.columns)
    table = conditions.drop_duplicates().reset_index(drop=True)
    return table[~model.design.is_control(table)].reset_index(drop=True)


def _moments(x) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (g,) over cells."""
    x = np.asarray(x.todense() if hasattr(x, "todense") else x, dtype=np.float64)
    return x.mean(axis=0), x.std(axis=0)

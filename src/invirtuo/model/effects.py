"""Effects of perturbations, gene by gene, and how far the truth may lie from a prediction of them.

Intervals are split conformal: half-widths are q s, where s joins what is known of the size of an error (the spread of
several models' predictions, a share of the gene's standard deviation among control cells, a share of the predicted
effect), and q is the smallest factor that covers the wanted share of all genes of calibration conditions, which no
model was fitted to. Scaled residuals: Lei et al. 2018, arXiv:1604.04173, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd

from invirtuo.checks import some
from invirtuo.dataset import CellDataset
from invirtuo.model.drawing import Request, drawn, means_of

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design
    from invirtuo.model.base import Model

__all__ = ["Calibration", "Pseudobulks", "bounds"]

CALIBRATION_CELLS = 1000  # most cells that are drawn of a calibration condition
VARIES = 0.1  # share of the standard deviation of a gene among control cells that counts as an error of its effect
GROWS = 0.3  # share of the predicted effect that does: errors grow with effects


@dataclass(frozen=True)
class Pseudobulks:
    """Means of real cells: of the control cells of every covariate group, with their spread, and of conditions.

    `control` (k, g), `sd` (k, g) have a row for each of `groups`; `mean` (c, g) one for each of `conditions` (names).
    """

    groups: tuple[str, ...]
    control: np.ndarray
    sd: np.ndarray
    conditions: tuple[str, ...]
    mean: np.ndarray

    @classmethod
    def of(cls, dataset: CellDataset, rows: np.ndarray | None = None, n_genes: int | None = None) -> Self:
        """From all cells of a dataset, or some rows (rising), and its first genes."""
        design = dataset.design
        table, mean, variance, n_cells = dataset.pseudobulk(np.arange(len(dataset.obs)) if rows is None else rows)
        mean, variance = mean[:, :n_genes], variance[:, :n_genes]
        control, groups = design.is_control(table), design.groups(table).to_numpy(dtype=str)
        names = tuple(np.unique(groups[control]))
        pooled = [_pooled(mean[own], variance[own], n_cells[own]) for own in (control & (groups == g) for g in names)]
        return cls(
            names,
            np.array([m for m, _ in pooled], np.float32).reshape(-1, mean.shape[1]),
            np.array([v**0.5 for _, v in pooled], np.float32).reshape(-1, mean.shape[1]),
            tuple(design.names(table)[~control]),
            mean[~control].astype(np.float32),
        )

    def state(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        names = {"groups": np.array(self.groups, dtype=str), "conditions": np.array(self.conditions, dtype=str)}
        return {**names, "control": self.control, "sd": self.sd, "mean": self.mean}

    @classmethod
    def load(cls, state: Mapping[str, np.ndarray]) -> Self:
        """From what :meth:`state` gave."""
        groups, conditions = (tuple(state[name].tolist()) for name in ("groups", "conditions"))
        return cls(groups, state["control"], state["sd"], conditions, state["mean"])

    def with_groups(self, other: Self) -> Self:
        """The same, and the groups of others that are new."""
        new = [i for i, group in enumerate(other.groups) if group not in self.groups]
        return type(self)(
            (*self.groups, *(other.groups[i] for i in new)),
            np.concatenate([self.control, other.control[new]]),
            np.concatenate([self.sd, other.sd[new]]),
            self.conditions,
            self.mean,
        )

    def of_control(self, design: Design, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (c, g) of the control cells of each condition of a table.

        Raises
        ------
        ValueError
            If a group has no control cells.
        """
        groups = design.groups(table)
        if missing := sorted(set(groups) - set(self.groups)):
            raise ValueError(
                f"there are no control cells of {some(missing)}, and effects are differences to them; pass such cells"
            )
        rows = [self.groups.index(group) for group in groups]
        return self.control[rows].astype(np.float64), self.sd[rows].astype(np.float64)

    def effect(self, design: Design, table: pd.DataFrame) -> np.ndarray:
        """(c, g) difference of a condition's mean to its control cells'; NaN for conditions without cells."""
        means = pd.DataFrame(self.mean.astype(np.float64), index=pd.Index(self.conditions, dtype=object))
        return means.reindex(design.names(table)).to_numpy() - self.of_control(design, table)[0]


class Calibration:
    """How a fitted model's intervals are made: from the conditions that its split held out for validation.

    Parameters
    ----------
    model
        A fitted model.
    level
        Share of genes that intervals cover.
    controls
        Further control cells, of groups that the fit did not see.

    Raises
    ------
    ValueError
        If the fit held out no conditions for validation, or the level is no share.
    """

    def __init__(self, model: Model, level: float, controls: AnnData | None = None):
        if not 0 < level < 1:
            raise ValueError(f"effect_level is {level}; expected a share between 0 and 1, or None for no intervals")
        known, seen, design = model.card["held_out"]["val"], model._pseudobulks, model.design
        if seen is None or not known:
            raise ValueError(
                "intervals of effects are calibrated on conditions that the fit held out for validation, and there are "
                'none; fit with a split that has whole conditions as "val", or pass effect_level=None'
            )
        if controls is not None:
            cells = model._with_genes(controls[design.is_control(controls.obs)])
            seen = seen.with_groups(Pseudobulks.of(CellDataset(cells, design)))
        self.model, self.seen, self.level = model, seen, level
        self.known = pd.DataFrame(known, columns=design.columns)

    def intervals(self, request: Request, means: np.ndarray) -> dict[str, np.ndarray]:
        """Effects on every gene and their bounds, (g, c) each.

        Parameters
        ----------
        request, means
            What was drawn, and the means (c, g) of its cells; calibration conditions are drawn as the request was.
        """
        model, known = self.model, self.known
        asked = replace(request, table=known, n_cells=min(request.n_cells, CALIBRATION_CELLS))
        known_means = np.empty((len(known), means.shape[1]))
        for _ in means_of(drawn(model, asked, "local", None), known_means):
            pass
        drawn_means = (means[None], known, known_means[None])
        effect, half = bounds(self.seen, model.design, request.table, *drawn_means, self.level)
        return {"effect": effect.T, "effect_low": (effect - half).T, "effect_high": (effect + half).T}


def bounds(
    observed: Pseudobulks,
    design: Design,
    table: pd.DataFrame,
    means: np.ndarray,
    known: pd.DataFrame | None = None,
    known_means: np.ndarray | None = None,
    level: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Effects of conditions as models predict them, and half-widths of their intervals.

    Parameters
    ----------
    observed
        Control cells of all groups, and the cells of the calibration conditions.
    table, means
        The c conditions, and the means (m, c, g) of the cells that each of m models drew for them.
    known, known_means
        The same of the calibration conditions.
    level
        Share of the genes of calibration conditions that intervals cover; None gives no intervals.

    Returns
    -------
    (c, g) and (c, g), NaN without a level.
    """
    effect, scale = _estimate(observed, design, table, means)
    if level is None:
        return effect, np.full_like(effect, np.nan)
    guess, known_scale = _estimate(observed, design, known, known_means)
    return effect, _factor(np.abs(observed.effect(design, known) - guess), known_scale, level) * scale


def _estimate(observed: Pseudobulks, design: Design, table, means) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the models' effects, and the scale of their errors, (c, g) each."""
    control, sd = observed.of_control(design, table)
    spread = np.std(means, axis=0, ddof=1) if len(means) > 1 else 0.0
    effect = np.mean(means, axis=0) - control
    return effect, np.sqrt(spread**2 + (VARIES * sd) ** 2 + (GROWS * effect) ** 2)


def _factor(error: np.ndarray, scale: np.ndarray, level: float) -> float:
    """Smallest factor by which the scale covers a share of the errors; genes that cannot vary are left out."""
    ratio = np.sort((error / np.where(scale > 0, scale, np.nan)).ravel())
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio):
        return 0.0
    return float(ratio[min(math.ceil(level * (len(ratio) + 1)), len(ratio)) - 1])


def _pooled(mean: np.ndarray, variance: np.ndarray, n_cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (g,) of the cells of several conditions together."""
    weight = (n_cells / n_cells.sum())[:, None]
    centre = (weight * mean).sum(0)
    return centre, (weight * (variance + (mean - centre) ** 2)).sum(0)

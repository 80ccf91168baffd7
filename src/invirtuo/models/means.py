"""What everybody must beat: no change, the perturbation mean and the context mean.

Formulas: STATE paper, section 5.7.5 (perturbation mean, context mean).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from invirtuo.batch import Batch
from invirtuo.dataset import CellDataset
from invirtuo.model import Model, Preset, SampleConfig

__all__ = ["ContextMean", "NoChange", "PerturbationMean"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoChangeConfig:
    """No choices."""


@dataclass(frozen=True)
class PerturbationMeanConfig:
    """How the effect is put on cells."""

    mode: str = "profile"  # "profile": one mean vector for all cells (the paper); "shift_cells": shift control cells

    def __post_init__(self) -> None:
        """Refuse unknown modes."""
        if self.mode not in ("profile", "shift_cells"):
            raise ValueError(f"mode is {self.mode!r}; expected profile or shift_cells")


@dataclass(frozen=True)
class ContextMeanConfig:
    """No choices."""


class NoChange(Model):
    """Control cells of the same covariates, as they are."""

    name = "no_change"
    Config = NoChangeConfig
    SEARCH = {}
    needs_source = True

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """The control cells (n, g)."""
        return batch.source


class _Pseudobulk(Model):
    """Keeps the mean of every training condition."""

    SEARCH = {}
    needs_source = True

    def build(self) -> None:
        g, p = len(self.genes), len(self.design.perturbations)
        self.register_buffer("means", torch.zeros(0, g))
        self.register_buffer("perturbations", torch.zeros(0, p))
        self.register_buffer("covariates", torch.zeros(0, len(self.design.covariates), dtype=torch.int64))
        self.register_buffer("n_cells", torch.zeros(0, dtype=torch.int64))

    def prepare(self, dataset: CellDataset) -> None:
        table, mean, _, n_cells = dataset.pseudobulk("train")
        condition = self.design.encode(table)
        self.means, self.n_cells = torch.from_numpy(mean).float(), torch.from_numpy(n_cells)
        self.perturbations, self.covariates = condition.perturbation, condition.groups

    def _control_mean(self, covariates: Tensor) -> Tensor | None:
        """(g,), control mean of one covariate group, or None."""
        rows = (self.covariates == covariates).all(1) & (self.perturbations == 0).all(1)
        return _weighted(self.means[rows], self.n_cells[rows]) if rows.any() else None


class PerturbationMean(_Pseudobulk):
    """Control mean of the covariates plus the mean effect of the perturbation over the training contexts.

    delta_{c,p} = mean(x | c, p) - mean(x | c, control); delta_p is the plain mean over the contexts that hold p. A
    combination that was never seen gets the sum of the effects of its parts.

    References
    ----------
    STATE, section 5.7.5.
    """

    name = "perturbation_mean"
    Config = PerturbationMeanConfig
    PRESETS = {
        "profile": Preset(PerturbationMeanConfig("profile"), source="STATE, section 5.7.5"),
        "shift-cells": Preset(PerturbationMeanConfig("shift_cells"), source="keeps the spread of the control cells"),
    }

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Shifted control cells, or the control mean plus the effect, (n, g)."""
        distinct, which = batch.condition.perturbation.unique(dim=0, return_inverse=True)
        effect = torch.stack([self.effect(row) for row in distinct])
        if self.config.mode == "shift_cells":
            return (batch.source + effect[which]).clamp_min(0)
        control = self._control_mean(batch.condition.groups[0])
        mean = batch.source.mean(0) if control is None else control
        return mean + effect[which]

    def effect(self, multi_hot: Tensor) -> Tensor:
        """(g,), mean effect of one perturbation (p,) multi-hot."""
        if not multi_hot.any():
            return torch.zeros_like(self.means[0])
        rows = (self.perturbations == multi_hot).all(1)
        contexts = dict.fromkeys(map(tuple, self.covariates[rows].tolist()))
        deltas = []
        for covariates in (self.covariates.new_tensor(context) for context in contexts):
            own = rows & (self.covariates == covariates).all(1)  # A+B, B+A and all times are one perturbation
            if (control := self._control_mean(covariates)) is not None:
                deltas.append(_weighted(self.means[own], self.n_cells[own]) - control)
        if deltas:
            return torch.stack(deltas).mean(0)
        parts = torch.nonzero(multi_hot).flatten()
        if len(parts) == 1:
            raise ValueError(
                f"perturbation {self.design.perturbations[int(parts)]!r} never occurs alone in training, beside "
                "control cells of its covariates; its mean effect is not defined"
            )
        logger.info("combination not seen in training: the effects of its parts are added")
        single = torch.eye(len(multi_hot)).to(multi_hot) * multi_hot
        return torch.stack([self.effect(single[i]) for i in parts]).sum(0)


class ContextMean(_Pseudobulk):
    """Mean of all perturbed training cells of the same covariates; control cells stay as they are.

    Covariates without perturbed training cells fall back to their control mean.

    References
    ----------
    STATE, section 5.7.5.
    """

    name = "context_mean"
    Config = ContextMeanConfig

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """The mean for every perturbed cell, the source for every control cell, (n, g)."""
        covariates = batch.condition.groups
        rows = (self.covariates == covariates[0]).all(1) & (self.perturbations != 0).any(1)
        if rows.any():
            mean = _weighted(self.means[rows], self.n_cells[rows])
        else:
            logger.info("no perturbed training cells of these covariates: the context mean is their control mean")
            control = self._control_mean(covariates[0])
            mean = batch.source.mean(0) if control is None else control
        return torch.where(batch.condition.is_control[:, None], batch.source, mean)


def _weighted(means: Tensor, n_cells: Tensor) -> Tensor:
    weight = n_cells.to(means)[:, None]
    return (means * weight).sum(0) / weight.sum()

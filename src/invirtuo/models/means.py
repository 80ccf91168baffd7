"""What everybody must beat: no change, the perturbation mean, the context mean, and ridge regression on pseudobulks.

Formulas: STATE paper, section 5.7.5 (perturbation mean, context mean, equations 40-44 of the ridge).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from invirtuo.batch import Batch
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.pseudobulk import Pseudobulk, weighted_mean
from invirtuo.nn.moved import moved
from invirtuo.settings import Settings, setting
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import SampleConfig

__all__ = ["ContextMean", "FoldChange", "MagnitudeOnly", "NoChange", "PerturbationMean", "Ridge"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoChangeConfig(Settings):
    """No choices."""


@dataclass(frozen=True)
class PerturbationMeanConfig(Settings):
    """How the effect is put on cells."""

    mode: Literal["profile", "shift_cells", "move_cells"] = setting(
        "profile",
        'how the effect is put on cells: one mean "profile" for all (the paper), added to control cells '
        '("shift_cells"), or control cells are moved to the new mean and keep their zeros ("move_cells")',
    )


@dataclass(frozen=True)
class FoldChangeConfig(Settings):
    """How far fold changes are trusted."""

    pseudocount: float = setting(0.01, "added to both mean expressions (counts per 10 000) of a fold change", gt=0)


@dataclass(frozen=True)
class ContextMeanConfig(Settings):
    """No choices."""


@dataclass(frozen=True)
class RidgeConfig(Settings):
    """What is regressed on what, and how the effect is put on cells."""

    penalty: float = setting(0.1, "weight lambda of the ridge penalty", gt=0)
    n_components: int = setting(10, "principal directions of the training pseudobulks that serve as gene vectors", ge=1)
    gene_vectors: tuple[tuple[float, ...], ...] = setting((), "a row of own numbers for each gene instead, in order")
    center: bool = setting(True, "regress what differs from the mean effect b, and add b; False regresses all of it")
    solver: Literal["two-sided", "exact"] = setting(
        "two-sided", '"two-sided" is equation 43, "exact" the minimiser of equation 42'
    )
    kernel: Literal["linear", "rbf", "additive"] = setting(
        "linear", '"linear" is the paper; "rbf" and "additive" are kernel ridge that knows the context'
    )
    mode: Literal["profile", "shift_cells", "move_cells"] = setting(
        "profile", "how the effect is put on cells, as in the perturbation mean"
    )
    unseen: Literal["raise", "mean", "zero"] = setting(
        "raise", 'perturbations never trained on: an error, the "mean" effect, or "zero" effect'
    )
    add_mean: bool = setting(
        False, "with center=False: add the mean effect b all the same, equations 43 and 44 to the letter"
    )


class NoChange(PerturbationModel):
    """Control cells of the same covariates, as they are."""

    name = "no_change"
    Config = NoChangeConfig
    SEARCH = {}
    needs_source = True
    keeps_zeros = True
    groups_by_controls = True
    any_target = True

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """The control cells (n, g)."""
        return batch.source


class _ConditionMeans(PerturbationModel):
    """Keeps the mean of every training condition."""

    SEARCH = {}
    needs_source = True

    def build(self) -> None:
        self.mode = getattr(self.config, "mode", "")
        self.deterministic = self.mode == "profile"
        self.keeps_zeros = self.keeps_zeros or self.mode == "move_cells"
        if self.mode == "move_cells":
            self.register_buffer("smallest", torch.zeros(()))  # value above 0 in training
        g, p = len(self.genes), len(self.design.perturbations)
        self.register_buffer("means", torch.zeros(0, g))
        self.register_buffer("perturbations", torch.zeros(0, p))
        self.register_buffer("covariates", torch.zeros(0, len(self.design.covariates), dtype=torch.int64))
        self.register_buffer("n_cells", torch.zeros(0, dtype=torch.int64))

    def prepare(self, dataset: CellDataset) -> None:
        self._keep(dataset, dataset.pseudobulk("train"))

    def _on_cells(self, batch: Batch, effect: Tensor, generator: torch.Generator) -> Tensor:
        """Effects (n, g) of one condition put on its control cells, or on their mean, as the mode says."""
        if self.mode == "shift_cells":
            return (batch.source + effect).clamp_min(0)
        if self.mode == "move_cells":
            return moved(batch.source, effect[0], float(self.smallest) / 2, generator)
        control = self._control_mean(batch.condition.groups[0])
        return (batch.source.mean(0) if control is None else control) + effect

    def _keep(self, dataset: CellDataset, training: Pseudobulk) -> None:
        if self.mode == "move_cells":
            self.smallest = torch.tensor(dataset.extremes()[0])
        self.means, self.n_cells = training.mean.float(), training.n_cells
        self.perturbations, self.covariates = training.condition.perturbation, training.condition.groups

    def _control_mean(self, covariates: Tensor) -> Tensor | None:
        """(g,), control mean of one covariate group, or None."""
        rows = (self.covariates == covariates).all(1) & (self.perturbations == 0).all(1)
        return weighted_mean(self.means[rows], self.n_cells[rows]) if rows.any() else None


class _MeanEffects(_ConditionMeans):
    """The mean effect of each perturbation over the contexts that hold it."""

    groups_by_controls = True

    def effect(self, multi_hot: Tensor) -> Tensor:
        """(g,), mean effect of one perturbation (p,) multi-hot."""
        if not multi_hot.any():
            return torch.zeros_like(self.means[0])

        # the mean over the contexts that trained on it, each beside its own control
        rows = (self.perturbations == multi_hot).all(1)
        contexts = dict.fromkeys(map(tuple, self.covariates[rows].tolist()))
        deltas = []
        for context in contexts:
            covariates = self.covariates.new_tensor(context)
            own = rows & (self.covariates == covariates).all(1)  # A+B, B+A and all times are one perturbation
            if (control := self._control_mean(covariates)) is not None:
                deltas.append(self._change(weighted_mean(self.means[own], self.n_cells[own]), control))
        if deltas:
            return torch.stack(deltas).mean(0)

        # a combination that was never seen
        members = torch.nonzero(multi_hot).flatten()
        if len(members) == 1:
            raise ValueError(
                f"perturbation {self.design.perturbations[int(members)]!r} never occurs alone in training, beside "
                "control cells of its covariates; its mean effect is not defined"
            )
        logger.info("combination not seen in training: the effects of its parts are added")
        single = torch.eye(len(multi_hot)).to(multi_hot) * multi_hot
        effects = [self.effect(single[i]) for i in members]
        return torch.stack(effects).sum(0)

    def _change(self, mean: Tensor, control: Tensor) -> Tensor:
        """(g,) effect of a mean against its control mean."""
        return mean - control


class PerturbationMean(_MeanEffects):
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
        "move-cells": Preset(PerturbationMeanConfig("move_cells"), source="keeps their zeros too"),
    }

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Shifted control cells, or the control mean plus the effect, (n, g)."""
        distinct, which = batch.condition.perturbation.unique(dim=0, return_inverse=True)
        effect = torch.stack([self.effect(row) for row in distinct])
        return self._on_cells(batch, effect[which], generator)


class MagnitudeOnly(PerturbationMean):
    """The mean response to all training perturbations, as strong as the response to the wanted one.

    With m the plain mean of the effects and d that of a perturbation, the effect is ``(d . m / m . m) m``: what can be
    known of a perturbation without knowing what is special about it.

    References
    ----------
    Ours; a ranking by strength is what hits are held against in PerturbHD.
    """

    name = "magnitude_only"

    def _keep(self, dataset: CellDataset, training: Pseudobulk) -> None:
        super()._keep(dataset, training)
        self.__dict__.pop("_everybody", None)  # of an earlier fit

    @cached_property
    def _everybody(self) -> Tensor:
        """(g,), plain mean of the effects of all training perturbations."""
        rows = self.perturbations[(self.perturbations != 0).any(1)].unique(dim=0)
        return torch.stack([super(MagnitudeOnly, self).effect(row) for row in rows]).mean(0)

    def effect(self, multi_hot: Tensor) -> Tensor:
        """(g,), the mean response at the strength of one perturbation (p,) multi-hot."""
        own = super().effect(multi_hot)
        everybody = self._everybody.to(own)
        return everybody * (own * everybody).sum() / everybody.square().sum().clamp_min(1e-12)


class FoldChange(_MeanEffects):
    """Control cells times the fold change of mean expression, logarithms undone: zeros stay zeros.

    The logarithm of the fold change is the plain mean over the training contexts that hold the perturbation. A
    combination that was never seen gets the product of the fold changes of its parts.

    References
    ----------
    Ours; fold changes of pseudobulks put on control counts are a usual entry of the Virtual Cell Challenge 2026.
    """

    name = "fold_change"
    Config = FoldChangeConfig
    keeps_zeros = True

    def prepare(self, dataset: CellDataset) -> None:
        self._keep(dataset, dataset.pseudobulk("train", linear=True))

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Control cells with every value multiplied, log1p again, (n, g)."""
        change = self.effect(batch.condition.perturbation[0])
        return torch.log1p(torch.expm1(batch.source) * torch.exp(change))

    def _change(self, mean: Tensor, control: Tensor) -> Tensor:
        return torch.log((mean + self.config.pseudocount) / (control + self.config.pseudocount))


class ContextMean(_ConditionMeans):
    """Mean of all perturbed training cells of the same covariates; control cells stay as they are.

    Covariates without perturbed training cells fall back to their control mean.

    References
    ----------
    STATE, section 5.7.5.
    """

    name = "context_mean"
    Config = ContextMeanConfig
    any_target = True

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """The mean for every perturbed cell, the source for every control cell, (n, g)."""
        covariates = batch.condition.groups
        rows = (self.covariates == covariates[0]).all(1) & (self.perturbations != 0).any(1)
        if rows.any():
            mean = weighted_mean(self.means[rows], self.n_cells[rows])
        else:
            logger.info("no perturbed training cells of these covariates: the context mean is their control mean")
            control = self._control_mean(covariates[0])
            mean = batch.source.mean(0) if control is None else control
        return torch.where(batch.condition.is_control[:, None], batch.source, mean)


class Ridge(_ConditionMeans):
    """Ridge regression of effects on what is known of perturbations, and, with a kernel, of contexts.

    A perturbation that was never trained on is an error without features; `unseen` gives it the mean effect or none,
    and a combination with it the effect of the known parts.

    Linear, as published: Y (g, P) holds the mean effect of each perturbation over its cells (each minus the control
    mean of its covariates), b the mean of its columns, G (g, d) vectors of genes, E (P, f) the features (or multi-hot)
    of the perturbations::

        K = (G^T G + lambda I)^-1 G^T (Y - b 1^T) E (E^T E + lambda I)^-1,  prediction = control mean + G K e + b

    Differs: equation 43 of the paper has Y in place of Y - b 1^T, unlike its equation 42, so that b counts twice in its
    equation 44, which shifts every control cell; the preset "literal" is both to the letter. Neither form is the
    minimiser of equation 42; `solver="exact"` is.

    Kernel ridge (ours): the effects of all pairs of context and perturbation, regressed with the kernel
    ``k = k_e exp(-|control mean - control mean'|^2 / (2 s))``, s the median squared distance of contexts;
    ``k_e = exp(-|e - e'|^2 / 2)`` for "rbf", e . e' for "additive", where effects of a combination add up.

    References
    ----------
    STATE, section 5.7.5, equations 40-44.
    """

    name = "ridge"
    Config = RidgeConfig
    PRESETS = {
        "default": Preset(RidgeConfig(), source="STATE, equations 42-44"),
        "literal": Preset(
            RidgeConfig(center=False, mode="shift_cells", add_mean=True),
            source="STATE, equations 43 and 44 to the letter: b stays in what is regressed, and is added to it",
        ),
        "exact": Preset(RidgeConfig(solver="exact"), source="minimiser of STATE, equation 42"),
        "shift-cells": Preset(RidgeConfig(mode="shift_cells"), source="keeps the spread of the control cells"),
        "move-cells": Preset(RidgeConfig(mode="move_cells"), source="keeps their zeros too"),
        "kernel": Preset(RidgeConfig(kernel="rbf"), source="ours"),
        "kernel-move-cells": Preset(RidgeConfig(kernel="rbf", mode="move_cells"), source="ours, keeps zeros too"),
        "kernel-additive": Preset(RidgeConfig(kernel="additive", center=False), source="ours"),
    }
    SEARCH = {"penalty": (1e-3, 100.0), "n_components": (5, 50), "center": [True, False]}
    takes_features = True
    groups_by_controls = True

    def build(self) -> None:
        super().build()
        g, f, rows = len(self.genes), self.design.code_width, len(self.config.gene_vectors)
        if rows not in (0, g):
            raise ValueError(f"gene_vectors has {rows} rows; expected one for each of the {g} genes, in order")
        self.register_buffer("average", torch.zeros(g))  # mean effect
        self.register_buffer("offset", torch.zeros(g))  # b that is added: the mean effect, or 0
        self.register_buffer("slopes", torch.zeros(g, f))  # G K
        self.register_buffer("codes", torch.zeros(0, f))  # with a kernel: e of every effect,
        self.register_buffer("context", torch.zeros(0, dtype=torch.int64))  # row of its control mean in
        self.register_buffer("contexts", torch.zeros(0, g))
        self.register_buffer("dual", torch.zeros(0, g))  # its dual coefficients
        self.register_buffer("bandwidth", torch.ones(()))  # s

    def prepare(self, dataset: CellDataset) -> None:
        config, training = self.config, dataset.pseudobulk("train")
        self._keep(dataset, training)

        # Y, a column for each perturbation; with a kernel, for each in each context
        codes, effects, controls, n_cells = self._effects(training.condition.code)
        if config.kernel == "linear":
            codes, column = codes.unique(dim=0, return_inverse=True)
            means = []
            for i in range(len(codes)):
                own = column == i
                means.append(weighted_mean(effects[own], n_cells[own]))
            effects = torch.stack(means)
        self.average = effects.mean(0).float()
        self.offset = self.average * (config.center or config.add_mean)
        centred = effects - self.average.double() * config.center

        # equation 43
        if config.kernel == "linear":
            genes = self._gene_vectors()
            self.slopes = (genes @ _two_sided(genes, centred.T, codes, config)).float()
            return

        # kernel ridge
        contexts, self.context = controls.unique(dim=0, return_inverse=True)
        self.codes, self.contexts = codes.float(), contexts.float()
        distance = torch.pdist(contexts).square()
        self.bandwidth = distance.median().float() if len(distance) else torch.ones(())
        gram = self._kernel(codes, controls).double()
        gram.diagonal().add_(config.penalty)
        self.dual = torch.linalg.solve(gram, centred).float()

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Shifted control cells, or the control mean plus the effect, (n, g)."""
        condition = batch.condition
        control = self._control_mean(condition.groups[0])
        mean = batch.source.mean(0) if control is None else control
        with torch.autocast(mean.device.type, enabled=False):  # closed form: bf16 would only lose digits
            if self.config.kernel == "linear":
                effect = condition.code @ self.slopes.T + self.offset
            else:
                kernel = self._kernel(condition.code, mean.expand(len(batch), -1))
                effect = kernel @ self.dual + self.offset

        # perturbations that were never trained on, where there is nothing else to know them by
        if not self.design.features:
            trained = (self.perturbations != 0).any(0)
            is_unseen = ~(condition.perturbation[:, trained] != 0).any(1, keepdim=True)
            effect = torch.where(is_unseen, self.average * (self.config.unseen == "mean"), effect)
        effect = torch.where(condition.is_control[:, None], 0.0, effect)
        return self._on_cells(batch, effect, generator)

    @property
    def takes_unseen(self) -> bool:
        return self.config.unseen != "raise" or super().takes_unseen

    def _effects(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Code, effect, control mean and size of every perturbed condition with control cells, in float64."""
        rows, contexts = [], []
        for i in torch.nonzero((self.perturbations != 0).any(1)).flatten().tolist():
            if (control := self._control_mean(self.covariates[i])) is not None:
                rows.append(i)
                contexts.append(control.double())
        if not rows:
            raise ValueError("no perturbed training cells beside control cells of their covariates; ridge needs some")
        controls = torch.stack(contexts)
        return codes[rows].double(), self.means[rows].double() - controls, controls, self.n_cells[rows]

    def _gene_vectors(self) -> Tensor:
        """G (g, d): those of the Config, or principal directions of the training pseudobulks."""
        if self.config.gene_vectors:
            return torch.tensor(self.config.gene_vectors, dtype=torch.float64)
        centred = self.means.double() - self.means.double().mean(0)
        _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
        n = min(self.config.n_components, int((sizes > 1e-9 * sizes[0]).sum()))
        return directions[:n].T

    def _kernel(self, codes: Tensor, contexts: Tensor) -> Tensor:
        """Kernel (n, c) between n conditions and the training effects."""
        own_codes = self.codes.to(codes)
        distance = torch.cdist(contexts, self.contexts.to(contexts)).square()
        of_contexts = torch.exp(-distance / (2 * self.bandwidth))[:, self.context]
        if self.config.kernel == "additive":
            of_codes = codes @ own_codes.T
        else:
            of_codes = torch.exp(-torch.cdist(codes, own_codes).square() / 2)
        return of_codes.to(of_contexts) * of_contexts


def _two_sided(genes: Tensor, y: Tensor, codes: Tensor, config: RidgeConfig) -> Tensor:
    """K (d, f) of genes (g, d), effects y (g, P) and codes (P, f): equation 43, or the minimiser of equation 42."""
    left, right = genes.T @ genes, codes.T @ codes
    cross = genes.T @ y @ codes
    if config.solver == "exact":  # G^T G K E^T E + lambda K = G^T Y E, diagonal in both eigenbases
        a, u = torch.linalg.eigh(left)
        c, v = torch.linalg.eigh(right)
        rotated = (u.T @ cross @ v) / (a[:, None] * c + config.penalty)
        return u @ rotated @ v.T
    left = left + config.penalty * torch.eye(len(left), dtype=left.dtype)
    right = right + config.penalty * torch.eye(len(right), dtype=right.dtype)
    return torch.linalg.solve(left, torch.linalg.solve(right, cross.T).T)

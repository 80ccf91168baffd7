"""Decoder-only model of PerturBench: a condition is all that it sees, so that all cells of a condition are equal.

Paper: PerturBench (Wu et al. 2024, arXiv:2408.10609). prediction = softplus(MLP([perturbation, covariates])), fitted by
squared error on perturbed cells: it learns the mean of every condition. Control cells are not an input.

Differs: control cells are training cells too, as the condition without perturbation (`learn_controls`; off in the
presets of the paper). Otherwise covariates of which no perturbed cell was seen have untrained weights.
Differs: epochs are steps here, at the number of training cells of the published data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from invirtuo.batch import Batch, Condition
from invirtuo.fit import FitConfig
from invirtuo.nn import NormMLP, one_hots
from invirtuo.settings import Settings, setting
from invirtuo.verbs.draw import in_batches
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import SampleConfig

__all__ = ["Config", "DecoderOnly"]


@dataclass(frozen=True)
class Config(Settings):
    """Width and depth, and what enters."""

    width: int = setting(256, "hidden width", ge=1)
    n_layers: int = setting(
        1, "hidden blocks; 0 makes the effect of a perturbation the same everywhere, before the softplus", ge=0
    )
    use_covariates: bool = setting(True, "covariate one-hots beside the perturbation")
    softplus: bool = setting(True, "keep predictions positive")
    learn_controls: bool = setting(True, "control cells are training cells too; off in the paper")


_FIT = FitConfig(batch_size=4000, schedule="val_plateau", warmup=0, ema=0.0, clip=0.0, keep="best", patience=50)
_BEST = "PerturBench, best of 60 trials"

_NORMAN = Config(3328, 3, use_covariates=False, softplus=False, learn_controls=False)
_NORMAN_FIT = replace(_FIT, steps=8000, val_every=16, lr=1.375e-4, weight_decay=4.417e-5)
_SRIVATSAN = Config(4352, 5, learn_controls=False)
_SRIVATSAN_FIT = replace(_FIT, steps=15_500, val_every=31, lr=6.798e-5, weight_decay=7.602e-6)
_JIANG = Config(5376, 3, learn_controls=False)
_JIANG_FIT = replace(_FIT, steps=234_000, val_every=585, batch_size=2000, lr=9.426e-5, weight_decay=8.514e-8)


class DecoderOnly(PerturbationModel):
    """softplus(MLP([perturbation, covariates])).

    References
    ----------
    PerturBench, arXiv:2408.10609, section 3.2.
    """

    name = "decoder_only"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), FitConfig(steps=600, batch_size=512, ema=0.99), "ours"),
        "norman19": Preset(_NORMAN, _NORMAN_FIT, _BEST),
        "srivatsan20": Preset(_SRIVATSAN, _SRIVATSAN_FIT, _BEST),
        "jiang24": Preset(_JIANG, _JIANG_FIT, _BEST),
    }
    SEARCH = {"fit.lr": (1e-6, 1e-2), "width": (128, 1024), "n_layers": (0, 3), "fit.weight_decay": (1e-9, 1e-3)}
    takes_features = True
    deterministic = True

    def build(self) -> None:
        """One MLP from condition to genes."""
        config = self.config
        self.sampler = "cells" if config.learn_controls else "pairs"
        self.levels = [len(levels) for levels in self.design.covariates.values()]
        n_in = self.design.code_width + sum(self.levels) * config.use_covariates
        self.decoder = NormMLP(n_in, config.width, len(self.genes), config.n_layers)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error over cells and genes."""
        return {"total": F.mse_loss(self._forward(batch.condition), batch.target)}

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """The mean of the condition, for every cell, (n, g)."""
        return in_batches(self._forward, config.batch_size, batch.condition)

    def _forward(self, condition: Condition) -> Tensor:
        blocks = one_hots(condition, self.levels) if self.config.use_covariates else []
        x = self.decoder(torch.cat([condition.code, *blocks], dim=1))
        return F.softplus(x) if self.config.softplus else x

"""Linear additive model of PerturBench.

Paper: PerturBench (Wu et al. 2024, arXiv:2408.10609). Each perturbed cell is paired with a random control cell of the
same covariates; its expression is softplus(control + W [perturbation, covariates] + b), fitted by squared error.

Differs: epochs are steps here, at the number of training cells of the published data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Batch, Condition
from invirtuo.fit import FitConfig
from invirtuo.nn import one_hots
from invirtuo.settings import Settings, setting
from invirtuo.verbs.draw import in_batches
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import SampleConfig

__all__ = ["Config", "LinearAdditive"]


@dataclass(frozen=True)
class Config(Settings):
    """What enters the linear map."""

    use_covariates: bool = setting(True, "whether the covariate one-hots enter beside the perturbation")
    softplus: bool = setting(True, "keep predictions positive, as published")


_FIT = FitConfig(batch_size=4000, schedule="val_plateau", warmup=0, ema=0.0, clip=0.0, keep="best", patience=50)
_DEFAULT_FIT = FitConfig(batch_size=512, lr=5e-3, schedule="constant", warmup=0, ema=0.0, clip=0.0, keep="best")
_BEST = "PerturBench, best of 60 trials"
_NORMAN_FIT = replace(_FIT, steps=8000, val_every=16, lr=4.717e-3, weight_decay=1.759e-8)
_SRIVATSAN_FIT = replace(_FIT, steps=15_500, val_every=31, lr=7.788e-4, weight_decay=1.063e-8)
_JIANG_FIT = replace(_FIT, steps=234_000, val_every=585, batch_size=2000, lr=1.421e-3, weight_decay=1.008e-8)


class LinearAdditive(PerturbationModel):
    """softplus(x_control + W [perturbation, covariates] + b), trained on control-perturbed pairs.

    References
    ----------
    PerturBench, arXiv:2408.10609, section 3.2.
    """

    name = "linear_additive"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _DEFAULT_FIT, "ours"),
        "norman19": Preset(Config(use_covariates=False), _NORMAN_FIT, _BEST),
        "srivatsan20": Preset(Config(), _SRIVATSAN_FIT, _BEST),
        "jiang24": Preset(Config(), _JIANG_FIT, _BEST),
    }
    sampler = "pairs"
    needs_source = True
    takes_features = True

    def build(self) -> None:
        """One Linear from condition to genes."""
        self.levels = [len(levels) for levels in self.design.covariates.values()]
        self.groups_by_controls = not self.config.use_covariates
        n_in = self.design.code_width + sum(self.levels) * self.config.use_covariates
        self.shift = nn.Linear(n_in, len(self.genes))

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean squared error over cells and genes."""
        return {"total": F.mse_loss(self._forward(batch.source, batch.condition), batch.target)}

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Shift the control cells, (n, g)."""
        return in_batches(self._forward, config.batch_size, batch.source, batch.condition)

    def _forward(self, source: Tensor, condition: Condition) -> Tensor:
        blocks = one_hots(condition, self.levels) if self.config.use_covariates else []
        shifted = source + self.shift(torch.cat([condition.code, *blocks], dim=1))
        return F.softplus(shifted) if self.config.softplus else shifted

"""Latent additive model of PerturBench.

Paper: PerturBench (Wu et al. 2024, arXiv:2408.10609). Each perturbed cell is paired with a random control cell of the
same covariates. Control cell and perturbation are encoded into one latent space, added there, and decoded::

    z = MLP([x_control, covariates]) + MLP(perturbation),  prediction = softplus(MLP([z, covariates]))

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

__all__ = ["Config", "LatentAdditive"]


@dataclass(frozen=True)
class Config(Settings):
    """Widths and depths; the three MLPs are alike."""

    width: int = setting(256, "hidden width", ge=1)
    n_latent: int = setting(64, "width of the latent space", ge=1)
    n_layers: int = setting(1, "hidden blocks of each MLP", ge=0)
    dropout: float = setting(0.1, "dropout of all MLPs", ge=0, lt=1)
    encode_covariates: bool = setting(
        False, "covariate one-hots beside the control cell; trained by perturbed groups alone"
    )
    decode_covariates: bool = setting(False, "covariate one-hots beside the latent vector")
    softplus: bool = setting(True, "keep predictions positive, as published")


_FIT = FitConfig(batch_size=4000, schedule="val_plateau", warmup=0, ema=0.0, clip=0.0, keep="best", patience=50)
_BEST = "PerturBench, best of 60 trials"

_NORMAN = Config(4352, 512, 1, 0.1)
_NORMAN_FIT = replace(_FIT, steps=8000, val_every=16, lr=9.260e-5, weight_decay=2.180e-8)
_SRIVATSAN = Config(5376, 192, 2, 0.3, encode_covariates=True, decode_covariates=True)
_SRIVATSAN_FIT = replace(_FIT, steps=15_500, val_every=31, lr=3.411e-5, weight_decay=6.079e-11)
_JIANG = Config(2304, 64, 4, 0.3, encode_covariates=True, decode_covariates=True)
_JIANG_FIT = replace(_FIT, steps=234_000, val_every=585, batch_size=2000, lr=5.651e-5, weight_decay=5.769e-10)


class LatentAdditive(PerturbationModel):
    """softplus(decode(encode(x_control) + embed(perturbation))), trained on control-perturbed pairs.

    References
    ----------
    PerturBench, arXiv:2408.10609, section 3.2.
    """

    name = "latent_additive"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), FitConfig(steps=1000, batch_size=256, ema=0.99), "ours"),
        "norman19": Preset(_NORMAN, _NORMAN_FIT, _BEST),
        "srivatsan20": Preset(_SRIVATSAN, _SRIVATSAN_FIT, _BEST),
        "jiang24": Preset(_JIANG, _JIANG_FIT, _BEST),
    }
    SEARCH = {"fit.lr": (1e-6, 1e-2), "width": (128, 1024), "n_latent": [16, 64, 128], "dropout": [0.0, 0.1, 0.3]}
    sampler = "pairs"
    needs_source = True
    takes_features = True

    def build(self) -> None:
        """Two encoders and the decoder."""
        config, n_genes = self.config, len(self.genes)
        self.levels = [len(levels) for levels in self.design.covariates.values()]
        self.groups_by_controls = not (config.encode_covariates or config.decode_covariates)
        n_encode = sum(self.levels) * config.encode_covariates
        n_decode = sum(self.levels) * config.decode_covariates
        shape = {"width": config.width, "n_layers": config.n_layers, "dropout": config.dropout}
        self.encoder = NormMLP(n_genes + n_encode, n_out=config.n_latent, **shape)
        self.perturbation = NormMLP(self.design.code_width, n_out=config.n_latent, **shape)
        self.decoder = NormMLP(config.n_latent + n_decode, n_out=n_genes, **shape)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error over cells and genes."""
        return {"total": F.mse_loss(self._forward(batch.source, batch.condition), batch.target)}

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Perturb the control cells, (n, g)."""
        return in_batches(self._forward, config.batch_size, batch.source, batch.condition)

    def _forward(self, source: Tensor, condition: Condition) -> Tensor:
        config = self.config
        seen_by_encoder = one_hots(condition, self.levels) if config.encode_covariates else []
        seen_by_decoder = one_hots(condition, self.levels) if config.decode_covariates else []
        z = self.encoder(torch.cat([source, *seen_by_encoder], dim=1))
        z = z + self.perturbation(condition.code)
        x = self.decoder(torch.cat([z, *seen_by_decoder], dim=1))
        return F.softplus(x) if config.softplus else x

"""SAMS-VAE, the sparse additive mechanism shift variational autoencoder, in the form of PerturBench.

Papers: Bereket and Karaletsos 2023, arXiv:2311.02794; PerturBench (Wu et al. 2024, arXiv:2408.10609). A perturbation p
shifts few latent dimensions, those of its mask m_p, by its effect e_p, and shifts of several perturbations add up::

    m_p ~ Bernoulli(sigmoid(logits_p)),  e_p ~ N(MLP([m_p, one-hot of p])),  z_p = sum over the cell's p of m_p e_p
    z_basal ~ N(MLP([x, covariates, z_p])),  prediction = softplus(MLP([z_basal + z_p, covariates]))

Masks are drawn once per perturbation and batch, hard in the forward and relaxed in the backward direction; effects too,
or once per cell with `joint_effects`. Loss, mean over the cells of a batch: squared error (summed over genes)
+ log q(z_basal) - log N(z_basal; 0, I), plus, for each perturbation p of the cell,
(KL(e_p | N(0, I)) + KL(m_p | Bernoulli(prior))) / training cells of p.

The simple form, SAMS-VAE (S) of PerturBench, has no masks (all ones), takes the mean of e_p, and draws z_basal from
N(0, I) to predict; the terms of masks and effects are not in its loss.

Differs: to predict, the default encodes control cells with their own shift, which is none, and then adds that of the
wanted perturbation. The reference encodes them with the wanted shift (`basal="target"`, in its presets): the encoder
then explains part of the shift away. `basal` is free in both forms.
Differs: the default gives the encoder of effects one perturbation at a time, as Bereket and Karaletsos do, so that
effects add up. In PerturBench, and in its presets here, it sees all perturbations of the cell (`joint_effects`).
Differs: epochs are steps here, at the number of training cells of the published data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Batch, Condition
from invirtuo.cells.dataset import CellDataset
from invirtuo.fit import FitConfig
from invirtuo.nn import NormMLP, gaussian_kl, gaussian_sample, one_hots
from invirtuo.settings import Settings, setting
from invirtuo.verbs.draw import in_batches
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import SampleConfig

__all__ = ["SAMSVAE", "Config"]


@dataclass(frozen=True)
class Config(Settings):
    """Architecture, priors, and how cells are drawn."""

    n_latent: int = setting(32, "width of the latent space", ge=1)
    width: int = setting(256, "hidden width of all networks", ge=1)
    layers_basal: int = setting(1, "hidden blocks of the encoder of cells", ge=0)
    layers_effect: int = setting(1, "hidden blocks of the encoder of effects", ge=0)
    layers_decoder: int = setting(1, "hidden blocks of the decoder", ge=0)
    dropout: float = setting(0.1, "dropout of the decoder alone", ge=0, lt=1)
    masked: bool = setting(True, "masks of effects; off: effects are their means (SAMS-VAE (S))")
    mask_prior: float = setting(0.3, "prior probability that a perturbation acts on a latent dimension", gt=0, lt=1)
    temperature: float = setting(0.5, "temperature of the relaxed masks", gt=0)
    joint_effects: bool = setting(
        False,
        "each cell has effects of its own, encoded from all its perturbations, as published; off: additive, one draw",
    )
    encode_covariates: bool = setting(False, "covariate one-hots beside the cell")
    decode_covariates: bool = setting(False, "covariate one-hots beside the latent vector")
    basal: Literal["factual", "target", "prior"] = setting(
        "factual",
        'basal vectors to predict from: control cells encoded with their own shift, none ("factual"), or that of '
        'the wanted perturbation ("target", as published), or drawn from the "prior"',
    )
    noise: bool = setting(True, "draw masks, effects and basal vectors; off takes the likelier mask, and means")


FIRST_LOGIT = -1.0
_FIT = FitConfig(
    batch_size=256,
    precision="fp32",
    schedule="val_plateau",
    warmup=0,
    ema=0.0,
    clip=0.0,
    keep="best",
    patience=50,
)
_BEST = "PerturBench, best of 60 trials"
_SIMPLE = Config(masked=False, basal="prior")
_PAPER = Config(joint_effects=True)
_DEFAULT_FIT = FitConfig(steps=1200, batch_size=256, ema=0.99)
_SIMPLE_DEFAULT = replace(_SIMPLE, encode_covariates=True, decode_covariates=True)
_MASKED_FIT = replace(_DEFAULT_FIT, lr=1e-2)  # mask logits begin at -1 and must cross 0 in few steps

_NORMAN = replace(
    _PAPER,
    n_latent=128,
    width=3584,
    layers_basal=1,
    layers_effect=3,
    layers_decoder=2,
    dropout=0.4,
    mask_prior=0.1138,
    basal="target",
)
_NORMAN_FIT = replace(_FIT, steps=125_000, val_every=250, lr=3.026e-5, weight_decay=4.245e-9)
_SRIVATSAN = replace(
    _PAPER,
    n_latent=64,
    width=1536,
    layers_basal=4,
    layers_effect=2,
    layers_decoder=1,
    dropout=0.3,
    mask_prior=0.01149,
    basal="target",
)
_SRIVATSAN_FIT = replace(_FIT, steps=235_000, val_every=470, lr=4.002e-4, weight_decay=1.749e-6)
_JIANG = replace(
    _PAPER,
    n_latent=64,
    width=3328,
    layers_basal=3,
    layers_effect=5,
    layers_decoder=3,
    dropout=0.5,
    mask_prior=0.2068,
    encode_covariates=True,
    decode_covariates=True,
    basal="prior",
)
_JIANG_FIT = replace(_FIT, steps=1_828_000, val_every=4570, lr=7.595e-6, weight_decay=1.592e-8)

_SIMPLE_PAPER = replace(_SIMPLE, joint_effects=True)
_SIMPLE_NORMAN = replace(_SIMPLE_PAPER, width=2048, layers_basal=1, layers_effect=1, layers_decoder=3, dropout=0.3)
_SIMPLE_NORMAN_FIT = replace(_FIT, steps=125_000, val_every=250, lr=1.598e-5, weight_decay=6.556e-5)
_WITH_COVARIATES = replace(_SIMPLE_PAPER, encode_covariates=True, decode_covariates=True)
_SIMPLE_SRIVATSAN = replace(
    _WITH_COVARIATES, width=2560, layers_basal=4, layers_effect=2, layers_decoder=3, dropout=0.4
)
_SIMPLE_SRIVATSAN_FIT = replace(_FIT, steps=235_000, val_every=470, lr=3.418e-4, weight_decay=6.944e-8)
_SIMPLE_JIANG = replace(_WITH_COVARIATES, width=1536, layers_basal=5, layers_effect=2, layers_decoder=3, dropout=0.6)
_SIMPLE_JIANG_FIT = replace(_FIT, steps=1_828_000, val_every=4570, lr=3.892e-4, weight_decay=9.994e-7)


class SAMSVAE(PerturbationModel):
    """Autoencoder whose perturbations shift few latent dimensions.

    References
    ----------
    Bereket and Karaletsos 2023, arXiv:2311.02794; PerturBench, arXiv:2408.10609, section 3.2.
    """

    name = "sams_vae"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _MASKED_FIT, "ours"),
        "simple": Preset(_SIMPLE_DEFAULT, _DEFAULT_FIT, "ours; SAMS-VAE (S) of PerturBench"),
        "norman19": Preset(_NORMAN, _NORMAN_FIT, _BEST),
        "srivatsan20": Preset(_SRIVATSAN, _SRIVATSAN_FIT, _BEST),
        "jiang24": Preset(_JIANG, _JIANG_FIT, _BEST),
        "simple-norman19": Preset(_SIMPLE_NORMAN, _SIMPLE_NORMAN_FIT, _BEST),
        "simple-srivatsan20": Preset(_SIMPLE_SRIVATSAN, _SIMPLE_SRIVATSAN_FIT, _BEST),
        "simple-jiang24": Preset(_SIMPLE_JIANG, _SIMPLE_JIANG_FIT, _BEST),
    }
    SEARCH = {"fit.lr": (1e-6, 1e-2), "width": (128, 1024), "n_latent": [16, 32, 64], "mask_prior": (0.01, 0.3)}
    needs_source = True

    def build(self) -> None:
        """Mask logits, encoders of effects and cells, decoder."""
        config, n_genes, p = self.config, len(self.genes), len(self.design.perturbations)
        self.levels = [len(levels) for levels in self.design.covariates.values()]
        self.needs_source = config.basal != "prior"
        self.groups_by_controls = self.needs_source and not (config.encode_covariates or config.decode_covariates)
        z, width = config.n_latent, config.width
        n_encode = sum(self.levels) * config.encode_covariates
        n_decode = sum(self.levels) * config.decode_covariates
        self.mask_logits = nn.Parameter(torch.full((p, z), FIRST_LOGIT)) if config.masked else None
        self.effect = NormMLP(z + p, width, 2 * z if config.masked else z, config.layers_effect)
        self.encoder = NormMLP(n_genes + n_encode + z, width, 2 * z, config.layers_basal)
        self.decoder = NormMLP(z + n_decode, width, n_genes, config.layers_decoder, config.dropout)
        self.register_buffer("n_trained", torch.ones(p))

    def prepare(self, dataset: CellDataset) -> None:
        """Count the training cells of every perturbation."""
        present = dataset.condition[torch.from_numpy(dataset.rows("train"))].perturbation != 0
        self.n_trained = present.sum(0).float().clamp_min(1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The negative evidence bound: squared error and the KL terms of basal vectors, effects and masks."""
        # reconstruction from basal vector and shift
        z_p, prior_terms = self._shifts(batch.condition.perturbation)
        mean, log_variance = self._encode(batch.target, batch.condition, z_p)
        z = gaussian_sample(mean, log_variance)
        squared = (self._decode(z + z_p, batch.condition) - batch.target).square().sum(1).mean()

        # log q(z) - log p(z) at the vectors that were drawn
        sd = (log_variance / 2).exp().clamp_min(1e-8)
        drawn = (z - mean) / sd
        basal_kl = (0.5 * z.square() - 0.5 * drawn.square() - sd.log()).sum(1).mean()
        losses = {"total": squared + basal_kl, "squared_error": squared, "basal_kl": basal_kl}

        for name, value in prior_terms.items():
            losses[name] = value / len(batch)
            losses["total"] = losses["total"] + losses[name]
        return losses

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Shift basal vectors of control cells, or of the prior, by the perturbation, and decode, (n, g)."""
        n, device = len(batch), self.n_trained.device
        p, d = len(self.n_trained), self.config.n_latent
        perturbation = batch.condition.perturbation
        uniform = torch.rand(p, d, generator=generator).to(device)
        n_draws = int(perturbation.count_nonzero()) if self.config.joint_effects else p
        effect_noise = torch.randn(n_draws, d, generator=generator).to(device)
        basal_noise = torch.randn(n, d, generator=generator).to(device) * self.config.noise
        masks = self._masks(uniform if self.config.noise else None)
        z_p, _ = self._shifts(perturbation, masks, effect_noise * self.config.noise)
        return in_batches(self._perturbed, config.batch_size, batch, z_p, basal_noise)

    def _perturbed(self, batch: Batch, z_p: Tensor, z: Tensor) -> Tensor:
        """Cells (n, g) of shifts (n, d) and of noise (n, d)."""
        if self.config.basal != "prior":
            own = z_p if self.config.basal == "target" else torch.zeros_like(z_p)
            z = gaussian_sample(*self._encode(batch.source, batch.condition, own), z)
        return self._decode(z + z_p, batch.condition)

    def mask_probability(self) -> Tensor:
        """(p, d), probability that a perturbation acts on a latent dimension."""
        return torch.sigmoid(self.mask_logits) if self.config.masked else self._ones()

    def _ones(self) -> Tensor:
        return torch.ones(len(self.n_trained), self.config.n_latent, device=self.n_trained.device)

    def _masks(self, uniform: Tensor | None) -> Tensor:
        """(p, d), 0 or 1, of uniform noise; without noise the likelier of the two."""
        if self.mask_logits is None:
            return self._ones()
        return _hard_mask(self.mask_logits, uniform, self.config.temperature)

    def _shifts(
        self, perturbation: Tensor, masks: Tensor | None = None, normal: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Shift z_p (n, d) of every cell, and the prior terms of effects and masks, summed over the cells.

        Parameters
        ----------
        perturbation
            (n, p), multi-hot.
        masks
            (p, d); drawn if None.
        normal
            Noise of the effects: (k, d) for the k perturbations of all cells, cell by cell, with `joint_effects`, else
            (p, d); drawn if None.
        """
        if masks is None:
            masks = self._masks(torch.rand_like(self._ones()) if self.config.masked else None)

        # effects, one row for each perturbation of each cell
        cell, which = perturbation.nonzero(as_tuple=True)
        seen = perturbation[cell] if self.config.joint_effects else F.one_hot(which, perturbation.shape[1])
        effect = self.effect(torch.cat([masks[which], seen.to(masks.dtype)], dim=1))
        terms = {}
        if self.config.masked:
            mean, log_variance = effect.chunk(2, dim=1)
            if not self.config.joint_effects:  # one draw for all cells of a perturbation
                normal = (torch.randn_like(masks) if normal is None else normal)[which]
            effect = gaussian_sample(mean, log_variance, normal)
            # terms of a perturbation count once in an epoch, shared by its cells
            share = 1 / self.n_trained[which]
            mask_kl = bernoulli_kl(self.mask_logits, self.config.mask_prior).sum(1)
            terms = {
                "effect_kl": (share * gaussian_kl(mean, log_variance)).sum(),
                "mask_kl": (share * mask_kl[which]).sum(),
            }

        own = perturbation[cell, which][:, None] * masks[which] * effect
        shifts = own.new_zeros(len(perturbation), own.shape[1]).index_add(0, cell, own)
        return shifts, terms

    def _encode(self, x: Tensor, condition: Condition, z_p: Tensor) -> tuple[Tensor, Tensor]:
        blocks = one_hots(condition, self.levels) if self.config.encode_covariates else []
        mean, log_variance = self.encoder(torch.cat([x, *blocks, z_p], dim=1)).chunk(2, dim=1)
        return mean, log_variance

    def _decode(self, z: Tensor, condition: Condition) -> Tensor:
        blocks = one_hots(condition, self.levels) if self.config.decode_covariates else []
        return F.softplus(self.decoder(torch.cat([z, *blocks], dim=1)))


def _hard_mask(logits: Tensor, uniform: Tensor | None, temperature: float) -> Tensor:
    """0 or 1, with the gradient of a relaxed Bernoulli variable; without uniform noise the likelier of the two."""
    if uniform is None:
        return (logits > 0).to(logits.dtype)
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / temperature)
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


def bernoulli_kl(logits: Tensor, prior: float) -> Tensor:
    """KL(Bernoulli(sigmoid(logits)) | Bernoulli(prior)), element by element."""
    on = F.logsigmoid(logits) - torch.tensor(prior, device=logits.device).log()
    off = F.logsigmoid(-logits) - torch.tensor(1 - prior, device=logits.device).log()
    probability = torch.sigmoid(logits)
    return probability * on + (1 - probability) * off

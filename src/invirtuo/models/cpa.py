"""CPA, the compositional perturbation autoencoder, in the form of PerturBench.

Papers: Lotfollahi et al. 2023, doi:10.15252/msb.202211517; PerturBench (Wu et al. 2024, arXiv:2408.10609).
A cell is encoded into a basal latent vector, to which the embeddings of its perturbations and covariates are added::

    q(z | x) = N(encoder(x)),  prediction = decoder(z + MLP(perturbation) + sum over covariates of MLP(one-hot))

An adversary reads perturbation and covariates from z; the encoder learns to hide them, so that they have to come from
the embeddings. To predict, control cells are encoded and get the embeddings of the wanted condition.

Training: loss = squared error (summed over genes) + kl_weight ``KL(q | N(0, I))`` alone for `warmup_steps`, then in
turns: where step % adversary_steps is 0, that loss minus adversary_weight A, for all but the adversary; else
adversary_weight A + penalty_weight ``|d logits / d z|^2``, for the adversary alone. A sums its cross-entropies.

Differs: warm-up is counted in steps, not epochs. The presets of the paper hold the steps of its epochs at the size of
its training data (Norman19, about 16 steps of 4,000 cells each; Srivatsan20, 31; Jiang24, 585 of 2,000).
Differs: `control_class` gives the adversary a class for control cells. Without it, as published, their label is a row
of zeros, and with a single perturbation there is nothing to classify.
Differs: the validation loss is squared error and KL, without the adversary, which is judged by no one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from invirtuo.batch import Batch, Condition
from invirtuo.fit import FitConfig
from invirtuo.nn import NormMLP, gaussian_kl, gaussian_sample, one_hots
from invirtuo.settings import Settings, setting
from invirtuo.verbs.draw import in_batches
from invirtuo.verbs.model import Preset
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import SampleConfig

__all__ = ["CPA", "Config"]


@dataclass(frozen=True)
class Config(Settings):
    """Architecture, weights of the losses, and how cells are drawn."""

    n_latent: int = setting(64, "width of the latent space", ge=1)
    width: int = setting(256, "hidden width of encoder, decoder and embeddings", ge=1)
    n_layers: int = setting(1, "hidden blocks of the decoder; the encoder has one more", ge=0)
    n_layers_perturbation: int = setting(2, "hidden blocks of the perturbation embedding", ge=0)
    n_layers_covariates: int = setting(1, "hidden blocks of the covariate embeddings", ge=0)
    dropout: float = setting(0.1, "dropout of all networks", ge=0, lt=1)
    kl_weight: float = setting(0.3, "weight of the KL term, beside the squared error summed over genes", ge=0)
    adversary: bool = setting(True, "hide perturbation and covariates from the basal latent vector")
    adversary_weight: float = setting(3.0, "weight of the adversary's cross-entropies", ge=0)
    penalty_weight: float = setting(1.0, "weight of the adversary's gradient penalty", ge=0)
    adversary_steps: int = setting(2, "one step of so many is the autoencoder's, the others are the adversary's", ge=2)
    warmup_steps: int = setting(200, "steps before the adversary takes part", ge=0)
    adversary_width: int = setting(128, "hidden width of each classifier", ge=1)
    adversary_layers: int = setting(2, "hidden blocks of each classifier", ge=0)
    control_class: bool = setting(True, "control cells are a class of their own for the adversary; off in the paper")
    noise: bool = setting(True, "draw the latent vector of control cells; off takes its mean")
    use_covariates: bool = setting(
        True, "add covariate embeddings; without them groups are known by their control cells alone, new ones as well"
    )


_FIT = FitConfig(batch_size=4000, schedule="val_plateau", warmup=0, ema=0.0, clip=0.0, keep="best", patience=50)
_BEST = "PerturBench, best of 60 trials"
_PAPER = Config(control_class=False)
_DEFAULT_FIT = FitConfig(steps=1200, batch_size=256, ema=0.99)

_NORMAN = replace(
    _PAPER,
    n_latent=128,
    width=3328,
    n_layers=1,
    dropout=0.2,
    kl_weight=19.76,
    adversary_weight=3.805,
    penalty_weight=1.898,
    adversary_steps=2,
    warmup_steps=240,
    adversary_width=776,
)
_NORMAN_FIT = replace(_FIT, steps=8000, val_every=16, lr=6.844e-5, weight_decay=1.660e-7)
_SRIVATSAN = replace(
    _PAPER,
    n_latent=512,
    width=1280,
    n_layers=3,
    dropout=0.1,
    kl_weight=0.2643,
    adversary_weight=0.2101,
    penalty_weight=10.21,
    adversary_steps=3,
    warmup_steps=155,
    adversary_width=383,
)
_SRIVATSAN_FIT = replace(_FIT, steps=15_500, val_every=31, lr=2.689e-4, weight_decay=2.992e-6)
_JIANG = replace(
    _PAPER,
    n_latent=512,
    width=3328,
    n_layers=7,
    dropout=0.3,
    kl_weight=6.905,
    adversary_weight=1.487,
    penalty_weight=2.815,
    adversary_steps=7,
    warmup_steps=2925,
    adversary_width=537,
    adversary_layers=1,
)
_JIANG_FIT = replace(_FIT, steps=234_000, val_every=585, batch_size=2000, lr=2.630e-5, weight_decay=3.693e-7)


class Encoder(nn.Module):
    """Blocks of Linear, LayerNorm, ReLU and dropout; mean and log-variance of the latent vector."""

    def __init__(self, n_genes: int, config: Config):
        super().__init__()
        layers: list[nn.Module] = []
        width = n_genes
        for _ in range(config.n_layers + 1):
            layers += [nn.Linear(width, config.width), nn.LayerNorm(config.width)]
            layers += [nn.ReLU(), nn.Dropout(config.dropout)]
            width = config.width
        self.hidden = nn.Sequential(*layers)
        self.mean = nn.Linear(config.width, config.n_latent)
        self.log_variance = nn.Linear(config.width, config.n_latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, g) -> (n, d), (n, d)."""
        h = self.hidden(x)
        return self.mean(h), self.log_variance(h)


class CPA(PerturbationModel):
    """Autoencoder with additive embeddings and an adversary.

    References
    ----------
    Lotfollahi et al. 2023, doi:10.15252/msb.202211517; PerturBench, arXiv:2408.10609, section 3.2.
    """

    name = "cpa"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _DEFAULT_FIT, "ours"),
        "no-adversary": Preset(Config(adversary=False), _DEFAULT_FIT, "ours; CPA (noAdv) of PerturBench"),
        "norman19": Preset(_NORMAN, _NORMAN_FIT, _BEST),
        "srivatsan20": Preset(_SRIVATSAN, _SRIVATSAN_FIT, _BEST),
        "jiang24": Preset(_JIANG, _JIANG_FIT, _BEST),
    }
    SEARCH = {
        "fit.lr": (1e-6, 1e-2),
        "width": (128, 1024),
        "kl_weight": (0.1, 20.0),
        "adversary_weight": (0.1, 100.0),
    }
    needs_source = True
    takes_features = True

    def build(self) -> None:
        """Encoder, embeddings, decoder, and the classifiers of the adversary."""
        config, n_genes, p = self.config, len(self.genes), len(self.design.perturbations)
        self.groups_by_controls = not config.use_covariates
        self.levels = [len(levels) for levels in self.design.covariates.values()]
        z, width, dropout = config.n_latent, config.width, config.dropout
        self.encoder = Encoder(n_genes, config)
        self.perturbation = NormMLP(self.design.code_width, width, z, config.n_layers_perturbation, dropout)
        self.covariates = nn.ModuleDict()
        for i, k in self._varying:
            self.covariates[str(i)] = NormMLP(k, width, z, config.n_layers_covariates, dropout)
        self.decoder = NormMLP(z, width, n_genes, config.n_layers, dropout)

        # a classifier for the perturbation, then one for each covariate
        self.adversary = nn.ModuleList()
        if config.adversary:
            n_classes = [p + config.control_class]
            n_classes += [k for _, k in self._varying]
            for k in n_classes:
                self.adversary.append(NormMLP(z, config.adversary_width, k, config.adversary_layers, dropout))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take classifiers that were saved when they had no dropout, whose layers had other numbers."""
        for i, classifier in enumerate(self.adversary):
            stem = f"{prefix}adversary.{i}."
            saved = sorted((k for k in state_dict if k.startswith(stem)), key=_layer)
            weights = [state_dict.pop(key) for key in saved]
            wanted = sorted(classifier.state_dict(prefix=stem), key=_layer)
            state_dict.update(zip(wanted if len(wanted) == len(saved) else saved, weights, strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _varying(self) -> list[tuple[int, int]]:
        """Number and levels of the covariates that have embeddings: those with more than one level."""
        return [(i, k) for i, k in enumerate(self.levels) if k > 1 and self.config.use_covariates]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Squared error summed over genes, plus weighted KL, mean over cells."""
        return self._autoencode(batch)[0]

    def update(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Warm-up, then autoencoder and adversary in turns."""
        config = self.config
        if not config.adversary or step < config.warmup_steps:
            return self.loss(batch)
        if step % config.adversary_steps:
            return self._adversary_loss(batch)

        # the autoencoder's turn: classifiers are to fail, and stay as they are
        losses, z = self._autoencode(batch)
        fixed = {name: parameter.detach() for name, parameter in self.adversary.named_parameters()}
        crossed = self._cross_entropy(batch.condition, self._logits(z, fixed))
        total = losses["total"] - config.adversary_weight * crossed
        return losses | {"total": total, "adversary": crossed}

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Encode control cells, add the embeddings of the condition, decode, (n, g)."""
        noise = torch.randn(len(batch), self.config.n_latent, generator=generator)
        return in_batches(self._perturbed, config.batch_size, batch, noise.to(batch.source.device))

    def _perturbed(self, batch: Batch, noise: Tensor) -> Tensor:
        mean, log_variance = self.encoder(batch.source)
        z = gaussian_sample(mean, log_variance, noise) if self.config.noise else mean
        return self._decode(z, batch.condition)

    def _decode(self, z: Tensor, condition: Condition) -> Tensor:
        z = z + self.perturbation(condition.code)
        blocks = one_hots(condition, self.levels) if self._varying else []
        for i, _ in self._varying:
            z = z + self.covariates[str(i)](blocks[i])
        return self.decoder(z)

    def _autoencode(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        mean, log_variance = self.encoder(batch.target)
        z = gaussian_sample(mean, log_variance)
        squared = (self._decode(z, batch.condition) - batch.target).square().sum(1).mean()
        kl = gaussian_kl(mean, log_variance).mean()
        return {"total": squared + self.config.kl_weight * kl, "squared_error": squared, "kl": kl}, z

    def _adversary_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of the classifiers on fixed latent vectors: cross-entropies and the penalty on their gradients."""
        with torch.no_grad():
            z = gaussian_sample(*self.encoder(batch.target))
        z.requires_grad_()
        logits = self._logits(z)
        crossed = self._cross_entropy(batch.condition, logits)
        slopes = [torch.autograd.grad(y.sum(), z, create_graph=True)[0] for y in logits]
        penalty = torch.stack([slope.square().mean() for slope in slopes]).sum()
        total = self.config.adversary_weight * crossed + self.config.penalty_weight * penalty
        return {"total": total, "adversary": crossed, "penalty": penalty}

    def _logits(self, z: Tensor, parameters: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Logits of every classifier for z; `parameters` of all may be used in place of their own."""
        if parameters is None:
            return [classifier(z) for classifier in self.adversary]
        logits = []
        for i, classifier in enumerate(self.adversary):
            prefix = f"{i}."
            own = {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
            logits.append(functional_call(classifier, own, z))
        return logits

    def _cross_entropy(self, condition: Condition, logits: list[Tensor]) -> Tensor:
        """Sum over perturbation (soft labels: a combination has two) and covariates, mean over cells."""
        labels = condition.perturbation
        if self.config.control_class:
            labels = torch.cat([labels, condition.is_control[:, None].to(labels)], dim=1)
        of_perturbation = F.cross_entropy(logits[0], labels)

        codes = list(condition.covariates.values())
        varying = [codes[i] for i, _ in self._varying]
        of_covariates = [F.cross_entropy(y, code) for y, code in zip(logits[1:], varying, strict=True)]
        return of_perturbation + sum(of_covariates)


def _layer(key: str) -> tuple[int, str]:
    """Number of the layer and name of a weight, by which weights stand in the order of the network."""
    *_, number, name = key.split(".")
    return int(number), name

"""CFGen: flow matching in the latent space of a count autoencoder, with guidance by several attributes.

Paper: Palma et al., "Generating multi-modal and multi-attribute single-cell counts with CFGen", ICLR 2025,
arXiv:2407.11734. Labels y, depth l, latent vector z and counts x of a cell (equations 5 and 6):

    p(x, z, l, y) = p(x | z, l) p(z | y, l) p(l) p(y)

p(y): observed proportions. p(l): log-normal. p(z | y, l): a flow from N(0, I) along straight lines. p(x | z, l):
negative binomial with mean l softmax(h(z)) and an inverse dispersion for each gene; peaks are Bernoulli. The decoder
does not see labels. In training every cell is conditioned on one of its attributes, or on none; attributes are put
together by guidance (equation 8). The autoencoder is trained first, without noise in its latent space; then the flow.

Differs: attributes are drawn for each cell (algorithm 1), not for each batch as in the public code. The depth is a
condition of the flow (`condition_on_size`). Latent vectors are standardised. Default: midpoint rule with 10 steps;
appendix C.4 says dopri5, algorithm 2 fixed steps. Weights are averaged. Latent vectors are computed once. Dispersions
start from moments and move ten times as fast as other weights. The encoder is trained with dropout of its input,
without which it learns the noise of training cells by heart.
Differs: depth is log-normal in each class of the first covariate (the paper: of all cells), since cell types differ in
it and the flow knows it: a monocyte asked for at the depth of a T cell is half a T cell.
Differs: unknown labels are never drawn; empty cells are left out; classes of one cell take the spread of all depths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from invirtuo.batch import Condition
from invirtuo.flow import SOLVER_NAMES, PathSample
from invirtuo.nn import BatchNormMLP, CountLikelihood, Dispersion, LabelEmbedding, Linear, ResidualVelocity
from invirtuo.settings import Settings, setting
from invirtuo.verbs.latent_flow import FIT, ConditionalFlow, LatentFlow
from invirtuo.verbs.model import Preset
from invirtuo.verbs.sampling import GuidedSampling

__all__ = ["CFGen", "Config"]


@dataclass(frozen=True)
class Config(Settings):
    """Autoencoder, depth, flow, training in stages and sampler."""

    n_latent: int = setting(50, "width of the latent space; 100 for HLCA, Tabula Muris and with peaks", ge=1)
    hidden_rna: tuple[int, ...] = setting(
        (512, 256), "widths of the encoder of genes; the decoder has them in reverse", ge=1
    )
    hidden_atac: tuple[int, ...] = setting((1024, 512), "widths of the encoder of peaks", ge=1)
    encoder_input: Literal["log_counts", "proportions", "log_proportions"] = setting(
        "log_counts", "what the encoder sees: log1p(x), x / l, or log1p(x / l)"
    )
    input_dropout: float = setting(
        0.5, "share of its input that the encoder does not see in training; 0 in the paper", ge=0, lt=1
    )
    dispersion: str = setting("gene", 'inverse dispersions: of each "gene", or "gene:COLUMN", by class of a covariate')
    size_factor: str = setting(
        "by",
        'distribution of depth, p(l): "global" (the paper), "by:COLUMN" ("by": first covariate), "empirical[:COLUMN]"',
    )
    condition_on_size: bool = setting(True, "give the depth to the flow")
    latent_scaling: Literal["standard", "none"] = setting(
        "standard", 'scale of latent vectors: "standard" is mean 0 and variance 1, "none" the paper'
    )
    hidden: int = setting(256, "width of the velocity network", ge=1)
    embedding: int = setting(128, "width of the embeddings of time, depth and labels", ge=1)
    n_blocks: int = setting(3, "residual blocks of the velocity network", ge=0)
    conditioning: Literal["single", "joint"] = setting(
        "single",
        'labels that a cell is trained with: a "single" attribute, which guidance puts together, or all at once',
    )
    prob_unconditional: float = setting(0.2, "probability that a cell is trained without labels", ge=0, le=1)
    sigma_min: float = setting(
        0.0, "standard deviation that is left of the noise at t = 1; 1e-4 in the public code", ge=0, lt=1
    )
    stratified: bool = setting(True, "spread the times of a batch evenly")
    coupling: Literal["independent", "ot"] = setting(
        "independent", 'coupling of noise and cells in a batch; "ot" is exact optimal transport'
    )
    ot_within_class: bool = setting(False, "couple only cells of equal covariates")
    autoencoder_share: float = setting(
        0.4, "share of FitConfig.steps that trains the autoencoder; the rest is the flow's", ge=0, le=1
    )
    val_share: float = setting(
        0.1, "training cells set aside to know when to stop, where the split has no validation cells", ge=0, lt=1
    )
    flow_lr: float = setting(1.0, "learning rate of the flow, in units of FitConfig.lr", gt=0)
    solver: str = setting("midpoint", "default solver of generate", choices=SOLVER_NAMES)
    steps: int = setting(10, "default number of steps of the solver", ge=1)
    refit_dispersion: bool = setting(False, "fit dispersions anew to validation cells that the encoder sees whole")


class Autoencoder(nn.Module):
    """Encoders of genes and peaks, one latent vector, decoders (appendix C.1).

    Parameters
    ----------
    config
        Widths and input.
    n_genes, n_peaks
        Numbers of features; either may be 0.
    by
        Covariate whose classes have dispersions of their own, and their number; None for one for each gene.
    """

    def __init__(self, config: Config, n_genes: int, n_peaks: int, by: tuple[str, int] | None):
        super().__init__()
        self.dropout = nn.Dropout(config.input_dropout)
        self.input, self.n_genes = config.encoder_input, n_genes
        self.by, n_classes = by or (None, 0)

        # the modalities that there are
        sizes = {"atac": (n_peaks, config.hidden_atac), "rna": (n_genes, config.hidden_rna)}
        sizes = {name: size for name, size in sizes.items() if size[0]}
        self.encoders = nn.ModuleDict({name: BatchNormMLP(n, hidden) for name, (n, hidden) in sizes.items()})
        n_encoded = sum(hidden[-1] for _, hidden in sizes.values())
        self.latent = Linear(n_encoded, config.n_latent)
        self.decoders = nn.ModuleDict()
        for name, (n, hidden) in sizes.items():
            self.decoders[name] = BatchNormMLP(config.n_latent, hidden[::-1], n)
        if n_genes:
            self.dispersion = Dispersion(n_genes, n_classes)

    def encode(self, x: Tensor) -> Tensor:
        """Counts (n, g + p) to latent vectors (n, d)."""
        modalities = {"rna": self._scaled(x[:, : self.n_genes]), "atac": x[:, self.n_genes :]}
        encoded = [encoder(self.dropout(modalities[name])) for name, encoder in self.encoders.items()]
        return self.latent(torch.cat(encoded, dim=1)).float()

    def _scaled(self, x: Tensor) -> Tensor:
        if self.input == "log_counts":
            return x.log1p()
        share = x / x.sum(dim=1, keepdim=True).clamp_min(1e-12)
        return share.log1p() if self.input == "log_proportions" else share

    def decode(self, z: Tensor, size: Tensor, condition: Condition) -> CountLikelihood:
        """Latent vectors (n, d) and depths (n,) to the distribution of counts; only dispersions may know labels."""
        logits = {name: decoder(z).float() for name, decoder in self.decoders.items()}
        if "rna" not in logits:
            nothing = z.new_zeros(len(z), 0)
            return CountLikelihood(nothing, nothing, logits["atac"])
        log_mean = logits["rna"].log_softmax(dim=1) + size.log()[:, None]
        return CountLikelihood(log_mean, self.dispersions(condition), logits.get("atac"))

    def dispersions(self, condition: Condition) -> Tensor:
        """Log inverse dispersions, (g,) or (n, g)."""
        log_dispersion: Tensor = self.dispersion(None if self.by is None else condition.covariates[self.by])
        return log_dispersion


_PAPER = Config(input_dropout=0.0, size_factor="global", latent_scaling="none", embedding=100, solver="dopri5")
_PAPER_FIT = replace(FIT, steps=20_000, schedule="constant", warmup=0, ema=0.0, patience=0)
# 300 epochs of the autoencoder, 1,500 of the flow at a tenth of its learning rate; all data sets by cell type
_PUBLIC = replace(
    _PAPER,
    size_factor="by",
    condition_on_size=False,
    sigma_min=1e-4,
    autoencoder_share=1 / 6,
    flow_lr=0.1,
)
_SMALL = Config(hidden_rna=(128, 64), n_latent=20, hidden=128, embedding=64)


class CFGen(LatentFlow):
    """Latent flow matching with negative binomial (and Bernoulli) decoders, guided by several attributes.

    References
    ----------
    Palma et al. 2025, arXiv:2407.11734.
    """

    name = "cfgen"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), FIT, "ours, for a CPU"),
        "small": Preset(_SMALL, FIT, "ours, smaller"),
        "multimodal": Preset(Config(n_latent=100), FIT, "appendix C.1, with peaks"),
        "paper": Preset(_PAPER, _PAPER_FIT, "appendix C, which gives no width of the flow"),
        "cfgen_small": Preset(replace(_PUBLIC, hidden=32, embedding=20), _PAPER_FIT, "public code"),
        "cfgen_big": Preset(replace(_PUBLIC, hidden=64), _PAPER_FIT, "public code"),
    }
    SEARCH = {"fit.lr": (1e-4, 1e-2), "n_latent": [20, 50, 100], "hidden": [64, 128, 256, 512]}

    Sampling = GuidedSampling

    def build(self) -> None:
        """Autoencoder, depth, velocity network and embeddings."""
        config, design = self.config, self.design
        self.depth = self.make_depth()
        self.autoencoder = Autoencoder(config, self.n_counted, self.n_peaks, self._dispersion_classes())
        sized = config.condition_on_size and self.n_counted > 0
        velocity = ResidualVelocity(config.n_latent, config.hidden, config.embedding, config.n_blocks, sized=sized)
        levels = [len(level) for level in design.covariates.values()]
        n_code = None if design.perturbation is None else design.code_width
        self.flow = ConditionalFlow(velocity, LabelEmbedding(levels, n_code, config.embedding))
        self.add_scale(config.n_latent)

    def _dispersion_classes(self) -> tuple[str, int] | None:
        kind, _, column = self.config.dispersion.partition(":")
        if kind != "gene" or (column and column not in self.design.covariates):
            known = ", ".join(self.design.covariates) or "none"
            raise ValueError(
                f"dispersion is {self.config.dispersion!r}; expected gene, or gene:COLUMN with one of {known}"
            )
        return (column, len(self.design.covariates[column])) if column else None

    def path(self, z0: Tensor, z1: Tensor, t: Tensor) -> PathSample:
        """Straight line to the latent vector; `sigma_min` of the noise is left at its end (section 3.2)."""
        left = 1 - self.config.sigma_min
        t_ = t[:, None]
        return PathSample(t, t_ * z1 + (1 - left * t_) * z0, z1 - left * z0)

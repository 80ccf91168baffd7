"""cellFlow for counts: flow matching between noise and the logits of a negative binomial, without a decoder.

Paper: Palma et al., "cellFlow: a generative flow-based model for single-cell count data" (workshop, 2023; it precedes
CFGen, and is not the CellFlow of Klein et al. 2025). Labels y, depth l, z in gene space and counts x of a cell:

    p(x, z, l, y) = p(x | z, l) p(z | l, y) p(l | y) p(y),    mean of x: l softmax(z)

The encoder keeps the number of genes; the flow leads from noise to z along straight lines with a little noise around
them, and noise and cells are paired by exact optimal transport inside a batch. Labels and depths travel with z. There
is no guidance. The paper has 2,000 highly variable genes (seurat_v3).

Differs: the text on the encoder is ambiguous; here g -> 512 -> 512 -> g with batch norm and ELU, from log1p(x). Vectors
are standardised, the input has dropout and weights are averaged; `paper` switches these off. The default solver is the
midpoint rule with 20 steps.
Differs: transport that ignores labels lets noise depend on the class, so that sampling from plain noise is biased;
`ot_within_class` (the default here) pairs within classes. The paper does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from invirtuo.batch import Condition
from invirtuo.flow import SOLVER_NAMES, PathSample, linear_path
from invirtuo.nn import BatchNormMLP, CountLikelihood, Dispersion, LabelEmbedding, ResidualVelocity
from invirtuo.settings import Settings, setting
from invirtuo.verbs.latent_flow import FIT, ConditionalFlow, LatentFlow
from invirtuo.verbs.model import Preset

__all__ = ["CellFlowCounts", "Config"]


@dataclass(frozen=True)
class Config(Settings):
    """Encoder, depth, flow, training in stages and sampler."""

    hidden_encoder: tuple[int, ...] = setting((512, 512), "widths of the encoder", ge=1)
    input_dropout: float = setting(
        0.5, "share of its input that the encoder does not see in training; 0 in the paper", ge=0, lt=1
    )
    size_factor: str = setting(
        "by", 'distribution of depth, p(l): "by" is by the first covariate, log-normal; as in cfgen otherwise'
    )
    hidden: int = setting(512, "width of the velocity network", ge=1)
    label_embedding: int = setting(256, "width of the embeddings of labels", ge=1)
    embedding: int = setting(256, "width of the embeddings of time and depth", ge=1)
    n_blocks: int = setting(3, "residual blocks of the velocity network", ge=0)
    sigma: float = setting(1e-4, "standard deviation of the noise around the path", ge=0)
    coupling: Literal["ot", "independent"] = setting(
        "ot", 'coupling of noise and cells in a batch; "ot" is exact optimal transport'
    )
    ot_within_class: bool = setting(True, "couple only cells of equal covariates; False in the paper")
    stratified: bool = setting(True, "spread the times of a batch evenly")
    latent_scaling: Literal["standard", "none"] = setting(
        "standard", 'scale of vectors: "standard" is mean 0 and variance 1, "none" the paper'
    )
    autoencoder_share: float = setting(
        0.4, "share of FitConfig.steps that trains the encoder; the rest is the flow's", ge=0, le=1
    )
    val_share: float = setting(
        0.1, "training cells set aside to know when to stop, where the split has no validation cells", ge=0, lt=1
    )
    flow_lr: float = setting(1.0, "learning rate of the flow, in units of FitConfig.lr; 0.1 in the paper", gt=0)
    solver: str = setting("midpoint", 'default solver of generate; "dopri5" in the paper', choices=SOLVER_NAMES)
    steps: int = setting(20, "default number of steps of the solver", ge=1)

    conditioning = "joint"  # all labels are always seen
    prob_unconditional = 0.0


class Encoder(nn.Module):
    """Counts to logits of the same width, and the negative binomial around them."""

    def __init__(self, config: Config, n_genes: int):
        super().__init__()
        self.dropout = nn.Dropout(config.input_dropout)
        self.mlp = BatchNormMLP(n_genes, config.hidden_encoder, n_genes)
        self.dispersion = Dispersion(n_genes)

    def encode(self, x: Tensor) -> Tensor:
        """Counts (n, g) to logits (n, g)."""
        return self.mlp(self.dropout(x.log1p())).float()

    def decode(self, z: Tensor, size: Tensor, condition: Condition) -> CountLikelihood:
        """Logits (n, g) and depths (n,) to the distribution of counts."""
        return CountLikelihood(z.log_softmax(dim=1) + size.log()[:, None], self.dispersion())


_FIT = replace(FIT, steps=5000)
_PAPER = Config(
    input_dropout=0.0, ot_within_class=False, latent_scaling="none", flow_lr=0.1, solver="dopri5", stratified=False
)
_PAPER_FIT = replace(_FIT, steps=20_000, schedule="constant", warmup=0, ema=0.0, clip=0.0)
_SMALL_EMBEDDINGS = replace(_PAPER, label_embedding=128, embedding=128)


class CellFlowCounts(LatentFlow):
    """Flow matching on the logits of a negative binomial, conditioned on all labels.

    References
    ----------
    Palma et al. 2023, cellFlow: a generative flow-based model for single-cell count data.
    """

    name = "cellflow_counts"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _FIT, "ours, for a CPU"),
        "paper": Preset(_PAPER, _PAPER_FIT, "appendices A.1-A.3"),
        "paper-128": Preset(_SMALL_EMBEDDINGS, _PAPER_FIT, "table 2, smallest embeddings"),
        "paper-deep": Preset(replace(_PAPER, n_blocks=4), _PAPER_FIT, "table 2, most blocks"),
    }
    SEARCH = {"fit.lr": (1e-4, 1e-3), "label_embedding": [128, 256], "embedding": [128, 256], "n_blocks": [2, 3, 4]}

    def build(self) -> None:
        """Encoder, depth, velocity network and embeddings."""
        config, design = self.config, self.design
        if self.n_peaks:
            raise ValueError(f"{self.name} models genes alone, found {self.n_peaks} peaks; use cfgen")
        self.depth = self.make_depth()
        self.autoencoder = Encoder(config, len(self.genes))
        velocity = ResidualVelocity(len(self.genes), config.hidden, config.embedding, config.n_blocks)
        levels = [len(level) for level in design.covariates.values()]
        n_code = None if design.perturbation is None else design.code_width
        labels = LabelEmbedding(levels, n_code, config.label_embedding, config.embedding)
        self.flow = ConditionalFlow(velocity, labels)
        self.add_scale(len(self.genes))

    def path(self, z0: Tensor, z1: Tensor, t: Tensor) -> PathSample:
        """Straight line with constant noise around it (equation 6)."""
        return linear_path(z0, z1, t, self.config.sigma)

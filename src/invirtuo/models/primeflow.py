"""PRiMeFlow: flow matching directly in gene-expression space.

Paper: "PRiMeFlow: capturing complex expression heterogeneity in perturbation response modelling" (the flagship).
Noise N(0, I) flows to log1p expression under a learned velocity v(x_t, condition, t); training is algorithm 1.

Differs: the paper leaves open the scale of the sinusoids, how time and condition enter the blocks, the null condition,
the guidance formula, padding and the optimiser; docs/decisions says what we chose. The paper's presets (`srivatsan20`,
`norman19`, and their MLP ablations) are built from what it states.
Differs: the default velocity network is not the paper's U-Net but `genewise` with Gaussian preconditioning and
pseudobulk anchors (docs/models/primeflow.md): far cheaper, and better on conditions that were not seen.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Batch, Condition
from invirtuo.dataset import CellDataset
from invirtuo.fit import FitConfig
from invirtuo.flow import PATHS, gaussian_velocity, guided, solve
from invirtuo.flow.path import COEFFICIENTS
from invirtuo.model import Model, Preset, SampleConfig
from invirtuo.nn import MLP, ConditionEncoder, GenewiseVelocity, PseudobulkAnchor, UNet1d, sinusoids

__all__ = ["Config", "PRiMeFlow"]

logger = logging.getLogger(__name__)

T_BINS = 5  # bins of time in which the validation loss is reported


@dataclass(frozen=True)
class Config:
    """Architecture, path and sampler. Names are those of tables 10-13 where the paper has one."""

    velocity: str = "genewise"  # "unet" (the paper), "mlp" (its ablation), "genewise" (ours)
    precondition: bool = True  # remove the closed-form Gaussian velocity of each gene; off in the paper
    anchor: bool = True  # give every gene its control mean and sd and its expected effect; genewise only
    covariate_scale: float = 0.0  # factor on the covariate one-hots; 1 in the paper, 0 trusts the anchors alone
    hidden_dim: int = 256  # U-Net: base width and input MLPs; MLP: width; genewise: embedding of time and condition
    dropout: float = 0.0
    n_layers_gene_expression: int = 2  # layers of the value MLP (U-Net: shared by genes; MLP: whole cell)
    n_layers_conditions: int = 2  # layers of the condition MLP
    n_layers_time: int = 2  # layers of the time MLP
    n_layers_decoding: int = 2  # MLP: hidden layers after the concatenation
    channel_mult: tuple[int, ...] = (1, 2, 2, 4, 4)  # U-Net: width multiplier per level
    num_res_blocks: int = 2  # U-Net: residual blocks per level
    conv_resample: bool = True  # U-Net: learned down- and upsampling
    num_heads: int = 8  # U-Net: attention heads
    attention_resolutions: tuple[int, ...] = (16,)  # U-Net: downsampling factors with attention
    film: bool = False  # U-Net: scale and shift instead of adding the embedding
    recompute: bool = False  # U-Net: recompute blocks in the backward pass to save memory
    gene_width: int = 64  # genewise: width of the network shared by all genes
    n_context: int = 8  # genewise: context numbers per gene
    cell_width: int = 512  # genewise: width of the network that reads the whole cell
    n_blocks: int = 3  # genewise: its residual blocks
    n_sinusoids: int = 32  # genewise: sinusoidal features of a value
    loss_genes: int = 512  # genewise: genes drawn for the loss of each step, 0 for all
    prob_unconditional: float = 0.1  # probability that a cell's condition is replaced by the null condition
    interpl_type: str = "linear"  # path: "linear" or "trigonometric"
    sigma: float = 0.0  # constant noise level of the path
    time_scale: float = 1000.0  # scale of t inside its sinusoids
    value_scale: float = 10.0  # scale of expression inside its sinusoids
    hurdle: bool = True  # set sampled values below half the smallest positive training value to 0; off in the paper
    solver: str = "ab2"  # default solver of predict
    steps: int = 20  # default number of its steps

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.velocity not in VELOCITIES:
            raise ValueError(f"velocity is {self.velocity!r}; expected one of {', '.join(VELOCITIES)}")
        if self.interpl_type not in PATHS:
            raise ValueError(f"interpl_type is {self.interpl_type!r}; expected one of {', '.join(PATHS)}")
        if not 0 <= self.prob_unconditional < 1:
            raise ValueError(f"prob_unconditional is {self.prob_unconditional}; expected at least 0 and below 1")


@dataclass(frozen=True)
class Sizes:
    """What a velocity network needs to know of genes and Design."""

    n_genes: int
    n_perturbations: int
    levels: tuple[int, ...]
    n_continuous: int


class _Embedding(nn.Module):
    """Time and condition encoders, of one width."""

    def __init__(self, config: Config, sizes: Sizes, d_time: int, width: int):
        super().__init__()
        self.d_time, self.time_scale = d_time, config.time_scale
        self.time = MLP(d_time, width, config.n_layers_time - 1, n_out=width)
        self.condition = ConditionEncoder(
            sizes.n_perturbations,
            list(sizes.levels),
            sizes.n_continuous,
            width,
            config.n_layers_conditions,
            config.covariate_scale,
        )

    def forward(self, t: Tensor, condition: Condition, is_null: Tensor | None) -> tuple[Tensor, Tensor]:
        """t (n,) -> embeddings of time and condition, (n, width) each."""
        time = self.time(sinusoids(t, self.d_time, self.time_scale).to(self.time[0].weight.dtype))
        return time, self.condition(condition, is_null)


class UNetVelocity(nn.Module):
    """The paper's field, equation 3: U-Net over genes on Enc(x_t) + Emb(G), Enc(c), Enc(t).

    Genes are padded on the right to the next length that the U-Net can halve; padded positions share one embedding
    row, hold 0, and never reach loss or output.
    """

    def __init__(self, config: Config, sizes: Sizes):
        super().__init__()
        d = config.hidden_dim
        self.value_scale, self.width = config.value_scale, d
        self.embed = _Embedding(config, sizes, d, 4 * d)
        self.values = MLP(d, d, config.n_layers_gene_expression - 1, n_out=d)
        self.genes = nn.Embedding(sizes.n_genes + 1, d)
        nn.init.normal_(self.genes.weight, std=0.02)
        self.unet = UNet1d(
            d,
            width=d,
            mult=config.channel_mult,
            n_res=config.num_res_blocks,
            attention=config.attention_resolutions,
            heads=config.num_heads,
            dropout=config.dropout,
            d_embedding=4 * d,
            resample=config.conv_resample,
            film=config.film,
            recompute=config.recompute,
        )
        self.n_genes = sizes.n_genes
        self.length = -(-sizes.n_genes // self.unet.multiple) * self.unet.multiple

    def forward(self, x: Tensor, cell: Tensor, t: Tensor, condition: Condition, is_null, features, genes) -> Tensor:
        time, encoded = self.embed(t, condition, is_null)
        padded = F.pad(x, (0, self.length - self.n_genes))
        dtype = self.genes.weight.dtype
        gene = F.pad(torch.arange(self.n_genes, device=x.device), (0, self.length - self.n_genes), value=self.n_genes)
        h = self.values(sinusoids(padded, self.width, self.value_scale).to(dtype))
        v = self.unet(h + self.genes(gene).to(h.dtype), (time + encoded).to(h.dtype))
        v = v.squeeze(2)[:, : self.n_genes].float()
        return v if genes is None else v.index_select(1, genes)


class MLPVelocity(nn.Module):
    """The ablation PRiMeFlow-MLP: three input MLPs, concatenated, and a decoding MLP."""

    def __init__(self, config: Config, sizes: Sizes):
        super().__init__()
        width, dropout = config.hidden_dim, config.dropout
        self.d_time, self.time_scale = min(width, 256), config.time_scale
        self.values = MLP(sizes.n_genes, width, config.n_layers_gene_expression, dropout=dropout)
        self.time = MLP(self.d_time, width, config.n_layers_time, dropout=dropout)
        self.condition = ConditionEncoder(
            sizes.n_perturbations,
            list(sizes.levels),
            sizes.n_continuous,
            width,
            config.n_layers_conditions,
            config.covariate_scale,
            activated=True,
            dropout=dropout,
        )
        self.decode = MLP(3 * width, width, config.n_layers_decoding, n_out=sizes.n_genes, dropout=dropout)

    def forward(self, x: Tensor, cell: Tensor, t: Tensor, condition: Condition, is_null, features, genes) -> Tensor:
        dtype = self.values[0].weight.dtype
        time = self.time(sinusoids(t, self.d_time, self.time_scale).to(dtype))
        parts = [self.values(cell.to(dtype)), self.condition(condition, is_null), time]
        v = self.decode(torch.cat([part.to(time.dtype) for part in parts], dim=1)).float()
        return v if genes is None else v.index_select(1, genes)


class GenewiseField(nn.Module):
    """Ours: a denoiser shared by all genes, that knows which gene it is, with cheap global context."""

    def __init__(self, config: Config, sizes: Sizes):
        super().__init__()
        self.embed = _Embedding(config, sizes, 64, config.hidden_dim)
        self.field = GenewiseVelocity(
            sizes.n_genes,
            config.hidden_dim,
            n_features=PseudobulkAnchor.n_features if config.anchor else 0,
            width=config.gene_width,
            n_context=config.n_context,
            cell_width=config.cell_width,
            n_blocks=config.n_blocks,
            n_sinusoids=config.n_sinusoids,
            value_scale=config.value_scale,
            dropout=config.dropout,
        )

    def forward(self, x: Tensor, cell: Tensor, t: Tensor, condition: Condition, is_null, features, genes) -> Tensor:
        time, encoded = self.embed(t, condition, is_null)
        return self.field(x, cell, F.silu(time + encoded), features, genes)


VELOCITIES = {"unet": UNetVelocity, "mlp": MLPVelocity, "genewise": GenewiseField}

_PAPER = Config(
    velocity="unet",
    precondition=False,
    anchor=False,
    covariate_scale=1.0,
    dropout=0.1,
    loss_genes=0,
    prob_unconditional=0.2,
    hurdle=False,
    solver="euler",
    steps=100,
)
_MLP = replace(_PAPER, velocity="mlp")
_FIT = FitConfig(steps=2000, batch_size=256, lr=2e-3, clip=1.0, betas=(0.9, 0.99))
_PAPER_FIT = FitConfig(steps=20_000, lr=5e-5, schedule="constant", warmup=0, ema=0.0, accumulate=4, keep="best")


class PRiMeFlow(Model):
    """Conditional flow matching from noise to log-normalised expression.

    References
    ----------
    PRiMeFlow, algorithm 1 and equations 2 and 3.
    """

    name = "primeflow"
    Config = Config
    PRESETS = {
        "default": Preset(Config(), _FIT, "ours"),
        "quick": Preset(Config(), replace(_FIT, steps=800), "ours, 14,000 cells x 2,000 genes in minutes on a CPU"),
        "small": Preset(
            replace(_PAPER, hidden_dim=32, channel_mult=(1, 2, 2, 4), num_heads=2, attention_resolutions=(8,),
                    dropout=0.0, solver="ab2", steps=20),
            FitConfig(steps=1000, batch_size=64, lr=1e-3), "ours, the U-Net for a CPU"),
        "srivatsan20": Preset(_PAPER, replace(_PAPER_FIT, batch_size=54), "table 10; 4 devices there"),
        "norman19": Preset(
            replace(_PAPER, channel_mult=(1, 1, 2, 2, 4)), replace(_PAPER_FIT, batch_size=100),
            "table 11; 4 devices there"),
        "mlp-srivatsan20": Preset(
            replace(_MLP, hidden_dim=3072, dropout=0.0, n_layers_gene_expression=1, n_layers_conditions=1,
                    n_layers_time=3, n_layers_decoding=2, prob_unconditional=0.0, sigma=0.01),
            replace(_PAPER_FIT, lr=3.71e-5, weight_decay=4.05e-7, batch_size=512, accumulate=1), "table 12"),
        "mlp-norman19": Preset(
            replace(_MLP, hidden_dim=2048, dropout=0.1, n_layers_gene_expression=2, n_layers_conditions=3,
                    n_layers_time=5, n_layers_decoding=1, prob_unconditional=0.1, interpl_type="trigonometric",
                    sigma=0.1),
            replace(_PAPER_FIT, lr=8.56e-6, weight_decay=9.58e-7, batch_size=1024, accumulate=1), "table 13"),
    }  # fmt: skip

    takes_features = True

    def build(self) -> None:
        """Make the velocity network and the statistics that anchor it."""
        config, design = self.config, self.design
        levels = tuple(len(level) for level in design.covariates.values())
        sizes = Sizes(len(self.genes), design.code_width, levels, int(design.time is not None))
        self.velocity = VELOCITIES[config.velocity](config, sizes)
        self.register_buffer("gene_mean", torch.zeros(sizes.n_genes))
        self.register_buffer("gene_sd", torch.ones(sizes.n_genes))
        self.register_buffer("smallest", torch.zeros(()))
        anchored = config.anchor and config.velocity == "genewise"
        self.anchor = PseudobulkAnchor(len(levels), sizes.n_perturbations, sizes.n_genes) if anchored else None

    def prepare(self, dataset: CellDataset) -> None:
        """Mean and standard deviation of every gene, and the anchors, from training cells."""
        table, mean, variance, n_cells = dataset.pseudobulk("train")
        values = dataset.matrix[dataset.rows("train")].data
        self.smallest = torch.tensor(values[values > 0].min(initial=np.inf))
        if self.config.precondition:
            weight = n_cells[:, None] / n_cells.sum()
            overall = (mean * weight).sum(0)
            spread = ((variance + (mean - overall) ** 2) * weight).sum(0)
            self.gene_mean = torch.from_numpy(overall).float()
            self.gene_sd = torch.from_numpy(spread**0.5).float() + 1e-3
        if self.anchor is not None:
            tensors = [torch.from_numpy(array) for array in (mean, variance, n_cells)]
            self.anchor.fit(self.design.encode(table), *tensors)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean squared error of the velocity over cells and genes, algorithm 1; in validation also per bin of t."""
        config, x1 = self.config, batch.target
        n, g = x1.shape
        like = {"device": x1.device, "generator": generator}
        x0 = torch.randn(n, g, **like)
        t = torch.rand(n, **like) if self.training else (torch.arange(n, device=x1.device) + torch.rand(n, **like)) / n
        is_null = torch.rand(n, **like) < config.prob_unconditional
        point = PATHS[config.interpl_type](x0, x1, t, config.sigma, generator)
        genes, target = None, point.ut
        if self.training and 0 < config.loss_genes < g:
            genes = torch.randperm(g, **like)[: config.loss_genes]
            target = target.index_select(1, genes)
        v = self.evaluate(point.xt, t, batch.condition, is_null if config.prob_unconditional else None, genes)
        per_cell = (v - target).square().mean(dim=1)
        losses = {"total": per_cell.mean()}
        if not self.training:
            edges = [i * n // T_BINS for i in range(T_BINS + 1)]
            bins = pairwise(edges)
            losses |= {f"t{i}": per_cell[a:b].mean() for i, (a, b) in enumerate(bins) if a < b}
        return losses

    def evaluate(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        is_null: Tensor | None = None,
        genes: Tensor | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:
        """The velocity field: x (n, g), t (n,) -> (n, g), or (n, m) for chosen genes."""
        config = self.config
        features = None if self.anchor is None else self.anchor(condition, is_null)
        take = (lambda z: z) if genes is None else (lambda z: z.index_select(1, genes))
        if not config.precondition:
            return (network or self.velocity)(x, x, t, condition, is_null, features, genes)
        v, scale = gaussian_velocity(x, t, self.gene_mean, self.gene_sd, config.interpl_type, config.sigma)
        ratio = _standard(x, t, self.gene_mean, self.gene_sd, config)
        return take(v) + take(scale) * (network or self.velocity)(x, ratio, t, condition, is_null, features, genes)

    def sample(self, batch: Batch, generator: torch.Generator, config: SampleConfig) -> Tensor:
        """Integrate from noise to cells (n, g)."""
        if config.guidance != 1 and self.config.prob_unconditional == 0:
            logger.warning("the null condition of this model was never trained; guidance other than 1 has no meaning")
        noise = torch.randn(len(batch), len(self.genes), generator=generator).to(self.gene_mean.device)
        network = self.velocity
        if torch.is_autocast_enabled(noise.device.type):  # weights are cast once, not at every evaluation
            network = copy.deepcopy(network).to(torch.bfloat16)
        grid = config.grid or config.steps or self.config.steps
        cells = []
        for start in range(0, len(batch), config.batch_size):
            rows = slice(start, start + config.batch_size)
            condition = batch.condition[rows]

            def velocity(x: Tensor, t: Tensor, is_null: Tensor, condition=condition) -> Tensor:
                repeated = torch.arange(len(x), device=x.device) % len(condition)
                doubled = condition if len(x) == len(condition) else condition[repeated]
                time = torch.full((len(x),), float(t), device=x.device)
                return self.evaluate(x, time, doubled, is_null if is_null.any() else None, network=network)

            field = guided(velocity, config.guidance, config.interval)
            cells.append(solve(field, noise[rows], grid, config.solver or self.config.solver))
        x = torch.cat(cells)
        # No cell has a value between 0 and the smallest count. A flow leaves a haze there, which shifts the mean of
        # silent genes by many of their tiny standard errors.
        return torch.where(x < self.smallest / 2, 0.0, x) if self.config.hurdle else x


def _standard(x: Tensor, t: Tensor, mean: Tensor, sd: Tensor, config: Config) -> Tensor:
    """The point on the path, standardised by the Gaussian it would come from."""
    a, b, _, _ = COEFFICIENTS[config.interpl_type](t[:, None])
    return (x - b * mean) / (a**2 + (b * sd) ** 2 + config.sigma**2).sqrt()

"""Velocity networks of flows in gene space: the paper's U-Net, its MLP ablation, and a network without convolution.

All are built from the Config of PRiMeFlow, take the same :class:`Point` and give the velocity of all genes or of those
asked for. Whether it is preconditioned, and what it stands for, is decided outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Condition
from invirtuo.models.primeflow.anchor import PseudobulkAnchor
from invirtuo.models.primeflow.genewise import GenewiseVelocity
from invirtuo.models.primeflow.unet import UNet1d
from invirtuo.nn.embed import ConditionEncoder, sinusoids
from invirtuo.nn.mlp import MLP

__all__ = ["VELOCITIES", "Point", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a velocity network, from genes and Design."""

    n_genes: int
    n_perturbations: int
    levels: tuple[int, ...]
    n_continuous: int


class Point(NamedTuple):
    """Where a velocity network is asked, for n cells."""

    x: Tensor  # (n, g)
    cell: Tensor  # (n, g), x in the scale of networks that read all genes of a cell
    t: Tensor  # (n,)
    condition: Condition
    is_null: Tensor | None = None  # (n,) bool, cells whose condition is the null condition
    anchors: Callable[[Tensor | None], Tensor] | None = None  # features (n, m, f) of the condition for genes, or all
    genes: Tensor | None = None  # (m,), numbers of the genes that are asked for; None for all
    log_depth: Tensor | None = None  # (n,), log of the depth over its training median


def _condition_encoder(config: Any, sizes: Sizes, width: int, **options: Any) -> ConditionEncoder:
    """The encoder of conditions that all networks have, of their own width."""
    levels, depth = list(sizes.levels), config.n_layers_conditions
    return ConditionEncoder(
        sizes.n_perturbations, levels, sizes.n_continuous, width, depth, config.covariate_scale, **options
    )


class _Embedding(nn.Module):
    """Time and condition encoders, of one width."""

    def __init__(self, config: Any, sizes: Sizes, d_time: int, width: int):
        super().__init__()
        self.d_time, self.time_scale = d_time, config.time_scale
        self.time = MLP(d_time, width, config.n_layers_time - 1, n_out=width)
        self.condition = _condition_encoder(config, sizes, width)
        self.depth = MLP(1, width, 1, n_out=width) if config.depth else None

    def forward(self, at: Point) -> tuple[Tensor, Tensor]:
        """Embeddings of time (and depth) and of the condition, (n, width) each."""
        dtype = self.time[0].weight.dtype
        time = self.time(sinusoids(at.t, self.d_time, self.time_scale).to(dtype))
        if self.depth is not None:
            time = time + self.depth(at.log_depth[:, None].to(dtype))
        return time, self.condition(at.condition, at.is_null)


class UNetVelocity(nn.Module):
    """The paper's field, equation 3: U-Net over genes on Enc(x_t) + Emb(G), Enc(c), Enc(t).

    Genes are padded on the right to the next length that the U-Net can halve; padded positions share one embedding
    row, hold 0, and never reach loss or output.
    """

    def __init__(self, config: Any, sizes: Sizes):
        super().__init__()
        d = config.hidden_dim
        self.value_scale, self.width = config.value_scale, d

        # embeddings of time and condition, of values, of genes, and of what pseudobulks predict
        self.embed = _Embedding(config, sizes, d, 4 * d)
        self.values = MLP(d, d, config.n_layers_gene_expression - 1, n_out=d)
        self.genes = nn.Embedding(sizes.n_genes + 1, d)
        nn.init.normal_(self.genes.weight, std=0.02)
        self.anchors = nn.Linear(PseudobulkAnchor.n_features, d) if config.anchor else None

        # a line as long as the U-Net can halve
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
        )
        self.n_genes = sizes.n_genes
        self.length = -(-sizes.n_genes // self.unet.multiple) * self.unet.multiple

    def forward(self, at: Point) -> Tensor:
        time, encoded = self.embed(at)

        # Enc(x_t) + Emb(G) at every position of the line
        numbers = torch.arange(self.n_genes, device=at.x.device)
        rows = self.genes(F.pad(numbers, (0, self.length - self.n_genes), value=self.n_genes))
        h = self.values(sinusoids(self._padded(at.x), self.width, self.value_scale).to(rows.dtype))
        h = h + rows.to(h.dtype)
        if self.anchors is not None:
            h = h + self.anchors(self._padded(at.anchors(None)).to(h.dtype))

        v = self.unet(h, (time + encoded).to(h.dtype))[:, : self.n_genes, 0].float()
        return v if at.genes is None else v.index_select(1, at.genes)

    def _padded(self, values: Tensor) -> Tensor:
        """Values (n, g, ...) of the genes, with zeros on the right to the length of the line."""
        return F.pad(values, (*(0, 0) * (values.ndim - 2), 0, self.length - self.n_genes))


class MLPVelocity(nn.Module):
    """The ablation PRiMeFlow-MLP: three input MLPs, concatenated, and a decoding MLP."""

    def __init__(self, config: Any, sizes: Sizes):
        super().__init__()
        width, dropout = config.hidden_dim, config.dropout
        self.d_time, self.time_scale = min(width, 256), config.time_scale
        n_in = sizes.n_genes * (1 + PseudobulkAnchor.n_features * config.anchor) + config.depth
        self.values = MLP(n_in, width, config.n_layers_gene_expression, dropout=dropout)
        self.time = MLP(self.d_time, width, config.n_layers_time, dropout=dropout)
        self.condition = _condition_encoder(config, sizes, width, activated=True, dropout=dropout)
        self.decode = MLP(3 * width, width, config.n_layers_decoding, n_out=sizes.n_genes, dropout=dropout)

    def forward(self, at: Point) -> Tensor:
        dtype = self.values[0].weight.dtype
        cell = [at.cell]
        cell += [] if at.anchors is None else [at.anchors(None).flatten(1)]
        cell += [] if at.log_depth is None else [at.log_depth[:, None]]
        time = self.time(sinusoids(at.t, self.d_time, self.time_scale).to(dtype))
        encoded = [self.values(torch.cat(cell, dim=1).to(dtype)), self.condition(at.condition, at.is_null), time]
        v = self.decode(torch.cat([code.to(time.dtype) for code in encoded], dim=1)).float()
        return v if at.genes is None else v.index_select(1, at.genes)


class GenewiseField(nn.Module):
    """Ours: a denoiser shared by all genes, with an embedding of each and cheap global context."""

    def __init__(self, config: Any, sizes: Sizes):
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

    def forward(self, at: Point) -> Tensor:
        time, encoded = self.embed(at)
        features = None if at.anchors is None else at.anchors(at.genes)
        return self.field(at.x, at.cell, F.silu(time + encoded), features, at.genes)


VELOCITIES = {"unet": UNetVelocity, "mlp": MLPVelocity, "genewise": GenewiseField}

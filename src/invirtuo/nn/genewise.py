"""A velocity field without convolution: one small network shared by all genes, and a cheap view of the whole cell."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.nn.embed import sinusoids
from invirtuo.nn.mlp import ModulatedBlock

__all__ = ["GenewiseVelocity"]


class GenewiseVelocity(nn.Module):
    """Per-gene denoiser with global context.

    For every gene, a shared MLP sees sinusoids of the gene's own value, a learned gene embedding, features of the
    condition for that gene, and a few context numbers. These come from one MLP that reads the whole cell, modulated by
    time and condition. The read-out is a vector per gene, zero at the start, so that a new network gives exactly 0.
    Nothing depends on the order of the genes, and any subset of genes can be evaluated alone.

    Parameters
    ----------
    n_genes
        g
    d_embedding
        Width of the embedding of time and condition.
    n_features
        Condition features per gene (0 for none).
    width
        Width of the per-gene network.
    n_context
        Context numbers per gene.
    cell_width, n_blocks
        Width and residual blocks of the network that reads the whole cell.
    n_sinusoids
        Sinusoidal features of a value.
    value_scale
        Scale of the values inside the sinusoids.
    dropout
        Dropout in the network that reads the whole cell.
    identity
        Give every gene an embedding and a read-out of its own; otherwise all genes share one of each.
    """

    def __init__(
        self,
        n_genes: int,
        d_embedding: int,
        *,
        n_features: int = 0,
        width: int = 64,
        n_context: int = 8,
        cell_width: int = 512,
        n_blocks: int = 3,
        n_sinusoids: int = 32,
        value_scale: float = 10.0,
        dropout: float = 0.0,
        identity: bool = True,
    ):
        super().__init__()
        self.n_sinusoids, self.value_scale = n_sinusoids, value_scale
        self.read = nn.Linear(n_genes, cell_width)
        self.blocks = nn.ModuleList(ModulatedBlock(cell_width, d_embedding, dropout) for _ in range(n_blocks))
        self.context = nn.Parameter(torch.randn(n_genes, n_context, cell_width) / math.sqrt(cell_width))
        self.context_bias = nn.Parameter(torch.zeros(n_genes, n_context))
        self.first = nn.Linear(n_sinusoids + n_features + n_context, width)
        rows = n_genes if identity else 1
        self.genes = nn.Parameter(torch.randn(rows, width) * 0.3)
        self.shift_first = nn.Linear(d_embedding, width)
        self.second = nn.Linear(width, width)
        self.modulate = nn.Linear(d_embedding, 2 * width)
        self.read_out = nn.Parameter(torch.zeros(rows, width))
        self.bias_out = nn.Parameter(torch.zeros(rows))

    def forward(
        self,
        values: Tensor,
        cell: Tensor,
        embedding: Tensor,
        features: Tensor | None = None,
        genes: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the field.

        Parameters
        ----------
        values
            (n, g), point on the path.
        cell
            (n, g), the same point in the scale in which the whole cell is read.
        embedding
            (n, d_embedding), time and condition, after the activation.
        features
            (n, g, n_features), condition features of each gene.
        genes
            (m,), numbers of the genes to evaluate; None for all.

        Returns
        -------
        (n, m)
        """
        hidden = self.read(cell)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        hidden = F.silu(hidden)

        def take(x: Tensor) -> Tensor:
            return x if genes is None or len(x) == 1 else x.index_select(0, genes)

        context_weight = take(self.context)
        m, n_context, width = context_weight.shape
        context = F.linear(hidden, context_weight.reshape(-1, width), take(self.context_bias).reshape(-1))
        own = values if genes is None else values.index_select(1, genes)
        context = context.view(len(own), m, n_context)
        parts = [sinusoids(own, self.n_sinusoids, self.value_scale).to(context.dtype), context]
        if features is not None:
            features = features if genes is None else features.index_select(1, genes)
            parts.append(features.to(context.dtype))
        z = self.first(torch.cat(parts, dim=-1))
        z = F.silu(z + take(self.genes).to(z.dtype) + self.shift_first(embedding).to(z.dtype)[:, None])
        scale, shift = self.modulate(embedding).to(z.dtype)[:, None].chunk(2, dim=-1)
        z = F.silu(self.second(z) * (1 + scale) + shift)
        return (z * take(self.read_out).to(z.dtype)).sum(-1).float() + take(self.bias_out)

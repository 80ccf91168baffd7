"""A velocity field without convolution: one small network shared by all genes, and a cheap view of the whole cell."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.models.primeflow.shared import shared_network
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
    ):
        super().__init__()
        self.value_scale = value_scale
        self.read = nn.Linear(n_genes, cell_width)
        self.blocks = nn.ModuleList(ModulatedBlock(cell_width, d_embedding, dropout) for _ in range(n_blocks))
        self.context = nn.Parameter(torch.randn(n_genes, n_context, cell_width) / math.sqrt(cell_width))
        self.context_bias = nn.Parameter(torch.zeros(n_genes, n_context))
        self.first = nn.Linear(n_sinusoids + n_features + n_context, width)
        self.genes = nn.Parameter(torch.randn(n_genes, width) * 0.3)
        self.shift_first = nn.Linear(d_embedding, width)
        self.second = nn.Linear(width, width)
        self.modulate = nn.Linear(d_embedding, 2 * width)
        self.read_out = nn.Parameter(torch.zeros(n_genes, width))
        self.bias_out = nn.Parameter(torch.zeros(n_genes))

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
            (n, m, n_features), condition features of the genes to evaluate.
        genes
            (m,), their numbers; None for all.

        Returns
        -------
        (n, m)
        """
        # the whole cell
        hidden = self.read(cell)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        hidden = F.silu(hidden)
        dtype = hidden.dtype

        # what every gene sees beside its own value
        weight = self._chosen(self.context, genes).reshape(-1, hidden.shape[1])
        bias = self._chosen(self.context_bias, genes).reshape(-1)
        own = values if genes is None else values.index_select(1, genes)
        rest = F.linear(hidden, weight, bias).view(*own.shape, -1)
        if features is not None:
            rest = torch.cat([rest, features.to(dtype)], dim=-1)

        # scale and shift of every cell go into its own weights: a pass over all activations less
        factor, offset = self.modulate(embedding).to(dtype).chunk(2, dim=-1)
        factor = 1 + factor
        second = (self.second.weight.to(dtype) * factor[:, :, None]).transpose(1, 2)
        second_bias = self.second.bias.to(dtype) * factor + offset
        per_cell = (self.shift_first(embedding).to(dtype), second, second_bias)
        first = (self.first.weight.to(dtype), self.first.bias.to(dtype))
        per_gene = (self._chosen(self.genes, genes).to(dtype), self._chosen(self.read_out, genes).to(dtype))
        out = shared_network(own, rest, *per_cell, *first, *per_gene, scale=self.value_scale)
        return out.float() + self._chosen(self.bias_out, genes)

    @staticmethod
    def _chosen(x: Tensor, genes: Tensor | None) -> Tensor:
        """Rows of the genes that are asked for."""
        return x if genes is None else x.index_select(0, genes)

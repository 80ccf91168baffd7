"""A velocity field without convolution: one small network shared by all genes, and a cheap view of the whole cell."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.nn.embed import sinusoids
from invirtuo.nn.mlp import ModulatedBlock

__all__ = ["GenewiseVelocity"]

TILE = 32_768  # values that go through the shared network at once without gradients: its activations stay in caches


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
        self.n_sinusoids, self.value_scale = n_sinusoids, value_scale
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
        own = values if genes is None else values.index_select(1, genes)
        if features is not None and genes is not None:
            features = features.index_select(1, genes)
        weight = self._chosen(self.context, genes).reshape(-1, hidden.shape[1])
        bias = self._chosen(self.context_bias, genes).reshape(-1)
        shift = self.shift_first(embedding)
        factor, offset = self.modulate(embedding).chunk(2, dim=-1)
        in_tiles = not torch.is_grad_enabled() and own.device.type == "cpu"  # an accelerator wants one large piece
        lookup = self._lookup(own, hidden.dtype) if in_tiles else None
        n_rows = max(TILE // own.shape[1], 1) if in_tiles else len(own)
        outputs = []
        for start in range(0, len(own), n_rows):
            rows = slice(start, start + n_rows)
            context = F.linear(hidden[rows], weight, bias)
            given = None if features is None else features[rows]
            outputs.append(
                self._per_gene(own[rows], context, given, shift[rows], 1 + factor[rows], offset[rows], genes, lookup)
            )
        return torch.cat(outputs) + self._chosen(self.bias_out, genes)

    def _per_gene(
        self,
        own: Tensor,
        context: Tensor,
        features: Tensor | None,
        shift: Tensor,
        factor: Tensor,
        offset: Tensor,
        genes: Tensor | None,
        lookup: Any,
    ) -> Tensor:
        """The network shared by all genes: values (n, m) and context (n, m c) -> (n, m)."""
        n, m = own.shape
        inplace, dtype, k = not torch.is_grad_enabled(), context.dtype, self.n_sinusoids
        rest = context.view(n * m, -1)
        if features is not None:
            rest = torch.cat([rest, features.reshape(n * m, -1).to(dtype)], dim=1)
        if lookup is None:
            waves = sinusoids(own, k, self.value_scale).view(n * m, k).to(dtype)
            z = self.first(torch.cat([waves, rest], dim=1))
        else:
            table, low, resolution = lookup
            place = ((own.reshape(-1) - low) * resolution + 0.5).int()
            z = F.embedding(place, table).add_(F.linear(rest, self.first.weight[:, k:]))
        z = z.view(n, m, -1)
        who = self._chosen(self.genes, genes).to(z.dtype)
        z = z.add_(who).add_(shift.to(z.dtype)[:, None]) if inplace else z + (who + shift.to(z.dtype)[:, None])
        z = F.silu(z, inplace=inplace)
        # scale and shift of every cell go into its own weights: a pass over all activations less
        weight = (self.second.weight.to(z.dtype) * factor.to(z.dtype)[:, :, None]).transpose(1, 2)
        bias = self.second.bias.to(z.dtype) * factor.to(z.dtype) + offset.to(z.dtype)
        z = F.silu(torch.baddbmm(bias[:, None], z, weight), inplace=inplace)
        return (z * self._chosen(self.read_out, genes).to(z.dtype)).sum(-1).float()

    def _lookup(self, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """What the first layer makes of a value, tabulated: its rows, the lowest value, rows per unit; bf16 only.

        Between two rows the fastest sinusoid turns by 0.02, half of which is less than bf16 tells apart near 1.
        """
        if dtype != torch.bfloat16 or not values.numel():
            return None
        resolution = 50.0 * self.value_scale
        low, high = values.min(), values.max()
        n_rows = int((high - low) * resolution) + 2
        if n_rows > values.numel():
            return None
        grid = low + torch.arange(n_rows, device=values.device) / resolution
        weight = self.first.weight[:, : self.n_sinusoids]
        return (
            F.linear(
                sinusoids(grid, self.n_sinusoids, self.value_scale).to(dtype),
                weight.to(dtype),
                self.first.bias.to(dtype),
            ),
            low,
            resolution,
        )

    @staticmethod
    def _chosen(x: Tensor, genes: Tensor | None) -> Tensor:
        """Rows of the genes that are asked for; one row stands for all."""
        return x if genes is None or len(x) == 1 else x.index_select(0, genes)

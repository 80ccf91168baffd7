"""The network shared by all genes of the gene-wise velocity, in tiles whose activations stay in the caches of a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from invirtuo.nn.embed import sinusoids

__all__ = ["shared_network"]

TILE = 32_768  # values of a tile


def shared_network(
    values: Tensor,
    rest: Tensor,
    shift: Tensor,
    second: Tensor,
    second_bias: Tensor,
    first: Tensor,
    first_bias: Tensor,
    who: Tensor,
    read_out: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Two layers of width w on every gene of every cell, and a read-out of the gene's own.

    ::

        z1 = first [sinusoids(scale value), rest] + first_bias + who + shift
        z2 = second silu(z1) + second_bias
        out = read_out . silu(z2)

    Parameters
    ----------
    values
        (n, m)
    rest
        (n, m, r), what else is known of a gene of a cell.
    shift, second, second_bias
        Of every cell: (n, w), (n, w, w), (n, w).
    first, first_bias
        (w, k + r) and (w,), where k is the number of sinusoids.
    who, read_out
        Of every gene, (m, w).
    scale
        Scale of the values inside the sinusoids.

    Returns
    -------
    (n, m)
    """
    k = first.shape[1] - rest.shape[2]
    weights = (first, first_bias, who, read_out)

    # an accelerator and a compiler want one large piece
    if values.device.type != "cpu" or values.requires_grad or torch.compiler.is_compiling():
        waves = sinusoids(values, k, scale).to(first.dtype)
        z = F.linear(torch.cat([waves, rest], dim=-1), first, first_bias)
        z = F.silu(z + (who + shift[:, None]))
        z = F.silu(torch.baddbmm(second_bias[:, None], z, second))
        return (z * read_out).sum(-1)

    lookup = _Waves(values, k, scale, first, first_bias)
    n_rows = max(TILE // values.shape[1], 1)
    per_cell = (x.split(n_rows) for x in (values, rest, shift, second, second_bias))
    return torch.cat([_Tile.apply(lookup, *tile, *weights) for tile in zip(*per_cell, strict=True)])


class _Waves:
    """Sinusoids of values and what the first layer makes of them, looked up in tables where bf16 allows.

    Between two rows of the tables the fastest sinusoid turns by 0.02: half of it is less than bf16 tells near 1.
    """

    def __init__(self, values: Tensor, k: int, scale: float, first: Tensor, bias: Tensor):
        self.k, self.scale = k, scale
        self.weight, self.bias = first.detach()[:, :k], bias.detach()
        self.table: Tensor | None = None
        if first.dtype != torch.bfloat16 or not values.numel():
            return

        # a table pays while it has fewer rows than there are values, and cannot be made where one is not finite
        self.low, high = (float(x) for x in values.aminmax())
        self.resolution = 50.0 * scale
        n_rows = (high - self.low) * self.resolution + 2
        if n_rows < values.numel():
            self.table = self._sinusoids(self.low + torch.arange(int(n_rows)) / self.resolution)
            self.layer = F.linear(self.table, self.weight, self.bias)

    def first_layer(self, values: Tensor) -> Tensor:
        """(n, m) -> (n m, w), without the rest."""
        if self.table is None:
            return F.linear(self._sinusoids(values.reshape(-1)), self.weight, self.bias)
        return F.embedding(self._places(values), self.layer)

    def __call__(self, values: Tensor) -> Tensor:
        """(n, m) -> (n m, k)."""
        if self.table is None:
            return self._sinusoids(values.reshape(-1))
        return F.embedding(self._places(values), self.table)

    def _sinusoids(self, values: Tensor) -> Tensor:
        return sinusoids(values, self.k, self.scale).to(self.weight.dtype)

    def _places(self, values: Tensor) -> Tensor:
        return ((values.reshape(-1) - self.low) * self.resolution + 0.5).int()


class _Tile(torch.autograd.Function):
    """:func:`shared_network` of cells so few that activations stay in caches, with its derivative written out.

    Autograd would pass over activations of all cells, far larger than the caches, about three times as often.
    """

    @staticmethod
    def forward(ctx: Any, waves: _Waves, *inputs: Tensor) -> Tensor:
        values, rest, shift, second, second_bias, first, _, who, read_out = inputs
        of_rest = first[:, waves.k :].t()
        z1 = waves.first_layer(values)
        torch.addmm(z1, rest.flatten(0, 1), of_rest, out=z1)
        z1 = z1.view(*values.shape, -1)
        z1.add_(who).add_(shift[:, None])
        if not any(ctx.needs_input_grad):
            z2 = torch.baddbmm(second_bias[:, None], F.silu(z1, inplace=True), second)
            return F.silu(z2, inplace=True).mul_(read_out).sum(-1)

        s1 = z1.sigmoid()
        a1 = z1.mul_(s1)
        z2 = torch.baddbmm(second_bias[:, None], a1, second)
        s2 = z2.sigmoid()
        a2 = z2.mul_(s2)
        ctx.waves = waves
        ctx.save_for_backward(values, rest, second, first, read_out, a1, s1, a2, s2)
        return (a2 * read_out).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, rest, second, first, read_out, a1, s1, a2, s2 = ctx.saved_tensors
        gradient = gradients[0][:, :, None]
        one = torch.ones((), dtype=a1.dtype)

        # read-out and second layer; the derivative of silu(z) = z s is s + z s (1 - s)
        d_read_out = (a2 * gradient).sum(0)
        d2 = torch.lerp(a2, one, s2).mul_(read_out).mul_(gradient)
        d_second = torch.bmm(a1.transpose(1, 2), d2)
        d_second_bias = d2.sum(1)

        # first layer
        d1 = torch.lerp(a1, one, s1).mul_(torch.bmm(d2, second.transpose(1, 2)))
        d_who, d_shift = d1.sum(0), d1.sum(1)
        d1 = d1.flatten(0, 1)
        d_rest = d1 @ first[:, ctx.waves.k :]
        d_first = torch.cat([d1.t() @ ctx.waves(values), d1.t() @ rest.flatten(0, 1)], dim=1)
        return (
            None,
            None,
            d_rest.view_as(rest),
            d_shift,
            d_second,
            d_second_bias,
            d_first,
            d_shift.sum(0),
            d_who,
            d_read_out,
        )

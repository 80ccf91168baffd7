"""The network shared by all genes of the gene-wise velocity, in tiles whose activations stay in the caches of a CPU."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from invirtuo.nn.embed import sinusoids
from invirtuo.threads import in_threads

__all__ = ["shared_network"]

TILE = 32_768  # values of a tile
RESOLUTION = (
    50.0  # rows of a table per unit of scale x value: the fastest sinusoid turns by 0.02, twice what bf16 tells
)
BLOCK = 256  # rows of a table come in blocks, so that the next batch finds it made

silu_backward = torch.ops.aten.silu_backward


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
    # an accelerator and a compiler want one large piece
    if values.device.type != "cpu" or values.requires_grad or torch.compiler.is_compiling():
        waves = sinusoids(values, first.shape[1] - rest.shape[2], scale).to(first.dtype)
        z = F.linear(torch.cat([waves, rest], dim=-1), first, first_bias)
        z = F.silu(z + (who + shift[:, None]))
        z = F.silu(torch.baddbmm(second_bias[:, None], z, second))
        return (z * read_out).sum(-1)
    out: Tensor = _Tiled.apply(scale, values, rest, shift, second, second_bias, first, first_bias, who, read_out)
    return out


class _Waves:
    """Sinusoids of values and what the first layer makes of them, looked up in tables where bf16 allows."""

    def __init__(self, values: Tensor, k: int, scale: float, first: Tensor, bias: Tensor):
        self.k, self.scale = k, scale
        self.weight, self.bias = first[:, :k], bias
        self.table: Tensor | None = None
        if first.dtype != torch.bfloat16 or not values.numel():
            return

        # a table pays while it has fewer rows than there are values, and cannot be made where one is not finite
        self.resolution = RESOLUTION * scale
        low, high = (float(x) * self.resolution for x in values.aminmax())
        if high - low < values.numel():
            self.low = math.floor(low / BLOCK) * BLOCK
            self.table = _table(self.low, math.ceil(high / BLOCK) * BLOCK + 1, k, scale)
            self.layer = F.linear(self.table, self.weight, self.bias)

    def first_layer(self, values: Tensor) -> Tensor:
        """(n, m) -> (n, m, w), without the rest."""
        if self.table is None:
            return F.linear(self._sinusoids(values), self.weight, self.bias)
        return F.embedding(self._places(values), self.layer)

    def __call__(self, values: Tensor) -> Tensor:
        """(n, m) -> (n, m, k)."""
        if self.table is None:
            return self._sinusoids(values)
        return F.embedding(self._places(values), self.table)

    def _sinusoids(self, values: Tensor) -> Tensor:
        return sinusoids(values, self.k, self.scale).to(self.weight.dtype)

    def _places(self, values: Tensor) -> Tensor:
        return (values * self.resolution + (0.5 - self.low)).int()


@lru_cache(maxsize=8)
def _table(low: int, high: int, k: int, scale: float) -> Tensor:
    """Sinusoids of the values between two places, the same for every batch; (high - low, k)."""
    return sinusoids(torch.arange(low, high) / (RESOLUTION * scale), k, scale).to(torch.bfloat16)


class _Tiled(torch.autograd.Function):
    """:func:`shared_network`, cells so few at a time that activations stay in caches, with its derivative written out.

    Autograd would pass over activations of all cells, far larger than the caches, about three times as often. Tiles
    have threads of their own.
    """

    @staticmethod
    def forward(ctx: Any, scale: float, *inputs: Tensor) -> Tensor:
        values, rest, shift, second, second_bias, first, first_bias, who, read_out = inputs
        keeps = any(ctx.needs_input_grad)
        waves = _Waves(values, first.shape[1] - rest.shape[2], scale, first, first_bias)
        of_rest = first[:, waves.k :].t()

        def tile(rows: slice) -> tuple[Tensor, ...]:
            z1 = who + shift[rows, None]
            z1.flatten(0, 1).addmm_(rest[rows].flatten(0, 1), of_rest)
            z1.add_(waves.first_layer(values[rows]))
            a1 = F.silu(z1, inplace=not keeps)
            z2 = torch.baddbmm(second_bias[rows, None], a1, second[rows])
            a2 = F.silu(z2, inplace=not keeps)
            out = torch.bmm(a2.transpose(0, 1), read_out[:, :, None])[:, :, 0].t()
            return (out, z1, a1, z2, a2) if keeps else (out,)

        tiles = in_threads(tile, _tiles(values))
        if keeps:
            ctx.waves, ctx.activations = waves, [activations for _, *activations in tiles]
            ctx.save_for_backward(values, rest, second, first, read_out)
        return torch.cat([out for out, *_ in tiles])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, rest, second, first, read_out = ctx.saved_tensors
        waves, gradient = ctx.waves, gradients[0]

        def tile(which: tuple[slice, list[Tensor]]) -> tuple[Tensor, ...]:
            rows, (z1, a1, z2, a2) = which
            own = gradient[rows]

            # read-out and second layer
            d_read_out = torch.bmm(own.t()[:, None], a2.transpose(0, 1))[:, 0]
            d2 = silu_backward(read_out * own[:, :, None], z2)
            d_second = torch.bmm(a1.transpose(1, 2), d2)

            # first layer
            d1 = silu_backward(torch.bmm(d2, second[rows].transpose(1, 2)), z1)
            d_rest = d1 @ first[:, waves.k :]
            inputs = waves(values[rows]), rest[rows]
            d_first = torch.cat([each.flatten(0, 1).t() @ d1.flatten(0, 1) for each in inputs])
            return d_rest, d1.sum(1), d_second, d2.sum(1), d_first, d1.sum(0), d_read_out

        of_tiles = in_threads(tile, zip(_tiles(values), ctx.activations, strict=True))
        parts = list(zip(*of_tiles, strict=True))
        d_rest, d_shift, d_second, d_second_bias = map(torch.cat, parts[:4])
        d_first, d_who, d_read_out = (torch.stack(part).sum(0) for part in parts[4:])
        of_cells = d_rest, d_shift, d_second, d_second_bias
        return None, None, *of_cells, d_first.t(), d_shift.sum(0), d_who, d_read_out


def _tiles(values: Tensor) -> list[slice]:
    """Rows (cells) of every tile."""
    n_rows = max(TILE // max(values.shape[1], 1), 1)
    return [slice(start, start + n_rows) for start in range(0, len(values), n_rows)]

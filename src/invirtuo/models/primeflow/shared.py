"""The network shared by all genes of the gene-wise velocity, in tiles whose activations stay in the caches of a CPU."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from invirtuo.nn.embed import sinusoids
from invirtuo.threads import in_threads

__all__ = ["shared_network"]

TILE = 32_768  # values of a tile
RESOLUTION = 50.0  # rows of a table per unit of scale x value: half of 0.02 is less than bf16 tells near 1
BLOCK = 256  # rows of a table come in blocks, so that the next batch finds it made


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

    Autograd would pass over activations of all cells, far larger than the caches, several times as often. Tiles have
    threads of their own.
    """

    @staticmethod
    def forward(ctx: Any, scale: float, *inputs: Tensor) -> Tensor:
        from invirtuo.models.primeflow import fused

        values, rest, shift, second, second_bias, first, first_bias, who, read_out = inputs
        keeps = any(ctx.needs_input_grad)
        waves = _Waves(values, first.shape[1] - rest.shape[2], scale, first, first_bias)
        of_rest = first[:, waves.k :].t()
        out = torch.empty(values.shape, dtype=torch.promote_types(first.dtype, torch.float32))

        def tile(rows: slice) -> tuple[Tensor, ...]:
            z1 = waves.first_layer(values[rows])
            z1.flatten(0, 1).addmm_(rest[rows].flatten(0, 1), of_rest)
            a1 = torch.empty_like(z1)
            fused.first(*map(_array, (z1, who, shift[rows], a1)))
            z2 = torch.baddbmm(second_bias[rows, None], a1, second[rows])
            fused.second(*map(_array, (z2, read_out, out[rows])))
            return (z1, a1, z2) if keeps else ()

        activations = in_threads(tile, _tiles(values))
        if keeps:
            ctx.waves, ctx.activations = waves, activations
            ctx.save_for_backward(values, rest, second, first, read_out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from invirtuo.models.primeflow import fused

        values, rest, second, first, read_out = ctx.saved_tensors
        waves, d_out = ctx.waves, gradients[0].contiguous()
        (n, m), w = values.shape, len(first)
        d_shift, d_second_bias = torch.zeros(2, n, w, dtype=d_out.dtype)

        def tile(which: tuple[slice, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            rows, (z1, a1, z2) = which
            d_who, d_read_out = torch.zeros(2, m, w, dtype=d_out.dtype)

            # read-out and second layer
            d2 = torch.empty_like(z2)
            fused.back_second(*map(_array, (z2, read_out, d_out[rows], d2, d_read_out, d_second_bias[rows])))
            d_second = torch.bmm(a1.transpose(1, 2), d2)

            # first layer
            d1 = torch.bmm(d2, second[rows].transpose(1, 2))
            fused.back_first(*map(_array, (z1, d1, d_who, d_shift[rows])))
            d_rest = d1 @ first[:, waves.k :]
            inputs = waves(values[rows]), rest[rows]
            d_first = torch.cat([each.flatten(0, 1).t() @ d1.flatten(0, 1) for each in inputs])
            return d_rest, d_second, d_first, d_who, d_read_out

        of_tiles = in_threads(tile, zip(_tiles(values), ctx.activations, strict=True))
        parts = list(zip(*of_tiles, strict=True))
        d_rest, d_second = map(torch.cat, parts[:2])
        d_first, d_who, d_read_out = (torch.stack(part).sum(0) for part in parts[2:])
        return (
            None,
            None,
            d_rest,
            d_shift,
            d_second,
            d_second_bias,
            d_first.t(),
            d_shift.sum(0),
            d_who,
            d_read_out,
        )


def _array(x: Tensor) -> np.ndarray:
    """The memory of a tensor; bf16, which numpy does not have, as its bits."""
    x = x.detach()
    # not x.numpy(), after which PyTorch may not free what it shards over devices
    return np.from_dlpack(x.view(torch.uint16) if x.dtype == torch.bfloat16 else x)


def _tiles(values: Tensor) -> list[slice]:
    """Rows (cells) of every tile."""
    n_rows = max(TILE // max(values.shape[1], 1), 1)
    return [slice(start, start + n_rows) for start in range(0, len(values), n_rows)]

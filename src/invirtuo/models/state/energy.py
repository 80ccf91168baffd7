"""The energy distance between sets of cells, as a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["energy_loss"]


def energy_loss(predicted: Tensor, real: Tensor) -> Tensor:
    """Squared MMD of b pairs of sets with the kernel ``-|u - v|``: ``2 E|x - y| - E|x - x'| - E|y - y'|``.

    Means are over all pairs, self-pairs too, so that it is 0 for equal sets and above 0 for others. The "energy" of
    geomloss is half of it.

    Parameters
    ----------
    predicted, real
        (b, s, d) and (b, r, d); rounded to float32 at least, with gradient 0 at distance 0.

    Returns
    -------
    (b,)

    References
    ----------
    Adduri et al. 2025, equation 18.
    """
    n = predicted.shape[1]
    with torch.autocast(predicted.device.type, enabled=False):
        x, y = (part.float() if part.dtype != torch.float64 else part for part in (predicted, real))
        distance = _distances(x, y)
        between, within, real_within = (
            block.mean(dim=(1, 2)) for block in (distance[:, :n, n:], distance[:, :n, :n], distance[:, n:, n:])
        )
        return 2 * between - within - real_within


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances among the rows of x (b, s, d) and y (b, r, d): (b, s + r, s + r).

    On a CPU they come from products, which is several times faster than from differences.
    """
    if x.device.type == "cpu":
        return _ByProducts.apply(x, y)
    z = torch.cat([x, y], dim=1)
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


class _ByProducts(torch.autograd.Function):
    """Distances as roots of a.a + b.b - 2 a.b, summed in float64; equal rows have distance and gradient 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """x (b, s, d), y (b, r, d) -> (b, s + r, s + r)."""
        z = torch.cat([x, y], dim=1)
        exact = z.double()
        squares = exact @ exact.mT
        own = squares.diagonal(dim1=1, dim2=2)
        sums = own[:, :, None] + own[:, None]
        squares = sums - 2 * squares
        squares *= squares > 1e-12 * sums  # below it, rows are equal as far as float64 can tell
        distance = squares.sqrt().to(x.dtype)
        ctx.n = x.shape[1]
        ctx.save_for_backward(z, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Sums of unit vectors between the rows, weighted by the gradient (b, s + r, s + r)."""
        z, distance = ctx.saved_tensors
        weight = torch.where(distance > 0, (gradient + gradient.mT) / distance, 0)
        rows = (slice(0, ctx.n), slice(ctx.n, None))
        return tuple(
            z[:, own] * weight[:, own].sum(dim=2, keepdim=True) - weight[:, own] @ z if needed else None
            for own, needed in zip(rows, ctx.needs_input_grad, strict=True)
        )

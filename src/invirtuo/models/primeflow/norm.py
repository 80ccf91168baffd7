"""Group norm, shift and SiLU in one differentiable step for channels-last tensors.

On CPUs the framework's group norm in channels-last memory walks through a few channels at a time; with 1-8 channels
per group it costs several times what the convolutions cost. Here statistics are sums per channel, everything between
the sums is one fused multiply-add per element, and nothing but the input is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """SiLU(GroupNorm(x + shift)).

    Parameters
    ----------
    x
        (n, m, c), contiguous; m positions, c channels.
    weight, bias
        (c,), scale and offset after the norm.
    groups
        Number of groups of channels; statistics are in fp32.
    shift
        (n, c), added to every position before the norm, or None.
    silu
        Whether the activation follows.

    Returns
    -------
    (n, m, c)
    """
    if shift is None:
        shift = x.new_zeros(len(x), x.shape[2], dtype=torch.float32)
    if torch.is_grad_enabled():
        return _GroupNormSiLU.apply(x, weight, bias, shift, groups, eps, silu)
    _, scale, offset = _affine(x, weight.float(), bias.float(), shift.float(), groups, eps)
    z = _multiply_add(x, scale, offset)
    return F.silu(z, inplace=True) if silu else z


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        moments, scale, offset = _affine(x, weight.float(), bias.float(), shift.float(), groups, eps)
        z = _multiply_add(x, scale, offset)
        ctx.save_for_backward(x, weight, shift, *moments, scale, offset)
        ctx.groups, ctx.silu, ctx.bias_dtype = groups, silu, bias.dtype
        return F.silu(z, inplace=True) if silu else z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shift, total, mean, rstd, scale, offset = ctx.saved_tensors
        (n, m, c), groups = x.shape, ctx.groups
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad.contiguous(), _multiply_add(x, scale, offset))
        shift32 = shift.float()
        d0 = grad.sum(1, dtype=torch.float32)
        d1 = (grad * x).sum(1, dtype=torch.float32) + shift32 * d0
        gamma = weight.float()

        def per_group(v: Tensor) -> Tensor:
            return (v * gamma).view(n, groups, -1).sum(2)

        size = m * c // groups
        c1 = (per_group(d0) * mean - per_group(d1)) * rstd**3 / size
        c0 = -c1 * mean - per_group(d0) * rstd / size
        c1, c0, mean, rstd = (v.repeat_interleave(c // groups, dim=1) for v in (c1, c0, mean, rstd))
        c0 = c0 + c1 * shift32
        dx = _multiply_add(grad, scale, c0).addcmul_(x, c1[:, None].to(x.dtype))
        dshift = scale * d0 + c1 * total + m * c0
        dweight = ((d1 - mean * d0) * rstd).sum(0)
        return dx, dweight.to(weight.dtype), d0.sum(0).to(ctx.bias_dtype), dshift.to(shift.dtype), None, None, None


def _affine(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, groups: int, eps: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Channel sums (n, c), mean and 1/sd (n, groups), and (n, c) scale and offset with z = scale x + offset."""
    n, m, c = x.shape
    total = x.sum(1, dtype=torch.float32)
    square = (x * x).sum(1, dtype=torch.float32) + shift * (2 * total + m * shift)
    size = m * c // groups
    mean = (total + m * shift).view(n, groups, -1).sum(2) / size
    variance = square.view(n, groups, -1).sum(2) / size - mean**2
    rstd = (variance.clamp_min(0) + eps).rsqrt()
    scale = rstd.repeat_interleave(c // groups, dim=1) * weight
    offset = bias - mean.repeat_interleave(c // groups, dim=1) * scale + scale * shift
    return (total, mean, rstd), scale, offset


def _multiply_add(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Scale and offset (n, c) at every position of x (n, m, c), in the type of x."""
    return torch.addcmul(offset[:, None].to(x.dtype), x, scale[:, None].to(x.dtype))

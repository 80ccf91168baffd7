"""Classifier-free guidance: mix the velocity with and without the condition."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["guided"]


def guided(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    weight: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """Velocity v_null + weight (v_cond - v_null), inside an interval of time.

    Weight 1, and times outside the interval, evaluate the conditional branch alone; otherwise both branches go through
    the network in one batch.

    Parameters
    ----------
    velocity
        Takes x (n, g), t (0-dim) and a (n,) bool mask that is True where the condition is replaced by the null
        condition. For a guided step it is called once with 2 n rows: first the conditional, then the null half.
    weight
        Guidance weight; 1 is no guidance, 0 the unconditional velocity.
    interval
        Guide only for interval[0] <= t < interval[1]; an interval that ends at 1 includes 1.

    References
    ----------
    Ho and Salimans 2022, arXiv:2207.12598, equation 6; interval: Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """
    start, end = interval[0], interval[1] if interval[1] < 1 else math.inf

    def field(x: Tensor, t: Tensor) -> Tensor:
        n = len(x)
        keep = torch.zeros(n, dtype=torch.bool, device=x.device)
        if weight == 1 or not start <= float(t) < end:
            return velocity(x, t, keep)
        both = velocity(torch.cat([x, x]), t, torch.cat([keep, ~keep]))
        return both[n:] + weight * (both[:n] - both[n:])

    return field

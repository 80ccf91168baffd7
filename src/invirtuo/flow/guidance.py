"""Classifier-free guidance: mix the velocity with and without the condition, or with one attribute at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["composed", "guided"]


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


def composed(
    velocity: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], weights: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Velocity v_0 + sum_i w_i (v_i - v_0) of several attributes, each evaluated alone.

    It is the probability-flow velocity of the density proportional to p(x) prod_i [p(x | y_i) / p(x)]^w_i, and this is
    p(x | y_1, ..., y_K) for weights of 1 if the attributes are independent given x. All branches go through the network
    in one batch; branches whose coefficient is 0 for every cell are left out, v_0 among them when weights sum to 1.

    Parameters
    ----------
    velocity
        Takes x (m, d), t (0-dim), the cell of each row (m,), and its branch (m,): 0 without attributes, i with
        attribute i alone. Gives (m, d).
    weights
        (n, k), weight of each attribute for each cell, or (1, k) for all.

    References
    ----------
    CFGen, arXiv:2407.11734, equation 8 and proposition 1.
    """
    share = torch.cat([1 - weights.sum(dim=1, keepdim=True), weights], dim=1)
    used = (share != 0).any(dim=0).nonzero().flatten().tolist()

    def field(x: Tensor, t: Tensor) -> Tensor:
        n = len(x)
        cell = torch.arange(n, device=x.device)
        branch = torch.tensor(used, device=x.device)
        v = velocity(x.repeat(len(used), 1), t, cell.repeat(len(used)), branch.repeat_interleave(n))
        parts = v.reshape(len(used), n, -1)
        return sum(share[:, i, None].to(x) * part for i, part in zip(used, parts, strict=True))

    return field

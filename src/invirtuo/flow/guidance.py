"""Classifier-free guidance: mix the velocity with and without the condition, or with one attribute at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["composed", "guided", "nested"]


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
        Takes x (m, g), t (0-dim) and a (m,) bool mask that is True where the condition is replaced by the null
        condition. For a guided step it is called once with 2 n rows: first the conditional, then the null half.
        Weight 0 evaluates the null half alone.
    weight
        Guidance weight; 1 is no guidance, 0 the unconditional velocity.
    interval
        Guide only for interval[0] <= t < interval[1]; an interval that ends at 1 includes 1.

    References
    ----------
    Ho and Salimans 2022, arXiv:2207.12598, equation 6; interval: Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """
    return nested(lambda x, t, branch: velocity(x, t, branch == 0), [weight], interval)


def nested(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    weights: Sequence[float],
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """Velocity v_0 + sum_i w_i (v_i - v_(i-1)) of conditions that each know more than the one before.

    Branches whose coefficient is 0 are left out, the others go through the network in one batch. With equal weights it
    is :func:`guided`.

    Parameters
    ----------
    velocity
        Takes x (m, g), t (0-dim) and the branch of each row (m,), k to 0; branches come one after the other, each with
        all rows of the state.
    weights
        w_1 to w_k.
    interval
        Guide only for interval[0] <= t < interval[1], and take v_k elsewhere; an interval that ends at 1 includes 1.

    References
    ----------
    Brooks et al. 2023, arXiv:2211.09800, equation 3, for two conditions.
    """
    start, end = interval
    if end >= 1:
        end = math.inf  # the last step may begin at 1, up to rounding

    # collect terms: v_i enters with w_i - w_(i+1), where w_0 = 1 and the weight after the last is 0
    levels = [1.0, *weights, 0.0]
    guided_coefficients = {}
    for i in reversed(range(len(levels) - 1)):
        if levels[i] != levels[i + 1]:  # a branch without weight is not evaluated
            guided_coefficients[i] = levels[i] - levels[i + 1]
    unguided = {len(weights): 1.0}

    def field(x: Tensor, t: Tensor) -> Tensor:
        coefficients = guided_coefficients if start <= float(t) < end else unguided
        n_branches = len(coefficients)
        branch = torch.tensor(list(coefficients), device=x.device).repeat_interleave(len(x))
        # one evaluation for all branches
        velocities = velocity(x.repeat(n_branches, 1), t, branch).reshape(n_branches, *x.shape)
        total: Tensor = sum(c * v for c, v in zip(coefficients.values(), velocities, strict=True))
        return total

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
    # collect terms: v_0 enters with 1 - sum_i w_i; a branch without weight in all cells is not evaluated
    coefficients = torch.cat([1 - weights.sum(dim=1, keepdim=True), weights], dim=1)
    used = (coefficients != 0).any(dim=0).nonzero().flatten().tolist()

    def field(x: Tensor, t: Tensor) -> Tensor:
        n = len(x)
        cell = torch.arange(n, device=x.device)
        branch = torch.tensor(used, device=x.device)
        repeated = x.repeat(len(used), 1)
        flat = velocity(repeated, t, cell.repeat(len(used)), branch.repeat_interleave(n))
        velocities = flat.reshape(len(used), n, -1)
        weighted = (coefficients[:, i, None].to(x) * v for i, v in zip(used, velocities, strict=True))
        total: Tensor = sum(weighted)
        return total

    return field

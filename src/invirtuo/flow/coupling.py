"""Which source belongs to which target inside a mini-batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["exact_coupling", "plan_pairs", "sinkhorn"]


def exact_coupling(x0: Tensor, x1: Tensor) -> Tensor:
    """Optimal one-to-one pairing for the squared Euclidean cost.

    Parameters
    ----------
    x0, x1
        (n, g), equally many sources and targets.

    Returns
    -------
    (n,), row of x1 that belongs to each row of x0.

    References
    ----------
    Tong et al. 2023, arXiv:2302.00482, section 3.2.
    """
    if len(x0) != len(x1):
        raise ValueError(f"exact coupling needs equally many sources and targets, found {len(x0)} and {len(x1)}")
    cost = torch.cdist(x0.double(), x1.double()).square()
    from scipy.optimize import linear_sum_assignment  # slow to import

    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, device=x1.device)


def sinkhorn(
    cost: Tensor,
    epsilon: float = 1.0,
    tau_a: float = 1.0,
    tau_b: float = 1.0,
    *,
    iterations: int = 500,
    tolerance: float = 1e-4,
) -> Tensor:
    """Entropic transport plan between uniform marginals, balanced or unbalanced, in log domain.

    Minimises <cost, plan> + epsilon KL(plan | a b^T) + rho_a KL(plan 1 | a) + rho_b KL(plan^T 1 | b) with
    rho = epsilon tau / (1 - tau): tau = 1 is a hard marginal, and both 1 the balanced problem.

    Parameters
    ----------
    cost
        (..., n, m), one problem for each leading index.
    epsilon
        Weight of the entropy, in units of the cost.
    tau_a, tau_b
        Weight of the marginal of the rows and of the columns, in (0, 1].
    iterations, tolerance
        Stop after so many rounds, or when no potential moves by more than tolerance epsilon.

    Returns
    -------
    (..., n, m), the plan; its mass is 1 if balanced.

    References
    ----------
    Cuturi 2013, arXiv:1306.0895; unbalanced: Chizat et al. 2018, doi:10.1090/mcom/3303; tau as in Cuturi et al. 2022,
    arXiv:2201.12324.
    """
    if not (epsilon > 0 and 0 < tau_a <= 1 and 0 < tau_b <= 1):
        raise ValueError(f"sinkhorn needs epsilon > 0 and tau in (0, 1], found {epsilon}, {tau_a}, {tau_b}")
    *_, n, m = cost.shape
    scaled = cost / epsilon
    f, g = torch.zeros_like(scaled[..., 0]), torch.zeros_like(scaled[..., 0, :])  # potentials over epsilon
    for _ in range(iterations):
        before = f
        # alternate the two marginals; a tau below 1 lets a marginal deviate from the uniform one
        f = -tau_a * (torch.logsumexp(g[..., None, :] - scaled, dim=-1) + math.log(n))
        g = -tau_b * (torch.logsumexp(f[..., None] - scaled, dim=-2) + math.log(m))
        if (f - before).abs().max() < tolerance:
            break
    return (f[..., None] + g[..., None, :] - scaled).exp()


def plan_pairs(plan: Tensor, n_pairs: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw pairs by their mass in transport plans (..., n, m): rows and columns, (..., n_pairs) each."""
    *leading, n, m = plan.shape
    drawn = torch.multinomial(plan.reshape(-1, n * m), n_pairs, replacement=True, generator=generator)
    drawn = drawn.reshape(*leading, n_pairs)
    return drawn // m, drawn % m

"""Sparsity of networks: hard-concrete gates, penalties and proximal steps, as functions on tensors.

Layout everywhere: weights W_k are (..., in, out), gates z_k (..., in); leading axes are members of an ensemble. What a
penalty of the registry needs of a network is written in :class:`Penalised`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "PENALTIES",
    "Penalised",
    "Penalty",
    "expected_flops",
    "expected_l0",
    "gate_cdf",
    "gate_from_uniform",
    "gate_mode",
    "gate_path",
    "gate_sample",
    "group_prox",
    "lasso_prox",
    "p_open",
    "weight_path",
]

GAMMA, ZETA, EPS = -0.1, 1.1, 1e-6  # limits of the stretched gate, and of the uniform numbers it is made of
BETA = 2 / 3  # temperature

# ---- hard-concrete gates (Louizos, Welling, Kingma 2018, arXiv:1712.01312) -------------------------------------------


def gate_from_uniform(log_alpha: Tensor, u: Tensor, beta: float = BETA) -> Tensor:
    """Gate z in [0, 1] from uniform numbers: a concrete variable, stretched to (-0.1, 1.1) and cut (equations 10, 11).

    Parameters
    ----------
    log_alpha
        Location of each gate; large is open.
    u
        In (0, 1), broadcast against `log_alpha`.
    beta
        Temperature.
    """
    s = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / beta)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def gate_sample(log_alpha: Tensor, beta: float = BETA) -> Tensor:
    """One random gate for each location, from the global generator of torch."""
    return gate_from_uniform(log_alpha, torch.rand_like(log_alpha).clamp(EPS, 1 - EPS), beta)


def gate_mode(log_alpha: Tensor) -> Tensor:
    """Gate without noise, for evaluation; closed if log_alpha < -log 11 (equation 13)."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def gate_cdf(x: float, log_alpha: Tensor, beta: float = BETA) -> Tensor:
    """Probability that the stretched variable is at most x."""
    share = (x - GAMMA) / (ZETA - GAMMA)
    logit = math.log(share) - math.log1p(-share)
    return torch.sigmoid(beta * logit - log_alpha).clamp(EPS, 1 - EPS)


def p_open(log_alpha: Tensor, beta: float = BETA) -> Tensor:
    """Probability that a gate is not 0 (equation 12)."""
    return torch.sigmoid(log_alpha - beta * math.log(-GAMMA / ZETA))


# ---- sizes of networks -----------------------------------------------------------------------------------------------


def weight_path(weights: Sequence[Tensor]) -> Tensor:
    """(..., in, out), sum over all paths from an input to an output of the product of absolute weights.

    References
    ----------
    Aliee, Theis, Kilbertus, arXiv:2106.12430 (C-NODE); Aliee et al. 2022, arXiv:2210.14672 (PathReg).
    """
    path = weights[0].abs()
    for weight in weights[1:]:
        path = path @ weight.abs()
    return path


def gate_path(gates: Sequence[Tensor], n_out: int) -> Tensor:
    """(..., in, out), the same sum for gates alone, every connection being z_i of its input unit.

    All columns are equal: it is z_0 times the sums of the later gates, whatever the output.
    """
    later = gates[0].new_ones(gates[0].shape[:-1])
    for gate in gates[1:]:
        later = later * gate.abs().sum(dim=-1)
    return (gates[0].abs() * later[..., None])[..., None].expand(*gates[0].shape, n_out)


def expected_l0(
    weight: Tensor, bias: Tensor, log_alpha: Tensor, lam: float = 1.0, decay: float = 0.0, beta: float = BETA
) -> Tensor:
    """Expected number of weights behind open gates of a layer, times `lam`, with weight decay (equation 15)."""
    # every gate has a row of weights
    rows = (lam + decay / 2 * weight.square()).sum(dim=-1)
    return (p_open(log_alpha, beta) * rows).sum(dim=-1) + decay / 2 * bias.square().sum(dim=-1)


def expected_flops(log_alpha: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """Expected multiplications and additions of a layer, and its expected number of parameters."""
    n_open = p_open(log_alpha).sum(dim=-1)
    return (2 * n_open - 1) * n_out + n_out, n_open * n_out + n_out


# ---- proximal steps --------------------------------------------------------------------------------------------------


def group_prox(weight: Tensor, threshold: float | Tensor) -> Tensor:
    """Shrink groups (last axis) towards zero by their norm; short ones become exactly zero.

    A threshold for each group is (..., 1).

    References
    ----------
    Bellot, Branson, van der Schaar, arXiv:2105.02522 (NGM): the weights of one input in the net of one target.
    """
    norm = weight.norm(dim=-1, keepdim=True)
    return weight * ((norm - threshold).clamp_min(0.0) / norm.clamp_min(torch.finfo(weight.dtype).tiny))


def lasso_prox(theta: Tensor, weight: Tensor, lam: float | Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Hierarchical proximal step of LassoNet, for each input by itself.

    Parameters
    ----------
    theta
        (..., in, out), skip connection.
    weight
        (..., in, units), first layer.
    lam
        Penalty on the norms of the rows of theta, times the step; one for all, or (..., 1) for each input.
    bound
        M: afterwards ``max |weight_i| <= M norm(theta_i)``.

    References
    ----------
    Lemhadri et al., JMLR 2021 22(127), algorithm 2.
    """
    # x for every number m of units that are cut off
    norm = theta.norm(dim=-1)
    sizes = weight.abs().sort(dim=-1, descending=True).values
    zero = sizes.new_zeros(*sizes.shape[:-1], 1)
    sums = torch.cat([zero, sizes.cumsum(dim=-1)], dim=-1)  # S_m, m = 0..units
    m = torch.arange(sums.shape[-1], dtype=sizes.dtype, device=sizes.device)
    shrunk = (norm[..., None] + bound * sums - lam).clamp_min(0.0)
    x = shrunk / (1 + m * bound**2)

    # the first m at which the next unit is not cut off
    below = torch.cat([sizes, zero], dim=-1)  # a_(m+1)
    first = (bound * x >= below).int().argmax(dim=-1, keepdim=True)
    x = x.gather(-1, first)

    scale = x / norm.clamp_min(torch.finfo(theta.dtype).tiny)[..., None]
    return theta * scale, weight.sign() * torch.minimum(weight.abs(), bound * x)


# ---- the registry ----------------------------------------------------------------------------------------------------


class Penalised(Protocol):
    """A network with m members, as far as penalties need it."""

    def weights(self) -> list[Tensor]:
        """All weights, biases left out."""
        ...

    def weight_path(self) -> Tensor:
        """(m, in, out)."""
        ...

    def gate_path(self, gates: Sequence[Tensor]) -> Tensor:
        """(m, in, out), for drawn gates."""
        ...

    def l0(self) -> Tensor:
        """(m,), expected number of weights behind open gates."""
        ...

    def n_regulators(self) -> Tensor:
        """(m, out), expected number of open inputs of each target."""
        ...


class Penalty(NamedTuple):
    """A row of the registry: the term that is added to the loss, or the proximal step, or both."""

    value: Callable[[Penalised, Sequence[Tensor]], Tensor] | None  # (m,), before it is multiplied by lambda
    gated: bool  # whether gates are learned
    prox: str = ""  # name of the proximal step of the network
    source: str = ""
    lam: float = 0.03  # weight, if a Config gives none
    kept: Callable[[Penalised, Sequence[Tensor]], Tensor] | None = None  # what acts on, when the mask is frozen


def _pathreg(field: Penalised, gates: Sequence[Tensor]) -> Tensor:
    of_weights = field.weight_path().mean(dim=(-2, -1))
    return of_weights + 0.1 * field.gate_path(gates).mean(dim=(-2, -1))


def _cnode(field: Penalised, gates: Sequence[Tensor]) -> Tensor:
    return field.weight_path().mean(dim=(-2, -1))


def _as_inputs(total: Tensor, field: Penalised) -> Tensor:
    """(m,), a sum over all weights as a number of inputs of a target: its mean times the inputs there are."""
    weights = field.weights()
    n_weights = sum(weight[0].numel() for weight in weights)
    return total * weights[0].shape[1] / n_weights


def _l1(field: Penalised, gates: Sequence[Tensor]) -> Tensor:
    sums = [weight.abs().flatten(1).sum(dim=1) for weight in field.weights()]
    return _as_inputs(torch.stack(sums).sum(dim=0), field)


def _l0(field: Penalised, gates: Sequence[Tensor]) -> Tensor:
    return _as_inputs(field.l0(), field)


def _target_l0(field: Penalised, gates: Sequence[Tensor]) -> Tensor:
    return field.n_regulators().mean(dim=-1)


PENALTIES: dict[str, Penalty] = {
    "none": Penalty(None, False, source="neural ODE without penalty"),
    "l1": Penalty(_l1, False, source="mean absolute weight, times inputs", kept=_l1),
    "l0": Penalty(_l0, True, source="Louizos et al., arXiv:1712.01312; share of open weights, times inputs"),
    "cnode": Penalty(
        _cnode, False, source="mean weight path; Aliee, Theis, Kilbertus, arXiv:2106.12430", lam=0.02, kept=_cnode
    ),
    "path": Penalty(_cnode, False, source="another name of cnode", lam=0.02, kept=_cnode),
    "pathreg": Penalty(_pathreg, True, source="Aliee et al. 2022, arXiv:2210.14672", lam=0.002, kept=_cnode),
    "group_lasso": Penalty(None, False, "groups", "Bellot et al., arXiv:2105.02522", lam=0.1),
    "lassonet": Penalty(None, False, "lasso", "Lemhadri et al., JMLR 2021 22(127)", lam=5.0),
    "target_l0": Penalty(_target_l0, True, source="ours: expected regulators of each target"),
}

"""How scalars and conditions become vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Condition
from invirtuo.nn.mlp import MLP

__all__ = ["ConditionEncoder", "one_hots", "sinusoids"]


def sinusoids(x: Tensor, width: int, scale: float = 1.0, period: float = 10_000.0) -> Tensor:
    """Cosines and sines of a scalar at geometrically spaced frequencies, in fp32.

    [cos(scale x w_k), sin(scale x w_k)] with w_k = period^(-k / h), k = 0 .. h - 1, h = width / 2.

    Parameters
    ----------
    x
        (...,), any shape.
    width
        Number of features, even.

    Returns
    -------
    (..., width)

    References
    ----------
    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, in the order of Dhariwal and Nichol 2021, arXiv:2105.05233.
    """
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=x.device, dtype=torch.float32) * (-math.log(period) / half))
    angle = x.float()[..., None] * (frequency * scale)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def one_hots(condition: Condition, levels: Iterable[int]) -> list[Tensor]:
    """One (n, k) block for each covariate of n conditions; `levels` are the k, in order."""
    pairs = zip(levels, condition.covariates.values(), strict=True)
    return [F.one_hot(codes, k).to(condition.code.dtype) for k, codes in pairs]


class ConditionEncoder(nn.Module):
    """Condition -> vector, with a learned null condition for classifier-free guidance.

    The perturbation multi-hot (or features), one one-hot block per covariate and the continuous values are concatenated
    and go through an MLP. The null condition is one learned vector, zero at the start, that replaces the output of the
    MLP: it is neither a control cell nor a cell without covariates (PRiMeFlow, section 3.1; the null: our decision).

    Parameters
    ----------
    n_perturbations, levels, n_continuous
        Sizes of the parts: p, k of every covariate in order (none: covariates are left out), number of continuous
        values.
    width
        Width of the result.
    n_layers
        Linear layers of the MLP, the last one without activation.
    covariate_scale
        Factor on the one-hot blocks; 0 leaves the covariates out.
    activated, dropout
        Let every layer end in activation and dropout, the last one too.
    """

    def __init__(
        self,
        n_perturbations: int,
        levels: list[int],
        n_continuous: int,
        width: int,
        n_layers: int = 2,
        covariate_scale: float = 1.0,
        *,
        activated: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.levels, self.n_continuous = levels, n_continuous
        self.covariate_scale = covariate_scale
        n_in = n_perturbations + sum(levels) + n_continuous
        if activated:
            self.mlp = MLP(n_in, width, n_layers, dropout=dropout)
        else:
            self.mlp = MLP(n_in, width, n_layers - 1, n_out=width, dropout=dropout)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, condition: Condition, is_null: Tensor | None = None) -> Tensor:
        """Encode n conditions; rows where `is_null` (n,) is True become the null condition. Gives (n, width)."""
        blocks = [condition.code]
        if self.levels:
            blocks += [block * self.covariate_scale for block in one_hots(condition, self.levels)]
        blocks += [value[:, None] for value in condition.continuous.values()]
        encoded = self.mlp(torch.cat(blocks, dim=1))
        if is_null is None:
            return encoded
        return torch.where(is_null[:, None], self.null.to(encoded.dtype), encoded)

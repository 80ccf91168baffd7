"""Which source belongs to which target inside a mini-batch."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["exact_coupling"]


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
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, device=x1.device)

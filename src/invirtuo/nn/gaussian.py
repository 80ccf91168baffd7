"""Diagonal Gaussians of variational autoencoders, given by mean and log-variance."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gaussian_kl", "gaussian_sample"]


def gaussian_sample(mean: Tensor, log_variance: Tensor, noise: Tensor | None = None) -> Tensor:
    """Mean + exp(log_variance / 2) noise; draws the noise if it is not given."""
    return mean + (log_variance / 2).exp().clamp_min(1e-8) * (torch.randn_like(mean) if noise is None else noise)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) | N(0, I)), summed over the last axis.

    Examples
    --------
    >>> gaussian_kl(torch.tensor([1.0, 0.0]), torch.zeros(2))
    tensor(0.5000)
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)

"""Probability paths between x0 (noise or source, t = 0) and x1 (data, t = 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["COEFFICIENTS", "PATHS", "PathSample", "gaussian_velocity", "linear_path", "trigonometric_path"]


class PathSample(NamedTuple):
    """A point on the path and the velocity there: `t` (n,), `xt` (n, g), `ut` (n, g)."""

    t: Tensor
    xt: Tensor
    ut: Tensor


class Coefficients(NamedTuple):
    """xt = a x0 + b x1, ut = da x0 + db x1."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


def _linear(t: Tensor) -> Coefficients:
    return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


def _trigonometric(t: Tensor) -> Coefficients:
    angle = t * (math.pi / 2)
    cos, sin = angle.cos(), angle.sin()
    return Coefficients(cos, sin, -(math.pi / 2) * sin, (math.pi / 2) * cos)


COEFFICIENTS = {"linear": _linear, "trigonometric": _trigonometric}


def linear_path(
    x0: Tensor, x1: Tensor, t: Tensor, sigma: float = 0.0, generator: torch.Generator | None = None
) -> PathSample:
    """Straight line from x0 to x1, with constant Gaussian noise around it.

    xt = (1 - t) x0 + t x1 + sigma eps, ut = x1 - x0. The noise level is constant, so it does not enter the velocity.

    Parameters
    ----------
    x0, x1
        (n, g), source and target.
    t
        (n,), in [0, 1].
    sigma
        Standard deviation of the noise added to the point.

    References
    ----------
    Lipman et al. 2022, arXiv:2210.02747, equation 22; PRiMeFlow, algorithm 1.
    """
    return _sample(_linear, x0, x1, t, sigma, generator)


def trigonometric_path(
    x0: Tensor, x1: Tensor, t: Tensor, sigma: float = 0.0, generator: torch.Generator | None = None
) -> PathSample:
    """Quarter circle from x0 to x1, which keeps the variance of independent unit-variance ends.

    xt = cos(pi t / 2) x0 + sin(pi t / 2) x1 + sigma eps, ut = pi/2 (cos(pi t / 2) x1 - sin(pi t / 2) x0).
    Arguments as in :func:`linear_path`.

    References
    ----------
    Albergo and Vanden-Eijnden 2022, arXiv:2209.15571; named in tables 13-15 of PRiMeFlow.
    """
    return _sample(_trigonometric, x0, x1, t, sigma, generator)


PATHS = {"linear": linear_path, "trigonometric": trigonometric_path}


def gaussian_velocity(
    xt: Tensor, t: Tensor, mean: Tensor, sd: Tensor, path: str = "linear", sigma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Velocity of the path from N(0, 1) to a Gaussian, in closed form, gene by gene.

    For x0 ~ N(0, 1) and x1 ~ N(mean, sd^2), independent, (xt, ut) is jointly Gaussian, so that E[ut | xt] is linear
    in xt and the variance of what is left does not depend on xt.

    Parameters
    ----------
    xt
        (n, g), point on the path.
    t
        (n,)
    mean, sd
        (g,) or (n, g), of the target.
    path, sigma
        Name in ``PATHS``, and the constant noise level.

    Returns
    -------
    E[ut | xt] and the standard deviation of ut around it, both (n, g).
    """
    a, b, da, db = COEFFICIENTS[path](_column(t, xt))
    variance = a**2 + (b * sd) ** 2 + sigma**2
    covariance = a * da + b * db * sd**2
    velocity = db * mean + covariance / variance * (xt - b * mean)
    # da^2 + (db sd)^2 - covariance^2 / variance, written so that genes with a small sd lose no digits
    determinant = a * db - b * da
    without_blur = determinant**2 * sd**2
    blur = sigma**2 * (da**2 + (db * sd) ** 2)
    residual_variance = (without_blur + blur) / variance
    return velocity, residual_variance.sqrt()


def _sample(
    coefficients: Callable[[Tensor], Coefficients],
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    sigma: float,
    generator: torch.Generator | None,
) -> PathSample:
    a, b, da, db = coefficients(_column(t, x0))
    mean = a * x0 + b * x1
    return PathSample(t, _blur(mean, sigma, generator), da * x0 + db * x1)


def _column(t: Tensor, x: Tensor) -> Tensor:
    """Times (n,) in a shape that broadcasts over the rows of x (n, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def _blur(mean: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    if sigma == 0:
        return mean
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + sigma * noise

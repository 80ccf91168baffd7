"""Moving cells to another mean while they stay cells: zeros are kept, values of single cells stay apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["moved", "with_mean", "with_zeros"]

LARGEST = 100.0  # fold change of positive values, up or down
NEWTON_STEPS = 10


def with_zeros(
    x: Tensor, way: str | None, controls: Tensor | None, smallest: float, generator: torch.Generator
) -> Tensor:
    """What a continuous model has drawn, as cells with zeros.

    Parameters
    ----------
    x
        (n, g), drawn.
    way
        "threshold" sets values below `smallest` to 0; "moved" moves `controls` to the mean of `x` (:func:`moved`); None
        leaves them.
    controls
        (n, g), measured control cells.
    smallest
        Values below are zeros.
    generator
        Of :func:`moved`.

    Returns
    -------
    (n, g)
    """
    if way == "threshold":
        return torch.where(x < smallest, 0.0, x)
    if way == "moved":
        return moved(controls, x.mean(0) - controls.mean(0), smallest, generator)
    return x


def moved(cells: Tensor, effect: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Measured cells whose mean has moved by an effect, gene by gene; see :func:`with_mean`.

    Parameters
    ----------
    cells
        (n, g) log1p values of measured cells.
    effect
        (g,) what is added to the mean; a mean stays at 0 or above.
    smallest
        Values below are zeros.
    generator
        Orders equal values of a gene at random: which of the zeros express it when its mean grows.

    Returns
    -------
    (n, g), not negative.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0], [0.0], [1.0], [2.0]])
    >>> y = moved(x, torch.tensor([0.6]), 0.5, torch.Generator().manual_seed(0))
    >>> round(float(y.mean()), 3), int((y == 0).sum())
    (1.35, 1)
    """
    # CPU noise, so that the same seed gives the same cells on every device; it orders zeros and equal values
    noise = torch.rand(cells.shape, generator=generator, dtype=torch.float32).to(cells)
    ordered = torch.where(cells < smallest, noise * smallest * 0.999, cells + noise * smallest * 1e-3)
    return with_mean(ordered, ordered, 1.0, cells.mean(0) + effect, smallest)


def with_mean(x: Tensor, pilot: Tensor, weight: float, estimate: Tensor, smallest: float) -> Tensor:
    """Cells whose mean lies between that of the pilot and an estimate; gene by gene, monotone, zeros stay possible.

    Adding a difference would turn every zero into a small number, multiplying leaves the share of zeros where it was.
    Here the share p of cells that express a gene becomes 1 - (1 - p)^r for a mean that grows r-fold (what independent
    counts do), the cells that come or go are those nearest to the limit, and a fold change of the positive values does
    the rest. The order of the cells in a gene stays, and so the ranks of its correlations.

    Parameters
    ----------
    x
        (n, g) sampled log1p values; below `smallest` they count as zero.
    pilot
        (m, g) sampled values of the same condition, from which the mean and the distribution are taken.
    weight
        Of the estimate, 0 to 1.
    estimate
        (g,) mean of each gene, not negative.
    smallest
        Values below are set to 0.

    Returns
    -------
    (n, g), not negative.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[0.0], [0.1], [1.0], [2.0]])
    >>> moved = with_mean(x, x, 1.0, torch.tensor([1.2]), 0.5)
    >>> round(float(moved.mean()), 3)
    1.2
    """
    # of every gene: values of the pilot from high to low, and how many of them are above zero
    ordered = pilot.T.contiguous().sort(dim=1, descending=True).values  # (g, m)
    n_pilot = ordered.shape[1]
    positive = torch.where(ordered < smallest, 0.0, ordered)
    n_positive = (positive > 0).sum(dim=1, keepdim=True)

    # the mean that is wanted, and the share of values above zero that goes with it
    mean = positive.mean(dim=1, keepdim=True)
    wanted = ((1 - weight) * mean + weight * estimate[:, None]).clamp_min(0)
    share = n_positive / n_pilot
    ratio = wanted / mean.clamp_min(1e-12)
    new_share = torch.where(share < 1, 1 - (1 - share) ** ratio, 1.0)

    def mapped(rank: Tensor) -> Tensor:
        """Values (g, k) at ranks (g, k), numbers of pilot cells with higher values, when the share has changed."""
        top = (rank + 0.5) / n_pilot
        position = (top / new_share.clamp_min(1e-12) * n_positive - 0.5).clamp_min(0)
        low = position.floor().long().clamp(max=n_pilot - 1)
        high = (low + 1).clamp(max=n_pilot - 1)
        last = (n_positive - 1).clamp_min(0)
        below, above = positive.gather(1, low.minimum(last)), positive.gather(1, high.minimum(last))
        values = torch.lerp(below, above, position - low)
        return torch.where(top < new_share, values, 0.0)

    # what the share alone does not reach, a fold change does
    fold = _fold_change(mapped(torch.arange(n_pilot).to(ordered).expand_as(ordered)), wanted)

    # cells by their rank among those of the pilot; above its highest value they keep their distance to it
    own = x.T.contiguous()
    rank = n_pilot - torch.searchsorted(ordered.flip(1), own, right=True)
    beyond = torch.where(ordered[:, :1] >= smallest, (own - ordered[:, :1]).clamp_min(0), 0.0)
    return torch.log1p(torch.expm1(mapped(rank.to(own)) + beyond) * fold).T.contiguous()


def _fold_change(values: Tensor, wanted: Tensor) -> Tensor:
    """Factor (g, 1) on linear values after which the mean of log1p values (g, k) is the wanted one (g, 1).

    The mean grows with the logarithm of the factor as a sum of softplus does, which is convex: Newton's method, begun
    where the mean is too large, comes down to it.
    """
    linear = torch.expm1(values)
    positive = linear > 0
    level = torch.where(positive, linear, 1.0).log()
    share = positive.to(values.dtype).mean(dim=1, keepdim=True).clamp_min(1e-12)
    log_fold = (wanted - level.mean(dim=1, keepdim=True)) / share
    for _ in range(NEWTON_STEPS):
        moved_level = log_fold + level
        mean = torch.where(positive, functional.softplus(moved_level), 0.0).mean(dim=1, keepdim=True)
        slope = torch.where(positive, moved_level.sigmoid(), 0.0).mean(dim=1, keepdim=True)
        log_fold = log_fold - (mean - wanted) / slope.clamp_min(1e-12)
    return log_fold.clamp(-math.log(LARGEST), math.log(LARGEST)).exp()

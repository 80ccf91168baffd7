"""Likelihoods of counts (negative binomial) and of open chromatin (Bernoulli), and the distribution of depth.

Means and dispersions are kept as logarithms: rates of 1e-10 and inverse dispersions of 1e6 lose no digits in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CountLikelihood", "Dispersion", "SizeFactor", "nb_log_prob", "nb_sample"]

LARGE = 50.0  # inverse dispersions above this use Stirling's series
LIMITS = (-10.0, 15.0)  # of the logarithm of an inverse dispersion


def nb_log_prob(x: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """Log probability of counts under a negative binomial with variance mean + mean^2 / dispersion.

    lgamma(x + r) - lgamma(r) - lgamma(x + 1) - r log1p(m / r) + x log(m / r) - x log1p(m / r), for mean m and inverse
    dispersion r; for r > 50 the difference of the first two terms by Stirling's series.

    Parameters
    ----------
    x, log_mean, log_dispersion
        Shapes that broadcast; counts, log of the mean, log of the inverse dispersion.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix B.1.
    """
    return _of_counts(x, log_mean, log_dispersion) - (x + log_dispersion.exp()) * F.softplus(log_mean - log_dispersion)


def _of_counts(x: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """The terms of the log probability that are 0 where x is 0."""
    r = log_dispersion.exp()
    small = r.clamp(max=LARGE)
    exact = torch.lgamma(x + small) - torch.lgamma(small) - x * small.log()

    # where lgamma loses all digits: Stirling's series
    large = r.clamp(min=LARGE)
    leading = (x + large - 0.5) * torch.log1p(x / large) - x
    series = leading + 1 / (12 * (large + x)) - 1 / (12 * large)
    return torch.where(r > LARGE, series, exact) - torch.lgamma(x + 1) + x * log_mean


def nb_sample(mean: Tensor, dispersion: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw counts: a gamma rate of the given mean and shape `dispersion`, and a Poisson number of it; float32."""
    shape = dispersion.expand_as(mean).contiguous()
    rate = torch._standard_gamma(shape, generator=generator) * (mean / shape)
    return torch.poisson(rate, generator=generator)


@dataclass(frozen=True)
class CountLikelihood:
    """Distribution of the counts of n cells: negative binomial genes and, behind them, Bernoulli peaks.

    Parameters
    ----------
    log_mean
        (n, g), log of the mean of each gene.
    log_dispersion
        (g,) or (n, g), log of the inverse dispersion.
    logits
        (n, p), log odds that a peak is open; None without peaks.
    """

    log_mean: Tensor
    log_dispersion: Tensor
    logits: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """(n, g + p), expected counts, and probabilities of peaks."""
        mean = self.log_mean.exp()
        return mean if self.logits is None else torch.cat([mean, self.logits.sigmoid()], dim=1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(n, g + p), counts of genes, 0 or 1 for peaks; drawn where the generator is."""
        device = self.log_mean.device if generator is None else generator.device
        drawn = []
        if self.log_mean.shape[1]:
            mean, dispersion = self.log_mean.exp(), self._limited.exp()
            drawn.append(nb_sample(mean.to(device), dispersion.to(device), generator))
        if self.logits is not None:
            chance = self.logits.sigmoid().to(device)
            noise = torch.rand(chance.shape, generator=generator, device=device)
            drawn.append((noise < chance).float())
        return torch.cat(drawn, dim=1)

    @property
    def _limited(self) -> Tensor:
        return self.log_dispersion.clamp(*LIMITS)

    def log_prob_genes(self, x: Tensor) -> Tensor:
        """(n,) log probability of counts (n, g); the gamma functions are only evaluated where a count is not 0."""
        # terms of all entries
        r = self._limited.expand_as(self.log_mean)
        everywhere = (x + r.exp()) * F.softplus(self.log_mean - r)

        # terms of counts that are not 0
        where = x.nonzero(as_tuple=True)
        terms = _of_counts(x[where], self.log_mean[where], r[where])
        return -everywhere.sum(dim=1) + torch.zeros_like(x[:, 0]).index_add(0, where[0], terms)

    def log_prob_peaks(self, x: Tensor) -> Tensor:
        """(n,) log probability of open peaks (n, p) of 0 and 1."""
        return -F.binary_cross_entropy_with_logits(self.logits, x, reduction="none").sum(dim=1)


class Dispersion(nn.Module):
    """Log inverse dispersion of each gene, or of each gene and class, learned ten times as fast as other weights.

    With the steps of Adam, a learning rate of 1e-3 moves a logarithm by 1 in a thousand steps: longer than an
    autoencoder of a small data set is trained.

    Parameters
    ----------
    n_genes
        Number of genes.
    n_classes
        Classes with dispersions of their own; 0 for one for each gene.
    """

    speed = 10.0

    def __init__(self, n_genes: int, n_classes: int = 0):
        super().__init__()
        shape = (n_classes + 1, n_genes) if n_classes else (n_genes,)  # a last row for cells of unknown class
        self.weight = nn.Parameter(torch.randn(shape) / self.speed)

    def start(self, inverse: Tensor) -> None:
        """Begin with the inverse (g,) of the dispersions, between 1/20 and 20."""
        self.weight.data[:] = -inverse.clamp(0.05, 20.0).log().to(self.weight) / self.speed

    def forward(self, classes: Tensor | None = None) -> Tensor:
        """(g,), or (n, g) for cells of these classes (n,), -1 where it is not known."""
        return self.speed * (self.weight if classes is None else self.weight[classes])


class SizeFactor(nn.Module):
    """Distribution of the depth of a cell, for all cells or for each of k groups: log-normal, or the observed depths.

    Groups of fewer than two cells, or without spread, get the spread of all cells. Group -1 is that of all cells.

    Parameters
    ----------
    empirical
        Draw from the observed depths instead of from a log-normal distribution.

    References
    ----------
    CFGen, equations 5 and 6; by class: cellFlow.
    """

    log_mean: Tensor
    log_sd: Tensor
    log_range: Tensor
    observed: Tensor
    ends: Tensor

    def __init__(self, *, empirical: bool = False):
        super().__init__()
        self.empirical = empirical
        self.register_buffer("log_mean", torch.zeros(0))  # of every group, and of all cells
        self.register_buffer("log_sd", torch.zeros(0))
        self.register_buffer("log_range", torch.tensor([0.0, 1.0]))
        self.register_buffer("observed", torch.zeros(0))  # sorted by group; all cells last
        self.register_buffer("ends", torch.zeros(0, dtype=torch.int64))  # of the groups in `observed`

    def fit(self, size: Tensor, group: Tensor, n_groups: int) -> None:
        """Learn from the depths (n,) of training cells, and the group (n,) of each, -1 where it is not known."""
        # log depths of every group, then of all cells; a group without cells has those of all
        log = size.double().log()
        by_group = [log[group == k] for k in range(n_groups)]
        by_group.append(log)
        by_group = [values if len(values) else log for values in by_group]

        # log-normal
        spread = torch.stack([values.std(correction=0) for values in by_group])
        self.log_mean = torch.stack([values.mean() for values in by_group]).float()
        self.log_sd = torch.where(spread > 0, spread, spread[-1]).float()
        self.log_range = torch.stack([log.min(), log.max()]).float()

        if self.empirical:
            self.observed = torch.cat(by_group).exp().float()
            sizes = [len(values) for values in by_group]
            self.ends = torch.tensor([0, *sizes]).cumsum(0)

    def sample(self, group: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a depth for each of n cells with groups (n,); on the CPU, not rounded."""
        group = torch.where(group < 0, len(self.log_mean) - 1, group)
        if not self.empirical:
            noise = torch.randn(len(group), generator=generator)
            return (self.log_mean[group] + self.log_sd[group] * noise).exp()

        # a random one of the observed depths of the group
        start, end = self.ends[group], self.ends[group + 1]
        position = torch.rand(len(group), generator=generator, dtype=torch.float64) * (end - start)
        return self.observed[start + position.long().clamp(max=end - start - 1)]

    def scaled(self, size: Tensor) -> Tensor:
        """Log depth on the scale of the training cells, whose smallest is 0 and largest 1; 0 if they are all alike."""
        low, high = self.log_range
        if high <= low:
            return torch.zeros_like(size)
        return (size.log() - low) / (high - low)

"""Drawing cells from a generator block by block, locally or on the workers of a cluster, in the order of the cells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from invirtuo import fit
from invirtuo.batch import Batch
from invirtuo.verbs.draw import OnDevices, in_parts
from invirtuo.verbs.sampling import NoSampling
from invirtuo.verbs.write_counts import Block, in_rows

if TYPE_CHECKING:
    from invirtuo.nn import CountLikelihood


class Likely(OnDevices, Protocol):
    """A model that gives the likelihood of counts."""

    def likelihood(
        self, batch: Batch, weights: Tensor, generator: torch.Generator, config: Any
    ) -> tuple[CountLikelihood, Tensor | None]:
        """The distribution of the counts of cells; latent vectors."""


__all__ = ["Request", "drawn"]

BLOCK = 512  # cells that are computed together, whatever is asked for: a cell depends on the seed and its number alone


@dataclass(frozen=True)
class Request:
    """Cells to draw: labels and depths, one row each, weights of guidance (n, k) or (1, k), and how."""

    labels: pd.DataFrame
    size: Tensor
    weights: Tensor
    seed: int
    config: NoSampling = field(default_factory=NoSampling)
    means: bool = False  # whether expected counts are wanted, too
    device: str | None = None
    first: int = 0  # number of the first block

    def __len__(self) -> int:
        """Give the number of blocks."""
        return math.ceil(len(self.labels) / BLOCK)

    def part(self, start: int, stop: int) -> Request:
        """The request of the blocks from `start` to `stop`."""
        rows = slice(start * BLOCK, stop * BLOCK)
        weights = self.weights[rows] if len(self.weights) > 1 else self.weights
        # copies: a worker would be sent all of a tensor with a slice of it
        size, weights = self.size[rows].clone(), weights.clone()
        return replace(self, labels=self.labels.iloc[rows], size=size, weights=weights, first=self.first + start)

    @property
    def begins_with(self) -> str:
        """The first cell."""
        return f"cell {self.first * BLOCK}"


def drawn(model: Likely, request: Request, engine: str, n_jobs: int | None) -> Iterator[Block]:
    """Draw the blocks of a request, in their order; what is random in one depends on the seed and its number."""
    yield from in_parts(_blocks, request, model, engine=engine, n_jobs=n_jobs, in_order=True)


@torch.no_grad()
def _blocks(request: Request, model: Likely) -> Iterator[Block]:
    """Draw the blocks in this process."""
    with model.on_device(request.device) as device:
        for i in range(len(request)):
            block = request.part(i, i + 1)
            batch = Batch(model.design.encode(block.labels), size_factor=block.size).to(device)
            # on the CPU, so that the same seed gives the same cells on every device
            generator = torch.Generator().manual_seed(fit.noise_seed(request.seed, 3, block.first))
            cells, z = model.likelihood(batch, block.weights.to(device), generator, request.config)
            counts = in_rows(cells.sample(generator))
            mean = cells.mean.float().cpu().numpy() if request.means else None
            latent = None if z is None else z.float().cpu().numpy()
            yield Block(counts, mean, latent)

"""The batches of a fit, without end, and the noise of each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from invirtuo import samplers
from invirtuo.fit.config import FitConfig
from invirtuo.fit.devices import place

if TYPE_CHECKING:
    from invirtuo.batch import Batch
    from invirtuo.dataset import CellDataset
    from invirtuo.model import Model

__all__ = ["Stream", "noise_seed"]


class Stream:
    """Batches of the training cells without end; of several devices each takes its share, after the first `start`."""

    def __init__(self, dataset: CellDataset, model: Model, config: FitConfig, start: int):
        self.dataset, self.model, self.config, self.start = dataset, model, config, start

    def __iter__(self) -> Iterator[Batch]:
        rank, n_devices = place()
        sampler, number = samplers.named(self.model.sampler, self.model.set_size), 0
        shares = 1 if self.dataset.on_disk else n_devices  # cells in memory are dealt batch by batch, files by blocks
        seeds = ([self.config.seed, epoch] for epoch in count())
        for epoch, layout, rng, dense in self.dataset.windows(sampler, seeds, rank=rank, n_ranks=n_devices):
            if epoch and not number:
                raise ValueError(f"the sampler {self.model.sampler!r} found no cells to train on")
            for rows in sampler(layout, self.config.batch_size, rng):
                number += 1
                if number > self.start * shares and (shares == 1 or (number - 1) % shares == rank):
                    yield self.dataset.take(rows, dense)


def noise_seed(*numbers: int) -> int:
    """Seed of the noise that the numbers name."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

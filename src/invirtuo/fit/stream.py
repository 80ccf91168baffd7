"""The batches of a fit, without end, and the noise of each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch

from invirtuo.cells import samplers
from invirtuo.fit.config import FitConfig
from invirtuo.fit.devices import rank_and_size
from invirtuo.fit.trainable import Trainable

if TYPE_CHECKING:
    from invirtuo.batch import Batch
    from invirtuo.cells.dataset import CellDataset

__all__ = ["GENERATOR_LOCK", "Stream", "noise_seed", "seeded"]

GENERATOR_LOCK = threading.RLock()  # held by who draws from torch's global generator, which all threads share


class Stream:
    """Batches of the training cells without end; of several devices each takes its share, after the first `start`."""

    def __init__(self, dataset: CellDataset, model: Trainable, config: FitConfig, start: int):
        self.dataset, self.model, self.config, self.start = dataset, model, config, start

    def __iter__(self) -> Iterator[Batch]:
        rank, n_devices = rank_and_size()
        sampler = samplers.named(self.model.sampler, self.model.set_size)
        # devices take turns in the batches of cells in memory, and share the blocks of files
        shares = 1 if self.dataset.on_disk else n_devices
        number = 0  # of batches drawn so far
        seeds = ([self.config.seed, epoch] for epoch in count())
        for epoch, layout, rng, dense in self.dataset.windows(sampler, seeds, rank=rank, n_ranks=n_devices):
            if epoch and not number:
                raise ValueError(f"the sampler {self.model.sampler!r} found no cells to train on")
            for rows in sampler(layout, self.config.batch_size, rng):
                is_own = shares == 1 or number % shares == rank
                number += 1
                if number > self.start * shares and is_own:
                    yield self.dataset.take(rows, dense)


def noise_seed(*numbers: int) -> int:
    """Seed of the noise that numbers identify: the seed of the fit, a step, a purpose."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators for a block of code, in this thread alone; afterwards they are as before.

    Dropout and other layers use the global generator alone. Fits in several threads take turns.
    """
    with GENERATOR_LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield

"""Cells drawn from a generator block by block: here, or on the workers of a cluster, in the order of the cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from invirtuo import fit
from invirtuo.batch import Batch
from invirtuo.generators.output import Block, in_rows
from invirtuo.model import SampleConfig
from invirtuo.workers import n_workers, over_ray

if TYPE_CHECKING:
    from invirtuo.generators.base import CountGenerator

__all__ = ["Request", "drawn"]

BLOCK = 512  # cells that are computed together, whatever is asked for: a cell depends on the seed and its number alone


@dataclass(frozen=True)
class Request:
    """Cells to draw: labels and depths, one row each, weights of guidance (n, k) or (1, k), and how."""

    labels: pd.DataFrame
    size: Tensor
    weights: Tensor
    seed: int
    config: SampleConfig = field(default_factory=SampleConfig)
    means: bool = False  # whether expected counts are wanted, too
    first: int = 0  # number of the first block

    def __len__(self) -> int:
        """Give the number of blocks."""
        return math.ceil(len(self.labels) / BLOCK)

    def part(self, start: int, stop: int) -> Request:
        """Some of the blocks."""
        rows = slice(start * BLOCK, stop * BLOCK)
        weights = self.weights[rows] if len(self.weights) > 1 else self.weights
        labels, size = self.labels.iloc[rows], self.size[rows].clone()
        return replace(self, labels=labels, size=size, weights=weights.clone(), first=self.first + start)


class _Tasks(Sequence):
    """The parts of a request that workers draw, cut when they are sent."""

    def __init__(self, request: Request, size: int):
        self.request, self.size = request, size

    def __len__(self) -> int:
        return math.ceil(len(self.request) / self.size)

    def __getitem__(self, i):
        return self.request.part(i * self.size, (i + 1) * self.size)


def drawn(model: CountGenerator, request: Request, engine: str, n_jobs: int | None) -> Iterator[Block]:
    """Draw the blocks of a request, in their order; what is random in one depends on the seed and its number."""
    fit.keep_freed_memory()
    if engine == "local":
        yield from _here(model, request)
        return
    threads = torch.get_num_threads()
    workers = n_jobs or n_workers(threads)
    tasks = _Tasks(request, min(max(len(request) // (4 * workers), 1), 8))  # the model is sent with each
    options = {"threads": threads, "n_jobs": n_jobs, "retries": 3, "at_once": 2 * workers, "in_order": True}
    for number, blocks in over_ray(_on_worker, tasks, model, threads, **options):
        if isinstance(blocks, Exception):
            cell = number * tasks.size * BLOCK
            raise RuntimeError(f"the worker that drew cell {cell} and what follows ended: {blocks}") from blocks
        yield from blocks


def _here(model: CountGenerator, request: Request) -> Iterator[Block]:
    """Draw the blocks in this process."""
    with model.on_device() as device:
        for i in range(len(request)):
            part = request.part(i, i + 1)
            batch = Batch(model.design.encode(part.labels), size_factor=part.size).to(device)
            generator = torch.Generator(device).manual_seed(fit.noise_seed(request.seed, 3, part.first))
            with torch.no_grad():
                cells, z = model.likelihood(batch, part.weights.to(device), generator, request.config)
                counts = cells.sample(generator)
            mean = cells.mean.float().cpu().numpy() if request.means else None
            yield Block(in_rows(counts), mean, None if z is None else z.float().cpu().numpy())


def _on_worker(request: Request, model: CountGenerator, threads: int) -> list[Block]:
    """Blocks that are drawn in a process of a cluster."""
    torch.set_num_threads(threads)
    return list(_here(model, request))

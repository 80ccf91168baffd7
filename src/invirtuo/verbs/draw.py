"""Drawing cells from a fitted model: condition by condition, or part by part on the workers of a cluster."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from invirtuo import fit
from invirtuo.batch import Batch
from invirtuo.errors import preview, whole_number
from invirtuo.nn.moved import with_zeros
from invirtuo.verbs.controls import ControlCells
from invirtuo.verbs.emission import Depths
from invirtuo.verbs.sampling import SampleConfig
from invirtuo.workers import n_workers, over_ray

if TYPE_CHECKING:
    import h5py

    from invirtuo.cells.dataset import CellDataset
    from invirtuo.design import Design

__all__ = [
    "Request",
    "Sampled",
    "check_engine",
    "control_pool",
    "drawn",
    "filled",
    "in_batches",
    "in_parts",
    "means_of",
    "stored",
]


Item = TypeVar("Item")


class Divisible(Protocol):
    """A request that can be cut, so that workers draw it part by part."""

    def __len__(self) -> int:
        """Give the number of conditions, or of blocks of cells."""

    def part(self, start: int, stop: int) -> Self:
        """The request of those from `start` to `stop`."""

    @property
    def begins_with(self) -> str:
        """The first cells, for messages."""

    @property
    def device(self) -> str | None:
        """The device that is asked for."""


class OnDevices(Protocol):
    """A model that can be sent to a worker, and moved to a device."""

    name: ClassVar[str]
    design: Design

    @property
    def accelerator(self) -> str:
        """`FitConfig.accelerator` of the fit."""

    def device_of(self, name: str | None) -> torch.device:
        """The device of a name."""

    def on_device(self, name: str | None = None) -> AbstractContextManager[torch.device]:
        """Move the model to a device to be used there."""


class Sampled(OnDevices, Protocol):
    """A model that draws the cells of a condition."""

    needs_source: bool

    def sample(self, batch: Batch, generator: torch.Generator, config: Any) -> Tensor:
        """Cells (n, g) of one condition."""


@dataclass(frozen=True)
class Request:
    """Cells to draw: of which conditions, how many of each, how, from which control cells, and on which device."""

    table: pd.DataFrame
    n_cells: Sequence[int]  # of each condition
    seed: int
    config: SampleConfig
    pool: Mapping[str, ControlCells]
    device: str | None = None
    first: int = 0  # number of the first condition
    smallest: float = 0.0  # positive value of the training cells, where `config.zeros` asks for it
    depths: Depths | None = None  # where counts are asked for

    def __len__(self) -> int:
        """Give the number of conditions."""
        return len(self.table)

    def part(self, start: int, stop: int) -> Request:
        """The request of the conditions from `start` to `stop`."""
        n_cells = self.n_cells[start:stop]
        return replace(self, table=self.table.iloc[start:stop], n_cells=n_cells, first=self.first + start)

    @property
    def begins_with(self) -> str:
        """The first condition."""
        return str(self.table.iloc[0].to_dict())


def drawn(model: Sampled, request: Request, engine: str, n_jobs: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Number and cells (n, g) of every condition of a request, as they come."""
    device = model.device_of(request.device).type
    precision: Literal["bf16", "fp32"]
    precision = "bf16" if fit.use_bf16(request.config, device) else "fp32"  # decided here for all workers
    bare = replace(request, config=replace(request.config, precision=precision), pool={})
    counts = request.depths is not None  # which are not stored by their place
    yield from in_parts(_conditions, bare, model, request.pool, engine=engine, n_jobs=n_jobs, in_order=counts)


@torch.no_grad()
def _conditions(request: Request, model: Sampled, pool: Mapping[str, ControlCells]) -> Iterator[tuple[int, np.ndarray]]:
    """Number and cells of every condition of a request; they depend on the seed and the name of the condition alone."""
    table, config = request.table, request.config
    names = model.design.names(table)
    groups = model.design.groups(table)
    with model.on_device(request.device) as device:
        for i, (name, n_cells) in enumerate(zip(names, request.n_cells, strict=True)):
            # on the CPU, so that the same seed gives the same cells on every device
            generator = torch.Generator().manual_seed(zlib.crc32(f"{request.seed}|{name}".encode()))
            batch = Batch(model.design.encode(table.iloc[[i] * n_cells]))
            source = None
            if model.needs_source:
                source, embedding = _sources(pool, groups.iloc[i], n_cells, generator)
                batch = Batch(batch.condition, source=source, source_embedding=embedding)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                x = model.sample(batch.to(device), generator, config).float().cpu()
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"{model.name} draws NaN or infinite values for {name}; fit it again with a lower lr")
            if config.zeros == "moved" and source is None:
                source, _ = _sources(pool, groups.iloc[i], n_cells, generator)
            x = with_zeros(x, config.zeros, source, request.smallest / 2, generator)
            if config.clamp_min is not None:
                x = x.clamp_min(config.clamp_min)
            if request.depths is not None:
                x = request.depths.counts(x, groups.iloc[i], source)
            yield request.first + i, x.numpy()


def in_batches(draw: Callable[..., Tensor], size: int, *inputs: Any) -> Tensor:
    """What a network makes of n rows, (n, g), of which it is given at most `size` at a time."""
    batches = []
    for start in range(0, len(inputs[0]), size):
        rows = slice(start, start + size)
        own = [x[rows] for x in inputs]
        batches.append(draw(*own))
    return torch.cat(batches)


# ---- locally, or on a cluster --------------------------------------------------------------------------------------


def check_engine(engine: str, n_jobs: int | None) -> None:
    """Refuse engines that do not exist, and processes for the one that has none."""
    if engine not in ("local", "ray"):
        raise ValueError(f"engine is {engine!r}; expected local or ray")
    if n_jobs is None:
        return
    whole_number("n_jobs", n_jobs)
    if engine == "local":
        raise ValueError(f"n_jobs is {n_jobs} and engine is 'local', which draws in this process; pass engine='ray'")


class _Parts(Sequence[Any]):
    """The parts of a request that workers draw, cut when they are sent."""

    def __init__(self, request: Divisible, size: int):
        self.request, self.size = request, size

    def __len__(self) -> int:
        return math.ceil(len(self.request) / self.size)

    def __getitem__(self, i: Any) -> Any:
        return self.request.part(i * self.size, (i + 1) * self.size)


def in_parts(
    work: Callable[..., Iterator[Item]],
    request: Divisible,
    model: OnDevices,
    *shared: Any,
    engine: str,
    n_jobs: int | None,
    in_order: bool = False,
) -> Iterator[Item]:
    """Yield what ``work(request, model, *shared)`` does, in this process or, part by part, on those of a cluster."""
    fit.keep_freed_memory()
    if engine == "local":
        yield from work(request, model, *shared)
        return

    # several parts for each worker, so that all end at about the same time
    threads = torch.get_num_threads()
    gpus = "cpu" not in (request.device, model.accelerator)
    workers = n_jobs or n_workers(threads, gpus=gpus)
    size = min(max(len(request) // (4 * workers), 1), 8)  # the model is sent with each
    parts = _Parts(request, size)
    results = over_ray(
        _on_worker,
        parts,
        work,
        threads,
        model,
        *shared,
        threads=threads,
        gpus=gpus,
        n_jobs=n_jobs,
        retries=3,
        at_once=2 * workers,
        in_order=in_order,
    )

    # whatever ended a worker ends the drawing
    for number, found in results:
        if isinstance(found, Exception):
            begin = parts[number].begins_with
            raise RuntimeError(f"the worker that drew {begin} and what follows ended: {found}") from found
        yield from found


def _on_worker(request: Divisible, work: Callable[..., Iterator[Item]], threads: int, *shared: Any) -> list[Item]:
    """What the work yields for a part, in a process of a cluster."""
    torch.set_num_threads(threads)
    return list(work(request, *shared))


# ---- into an AnnData -----------------------------------------------------------------------------------------------


def stored(file: h5py.File, shape: tuple[int, int]) -> h5py.Dataset:
    """X of an h5ad, to be filled: dense, compressed, in pieces of about 1 MiB."""
    n_rows = max((1 << 18) // max(shape[1], 1), 1)  # of 4 bytes a value
    piece = (min(n_rows, shape[0]), shape[1])
    file.pop("X", None)
    x = file.create_dataset("X", shape, np.float32, chunks=piece, compression="gzip", compression_opts=1)
    x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return x


def filled(x: Any, cells: Iterable[tuple[int, np.ndarray]], n_cells: Sequence[int]) -> Any:
    """X with the cells of every condition, so many rows each, in the order of the conditions."""
    ends = np.cumsum(n_cells)
    for i, values in cells:
        x[ends[i] - n_cells[i] : ends[i]] = values
    return x


def means_of(cells: Iterable[tuple[int, np.ndarray]], means: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Hand the cells on, and put the mean of every condition into a row of (c, g)."""
    for i, values in cells:
        means[i] = values.mean(axis=0, dtype=np.float64)
        yield i, values


def control_pool(dataset: CellDataset, limit: int = 2000) -> dict[str, ControlCells]:
    """Training control cells of every group, at most `limit` of each, chosen by a fixed seed."""
    # group of covariates of every training cell, and whether it is a control
    rows = dataset.rows("train")
    design = dataset.design
    table, condition = design.unique_conditions(dataset.obs.iloc[rows])
    codes, names = pd.factorize(design.groups(table), sort=True)
    group = codes[condition]
    control = design.is_control(table)[condition]

    rng = np.random.default_rng(0)
    pool = {}
    for g in np.unique(group[control]):
        members = rows[(group == g) & control]
        kept = np.sort(rng.permutation(members)[:limit])
        embedding = None
        if dataset.embedding is not None:
            embedding = dataset.embedding[torch.from_numpy(kept)].numpy()
        pool[str(names[g])] = ControlCells(dataset.source.read(kept), embedding)
    return pool


def _sources(
    pool: Mapping[str, ControlCells], group: str, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """n control cells of a group, and their embedding; each is used once before any is used again."""
    if group not in pool:
        raise ValueError(
            f"no control cells for the covariates {group!r}; known: {preview(pool)}. Pass them with controls="
        )
    cells = pool[group]
    n_rounds = math.ceil(n / len(cells))
    orders = [torch.randperm(len(cells), generator=generator) for _ in range(n_rounds)]
    rows = torch.cat(orders)[:n]
    return cells.take(rows.numpy())

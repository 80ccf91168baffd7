"""Drawing cells from a fitted model: condition by condition, here or on the workers of a cluster."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from invirtuo import fit
from invirtuo.batch import Batch
from invirtuo.checks import some
from invirtuo.flow import SOLVERS
from invirtuo.settings import Settings
from invirtuo.workers import n_workers, over_ray

if TYPE_CHECKING:
    import h5py

    from invirtuo.dataset import CellDataset
    from invirtuo.model.base import Model

__all__ = ["Request", "SampleConfig", "control_pool", "drawn", "filled", "means_of", "stored"]


@dataclass(frozen=True)
class SampleConfig(Settings):
    """How cells are drawn from a fitted model."""

    guidance: float | Mapping[str, float] = 1.0  # weight of classifier-free guidance, or of its parts; 1 is none
    interval: tuple[float, float] = (0.0, 1.0)  # times between which guidance acts
    steps: int | None = None  # steps of the solver; None: the model's own
    solver: str | None = None  # name in flow.SOLVERS, or dopri5; None: the model's own
    grid: tuple[float, ...] | None = None  # times of the steps, instead of `steps` uniform ones
    clamp_min: float | None = None  # raise values below this to it; None leaves them
    precision: str = "auto"  # "fp32", "bf16", or "auto": bf16 where it is measured to be faster
    batch_size: int = 256  # cells in the network at once; does not change the numbers

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; expected auto, fp32 or bf16")
        if self.solver is not None and self.solver not in (*SOLVERS, "dopri5"):
            raise ValueError(f"solver is {self.solver!r}; expected one of {', '.join(SOLVERS)}, dopri5")
        weights = self.guidance if isinstance(self.guidance, Mapping) else {"": self.guidance}
        if not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"guidance is {self.guidance}; expected finite numbers")
        if not (len(self.interval) == 2 and 0 <= self.interval[0] < self.interval[1] <= 1):
            raise ValueError(f"interval is {self.interval}; expected two times that rise, between 0 and 1")
        if self.clamp_min is not None and not math.isfinite(self.clamp_min):
            raise ValueError(f"clamp_min is {self.clamp_min}; expected a finite number, or None")
        if self.grid is not None and ([*self.grid] != sorted({*self.grid}) or self.grid[:1] + self.grid[-1:] != (0, 1)):
            raise ValueError(f"grid is {self.grid}; expected times that rise from 0 to 1")
        for name in ("steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


@dataclass(frozen=True)
class Request:
    """Cells to draw: of which conditions, how many of each, and how."""

    table: pd.DataFrame
    n_cells: int
    seed: int
    config: SampleConfig
    pool: Mapping[str, sparse.csr_matrix]


def drawn(model: Model, request: Request, engine: str, n_jobs: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Number and cells (n, g) of every condition of a request, as they come."""
    fit.keep_freed_memory()
    if engine == "local":
        yield from _conditions(model, range(len(request.table)), request)
        return
    threads = torch.get_num_threads()
    workers, n = n_jobs or n_workers(threads), len(request.table)
    precision = "bf16" if fit.use_bf16(request.config) else "fp32"  # as here, not as measured there
    request = replace(request, config=replace(request.config, precision=precision))
    size = min(max(n // (4 * workers), 1), 8)  # conditions of a task: the model is sent with each
    tasks = [range(i, min(i + size, n)) for i in range(0, n, size)]
    results = over_ray(
        _on_worker, tasks, model, request, threads, threads=threads, n_jobs=n_jobs, retries=3, at_once=2 * workers
    )
    for number, cells in results:
        if isinstance(cells, Exception):
            first = request.table.iloc[tasks[number][0]].to_dict()
            raise RuntimeError(f"the worker that drew {first} and what follows ended: {cells}") from cells
        yield from zip(tasks[number], cells, strict=True)


@torch.no_grad()
def _conditions(model: Model, places: Iterable[int], request: Request) -> Iterator[tuple[int, np.ndarray]]:
    """Number and cells of some conditions; each depends on the seed and its name alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table, config, n_cells = request.table, request.config, request.n_cells
    model.eval().to(device)
    bf16 = fit.use_bf16(config)
    for i in places:
        name = model.design.names(table.iloc[[i]]).iloc[0]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{request.seed}|{name}".encode()))
        batch = Batch(model.design.encode(table.iloc[[i] * n_cells]))
        if model.needs_source:
            source = _sources(request.pool, model.design.groups(table.iloc[[i]]).iloc[0], n_cells, generator)
            batch = Batch(batch.condition, source=source)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = model.sample(batch.to(device), generator, config).float().cpu()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{model.name} draws NaN or infinite values for {name}; fit it again with a lower lr")
        yield i, (x if config.clamp_min is None else x.clamp_min(config.clamp_min)).numpy()
    model.cpu()


def _on_worker(places: Sequence[int], model: Model, request: Request, threads: int) -> list[np.ndarray]:
    """Cells of some conditions, drawn in a process of a cluster."""
    torch.set_num_threads(threads)
    return [cells for _, cells in _conditions(model, places, request)]


def stored(file: h5py.File, shape: tuple[int, int]) -> h5py.Dataset:
    """X of an h5ad, to be filled: dense, compressed, in pieces of about 1 MiB."""
    pieces = (min(max((1 << 18) // max(shape[1], 1), 1), shape[0]), shape[1])
    file.pop("X", None)
    x = file.create_dataset("X", shape, np.float32, chunks=pieces, compression="gzip", compression_opts=1)
    x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return x


def filled(x: Any, cells: Iterable[tuple[int, np.ndarray]], n_cells: int) -> Any:
    """Put the cells of every condition where they belong."""
    for i, values in cells:
        x[i * n_cells : (i + 1) * n_cells] = values
    return x


def means_of(cells: Iterable[tuple[int, np.ndarray]], means: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Hand the cells on, and put the mean of every condition into a row of (c, g)."""
    for i, values in cells:
        means[i] = values.mean(axis=0, dtype=np.float64)
        yield i, values


def control_pool(dataset: CellDataset, limit: int = 2000) -> dict[str, sparse.csr_matrix]:
    """Training control cells of every group, at most `limit` of each, chosen by a fixed seed."""
    rows = dataset.rows("train")
    design = dataset.design
    table, kind = design.kinds(dataset.obs.iloc[rows])
    number, names = pd.factorize(design.groups(table), sort=True)
    group, control = number[kind], design.is_control(table)[kind]
    rng = np.random.default_rng(0)
    pool = {}
    for g in np.unique(group[control]):
        members = rows[(group == g) & control]
        pool[str(names[g])] = dataset.matrix[np.sort(rng.permutation(members)[:limit])]
    return pool


def _sources(pool: Mapping[str, sparse.csr_matrix], group: str, n: int, generator: torch.Generator) -> Tensor:
    """n control cells of a group; each is used once before any is used again."""
    if group not in pool:
        raise ValueError(
            f"no control cells for the covariates {group!r}; known: {some(pool)}. Pass them with controls="
        )
    cells = pool[group]
    rows = torch.cat([torch.randperm(cells.shape[0], generator=generator) for _ in range(-(-n // cells.shape[0]))])[:n]
    return torch.from_numpy(cells[rows.numpy()].toarray())

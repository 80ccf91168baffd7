"""Engines: where the cells of a benchmark are computed. An engine changes when a record comes, not what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from invirtuo.bench.cell import Cell, Record, failed, launch
from invirtuo.workers import n_workers, over_ray

__all__ = ["ENGINES", "local", "ray"]


def local(cells: Sequence[Cell], n_jobs: int | None = None) -> Iterator[tuple[Cell, Record]]:
    """On this machine, through joblib: `n_jobs` processes at a time, each record as soon as it is there.

    Parameters
    ----------
    cells
        What to compute.
    n_jobs
        None: as many as have a core for each of their threads; one where there is a GPU.
    """
    from joblib import Parallel, delayed

    def work(cell: Cell) -> tuple[Cell, Record]:
        return cell, launch(cell)

    n_jobs = n_jobs or _n_jobs(cells)
    yield from Parallel(n_jobs, backend="threading", return_as="generator_unordered")(map(delayed(work), cells))


def ray(cells: Sequence[Cell], n_jobs: int | None = None) -> Iterator[tuple[Cell, Record]]:
    """On the Ray cluster of this session or of ``RAY_ADDRESS``; without one, on a new one with `n_jobs` workers.

    A machine of the cluster needs this package and, for named data sets, the same data folder.
    """
    threads = max((cell.threads for cell in cells), default=1)
    for number, record in over_ray(launch, cells, threads=threads, n_jobs=n_jobs):
        if isinstance(record, Exception):
            record = failed(cells[number], f"the worker ended: {str(record).splitlines()[0]}", str(record))
        yield cells[number], record


def _n_jobs(cells: Sequence[Cell]) -> int:
    return n_workers(max((cell.threads for cell in cells), default=1))


ENGINES: dict[str, Callable[..., Iterator[tuple[Cell, Record]]]] = {"local": local, "ray": ray}

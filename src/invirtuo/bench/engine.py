"""Engines: where the cells of a benchmark are computed. An engine changes when a record comes, not what is in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from invirtuo.bench.cell import Cell, Record, failed, launch

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
    try:
        import ray as cluster
    except ImportError as error:
        raise ValueError("engine 'ray' needs the package ray: pip install 'invirtuo[ray]'") from error
    from ray.exceptions import RayError

    n_jobs, threads = n_jobs or _n_jobs(cells), max((cell.threads for cell in cells), default=1)
    started = not cluster.is_initialized()
    if started and os.environ.get("RAY_ADDRESS"):
        cluster.init(log_to_driver=False)
    elif started:
        cluster.init(num_cpus=n_jobs * threads, include_dashboard=False, log_to_driver=False)
    n_gpus = 1 if cluster.cluster_resources().get("GPU") else 0
    remote = cluster.remote(num_cpus=threads, num_gpus=n_gpus, max_retries=0)(launch)
    try:
        running = {remote.remote(cell): cell for cell in cells}
        while running:
            done, _ = cluster.wait(list(running), num_returns=1)
            cell = running.pop(done[0])
            try:
                yield cell, cluster.get(done[0])
            except RayError as error:
                yield cell, failed(cell, f"the worker ended: {str(error).splitlines()[0]}", str(error))
    finally:
        if started:
            cluster.shutdown()


def _n_jobs(cells: Sequence[Cell]) -> int:
    import torch

    threads = max((cell.threads for cell in cells), default=1)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.cuda.is_available() else max(1, available // threads)


ENGINES: dict[str, Callable[..., Iterator[tuple[Cell, Record]]]] = {"local": local, "ray": ray}

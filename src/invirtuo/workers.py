"""Work spread over processes of a Ray cluster: items in, results as they come, and lost workers replaced."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from invirtuo.threads import n_cores

__all__ = ["n_workers", "over_ray"]


def over_ray(
    work: Callable[..., Any],
    items: Sequence[Any],
    *shared: Any,
    threads: int = 1,
    gpus: bool = True,
    n_jobs: int | None = None,
    retries: int = 0,
    at_once: int | None = None,
    in_order: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Call ``work(item, *shared)`` on the Ray cluster of this session or of ``RAY_ADDRESS``; without one, on a new one.

    Parameters
    ----------
    work
        A function that the machines of the cluster can import or unpickle.
    items
        One for each call.
    shared
        Sent to each machine once.
    threads
        Cores of a worker.
    gpus
        Whether a worker has one of the GPUs, too, where the cluster has some.
    n_jobs
        Workers of a new cluster; None: as many as there are cores for.
    retries
        How often an item whose worker was lost is begun anew.
    at_once
        Most items under way, so that results that are not taken yet do not fill the memory; None: all.
    in_order
        Give results in the order of the items; those that wait for an earlier one count as under way.

    Returns
    -------
    Number of an item and its result, or the ``RayError`` with which it ended, as they come.

    Raises
    ------
    ValueError
        If the package ray is missing.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine 'ray' needs the package ray: pip install 'invirtuo[ray]'") from error
    from ray.exceptions import RayError

    # a cluster, if there is none yet
    started = not ray.is_initialized()
    if started:
        n_cpus = threads * (n_jobs or n_workers(threads, gpus=gpus))
        _start_ray(n_cpus)

    n_gpus = 1 if gpus and ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=threads, num_gpus=n_gpus, max_retries=retries)(work)
    try:
        sent = [ray.put(value) for value in shared]
        running: dict[Any, int] = {}
        ready: dict[int, Any] = {}
        begun = given = 0
        while given < len(items):
            # begin items while there is room
            while begun < len(items) and (at_once is None or begun - given < at_once):
                running[remote.remote(items[begun], *sent)] = begun
                begun += 1

            # take the next that ends, whichever it is
            done, _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done[0])
            try:
                ready[number] = ray.get(done[0])
            except RayError as error:
                ready[number] = error

            # give what may be given: in order, what no earlier item holds up
            while given in ready or (ready and not in_order):
                number = given if in_order else next(iter(ready))
                yield number, ready.pop(number)
                given += 1
    finally:
        if started:
            with _sigterm_kept():
                ray.shutdown()


def _start_ray(n_cpus: int) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start one on this machine."""
    import ray

    options: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_cpus, "include_dashboard": False}
    with _sigterm_kept():
        ray.init(log_to_driver=False, **options)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Set the handler of SIGTERM again: Ray's ends the process with exit code 15, and goes without giving it back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def n_workers(threads: int, *, gpus: bool = True) -> int:
    """Workers that this machine has cores for; one where they compute on the GPU of this machine."""
    import torch

    if gpus and torch.cuda.is_available():
        return 1
    return max(1, n_cores() // threads)

"""How many threads a process may use, and telling torch, BLAS and numba; entry points call it, never an import."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

__all__ = ["VARIABLES", "in_threads", "n_cores", "size_threads"]

Item, Result = TypeVar("Item"), TypeVar("Result")

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@cache
def n_cores() -> int:
    """Cores that this process may use: those of its affinity, or of the CPU quota of its container if that is less."""
    from joblib import cpu_count

    n: int = cpu_count()
    return n


def size_threads() -> None:
    """Let numeric libraries use the cores that this process may use; settings of the environment stay.

    To be called before torch is loaded.
    """
    from threadpoolctl import threadpool_info, threadpool_limits

    limit = n_cores()
    for name in VARIABLES:  # for libraries that are not loaded yet, and for processes to come
        os.environ.setdefault(name, str(limit))
    # Threads that wait for each other sleep: those that spin take the core that the one they wait for needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if any(library["num_threads"] > limit for library in threadpool_info()):
        threadpool_limits(limit)
    if "torch" in sys.modules and sys.modules["torch"].get_num_threads() > limit:
        sys.modules["torch"].set_num_threads(limit)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What a function makes of every item, in order, on as many threads as torch has, with one of torch in each.

    For items of a millisecond or more of tensor operations without gradients: threads that share every operation wait
    for each other after each. Results do not depend on the number of threads.
    """
    import torch

    n = torch.get_num_threads()
    if n == 1:
        return [function(item) for item in items]

    def without_gradients(item: Item) -> Result:
        with torch.no_grad():  # a thread has this setting to itself
            return function(item)

    return list(_pool(n, os.getpid()).map(without_gradients, items))


@cache
def _pool(n: int, process: int) -> ThreadPoolExecutor:
    """Threads of a process (a fork inherits none), in each of which torch computes with one."""
    import torch

    pool = ThreadPoolExecutor(n, "one-thread", torch.set_num_threads, (1,))
    all_began = Barrier(n)
    list(pool.map(lambda _: all_began.wait(), range(n)))
    torch.set_num_threads(n)  # what threads to come begin with is one setting of the process
    return pool

"""How many threads a process may use, telling torch, BLAS and numba (never at an import), and sharing work by items."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

__all__ = ["VARIABLES", "in_threads", "n_cores", "operations_on_one_thread", "size_threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")
_kept_for_items = ContextVar("threads of in_threads where torch has fewer", default=1)  # of each thread

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

    todo = list(items)
    n = max(_kept_for_items.get(), torch.get_num_threads())
    if n == 1 or len(todo) == 1:
        return [function(item) for item in todo]
    numbers, results = iter(range(len(todo))), dict[int, Result]()

    def work() -> None:
        with torch.no_grad():  # a thread has this setting to itself
            for i in numbers:
                results[i] = function(todo[i])

    # This thread works, too: one that went to sleep at once would be found on the core of those that it woke.
    others = [_pool(n - 1, os.getpid()).submit(work) for _ in range(n - 1)]
    with operations_on_one_thread():
        work()
    for other in others:
        other.result()
    return [results[i] for i in range(len(todo))]


@contextmanager
def operations_on_one_thread() -> Iterator[None]:
    """Let torch do with one thread what is not done by :func:`in_threads`, which keeps those that torch had.

    Sharing them wins little in operations of less than a millisecond, and on two cores it often loses.
    """
    import torch

    n = torch.get_num_threads()
    token = _kept_for_items.set(max(_kept_for_items.get(), n))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)
        _kept_for_items.reset(token)


@cache
def _pool(n: int, process: int) -> ThreadPoolExecutor:
    """Threads of a process (a fork inherits none), in each of which torch computes with one."""
    import torch

    return ThreadPoolExecutor(n, "one-thread", torch.set_num_threads, (1,))

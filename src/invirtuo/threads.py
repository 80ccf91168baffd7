"""How many threads a process may use, and telling torch, BLAS and numba; entry points call it, never an import."""

from __future__ import annotations

import os
import sys
from functools import cache

__all__ = ["VARIABLES", "n_cores", "size_threads"]

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

"""Seconds of a fit and of a prediction beside busy processes, by the number of threads and how they wait.

On an otherwise idle machine. A row for each number of busy loops and each way: as many threads as cores that spin while
they wait, that do as OpenMP does by default (spin for a while), that sleep (OMP_WAIT_POLICY=PASSIVE, as the command
line sets), and one thread.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import invirtuo as iv
from studies.harness import Tables, apart, filled, fit, spent, study

LIMIT = 300.0  # seconds after which a row is given up


@study(quick={"steps": 3, "loops": [0]})
def threads(*, out: Path, steps: int = 40, loops: Sequence[int] = (0, 1, 2)) -> Tables:
    """Seconds of a fit and a prediction beside busy processes, by threads and how they wait.

    Parameters
    ----------
    loops
        Numbers of busy processes beside it.
    """
    n = len(os.sched_getaffinity(0))
    ways = {
        f"{n} threads, spinning": (n, {"OMP_WAIT_POLICY": "ACTIVE"}),
        f"{n} threads, default": (n, {}),
        f"{n} threads, sleeping": (n, {"OMP_WAIT_POLICY": "PASSIVE"}),
        "1 thread": (1, {}),
    }

    def one(busy: int, way: str) -> dict:
        n_threads, environment = ways[way]
        with busy_loops(busy):
            return apart(timed, steps=steps, threads=n_threads, environment=environment, limit=LIMIT)

    return {"threads": filled(out / "rows.csv", one, busy=loops, way=ways)}


@contextlib.contextmanager
def busy_loops(n: int) -> Iterator[None]:
    """Other work on the machine."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def timed(steps: int) -> dict:
    """Wall seconds of a fit and of a prediction, after a warm-up; in a process of its own."""
    adata = iv.preprocess.normalize(iv.datasets.load("kang"))
    design = iv.datasets.design("kang", adata)
    model = iv.models.PRiMeFlow(design, adata.var_names)
    fit(model, adata, steps=3, val_every=0)
    with spent() as fitting:
        fit(model, adata, steps=steps, val_every=0)
    with spent() as predicting:
        model.predict(design.conditions(adata.obs)[:2], 200, seed=0)
    return {"fit_seconds": fitting["wall_seconds"], "predict_seconds": predicting["wall_seconds"]}

"""Seconds of a fit and of a prediction beside busy processes, by the number of threads and how they wait.

    python benchmarks/threads.py --steps 40

On an otherwise idle machine. A row for each number of busy loops (0, 1, 2) and each way: as many threads as cores that
spin while they wait, that do as OpenMP does by default (spin for a while), that sleep (OMP_WAIT_POLICY=PASSIVE, as
the command line sets), and one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

WORK = """
import dataclasses, time
import invirtuo as iv
adata = iv.preprocess.normalize(iv.datasets.load("kang"))
design = iv.datasets.design("kang", adata)
model = iv.models.PRiMeFlow(design, adata.var_names)
config = dataclasses.replace(model.fit_config, steps={steps}, val_every=0, progress=False)
model.fit(adata, config=dataclasses.replace(config, steps=3))
start = time.perf_counter()
model.fit(adata, config=config)
fitted = time.perf_counter()
model.predict(design.conditions(adata.obs)[:2], 200, seed=0)
print(f"{{fitted - start:6.1f}} {{time.perf_counter() - fitted:6.1f}}")
"""


@contextlib.contextmanager
def busy(n_loops: int) -> Iterator[None]:
    """Other work on the machine."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_loops)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a row is given up")
    args = parser.parse_args()
    n = str(len(os.sched_getaffinity(0)))
    ways = {
        f"{n} threads, spinning": {"OMP_NUM_THREADS": n, "OMP_WAIT_POLICY": "ACTIVE"},
        f"{n} threads, default": {"OMP_NUM_THREADS": n},
        f"{n} threads, sleeping": {"OMP_NUM_THREADS": n, "OMP_WAIT_POLICY": "PASSIVE"},
        "1 thread": {"OMP_NUM_THREADS": "1"},
    }
    print("busy loops, threads: seconds of the fit, of the prediction")
    for n_loops in (0, 1, 2):
        for name, environment in ways.items():
            command = [sys.executable, "-c", WORK.format(steps=args.steps)]
            with busy(n_loops):
                try:
                    done = subprocess.run(
                        command,
                        env=os.environ | environment,
                        capture_output=True,
                        text=True,
                        timeout=args.limit,
                        check=True,
                    )
                    found = done.stdout.strip()
                except subprocess.TimeoutExpired:
                    found = f"more than {args.limit:.0f} s in all"
            print(f"{n_loops}, {name}: {found}", flush=True)


if __name__ == "__main__":
    main()

"""What every model costs at its setting for a CPU: CPU seconds, wall seconds and peak memory of fit and prediction.

    python benchmarks/costs.py --data-dir DATA --threads 2

Kang, 14,000 cells, 2,000 genes, three cell types held out (task kang-celltype); 1,000 cells of each are predicted.
Every model runs in a process of its own; reading and normalising the data, 10 to 20 seconds, counts. On a busy machine
look at CPU seconds: with t threads, the wall time of an idle one lies between these and a t-th of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import pandas as pd

import invirtuo as iv

QUICK = {"primeflow": "quick"}  # presets for a CPU, where it is not the default
RUN = """
import resource, sys
import torch
torch.set_num_threads(int(sys.argv[4]))
from dataclasses import replace
from invirtuo.bench import TASKS, Entry
name, preset, data_dir = sys.argv[1:4]
adata, design, split = TASKS["kang-celltype"].load(data_dir=data_dir or None)
model, fit = Entry(name, name, preset or None).make(design, adata.var_names)
model.fit(adata, split, replace(fit, progress=False)).predict("test", 1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)
"""


def cost(name: str, data_dir: str, threads: int) -> dict:
    """Fit and predict in a new process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-c", RUN, name, QUICK.get(name, ""), data_dir, str(threads)]
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "model": ":".join(filter(None, (name, QUICK.get(name)))),
        "cpu_seconds": round(cpu),
        "wall_seconds": round(time.perf_counter() - started),
        "peak_gib": round(float(done.stdout.split()[-1]), 2),
    }


def main() -> None:
    """Print one line for each model as it is done, and a table."""
    every = [name for name, kind in iv.models.MODELS.items() if kind.verb == "predict"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="*", default=every)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        rows.append(cost(name, args.data_dir, args.threads))
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()

"""Reading cells from disk: cells per second, CPU seconds, peak memory and mixing of one pass, a fit, and scores.

    python benchmarks/scale.py make FOLDER --cells 1000000     # generated cells in 20 files, and a shuffled store
    python benchmarks/scale.py measure FOLDER --out scale.csv  # every case in a process of its own
    python benchmarks/scale.py measure FOLDER --rivals PYTHON  # with scDataset and cell-load of another environment

Cells are generated: 2,000 genes, 100 to 200 of them above zero in a cell; each file is a plate, sorted by perturbation,
as files of screens often are. Batches of 512 cells are made dense, float32. On a busy machine look at CPU seconds.

`entropy` is the mean entropy of the labels in a batch over its mean in batches of a full shuffle: 1 is perfect mixing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

N_GENES, N_FILES, N_PERTURBATIONS, BATCH = 2000, 20, 200, 512
CASES = ("memory", "files", "store", "pairs", "sets", "sets of the files", "fit", "evaluate")
SCORES = ("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean")
RIVALS = {
    "scDataset": 262_144,
    "scDataset, blocks of 512": 184_320,
    "cell-load": 2048,
    "cell-load, consecutive": 32_768,
}


def make(folder: Path, n_cells: int) -> None:
    """Write the files and the shuffled store."""
    import invirtuo as iv

    (folder / "files").mkdir(parents=True, exist_ok=True)
    for k in range(N_FILES):
        plate(k, n_cells // N_FILES).write_h5ad(folder / "files" / f"plate_{k:02d}.h5ad")
    before = os.times()
    started = time.perf_counter()
    iv.store.shuffle(iv.CellStore.open(folder / "files"), folder / "store")
    spent = cpu(before) | {"wall_seconds": round(time.perf_counter() - started, 1), "peak_gib": peak()}
    print(json.dumps({"case": "shuffling", "cells": n_cells, **spent}))


def plate(k: int, n: int) -> anndata.AnnData:
    """Cells of one file, sorted by perturbation; log values."""
    rng = np.random.default_rng(k)
    lengths = rng.integers(100, 201, n)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    width = np.repeat(N_GENES / lengths, lengths)  # one gene in each of as many equal pieces as the cell has values
    indices = ((within + rng.random(indptr[-1])) * width).astype(np.int32)
    data = np.log1p(rng.gamma(2.0, 10.0, indptr[-1])).astype(np.float32)
    labels = np.sort(rng.integers(0, N_PERTURBATIONS + 20, n)) - 20  # a tenth are controls
    names = np.where(labels < 0, "control", np.char.add("gene_", np.maximum(labels, 0).astype(str)))
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(names),
            "cell_line": pd.Categorical([f"line_{k % 5}"] * n),
            "plate": pd.Categorical([f"plate_{k}"] * n),
        },
        index=[f"plate_{k}_cell_{i}" for i in range(n)],
    )
    x = sparse.csr_matrix((data, indices, indptr), (n, N_GENES))
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"gene_{i}" for i in range(N_GENES)]))


def cpu(before: os.times_result) -> dict[str, float]:
    """CPU seconds of this process and its children since `before`."""
    return {"cpu_seconds": round(sum(os.times()[:4]) - sum(before[:4]), 2)}


def peak() -> float:
    """Largest resident memory of this process so far, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def entropies(labels: list[np.ndarray]) -> float:
    """Mean entropy of the labels of batches, nats."""
    shares = (np.bincount(batch) / len(batch) for batch in labels)
    return float(np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]))


def mixing(obs: pd.DataFrame, batches: list[np.ndarray]) -> dict[str, float]:
    """Entropy of the plates and perturbations of batches over that of a full shuffle."""
    order = np.random.default_rng(12345).permutation(len(obs))
    whole = [order[i : i + BATCH] for i in range(0, len(obs), BATCH)]
    found = {}
    for column in ("plate", "perturbation"):
        codes = obs[column].cat.codes.to_numpy().astype(np.int64)
        full = [b for b in batches if len(b) == BATCH]
        found[f"entropy_{column}"] = round(
            entropies([codes[b] for b in full]) / entropies([codes[b] for b in whole]), 4
        )
    return found


def dataset(case: str, folder: Path, memory: str):
    """The cells of a case as a CellDataset."""
    import invirtuo as iv

    if case == "memory":
        files = [anndata.read_h5ad(path) for path in sorted((folder / "files").iterdir())]
        cells = anndata.concat(files, merge="same")
        cells.obs = cells.obs.astype("category")
    else:
        cells = iv.CellStore.open(folder / ("files" if case.endswith("files") else "store"), memory=memory)
    roles = {"perturbation": "perturbation", "control": "control", "covariates": ["cell_line"]}
    return cells, iv.Design.from_adata(cells.obs, **roles)


def measure(case: str, folder: Path, memory: str) -> dict:
    """One pass of a case, in this process."""
    import torch

    import invirtuo as iv

    torch.set_num_threads(1)
    before, started = os.times(), time.perf_counter()
    if case == "evaluate":
        return evaluate(folder, before, started)
    cells, design = dataset(case, folder, memory)
    if case == "fit":
        return fit(cells, design, before, started)
    data = iv.CellDataset(cells, design)
    opened = cpu(before)["cpu_seconds"]
    seen, total, before, started = [], 0.0, os.times(), time.perf_counter()
    kind = case.split(maxsplit=1)[0]  # of sampler; cells are the other cases
    sampler = iv.samplers.named(kind if kind in ("pairs", "sets") else "cells", 64)
    for batch in data.batches(sampler, BATCH, seed=1):
        seen.append(batch.index.numpy())
        total += float(batch.target[0, 0])
    spent = cpu(before) | {"wall_seconds": round(time.perf_counter() - started, 2)}
    n = sum(map(len, seen))
    result = {"case": case, "cells": n, "opening_cpu_seconds": opened, **spent, "peak_gib": peak()}
    result["cells_per_cpu_second"] = round(n / spent["cpu_seconds"])
    result["cells_per_second"] = round(n / spent["wall_seconds"])
    result["with_opening"] = round(n / (opened + spent["cpu_seconds"]))  # cells per CPU second
    return result | (mixing(data.obs, seen) if kind not in ("pairs", "sets") else {})


def fit(cells, design, before, started) -> dict:
    """Fit a small model for 500 steps."""
    import invirtuo as iv

    model = iv.models.LinearAdditive(design, cells.var_names)
    rng = np.random.default_rng(0)
    split = pd.Series(np.where(rng.random(cells.n_obs) < 0.9, "train", "val"), index=cells.obs.index)
    config = iv.FitConfig(steps=500, batch_size=BATCH, val_every=100, progress=False, precision="fp32")
    model.fit(cells, split, config)
    spent = cpu(before) | {"wall_seconds": round(time.perf_counter() - started, 2)}
    return {"case": "fit", "cells": 500 * BATCH, **spent, "peak_gib": peak()}


def evaluate(folder: Path, before, started) -> dict:
    """Score the cells of the shuffled store, as predictions, against those of the files."""
    import invirtuo as iv

    design = iv.Design(perturbation="perturbation", control="control", covariates=("cell_line",))
    scores = iv.evaluate(folder / "store", folder / "files", design, list(SCORES))
    spent = cpu(before) | {"wall_seconds": round(time.perf_counter() - started, 2)}
    cells = int(scores.loc[scores["metric"] == SCORES[0], "n_real"].sum())
    return {"case": "evaluate", "cells": cells, "conditions": len(scores) // len(SCORES), **spent, "peak_gib": peak()}


def in_a_process(command: list, **environment: str) -> dict:
    """Measure a case in a process of its own."""
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"case": command[-3], "failed": done.stderr[-500:]}
    return json.loads(done.stdout.splitlines()[-1])


def commands(args: argparse.Namespace) -> list[list]:
    """What is run for each case."""
    own = [sys.executable, "-W", "ignore", __file__, "measure", args.folder, "--memory", args.memory, "--case"]
    runs = [[*own, case] for case in args.cases]
    if args.rivals:
        script = [args.rivals, "-W", "ignore", Path(__file__).with_name("scale_rivals.py")]
        runs += [[*script, case, args.folder / "files", "--cells", n] for case, n in RIVALS.items()]
    return runs


def main() -> None:
    """Make the files, or print a line for every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--memory", default="256 MiB")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--rivals", type=Path, help="Python with scDataset and cell-load.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.verb == "make":
        make(args.folder, args.cells)
    elif args.case:
        print(json.dumps(measure(args.case, args.folder, args.memory)))
    else:
        rows = []
        for command in commands(args):
            rows.append(in_a_process(command))
            print(json.dumps(rows[-1]), flush=True)
        if args.out:
            pd.DataFrame(rows).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()

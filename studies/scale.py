"""Reading cells from disk: cells per second, CPU seconds, peak memory and mixing of one pass, a fit, and scores.

Cells are generated: 2,000 genes, 100 to 200 of them above zero in a cell; each file is a plate, sorted by perturbation,
as files of screens often are. Batches of 512 cells are made dense, float32. Every case is measured in a process of its
own. On a busy machine look at CPU seconds.

`entropy` is the mean entropy of the labels in a batch over its mean in batches of a full shuffle: 1 is perfect mixing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import invirtuo as iv
from studies import rivals
from studies.harness import Tables, apart, filled, spent, study

N_GENES, N_FILES, N_PERTURBATIONS, BATCH = 2000, 20, 200, 512
LEAST_VALUES, MOST_VALUES = 100, 200  # above zero in a cell
SCORES = ("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean")
CASES = ("memory", "files", "store", "pairs", "sets", "sets of the files", "fit", "evaluate")
RIVALS = {  # cells that each reads
    "scDataset": 262_144,
    "scDataset, blocks of 512": 184_320,
    "cell-load": 2048,
    "cell-load, consecutive": 32_768,
    "annbatch": 1_000_000,
    "annbatch, memory as ours": 1_000_000,
    "cellstream": 100_000,
    "cellstream, sets": 100_000,
}


@study(quick={"cells": 2000})
def make(folder: Path, *, out: Path, cells: int = 1_000_000) -> Tables:
    """Generated cells in 20 files and in a shuffled store, for scale-measure; what the shuffling costs.

    Parameters
    ----------
    folder
        Where the files and the store are written.
    cells
        Cells of all files together.
    """

    def one(cells: int) -> dict:
        (folder / "files").mkdir(parents=True, exist_ok=True)
        for k in range(N_FILES):
            plate(k, cells // N_FILES).write_h5ad(folder / "files" / f"plate_{k:02d}.h5ad")
        return apart(shuffle, folder=folder)

    return {"shuffling": filled(out / "shuffling.csv", one, cells=[cells])}


def shuffle(folder: str) -> dict:
    """Write the shuffled store; in a process of its own."""
    with spent() as cost:
        iv.shuffle(iv.CellStore.open(Path(folder) / "files"), Path(folder) / "store")
    return cost


@study(quick={"cases": ["store"]})
def measure(
    folder: Path, *, out: Path, cases: Sequence[str] = CASES, memory: str = "256 MiB", rivals_python: str | None = None
) -> Tables:
    """Cells per second, memory and mixing of a pass, a fit and scores, from memory and from disk.

    Parameters
    ----------
    folder
        What scale-make has written.
    cases
        What is measured: memory, files, store, pairs, sets, sets of the files, fit, evaluate.
    memory
        Memory of a store for what it reads ahead.
    rivals_python
        Interpreter of an environment with other loaders, to have beside ours those that it has.
    """

    def one(case: str) -> dict:
        if case in RIVALS:
            apart(rivals.write_files, python=rivals_python, case=case, folder=folder)
            row = apart(rivals.read_files, python=rivals_python, case=case, folder=folder, cells=RIVALS[case])
        else:
            row = apart(MEASURED.get(case, one_pass), case=case, folder=folder, memory=memory)
        for seconds, rate in (("cpu_seconds", "cells_per_cpu_second"), ("wall_seconds", "cells_per_second")):
            row[rate] = row["cells"] / row[seconds]
        return row

    every = [*cases, *RIVALS] if rivals_python else cases
    return {"scale": filled(out / "rows.csv", one, case=every)}


# ---- cells ---------------------------------------------------------------------------------------------------------


def plate(k: int, n: int) -> anndata.AnnData:
    """Cells of one file, sorted by perturbation; log values."""
    rng = np.random.default_rng(k)
    lengths = rng.integers(LEAST_VALUES, MOST_VALUES + 1, n)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    width = np.repeat(N_GENES // lengths, lengths)  # one gene in each of as many equal pieces as the cell has values
    indices = (within * width + rng.integers(0, width)).astype(np.int32)
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


def dataset(case: str, folder: Path, memory: str):
    """The cells of a case as a CellDataset."""
    if case == "memory":
        files = [anndata.read_h5ad(path) for path in sorted((folder / "files").iterdir())]
        cells = anndata.concat(files, merge="same")
        cells.obs = cells.obs.astype("category")
    else:
        cells = iv.CellStore.open(folder / ("files" if case.endswith("files") else "store"), memory=memory)
    roles = {"perturbation": "perturbation", "control": "control", "covariates": ["cell_line"]}
    return cells, iv.Design.from_adata(cells.obs, **roles)


# ---- cases, each in a process of its own -----------------------------------------------------------------------------


def one_pass(case: str, folder: str, memory: str) -> dict:
    """One pass over all cells."""
    with spent() as opening:
        cells, design = dataset(case, Path(folder), memory)
        data = iv.CellDataset(cells, design)
    kind = case.split(maxsplit=1)[0]
    grouped = kind in ("pairs", "sets")
    sampler = iv.samplers.named(kind if grouped else "cells", 64)
    seen, total = [], 0.0
    with spent() as cost:
        for batch in data.batches(sampler, BATCH, seed=1):
            seen.append(batch.index.numpy())
            total += float(batch.target[0, 0])
    n = sum(map(len, seen))
    opened = opening["cpu_seconds"]
    row = {"cells": n, "opening_cpu_seconds": opened, "with_opening": n / (opened + cost["cpu_seconds"])}
    return row | cost | ({} if grouped else mixing(data.obs, seen))


def fit(case: str, folder: str, memory: str) -> dict:
    """Fit a small model for 500 steps."""
    with spent() as cost:
        cells, design = dataset(case, Path(folder), memory)
        model = iv.models.LinearAdditive(design, cells.var_names)
        rng = np.random.default_rng(0)
        split = pd.Series(np.where(rng.random(cells.n_obs) < 0.9, "train", "val"), index=cells.obs.index)
        config = iv.FitConfig(steps=500, batch_size=BATCH, val_every=100, progress=False, precision="fp32")
        model.fit(cells, split, config)
    return {"cells": 500 * BATCH} | cost


def evaluate(case: str, folder: str, memory: str) -> dict:
    """Score the cells of the shuffled store, as predictions, against those of the files."""
    design = iv.Design(perturbation="perturbation", control="control", covariates=("cell_line",))
    with spent() as cost:
        scores = iv.evaluate(Path(folder) / "store", Path(folder) / "files", design, list(SCORES))
    cells = int(scores.loc[scores["metric"] == SCORES[0], "n_real"].sum())
    return {"cells": cells, "conditions": len(scores) // len(SCORES)} | cost


MEASURED = {"fit": fit, "evaluate": evaluate}


def entropies(labels: list[np.ndarray]) -> float:
    """Mean entropy of the labels of batches, nats."""
    shares = (np.bincount(batch) / len(batch) for batch in labels)
    return float(np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]))


def mixing(obs: pd.DataFrame, batches: list[np.ndarray]) -> dict[str, float]:
    """Entropy of the plates and perturbations of batches over that of a full shuffle."""
    order = np.random.default_rng(12345).permutation(len(obs))
    whole = [order[i : i + BATCH] for i in range(0, len(obs), BATCH)]
    full = [batch for batch in batches if len(batch) == BATCH]
    found = {}
    for column in ("plate", "perturbation"):
        codes = obs[column].cat.codes.to_numpy().astype(np.int64)
        best = entropies([codes[batch] for batch in whole])
        found[f"entropy_{column}"] = entropies([codes[batch] for batch in full]) / best
    return found

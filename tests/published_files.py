"""Small files in the layout of those that PerturBench publishes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

import invirtuo as iv
from invirtuo.bench import TASKS

LINES = ("k562", "mcf7", "ht29", "hap1", "a549")
N_GENES = 60  # more than the 50 of DEG recall
STATES = {
    "norman19": [("k562", "none")],
    "srivatsan20": [(line, "none") for line in ("k562", "a549", "mcf7")],
    "jiang24": [(line, drug) for line in LINES for drug in ("IFNG", "INS", "TGFB")],
}


def published_file(name: str, folder: Path, *, packed: bool = False) -> Path:
    """Median-depth log1p in X, raw counts in a layer, genes in any order; perturbations of the figures among them.

    Parameters
    ----------
    name
        Of the data set and of its task.
    folder
        Where it is written, under the published name.
    packed
        Pack it with gzip.
    """
    rng = np.random.default_rng(0)
    singles = [f"G{i}" for i in range(6)]
    drawn = sorted({condition.rpartition("|")[2] for condition in TASKS[name].figures})
    pairs = [f"{a}+{b}" for a, b in zip(singles, singles[1:] + singles[:1], strict=True)]
    labels = ["control", *singles, *drawn, *pairs]
    rows = [(label, *state) for state in STATES[name] for label in labels for _ in range(12)]
    counts = rng.poisson(1.5, (len(rows), N_GENES)).astype(np.float32)
    obs = pd.DataFrame(rows, columns=["condition", "cell_type", "treatment"], index=[f"c{i}" for i in range(len(rows))])
    obs["dose"], obs["perturbation_type"], obs["dataset"] = "1", "any", name
    obs["cov_merged"] = obs["cell_type"]
    obs["ncounts"], obs["ngenes"] = counts.sum(axis=1), (counts > 0).sum(axis=1)
    depth = counts.sum(1, keepdims=True)
    x = sparse.csr_matrix(np.log1p(counts / depth * np.median(depth)))
    var = pd.DataFrame(index=rng.permutation([f"gene{i:02d}" for i in range(N_GENES)]))
    uns = {"rank_genes_groups_cov": {f"k562_{label}": np.array(var.index[:5]) for label in labels}}
    adata = AnnData(x, obs=obs, var=var, layers={"counts": sparse.csr_matrix(counts)}, uns=uns)

    folder.mkdir(exist_ok=True)
    path = folder / iv.datasets.describe().loc[name, "file"]
    adata.write_h5ad(path)
    if not packed:
        return path
    whole = path.read_bytes()
    path.unlink()
    path = path.with_name(f"{path.name}.gz")
    path.write_bytes(gzip.compress(whole))
    return path

"""What a file for the Virtual Cell Challenge 2026 costs at full size: minutes, memory, bytes; cells are generated.

A training context in which all targets were perturbed, and contexts that are known by their control cells alone. Cells
are drawn with the depths and zeros of a usual experiment; nothing here says how good a prediction is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import invirtuo as iv
from invirtuo.bench import predict_submission
from invirtuo.metrics import check_submission, read_contract
from studies.harness import Tables, apart, study

MODELS = {"fold_change": None, "perturbation_mean": "move-cells"}
CONTROLS, TRAINED, DEPTH = 2000, 20, 12_000  # control cells of a context, cells of a target, counts of a cell


def generated(labels: Sequence[str], context: str, genes: int, seed: int) -> anndata.AnnData:
    """Cells (n, g) of a context with these labels, whole counts."""
    rng = np.random.default_rng(seed)
    level = np.random.default_rng(0).lognormal(0, 2.2, genes)
    level = level * rng.lognormal(0, 0.3, genes)
    effects = {label: np.exp(rng.normal(0, 1.0, genes) * (rng.random(genes) < 0.01)) for label in set(labels)}
    effects["non-targeting"] = np.ones(genes)
    rows = []
    for label in labels:
        share = level * effects[label]
        rows.append(sparse.csr_matrix(rng.poisson(share / share.sum() * rng.lognormal(np.log(DEPTH), 0.4)), dtype="f4"))
    obs = pd.DataFrame({"target_gene": list(labels), "context": context})
    obs.index = [f"{context}_{i}" for i in range(len(obs))]
    var = pd.DataFrame(index=[f"G{i:05d}" for i in range(genes)])
    return anndata.AnnData(sparse.vstack(rows, format="csr"), obs=obs, var=var)


def prepare(folder: str, contexts: list[str], targets: int, genes: int) -> None:
    """Write the files of the challenge, and of the training context."""
    names = [f"T{i:03d}" for i in range(targets)]
    control = ["non-targeting"] * CONTROLS
    training = generated([*control, *(name for name in names for _ in range(TRAINED))], "training", genes, 1)
    held_back = [generated(control, context, genes, 2 + i) for i, context in enumerate(contexts)]
    iv.preprocess.normalize(training).write_h5ad(f"{folder}/training.h5ad")
    anndata.concat(held_back).write_h5ad(f"{folder}/controls.h5ad")
    pd.DataFrame({"gene": training.var_names}).to_csv(f"{folder}/genes.csv", index=False, header=False)
    pd.DataFrame({"target_gene": names}).to_csv(f"{folder}/perturbations.csv", index=False)


def predict(folder: str, model: str, contexts: list[str], n_cells: int) -> dict:
    """Fit, predict into a file, check it; what the last two cost."""
    contract = read_contract(f"{folder}/genes.csv", f"{folder}/perturbations.csv", contexts, n_cells)
    cells = anndata.read_h5ad(f"{folder}/training.h5ad")
    design = iv.Design.from_adata(cells, perturbation="target_gene", control="non-targeting", covariates=["context"])
    fitted = iv.models.MODELS[model](design, cells.var_names, MODELS[model]).fit(cells)
    del cells
    started, out = time.perf_counter(), Path(folder) / f"{model}.h5ad"
    predict_submission(fitted, f"{folder}/controls.h5ad", contract, out)
    drawn = time.perf_counter()
    found = check_submission(out, contract)
    checked = time.perf_counter()
    facts = {"predict_minutes": (drawn - started) / 60, "check_minutes": (checked - drawn) / 60}
    facts |= {"cells": found.facts["n_obs"], "GiB": out.stat().st_size / 2**30, "problems": len(found.problems)}
    return facts | {"counts_above_0": found.facts["nnz"]}


@study(quick={"targets": 3, "genes": 200, "n_cells": 5, "contexts": ["A"]})
def submission(
    *,
    out: Path,
    contexts: Sequence[str] = ("A", "B", "C"),
    targets: int = 300,
    genes: int = 18_533,
    n_cells: int = 400,
    models: Sequence[str] = tuple(MODELS),
) -> Tables:
    """What a file for the Virtual Cell Challenge costs at full size.

    Parameters
    ----------
    contexts
        Labels of the contexts.
    targets
        Number of perturbations.
    genes
        Number of genes.
    n_cells
        Cells of each perturbation in each context.
    """
    folder, names = str(out), list(contexts)
    apart(prepare, folder=folder, contexts=names, targets=targets, genes=genes)
    rows = {model: apart(predict, folder=folder, model=model, contexts=names, n_cells=n_cells) for model in models}
    return {"costs": pd.DataFrame(rows).T}

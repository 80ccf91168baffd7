"""A few perturbed cells of a new context: what a fine-tuned model makes of them, beside a new fit and the cells alone.

Each cell type of Kang that was never seen responding in turn: 25, 50 or 100 of its treated cells join the training
cells, the others are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import torch

from invirtuo.bench import TASKS
from invirtuo.metrics import Pair, score
from invirtuo.models import PRiMeFlow
from invirtuo.nn.moved import moved
from studies.harness import Tables, filled, fit, over_seeds, part, study

METRICS = ("mmd_gex", "energy_distance", "mse_degs", "deg_recall", "cosine_logfc", "rmse_mean", "zeros_distance")
SHOTS = (0, 25, 50, 100)
TYPES = ("B cells", "FCGR3A+ Monocytes", "NK cells")
N_CELLS = 300


def run(seed: int, context: str, *, genes: int, steps: int, few_steps: int, data_dir: str | None) -> list[dict]:
    """Scores of one cell type at every number of cells."""
    torch.set_num_threads(1)
    adata, design, split = replace(TASKS["kang-celltype"], n_genes=genes).load(0, data_dir=data_dir)
    column = next(iter(design.covariates))
    own = np.flatnonzero(
        (adata.obs[column] == context).to_numpy() & (split == "test").to_numpy() & ~design.is_control(adata.obs)
    )
    own = np.random.default_rng(seed).permutation(own)
    tested = adata[np.sort(own[max(SHOTS) :])]
    controls = part(adata, split, "test")
    controls = controls[design.is_control(controls.obs)]
    real = anndata.concat([tested, controls])
    wanted = design.conditions(tested.obs)

    first = fit(PRiMeFlow(design, adata.var_names), adata, split, seed=seed, steps=steps)
    rows = []
    for n in SHOTS:
        predicted = {"not fine-tuned": first.predict(wanted, N_CELLS, seed=seed)}
        if n:
            known = split.copy()
            known.iloc[own[:n]] = "train"
            tuned = fit(first.adapt(design), adata, known, seed=seed, steps=few_steps)
            anew = fit(PRiMeFlow(design, adata.var_names), adata, known, seed=seed, steps=steps)
            predicted["fine-tuned"] = tuned.predict(wanted, N_CELLS, seed=seed)
            predicted["fitted anew"] = anew.predict(wanted, N_CELLS, seed=seed)
            few = adata[own[:n]]
            predicted["the cells, drawn again"] = few[np.random.default_rng(seed).integers(n, size=N_CELLS)].copy()
            predicted["control cells moved to their mean"] = to_mean(few, part(adata, split, "train"), context, design)
        for model, cells in predicted.items():
            scores = score(Pair(cells, real, design, n_pcs=30), METRICS)
            rows += [{"cells": n, "model": model} | row for row in scores[["metric", "value"]].to_dict("records")]
    return rows


def to_mean(few: anndata.AnnData, train: anndata.AnnData, context: str, design) -> anndata.AnnData:
    """Training control cells of the context that have moved to the mean of a few perturbed cells."""
    column = next(iter(design.covariates))
    pool = train[design.is_control(train.obs) & (train.obs[column] == context).to_numpy()]
    pool = pool[np.random.default_rng(0).integers(pool.n_obs, size=N_CELLS)]
    x = torch.from_numpy(pool.X.toarray())
    effect = torch.from_numpy(few.X.toarray()).mean(0) - x.mean(0)
    cells = moved(x, effect, float(train.X.data.min()) / 2, torch.Generator().manual_seed(0))
    obs = few.obs.iloc[[0] * N_CELLS].reset_index(drop=True)
    return anndata.AnnData(cells.numpy(), obs=obs.set_index(obs.index.astype(str)), var=few.var[[]].copy())


@study(quick={"contexts": ["NK cells"], "seeds": 1, "genes": 20, "steps": 2, "few_steps": 1})
def few_shot(
    *,
    out: Path,
    data_dir: str | None = None,
    contexts: Sequence[str] = TYPES,
    seeds: int = 3,
    genes: int = 200,
    steps: int = 800,
    few_steps: int = 200,
) -> Tables:
    """A few perturbed cells of a new context: fine-tuned, fitted anew, and the cells alone.

    Parameters
    ----------
    contexts
        Cell types, one after the other.
    genes
        Number of genes.
    steps, few_steps
        Of a fit, and of fine-tuning.
    """
    one = partial(run, genes=genes, steps=steps, few_steps=few_steps, data_dir=data_dir)
    table = filled(out / "scores.csv", one, seed=range(seeds), context=contexts)
    means = over_seeds(table, ["cells", "model", "metric"])
    own = over_seeds(table, ["context", "cells", "model", "metric"])["mean"].unstack("metric")
    return {"means": means["mean"].unstack("metric"), "spread": means["std"].unstack("metric"), "by_context": own}

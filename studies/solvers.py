"""Quality of samples against the number of network evaluations, for every solver, on a trained model.

    invirtuo demo --out demo
    python -m studies solvers demo/models/primeflow

For conditions of the bundled cells that the model was trained on: the published gene-space distance to real cells
(mmd_gex), the variance ratio (total variance of sampled over real cells), and the seconds of sampling. Noise is shared
by all rows, so that differences come from the solver alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import invirtuo as iv
from invirtuo.flow import EVALUATIONS
from invirtuo.metrics import Pair
from studies.harness import Rows, Tables, mean_scores, spent, study

GRID = {
    "euler": (5, 10, 20, 50, 100),
    "midpoint": (10, 20, 50),
    "heun": (10, 20, 50),
    "ab2": (5, 10, 20, 50),
    "rk4": (12, 20, 48),
}
CONDITIONS = ("CD4 T cell", "FCGR3A monocyte")


@study(quick={"cells": 20})
def solvers(model: Path, *, out: Path, cells: int = 500, seeds: int = 1) -> Tables:
    """Quality of samples against evaluations of the network, for every solver.

    Parameters
    ----------
    model
        Folder of a model fitted on the bundled cells.
    """
    raw = iv.datasets.load("kang")
    design = iv.datasets.design("kang", raw)
    adata = iv.preprocess.normalize(raw)
    adata = adata[adata.obs["cell_type"].isin(CONDITIONS).to_numpy()].copy()
    conditions = design.conditions(adata.obs)
    spread = {name: total_variance(adata[mask]) for name, mask in masks(adata, design)}
    fitted, pair = iv.load(model), None

    def one(solver: str, evaluations: int, seed: int) -> dict:
        nonlocal pair
        steps = evaluations // EVALUATIONS[solver]
        with spent() as cost:
            predicted = fitted.predict(conditions, n_cells=cells, solver=solver, steps=steps, seed=seed)
        pair = Pair(predicted, adata, design) if pair is None else pair.against(predicted)
        ratios = [total_variance(predicted[mask]) / spread[name] for name, mask in masks(predicted, design)]
        scores = mean_scores(pair, ["mmd_gex"]) | {"variance_ratio": float(np.mean(ratios))}
        return {"steps": steps} | scores | {"seconds": cost["wall_seconds"]}

    cases = [
        {"solver": solver, "evaluations": n, "seed": seed}
        for seed in range(seeds)
        for solver, evaluations in GRID.items()
        for n in evaluations
    ]
    return {"solvers": Rows(out / "rows.csv").fill(cases, one)}


def masks(adata, design):
    """Name of each perturbed condition and the rows that belong to it."""
    names = design.names(adata.obs)
    perturbed = names[~design.is_control(adata.obs)]
    return [(name, (names == name).to_numpy()) for name in sorted(perturbed.unique())]


def total_variance(cells) -> float:
    """Sum over genes of the variance over cells."""
    x = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
    return float(x.var(axis=0).sum())

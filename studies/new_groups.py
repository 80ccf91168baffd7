"""PRiMeFlow on donors of whom nothing is known but control cells, and these only when it predicts.

The task `kang-donor`, without any cell of the test donors in Design and fit; their training controls go to `predict`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

import invirtuo as iv
from invirtuo.bench import TASKS
from invirtuo.metrics import Pair
from studies.harness import Tables, filled, fit, mean_scores, part, study

METRICS = ("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean", "variance_ratio")


@study(quick={"steps": 5})
def new_groups(*, out: Path, data_dir: str | None = None, steps: int = 800, seeds: int = 1) -> Tables:
    """PRiMeFlow on donors who are no part of Design and fit."""
    adata, whole, split = replace(TASKS["kang-donor"], n_genes=500).load(data_dir=data_dir)
    real = part(adata, split, "test")
    held_out = whole.conditions(real.obs)
    new = adata.obs["donor"].isin(held_out["donor"]).to_numpy()
    known = adata[new & (split == "train").to_numpy()].copy()
    columns = {"perturbation": whole.perturbation, "control": whole.control, "covariates": list(whole.covariates)}
    design = iv.Design.from_adata(adata[~new], **columns)

    def one(seed: int) -> dict:
        model = iv.models.PRiMeFlow(design, adata.var_names)
        fit(model, adata[~new].copy(), split[~new], steps=steps, seed=seed)
        predicted = model.predict(held_out, 300, seed=seed, controls=known)
        return mean_scores(Pair(predicted, real, whole, n_pcs=30), METRICS, whole.names(pd.DataFrame(held_out)))

    return {"new-groups": filled(out / "rows.csv", one, seed=range(seeds))}

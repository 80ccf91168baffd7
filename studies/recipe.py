"""What a given quality costs: the paper's recipe (U-Net, 100 Euler steps) beside the default network, CPU seconds.

Held-out donors of Kang. The U-Net (preset `small`) is fitted for a number of steps and sampled with 100 Euler steps;
then the default is fitted for a tenth of the U-Net's CPU seconds, and for a fifth, and sampled with its own solver. One
thread for both, one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning
import pandas as pd

from invirtuo.bench import TASKS
from invirtuo.metrics import Pair
from invirtuo.models.primeflow.model import PRiMeFlow
from studies.harness import Rows, Tables, fit, grid, mean_scores, part, spent, study

METRICS = ("mmd_gex", "mmd_pca", "energy_distance", "variance_ratio", "deg_recall", "cosine_logfc", "rmse_mean")
UNET = "U-Net, 100 Euler steps"
PACE = 20  # steps of the fit that shows how long a step takes


class Until(lightning.Callback):
    """Ends a fit after some CPU seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_start(self, trainer, module) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        trainer.should_stop |= time.process_time() - self.began >= self.seconds


@study(quick={"genes": 100, "unet_steps": 2, "shares": [0.5], "cells": 10})
def recipe(
    *,
    out: Path,
    data_dir: str | None = None,
    task: str = "kang-donor",
    genes: int = 500,
    unet_steps: int = 600,
    shares: Sequence[float] = (0.1, 0.2),
    cells: int = 100,
    seeds: int = 1,
) -> Tables:
    """Quality of the default network at shares of the CPU seconds of the paper's recipe.

    Parameters
    ----------
    task
        Task of `invirtuo list tasks`.
    unet_steps
        Training steps of the U-Net.
    shares
        Shares of the U-Net's CPU seconds of training.
    """
    adata, design, split = replace(TASKS[task], n_genes=genes).load(0, data_dir=data_dir)
    real = part(adata, split, "test")
    rows = Rows(out / "rows.csv")

    def one(model: str, seed: int) -> dict:
        if model == UNET:
            made, settings = PRiMeFlow(design, adata.var_names, "small"), {"steps": unet_steps}
            callbacks, sampling = [], {"solver": "euler", "steps": 100}
        else:
            made, sampling = PRiMeFlow(design, adata.var_names), {}
            seconds = float(model.split()[1]) * seconds_of_unet(rows.table, seed)
            settings = {"steps": steps_within(seconds, made, adata, split)}
            callbacks = [Until(seconds)]
        with spent() as fitting:
            fit(made, adata, split, val_every=0, seed=seed, callbacks=callbacks, **settings)
        with spent() as sampled:
            predicted = made.predict("test", cells, seed=seed, **sampling)
        wanted = design.names(pd.DataFrame(made.card["held_out"]["test"]))
        means = mean_scores(Pair(predicted, real, design, n_pcs=30), METRICS, wanted)
        costs = {"fit_seconds": fitting["cpu_seconds"], "sample_seconds": sampled["cpu_seconds"]}
        return costs | {"cells": predicted.n_obs} | means

    models = [UNET, *(f"default, {share:g} of the time" for share in shares)]
    return {"recipe": rows.fill(grid(seed=range(seeds), model=models), one)}


def seconds_of_unet(table: pd.DataFrame, seed: int) -> float:
    """CPU seconds that the U-Net was fitted for."""
    mine = (table["model"] == UNET) & (table["seed"] == seed)
    return float(table.loc[mine, "fit_seconds"].iloc[0])


def steps_within(seconds: float, model: PRiMeFlow, adata, split) -> int:
    """As many training steps as the seconds hold, by a short fit."""
    with spent() as cost:
        fit(model, adata, split, steps=PACE, val_every=0)
    return max(int(seconds * PACE / cost["cpu_seconds"]), 1)

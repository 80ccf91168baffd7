"""What a given quality costs: the paper's recipe (U-Net, 100 Euler steps) beside the default network, CPU seconds.

    python benchmarks/recipe.py --data-dir DATA --out recipe

Held-out donors of Kang. The U-Net (preset `small`) is fitted for a number of steps and sampled with 100 Euler steps;
then the default is fitted for a tenth of the U-Net's CPU seconds, and for a fifth, and sampled with its own solver. One
thread for both, one after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning
import pandas as pd
import torch

from invirtuo.bench import TASKS
from invirtuo.metrics import Pair, score
from invirtuo.models.primeflow import PRiMeFlow

METRICS = ("mmd_gex", "mmd_pca", "energy_distance", "variance_ratio", "deg_recall", "cosine_logfc", "rmse_mean")
PACE = 20  # steps of the fit that shows how long a step takes


class Until(lightning.Callback):
    """Ends a fit after some CPU seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_start(self, trainer, module) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        trainer.should_stop |= time.process_time() - self.began >= self.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, sample, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("recipe"))
    parser.add_argument("--task", default="kang-donor")
    parser.add_argument("--genes", type=int, default=500)
    parser.add_argument("--unet-steps", type=int, default=600)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.2], help="of the U-Net's CPU seconds")
    parser.add_argument("--cells", type=int, default=100, help="of every condition")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adata, design, split = replace(TASKS[args.task], n_genes=args.genes).load(0, data_dir=args.data_dir)
    real = adata[(split == "test").to_numpy()].copy()
    rows = []

    def judged(name: str, model: PRiMeFlow, fit, callbacks=(), **sampling) -> float:
        start = time.process_time()
        model.fit(adata, split, replace(fit, val_every=0, progress=False, seed=args.seed), callbacks=callbacks)
        fitted = time.process_time()
        predicted = model.predict("test", args.cells, seed=args.seed, **sampling)
        seconds = {"fit_seconds": fitted - start, "sample_seconds": time.process_time() - fitted}
        scores = score(Pair(predicted, real, design, n_pcs=30), METRICS)
        wanted = design.names(pd.DataFrame(model.card["held_out"]["test"]))
        means = scores[scores["condition"].isin(wanted)].groupby("metric")["value"].mean()
        rows.append({"model": name, **seconds, "cells": predicted.n_obs, **means.reindex(METRICS)})
        print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), flush=True)
        return seconds["fit_seconds"]

    unet = PRiMeFlow(design, adata.var_names, "small")
    recipe = judged("U-Net, 100 Euler steps", unet, replace(unet.fit_config, steps=args.unet_steps),
                    solver="euler", steps=100)  # fmt: skip
    for share in args.shares:
        model = PRiMeFlow(design, adata.var_names)
        start = time.process_time()
        model.fit(adata, split, replace(model.fit_config, steps=PACE, progress=False, val_every=0))
        pace = (time.process_time() - start) / PACE
        steps = max(int(share * recipe / pace), 1)
        judged(f"default, {share:g} of the time", model, replace(model.fit_config, steps=steps),
               [Until(share * recipe)])  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.out / f"recipe-{args.task}-{args.seed}.csv", index=False)


if __name__ == "__main__":
    main()

"""The flagship's velocity network beside its ablations, each trained until its validation loss stops, fairly.

All networks are told the same of a condition, as in the paper (one-hots) or by anchors; none of them sets small values
to 0 by itself: rows "zeros" have values below half the smallest positive training value set to 0, for all networks.
Weights are judged along the way, so that one fit gives the learning curve, what is reached in equal time, and what is
reached in the end (the weights with the lowest validation loss). Unseen and seen conditions are judged apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch

from invirtuo.bench import TASKS, paired_differences
from invirtuo.fit import FitConfig
from invirtuo.metrics import Pair, score
from invirtuo.models import FMPCA, PRiMeFlow
from studies.harness import Failed, Tables, filled, over_seeds, part, study

METRICS = ("mmd_gex", "mmd_pca", "energy_distance", "mse_degs", "deg_recall", "cosine_logfc", "rmse_mean",
           "variance_ratio", "zeros_distance")  # fmt: skip
N_CELLS, N_SEEN, FIRST_MARK = 200, 3, 250
BARE = {"calibrate": 0.0, "hurdle": False, "loss_genes": 0}

NETWORKS: dict[str, dict[str, Any]] = {
    "fm_pca": {"lr": 1e-3},
    "fm_pca:ot": {"source": "control", "lr": 1e-3},
    "mlp": {"velocity": "mlp", "precondition": False, "hidden_dim": 384, "n_layers_decoding": 2, "lr": 1e-3},
    "genewise": {"velocity": "genewise", "cell_width": 256, "hidden_dim": 128, "lr": 2e-3},
    "unet": {"velocity": "unet", "precondition": False, "hidden_dim": 32, "channel_mult": (1, 2, 2, 4), "num_heads": 2,
             "attention_resolutions": (8,), "lr": 1e-3, "batch_size": 64},
}  # fmt: skip
TOLD: dict[str, dict[str, Any]] = {
    "one-hots": {"anchor": False, "covariate_scale": 1.0},
    "anchors": {"anchor": True, "covariate_scale": 0.0},
}


class Curve(lightning.Callback):
    """Takes the averaged weights at steps that double, with the CPU seconds that were spent on them."""

    def on_train_start(self, trainer, module) -> None:
        self.began, self.mark, self.taken = time.process_time(), FIRST_MARK, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step >= self.mark:
            weights = {name: value.clone() for name, value in module.average.state_dict().items()}
            self.taken[self.mark] = time.process_time() - self.began, weights
            self.mark *= 2

    def on_train_end(self, trainer, module) -> None:
        self.spent = time.process_time() - self.began


def run(
    task: str, told: str, network: str, genes: int, seed: int, *, steps: int, patience: int, data_dir: str | None
) -> list[dict]:
    """Fit one network until its validation loss stops, and judge it at its marks and at its best."""
    is_pca = network.startswith("fm_pca")
    if is_pca and told == "anchors":
        raise Failed("fm_pca has no anchored form")
    torch.set_num_threads(1)
    chosen = TASKS[task]
    chosen = replace(chosen, n_genes=genes) if not chosen.is_normalised else chosen
    adata, design, split = chosen.load(0, data_dir=data_dir)
    adata = adata[:, :genes].copy()

    # the fit
    options = dict(NETWORKS[network])
    fit = FitConfig(steps=steps, lr=options.pop("lr"), batch_size=options.pop("batch_size", 128), schedule="constant",
                    ema=0.995, clip=1.0, betas=(0.9, 0.99), val_every=FIRST_MARK, val_batches=16, patience=patience,
                    keep="best", progress=False, seed=seed)  # fmt: skip
    if is_pca:
        model = FMPCA(design, adata.var_names, replace(FMPCA.Config(), **options))
    else:
        model = PRiMeFlow(design, adata.var_names, replace(PRiMeFlow.Config(), **BARE, **TOLD[told], **options))
    curve = Curve()
    model.fit(adata, split, fit, callbacks=[curve])
    losses = model.history.set_index("step")["val_total"].dropna()
    best = int(losses.idxmin())

    # what it gives, along the way and in the end
    train = part(adata, split, "train")
    smallest = train.X.data.min() if hasattr(train.X, "data") else train.X[train.X > 0].min()
    seen = design.conditions(train.obs)
    seen = seen[~design.is_control(seen)].head(N_SEEN)
    wanted = {"unseen": (pd.DataFrame(model.card["held_out"]["test"]), "test"), "seen": (seen, "train")}
    points = {f"{mark} steps": (mark, *taken) for mark, taken in curve.taken.items()}
    points["best"] = (best, curve.spent, {name: value.clone() for name, value in model.state_dict().items()})
    rows = []
    for point, (step, seconds, weights) in points.items():
        model.load_state_dict(weights)
        about = {"point": point, "step": step, "seconds": seconds, "val_loss": losses.get(step, np.nan)}
        for conditions, (table, name) in wanted.items():
            predicted = model.predict(table, N_CELLS, seed=seed)
            as_drawn = predicted.X.copy()
            with_zeros = np.where(as_drawn < smallest / 2, 0.0, as_drawn).astype(np.float32)
            for values, x in (("as drawn", as_drawn), ("zeros", with_zeros)):
                predicted.X = x
                pair = Pair(predicted, part(adata, split, name), design, n_pcs=30)
                scores = score(pair, METRICS)[["condition", "metric", "value"]]
                scores = scores[scores["condition"].isin(design.names(table))]
                own = about | {"conditions": conditions, "values": values}
                rows += [own | row for row in scores.to_dict("records")]
    return rows


@study(quick={"networks": ["mlp"], "told": ["one-hots"], "seeds": 1, "steps": 2, "genes": [20]})
def converged(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = ("kang-celltype", "kang-donor", "glioblastoma-donor", "papalexi-replicate"),
    told: Sequence[str] = tuple(TOLD),
    networks: Sequence[str] = tuple(NETWORKS),
    genes: Sequence[int] = (128, 500),
    seeds: int = 3,
    steps: int = 16_000,
    patience: int = 8,
) -> Tables:
    """Velocity networks trained until the validation loss stops, told the same, judged alike.

    Parameters
    ----------
    told
        What a network is told of a condition: its one-hots, or the anchors.
    networks
        Networks that are fitted.
    genes
        Numbers of genes.
    steps
        Most steps of a fit.
    patience
        Validations, one every 250 steps, without a lower loss until a fit ends.
    """
    one = partial(run, steps=steps, patience=patience, data_dir=data_dir)
    axes = {"genes": genes, "seed": range(seeds), "task": tasks, "told": told, "network": networks}
    table = filled(out / "scores.csv", one, **axes)
    by = ["genes", "told", "conditions", "values"]
    each = ["task", *by, "network"]
    curves = over_seeds(table, [*each, "point", "metric"], ["value", "step", "seconds"]).xs("mean", axis=1, level=1)
    ends = table[table["point"] == "best"]
    best = over_seeds(ends, [*each, "metric"])["mean"].unstack("metric")
    alike = ends.rename(columns={"network": "model"}).groupby(by, sort=False)
    differences = pd.concat({about: paired_differences(rows) for about, rows in alike}, names=by)
    return {"best": best, "curves": curves, "differences": differences}

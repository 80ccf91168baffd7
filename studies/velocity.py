"""What a velocity network in gene space needs: networks taken apart, at equal time, equal arithmetic and equal steps.

Every variant is one run with a constant learning rate; its averaged weights are taken when it has done so many steps,
so many floating-point operations, and so many CPU seconds. At each mark cells are drawn for the held-out conditions of
the task and for some that were trained on ("seen"), and judged. Every network gets the same anchors, batches of the
same size, no calibration. A picture for each task shows OUT/scores.csv.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from invirtuo.bench import TASKS
from invirtuo.cells.files import writing
from invirtuo.fit import FitConfig
from invirtuo.metrics import Pair
from invirtuo.models.primeflow.model import PRiMeFlow
from studies.ablations import correlated_order, random_order
from studies.harness import Tables, filled, mean_scores, part, study

METRICS = ("mmd_gex", "mmd_pca", "variance_ratio", "deg_recall", "cosine_logfc", "rmse_mean", "correlation_error",
           "zeros_distance")  # fmt: skip
N_CELLS, N_SEEN, BATCH = 200, 3, 128

SMALL = {"calibrate": 0.0, "loss_genes": 0, "covariate_scale": 0.0}
UNET = {**SMALL, "velocity": "unet", "hidden_dim": 16, "channel_mult": (1, 2, 2), "num_heads": 2,
        "attention_resolutions": (4,)}  # fmt: skip
MLP = {**SMALL, "velocity": "mlp", "hidden_dim": 384, "n_layers_gene_expression": 2, "n_layers_decoding": 2}
GENEWISE = {**SMALL, "cell_width": 256, "hidden_dim": 128}
PLAIN = {"precondition": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "unet": {**UNET, **PLAIN},
    "unet, preconditioned": UNET,
    "unet, random gene order": {**UNET, **PLAIN},
    "unet, correlated genes side by side": {**UNET, **PLAIN},
    "unet, kernel 1": {**UNET, **PLAIN, "velocity": "unet, kernel 1"},
    "unet, no long skips": {**UNET, **PLAIN, "velocity": "unet, no long skips"},
    "unet, no gene identity": {**UNET, **PLAIN, "velocity": "unet, no gene identity"},
    "unet, values as they are": {**UNET, **PLAIN, "value_scale": 0.1},
    "unet, patches of 4": {**UNET, **PLAIN, "velocity": "unet, patches of 4"},
    "unet, FiLM": {**UNET, **PLAIN, "velocity": "unet, FiLM"},
    "unet, x1-prediction": {**UNET, **PLAIN, "velocity": "unet, x1-prediction"},
    "mlp": {**MLP, **PLAIN},
    "mlp, preconditioned": MLP,
    "mlp, x1-prediction": {**MLP, **PLAIN, "velocity": "mlp, x1-prediction"},
    "genewise": GENEWISE,
    "genewise, not preconditioned": {**GENEWISE, **PLAIN},
    "genewise, no context": {**GENEWISE, "n_context": 0},
    "genewise, no gene identity": {**GENEWISE, "velocity": "genewise, no gene identity"},
    "genewise, values as they are": {**GENEWISE, "value_scale": 0.1},
    "genewise, value scale 1": {**GENEWISE, "value_scale": 1.0},
    "genewise, value scale 100": {**GENEWISE, "value_scale": 100.0},
    "genewise, depth": {**GENEWISE, "depth": True},
    "genewise, no anchors": {**GENEWISE, "anchor": False, "covariate_scale": 1.0},
    "unet, no anchors": {**UNET, **PLAIN, "anchor": False, "covariate_scale": 1.0},
}
ORDERS = {"unet, random gene order": random_order, "unet, correlated genes side by side": correlated_order}
LR = {"unet": 1e-3, "mlp": 1e-3, "genewise": 2e-3}


class Marks(lightning.Callback):
    """Takes the averaged weights at a number of steps, operations and CPU seconds, and ends the fit at the last."""

    def __init__(self, marks: dict[str, float], flops: float):
        self.marks, self.flops, self.taken = dict(marks), flops, {}

    def on_train_start(self, trainer, module) -> None:
        self.began = time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        done = {
            "steps": float(trainer.global_step),
            "flops": trainer.global_step * self.flops,
            "seconds": time.process_time() - self.began,
        }
        for view in [view for view, mark in self.marks.items() if done[view] >= mark]:
            del self.marks[view]
            weights = {name: value.clone() for name, value in module.average.state_dict().items()}
            self.taken[view] = done, weights
        trainer.should_stop |= not self.marks


def flops_of_a_step(model: PRiMeFlow, adata, design) -> float:
    """Floating-point operations of the matrix products and convolutions of a training step."""
    from invirtuo import CellDataset

    batch = CellDataset(adata[:BATCH].copy(), design).take(range(min(BATCH, adata.n_obs)))
    with FlopCounterMode(display=False) as counter:
        model.train().loss(batch)["total"].backward()
    model.zero_grad()
    return float(counter.get_total_flops())


def run(task: str, variant: str, seed: int, *, marks: dict, n_genes: int, data_dir: str | None) -> list[dict]:
    """Fit one variant and judge it at its marks."""
    torch.set_num_threads(1)
    chosen = TASKS[task]
    chosen = replace(chosen, n_genes=n_genes) if not chosen.is_normalised else chosen
    adata, design, split = chosen.load(0, data_dir=data_dir)
    adata = adata[:, :n_genes].copy()
    if variant in ORDERS:
        order = ORDERS[variant](part(adata, split, "train").to_df().to_numpy())
        adata = adata[:, order].copy()
    config = replace(PRiMeFlow.Config(), **VARIANTS[variant])
    model = PRiMeFlow(design, adata.var_names, config)
    train = adata[(split == "train").to_numpy()]
    taker = Marks(marks, 0.0)
    model.fit(adata, split, FitConfig(steps=1, batch_size=BATCH, val_every=0, progress=False, seed=seed))
    taker.flops = flops_of_a_step(model, train, design)
    lr = LR[variant.split(",", maxsplit=1)[0]]
    fit = FitConfig(steps=10**6, batch_size=BATCH, lr=lr, schedule="constant", ema=0.995, clip=1.0, betas=(0.9, 0.99),
                    val_every=0, progress=False, seed=seed)  # fmt: skip
    model.fit(adata, split, fit, callbacks=[taker])
    seen = design.conditions(train.obs)
    seen = seen[~design.is_control(seen)].head(N_SEEN)
    held_out = pd.DataFrame(model.card["held_out"]["test"])
    rows = []
    for view, (done, weights) in taker.taken.items():
        model.load_state_dict(weights)
        for kind, wanted, name in (("held out", held_out, "test"), ("seen", seen, "train")):
            predicted = model.predict(wanted, N_CELLS, seed=seed)
            pair = Pair(predicted, part(adata, split, name), design, n_pcs=30)
            means = mean_scores(pair, METRICS, design.names(wanted))
            about = {"view": view, **done, "conditions": kind}
            rows += [about | {"metric": metric, "value": value} for metric, value in means.items()]
    return rows


def draw(table: pd.DataFrame, path: Path, metric: str = "mmd_gex") -> None:
    """Dots for every seed, a row for each variant, a column for each view, one colour for each network."""
    from matplotlib.figure import Figure

    colours = {"unet": "#0072b2", "mlp": "#e69f00", "genewise": "#d55e00"}
    chosen = table[table["metric"] == metric]
    at_time = chosen[(chosen["view"] == "seconds") & (chosen["conditions"] == "held out")]
    order = at_time.groupby("variant")["value"].mean().sort_values(ascending=False).index
    titles = {"seconds": "equal CPU time", "flops": "equal arithmetic", "steps": "equal steps"}
    figure = Figure(figsize=(11, 0.27 * len(order) + 1.2), layout="constrained")
    for axes, (view, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        for row, variant in enumerate(order):
            own = chosen[(chosen["variant"] == variant) & (chosen["view"] == view)]
            for kind, marker in (("held out", "o"), ("seen", "|")):
                values = own.loc[own["conditions"] == kind, "value"]
                axes.plot(values, [row] * len(values), marker, color=colours[variant.split(",")[0]], markersize=5)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks([x for x in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if low < x < high], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"{metric} (o unseen, | seen conditions)", fontsize=8)
        axes.grid(axis="x", color="0.9")
        axes.set_yticks(range(len(order)), order, fontsize=8)
    with writing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


@study(quick={"variants": ["mlp"], "seeds": 1, "steps": 3, "flops": 1e6, "seconds": 1.0})
def velocity(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = ("kang-celltype",),
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: int = 3,
    genes: int = 128,
    steps: int = 200,
    flops: float = 7e11,
    seconds: float = 45.0,
    jobs: int = 1,
) -> Tables:
    """Velocity networks taken apart, at equal time, equal arithmetic and equal steps.

    Parameters
    ----------
    variants
        Networks that are fitted.
    steps
        Training steps at which a network is judged.
    flops
        Floating-point operations of training at which it is judged.
    seconds
        CPU seconds of training at which it is judged.
    """
    marks = {"steps": steps, "flops": flops, "seconds": seconds}
    one = partial(run, marks=marks, n_genes=genes, data_dir=data_dir)
    table = filled(out / "scores.csv", one, jobs, seed=range(seeds), task=tasks, variant=variants)
    for task, rows in table.groupby("task"):
        draw(rows, out / f"{task}.png")
    shown = table[(table["metric"] == "mmd_gex") & (table["conditions"] == "held out")]
    return {"mmd_gex": shown.pivot_table(index=["task", "variant"], columns="view", values="value")}

"""How cost and quality of the default network grow with its width, with cells, with genes and with conditions.

The response of donors of Kang that were never seen responding (the validation donor of `kang-donor`), and conditions
that were. One axis at a time, and cells by width together, which decide how wide a network should be for a budget:
weights are judged along the way, so that one fit gives the whole curve. The learning rate does not fall.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from invirtuo.bench import TASKS
from invirtuo.metrics import Pair
from invirtuo.models import PRiMeFlow
from studies.converged import Curve
from studies.harness import Rows, Tables, fit, mean_scores, over_seeds, part, study

METRICS = ("mmd_gex", "energy_distance", "cosine_logfc", "rmse_mean")
N_CELLS, N_SEEN = 200, 4  # of each condition; conditions that were trained on
WIDTH, GENES = 256, 500  # of the axes that are not the one that is varied
WIDTHS, SHARES = (64, 128, 256, 512), (0.125, 0.25, 0.5, 1.0)  # of the network that reads the cell; of the cells
MORE_GENES, KEPT = (250, 1000, 2000), (0.25, 0.5)  # genes; share of the perturbed conditions
GRID = [
    *({"width": width, "cells": cells, "genes": GENES, "conditions": 1.0} for width in WIDTHS for cells in SHARES),
    *({"width": WIDTH, "cells": 1.0, "genes": genes, "conditions": 1.0} for genes in MORE_GENES),
    *({"width": WIDTH, "cells": 1.0, "genes": GENES, "conditions": kept} for kept in KEPT),
]


@study(quick={"seeds": 1, "steps": 250, "cases": 1})
def scaling(
    *, out: Path, data_dir: str | None = None, seeds: int = 3, steps: int = 2000, cases: int = len(GRID)
) -> Tables:
    """Quality along the fit, by width of the network, cells, genes and conditions.

    Parameters
    ----------
    cases
        How many settings of the grid, from the first on.
    """
    grid = [case | {"seed": seed} for seed in range(seeds) for case in GRID[:cases]]
    table = Rows(out / "scores.csv").fill(grid, partial(run, steps=steps, data_dir=data_dir))
    by = ["width", "cells", "genes", "conditions", "judged", "step"]
    curves = over_seeds(table, by, ["seconds", *METRICS])
    curves.columns = [name if which == "mean" else f"{name} {which}" for name, which in curves.columns]
    return {"scaling": curves.reset_index()}


def run(
    width: int, cells: float, genes: int, conditions: float, seed: int, *, steps: int, data_dir: str | None
) -> list[dict]:
    """Fit on a share of the cells and of the conditions, and judge the weights along the way."""
    torch.set_num_threads(1)
    adata, design, split = replace(TASKS["kang-donor"], n_genes=genes).load(0, data_dir=data_dir)
    few = thinned(adata, design, split, cells, conditions, seed)
    config = PRiMeFlow.Config(cell_width=width, hidden_dim=width // 2)
    curve, model = Curve(), PRiMeFlow(design, adata.var_names, config)
    options = {"batch_size": 128, "schedule": "constant", "val_every": 0, "ema": 0.995, "seed": seed}
    fit(model, adata, few, steps=steps, callbacks=[curve], **options)

    # real cells are all of those conditions, trained on or not
    trained = part(adata, few, "train")
    known = design.conditions(trained.obs)
    known = known[~design.is_control(known)].iloc[:N_SEEN]
    unknown = pd.DataFrame(model.card["held_out"]["val"])
    judged = {"unseen": (unknown, part(adata, split, "val")), "seen": (known, part(adata, split, "train"))}
    rows = []
    for step, (seconds, weights) in curve.taken.items():
        model.load_state_dict(weights)
        for name, (wanted, real) in judged.items():
            pair = Pair(model.predict(wanted, N_CELLS, seed=seed), real, design)
            about = {"judged": name, "step": step, "seconds": seconds, "training cells": trained.n_obs}
            rows.append(about | mean_scores(pair, METRICS, design.names(wanted)))
    return rows


def thinned(adata, design, split: pd.Series, cells: float, conditions: float, seed: int) -> pd.Series:
    """The split with a share of its training cells, of a share of its perturbed conditions."""
    rng = np.random.default_rng(seed)
    names = design.names(adata.obs).to_numpy()
    trained = (split == "train").to_numpy()
    perturbed = trained & ~design.is_control(adata.obs)
    every = pd.unique(names[perturbed])
    kept = rng.permutation(every)[: max(round(conditions * len(every)), 1)]
    stays = rng.random(len(split)) < cells
    dropped = trained & ~(stays & (~perturbed | np.isin(names, kept)))
    return split.mask(dropped, "")

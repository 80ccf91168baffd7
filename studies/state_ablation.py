"""ST and its ablations on cells with a hidden state, and what the size of the sets does there (figure 1B of STATE).

Every context holds two unlabelled populations, one in a hidden state that the perturbation turns up, one in a state
that it turns down. Where a population lies is new in every context, and its state shows so weakly in single cells that
only cells of the same population together tell it. All models see the same number of cells in a step, predict in sets
of the size they were trained with, and are judged on 64 cells of each of 30 contexts that were never seen responding.
`distance` is the energy distance to real cells, `wrong` the share of cells that respond unlike their population.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

import invirtuo as iv
from invirtuo.metrics.measures.distribution import energy_distance
from studies.harness import Tables, filled, spent, study

N_UNSEEN, N_CELLS = 30, 64
DIRECTION = np.array([1, -1, 1, -1])
SMALL = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "n_encoder_layers": 2}
MEANS = {"perturbation mean": None, "perturbation mean, shifted cells": "shift-cells"}


@study(quick={"steps": 1, "contexts": 40, "sizes": [4]})
def state_ablation(
    *, out: Path, steps: int = 500, contexts: int = 240, sizes: Sequence[int] = (1, 4, 16, 64), seeds: int = 1
) -> Tables:
    """ST and its ablations on planted cells that need attention.

    Parameters
    ----------
    contexts
        Contexts of the planted cells, 30 of them never seen responding.
    sizes
        Sizes of the sets.
    """
    variants = {f"attention, sets of {size}": {"set_size": size} for size in sizes}
    largest = max(sizes)
    variants |= {f"{mixing}, sets of {largest}": {"mixing": mixing, "set_size": largest} for mixing in ("mean", "none")}
    config = iv.FitConfig(steps=steps, batch_size=512, lr=4e-3, warmup=20, ema=0.9, clip=10.0, val_every=0,
                          precision="fp32", accelerator="cpu", progress=False)  # fmt: skip
    planted_cells = cache(planted)

    def one(model: str, seed: int) -> dict:
        cells, centres = planted_cells(seed, contexts)
        design = iv.Design.from_adata(cells, perturbation="p", control="control", covariates=["context"])
        unseen = [f"c{i:03d}|A" for i in range(N_UNSEEN)]
        split = iv.splits.hold_out(cells.obs, design, unseen, val_fraction=0.0, control_fractions=(1, 0, 0))
        if model in MEANS:
            made = iv.models.PerturbationMean(design, cells.var_names, MEANS[model])
        else:
            settings = iv.models.StateTransition.Config(**SMALL, **variants[model])
            made = iv.models.StateTransition(design, cells.var_names, settings)
        with spent() as cost:
            made.fit(cells, split, config=config)
        predicted = made.predict("test", N_CELLS, seed=seed, precision="fp32")
        scores = {"distance": distance(predicted, cells), "wrong": wrong(predicted, centres)}
        return scores | {"fit_cpu_seconds": cost["cpu_seconds"]}

    return {"state-ablation": filled(out / "rows.csv", one, seed=range(seeds), model=[*variants, *MEANS])}


def planted(seed: int, n_contexts: int) -> tuple[AnnData, np.ndarray]:
    """Cells, and the centres (contexts, 2, 4) of the populations in genes 0-3, the one that is turned down first."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_contexts, 2, 4))
    centres *= 2 / np.linalg.norm(centres, axis=2, keepdims=True)
    rows, obs = [], []
    for context in range(n_contexts):
        for label in ("control", "A"):
            population = rng.integers(2, size=N_CELLS)
            state = 2.0 * population[:, None] - 1
            where = centres[context, population] + 0.2 * rng.normal(size=(N_CELLS, 4))
            weak = 0.15 * state + 0.5 * rng.normal(size=(N_CELLS, 4))
            response = (label == "A") * 1.5 * state * DIRECTION + 0.3 * rng.normal(size=(N_CELLS, 4))
            rows.append(np.concatenate([where, weak, response], axis=1))
            obs += [(label, f"c{context:03d}")] * N_CELLS
    x = np.concatenate(rows)
    table = pd.DataFrame(obs, columns=["p", "context"], index=[f"cell_{i}" for i in range(len(obs))])
    cells = AnnData((x - x.min()).astype(np.float32), obs=table, var=pd.DataFrame(index=[f"g{i}" for i in range(12)]))
    return cells, centres - x.min()


def distance(predicted: AnnData, cells: AnnData) -> float:
    """Mean energy distance to the real cells of the unseen contexts."""
    found = []
    for context in predicted.obs["context"].unique():
        real = cells[((cells.obs["context"] == context) & (cells.obs["p"] == "A")).to_numpy()].X
        found.append(energy_distance(predicted[(predicted.obs["context"] == context).to_numpy()].X, real))
    return float(np.mean(found))


def wrong(predicted: AnnData, centres: np.ndarray) -> float:
    """Share of cells that do not respond as the population does in which they lie."""
    context = predicted.obs["context"].astype(str).str[1:].astype(int).to_numpy()
    population = np.linalg.norm(predicted.X[:, None, :4] - centres[context], axis=2).argmin(axis=1)
    return float(((predicted.X[:, 8:] @ DIRECTION > 0) != (population == 1)).mean())

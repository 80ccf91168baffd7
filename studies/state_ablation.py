"""ST and its ablations on cells with a hidden state, and what the size of the sets does there (figure 1B of STATE).

    python benchmarks/state_ablation.py

Every context holds two unlabelled populations, one in a hidden state that the perturbation turns up, one in a state
that it turns down. Where a population lies is new in every context, and its state shows so weakly in single cells that
only cells of the same population together tell it. All models see the same number of cells in a step, predict in sets
of the size they were trained with, and are judged on 64 cells of each of 30 contexts that were never seen responding.
`distance` is the energy distance to real cells, `wrong` the share of cells that respond unlike their population.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

import invirtuo as iv
from invirtuo.metrics.distribution import energy_distance

N_UNSEEN, N_CELLS = 30, 64
DIRECTION = np.array([1, -1, 1, -1])


def main() -> None:
    """Fit every variant and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--contexts", type=int, default=240)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells, centres = planted(args.seed, args.contexts)
    design = iv.Design.from_adata(cells, perturbation="p", control="control", covariates=["context"])
    held_out = [f"c{i:03d}|A" for i in range(N_UNSEEN)]
    split = iv.splits.hold_out(cells.obs, design, held_out, val_fraction=0.0, control_fractions=(1, 0, 0))
    small = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "n_encoder_layers": 2}
    variants = {f"attention, sets of {size}": {"set_size": size} for size in args.sizes}
    largest = max(args.sizes)
    variants |= {f"{mixing}, sets of {largest}": {"mixing": mixing, "set_size": largest} for mixing in ("mean", "none")}
    models = {
        name: iv.models.StateTransition(design, cells.var_names, iv.models.StateTransition.Config(**small, **options))
        for name, options in variants.items()
    }
    models["perturbation mean"] = iv.models.PerturbationMean(design, cells.var_names)
    models["perturbation mean, shifted cells"] = iv.models.PerturbationMean(design, cells.var_names, "shift-cells")
    fit = iv.FitConfig(steps=args.steps, batch_size=512, lr=4e-3, warmup=20, ema=0.9, clip=10.0, val_every=0,
                       precision="fp32", accelerator="cpu", progress=False)  # fmt: skip
    print(f"{'model':36s}{'distance':>10s}{'wrong':>8s}{'CPU s':>8s}")
    for name, model in models.items():
        start = time.process_time()
        model.fit(cells, split, config=fit)
        seconds = time.process_time() - start
        predicted = model.predict("test", N_CELLS, seed=args.seed, precision="fp32")
        print(f"{name:36s}{distance(predicted, cells):10.3f}{wrong(predicted, centres):8.3f}{seconds:8.0f}", flush=True)


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


if __name__ == "__main__":
    main()

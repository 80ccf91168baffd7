"""Quality of samples against the number of network evaluations, for every solver, on a trained model.

    invirtuo demo --out demo
    python benchmarks/solvers.py demo/models/primeflow

For conditions of the bundled cells that the model was trained on: the published gene-space distance to real cells
(mmd_gex), the variance ratio (total variance of sampled over real cells), and the seconds of sampling. Noise is shared
by all rows, so that differences come from the solver alone.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

import invirtuo as iv
from invirtuo.flow import EVALUATIONS
from invirtuo.metrics import Pair, score

GRID = {
    "euler": (5, 10, 20, 50, 100),
    "midpoint": (10, 20, 50),
    "heun": (10, 20, 50),
    "ab2": (5, 10, 20, 50),
    "rk4": (12, 20, 48),
}
CONDITIONS = ("CD4 T cell", "FCGR3A monocyte")


def main() -> None:
    """Sample with every solver and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a model fitted on the bundled cells")
    parser.add_argument("--cells", type=int, default=500, help="cells per condition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="CSV to write")
    args = parser.parse_args()
    raw = iv.datasets.load("kang")
    design = iv.datasets.design("kang", raw)
    adata = iv.preprocess.normalize(raw)
    adata = adata[adata.obs["cell_type"].isin(CONDITIONS).to_numpy()].copy()
    conditions = design.conditions(adata.obs)
    spread = {name: total_variance(adata[mask]) for name, mask in masks(adata, design)}
    model, rows, pair = iv.load(args.run), [], None
    for solver, evaluations in GRID.items():
        for n in evaluations:
            steps = n // EVALUATIONS[solver]
            start = time.perf_counter()
            predicted = model.predict(conditions, n_cells=args.cells, solver=solver, steps=steps, seed=args.seed)
            seconds = time.perf_counter() - start
            pair = Pair(predicted, adata, design) if pair is None else pair.against(predicted)
            distance = score(pair, ["mmd_gex"])["value"].mean()
            ratios = [total_variance(predicted[mask]) / spread[name] for name, mask in masks(predicted, design)]
            rows.append((solver, n, steps, distance, float(np.mean(ratios)), seconds))
            print(
                f"{solver:10s}{n:5d} evaluations  mmd_gex {distance:.4f}  variance {rows[-1][4]:.3f}  {seconds:.1f} s"
            )
    if args.out:
        columns = ["solver", "evaluations", "steps", "mmd_gex", "variance_ratio", "seconds"]
        pd.DataFrame(rows, columns=columns).to_csv(args.out, index=False)


def masks(adata, design):
    """Name of each perturbed condition and the rows that belong to it."""
    names = design.names(adata.obs)
    perturbed = names[~design.is_control(adata.obs)]
    return [(name, (names == name).to_numpy()) for name in sorted(perturbed.unique())]


def total_variance(cells) -> float:
    """Sum over genes of the variance over cells."""
    x = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
    return float(x.var(axis=0).sum())


if __name__ == "__main__":
    main()

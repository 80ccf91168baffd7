"""ST trained first on one data set, then on another: what fine-tuning is worth at few steps.

    python benchmarks/state_transfer.py --data-dir DATA --out state-transfer

First Kang (IFN-beta, blood cells), then the response of glioblastomas to panobinostat with a patient held out, on the
genes that both have. From the weights of the first and from scratch, with the same steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from invirtuo.bench import TASKS
from invirtuo.metrics import Pair, score
from invirtuo.models.state_transition import StateTransition

METRICS = ("mmd_gex", "deg_recall", "cosine_logfc", "pearson_delta", "rmse_mean", "variance_ratio")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the first data set, then on the second from either start; print means over patients and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("state-transfer"))
    parser.add_argument("--folds", type=int, default=5, help="patients held out, one at a time")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="*", default=[50, 200])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    first, first_design, first_split = replace(TASKS["kang-donor"], n_genes=None).load(data_dir=args.data_dir)
    known, rows = set(first.var_names), []
    for seed in range(args.seeds):
        start = None
        for fold in range(args.folds):
            adata, design, split = TASKS["glioblastoma-donor"].load(fold, data_dir=args.data_dir)
            adata = adata[:, [gene in known for gene in adata.var_names]].copy()
            if start is None:
                start = StateTransition(first_design, adata.var_names)
                fit = replace(start.fit_config, steps=args.first_steps, seed=seed, progress=False, val_every=0)
                start.fit(first[:, adata.var_names].copy(), first_split, fit)
            real = adata[(split == "test").to_numpy()].copy()
            for steps in args.steps:
                scratch = StateTransition(design, adata.var_names)
                for name, model in {"scratch": scratch, "fine-tuned": start.adapt(design, adata.var_names)}.items():
                    fit = replace(scratch.fit_config, steps=steps, seed=seed, progress=False, val_every=0)
                    model.fit(adata, split, fit)
                    pair = Pair(model.predict("test", 300, seed=seed), real, design, n_pcs=30)
                    means = score(pair, METRICS).groupby("metric")["value"].mean()
                    rows.append({"start": name, "steps": steps, "fold": fold, "seed": seed, **means})
                    pd.DataFrame(rows).to_csv(args.out / "transfer.csv", index=False)
    table = pd.DataFrame(rows).groupby(["steps", "start"])[list(METRICS)].mean()
    print(f"{adata.n_vars} genes")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()

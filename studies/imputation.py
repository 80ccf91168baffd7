"""Filling in hidden counts: CFGen beside its autoencoder, the posterior mean of scVI and answers that need no model.

    python benchmarks/imputation.py --data-dir DATA --out imputation --which nonzero

Entries of PBMC3K are hidden, a tenth of those that are not zero or of all, and models are fitted to what is left, as in
CFGen, appendix I.6; 2,000 genes. All are told the cell types. scVI needs the extra ``scvi``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import invirtuo as iv
from invirtuo.bench import imputation_scores, trivial_answers
from invirtuo.bench.comparators import posterior_mean
from invirtuo.generators import mask_entries
from invirtuo.genes import variable_genes

logger = logging.getLogger(__name__)

BY, FRACTION = "cell_type", 0.1
NOISE = (0.0, 0.05, 0.1)


def answers(masked, design, args, seed: int) -> dict:
    """Means of every entry, by origin."""
    model = iv.models.CFGen(design, masked.var_names)
    options = vars(model.fit_config) | {"seed": seed, "progress": False}
    model.fit(masked, config=iv.FitConfig(**options))
    found = trivial_answers(masked, BY, masked_fraction=FRACTION)
    given = {"masked_fraction": FRACTION, "seed": seed}
    found["cfgen, autoencoder alone"] = model.impute(masked, flow=False, **given).layers["imputed"]
    for noise in NOISE:
        n_draws = 1 if noise == 0 else 5
        filled = model.impute(masked, noise=noise, n_draws=n_draws, steps=args.steps, **given).layers["imputed"]
        found[f"cfgen, noise {noise:g}"] = filled
    try:
        found["scvi"] = posterior_mean(masked, design, epochs=args.epochs, seed=seed) / (1 - FRACTION)
    except ValueError as error:
        logger.warning("scvi is left out: %s", error)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Hide, fit, fill in, score; print means and standard deviations over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("imputation"))
    parser.add_argument("--which", nargs="*", default=["nonzero", "all"], choices=("nonzero", "all"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25, help="of the midpoint rule, each way")
    parser.add_argument("--epochs", type=int, help="of scVI; default: its own rule")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adata = iv.datasets.load("pbmc3k", data_dir=args.data_dir)
    adata = adata[:, variable_genes(adata.X, 2000)].copy()
    design = iv.Design.from_adata(adata, covariates=[BY])
    args.out.mkdir(parents=True, exist_ok=True)
    tables = []
    for which in args.which:
        for seed in range(args.seeds):
            masked, mask = mask_entries(adata, FRACTION, which=which, seed=seed)
            found = answers(masked, design, args, seed)
            tables.append(imputation_scores(adata.X, found, mask).assign(masked=which, seed=seed))
            pd.concat(tables).round(5).to_csv(args.out / "scores.csv", index=False)
    table = pd.concat(tables).drop(columns="seed").groupby(["masked", "model"], sort=False).agg(["mean", "std"])
    table.columns = ["_".join(column) for column in table.columns]
    table.round(4).to_csv(args.out / "summary.csv")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()

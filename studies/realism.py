"""Generating PBMC3K: CFGen and cellFlow beside scVI sampled from its prior and independent negative binomials.

    python benchmarks/realism.py --data-dir DATA --out realism --seeds 3

A third of the cells is held out in every seed. Each generator draws as many cells of every type as are held out, and
`invirtuo.bench.judge` compares them with those: components from real cells that are not scored, the training cells as
the mark to meet. What of the numbers lies within the range of as many real cells, drawn several times, is in
verdicts.csv. scVI needs the extra ``scvi`` and is left out, with a warning, where it is not installed. Generated
cells are kept in OUT/seed-N and are not generated again.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

import invirtuo as iv
from invirtuo.bench import judge
from invirtuo.bench.comparators import COMPARATORS, sample_prior
from invirtuo.bench.entry import FLOOR
from invirtuo.genes import variable_genes

logger = logging.getLogger(__name__)

VERDICTS = ["zeros_distance", "rmse_logvar", "rmse_mean", "correlation_error", "c2st", "mmd_rbf_disjoint",
            "mmd_rbf_median", "wasserstein2_disjoint"]  # fmt: skip
MIN_CELLS = 20  # training cells in which a gene must be seen (CFGen, appendix F)


def divided(adata, seed: int, n_genes: int | None = None):
    """Training and held-out cells, with the genes that enough training cells have, or the most variable of these."""
    held_out = np.random.default_rng(seed).random(adata.n_obs) < 1 / 3
    train, test = adata[~held_out], adata[held_out]
    genes = np.asarray((train.X > 0).sum(axis=0)).ravel() >= MIN_CELLS
    if n_genes is not None:
        genes = np.flatnonzero(genes)[variable_genes(train.X[:, genes], n_genes)]
    return train[:, genes].copy(), test[:, genes].copy()


def generated(name: str, train, design, labels: pd.DataFrame, seed: int):
    """Cells of one generator, fitted with one seed; name is MODEL, MODEL:PRESET or a comparator."""
    if name in COMPARATORS:
        return sample_prior(name, train, design, labels, seed=seed)
    kind, _, preset = name.partition(":")
    model = iv.models.MODELS[kind](design, train.var_names, preset or None)
    fit = iv.FitConfig(**{**vars(model.fit_config), "seed": seed, "progress": False})
    return model.fit(train, config=fit).generate(labels=labels, seed=seed)


def kept(path: Path, generate: Callable):
    """Generated cells, from the file if they have been drawn before; the CPU seconds that fitting and drawing took."""
    if path.exists():
        cells = iv.files.read_h5ad(path)
        return cells, float(cells.uns["seconds"])
    started = time.process_time()
    cells = generate()
    cells.uns["seconds"] = time.process_time() - started
    with iv.files.writing(path) as unfinished:
        cells.write_h5ad(unfinished, compression="gzip")
    return cells, cells.uns["seconds"]


def real_range(adata, design, args) -> pd.DataFrame:
    """Scores of real against as many other real cells, drawn anew several times: mean over classes of each draw."""
    path = args.out / "range.csv"
    if path.exists():
        return pd.read_csv(path)
    tables = []
    for seed in range(100, 100 + args.draws):
        train, test = divided(adata, seed, args.genes)
        rows = np.random.default_rng(seed).permutation(train.n_obs)[: test.n_obs]
        scores = judge({"real": train[rows].copy()}, test, design, args.out / "range", metrics=VERDICTS)
        tables.append(scores[scores["model"] == "real"].assign(seed=seed))
    keys = ["task", "metric", "seed"]
    table = pd.concat(tables).groupby(keys, sort=False, as_index=False)["value"].mean()
    table.to_csv(path, index=False)
    return table


def verdicts(scores: pd.DataFrame, real: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds beside the smallest and largest value of real cells; within: not above the largest."""
    scores = scores[scores["model"] != FLOOR]  # of halves: other numbers of cells
    ends = real.groupby(["task", "metric"], sort=False)["value"].agg(["min", "max"])
    means = scores.groupby(["task", "metric", "model"], sort=False)["value"].mean().rename("value").reset_index()
    table = means.join(ends, on=["task", "metric"], how="inner")
    return table.assign(within=table["value"] <= table["max"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, generate, judge; print means and standard deviations over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="pbmc3k")
    parser.add_argument("--models", nargs="*", default=["cfgen", "cellflow_counts", "independent_nb", "scvi"])
    parser.add_argument("--by", nargs="*", default=["cell_type"])
    parser.add_argument("--genes", type=int, help="most variable genes of the training cells; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=8, help="of real cells, for their range")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("realism"))
    args = parser.parse_args(arguments)
    adata = iv.datasets.load(args.dataset, data_dir=args.data_dir)
    design = iv.Design.from_adata(adata, covariates=args.by)
    tables, costs = [], []
    for seed in range(args.seeds):
        train, test = divided(adata, seed, args.genes)
        labels = test.obs[args.by].reset_index(drop=True)
        sides = {}
        for name in args.models:
            try:
                path = args.out / f"seed-{seed}" / f"{name.replace(':', '-')}.h5ad"
                sides[name], seconds = kept(path, partial(generated, name, train, design, labels, seed))
            except ValueError as error:
                logger.warning("%s is left out: %s", name, error)
                continue
            costs.append({"model": name, "seed": seed, "seconds": seconds})
        about = {"dataset": args.dataset, "split": f"a third of the cells held out, seed {seed}"}
        scores = judge({**sides, "training cells": train}, test, design, args.out / f"seed-{seed}", about=about)
        tables.append(scores.assign(seed=seed))
        pd.concat(tables).to_csv(args.out / "scores.csv", index=False)
        pd.DataFrame(costs).to_csv(args.out / "costs.csv", index=False)
    means = pd.concat(tables).groupby(["task", "metric", "model", "seed"], sort=False)["value"].mean()
    summary = means.groupby(["task", "metric", "model"], sort=False).agg(["mean", "std"]).round(4)
    summary.to_csv(args.out / "summary.csv")
    found = verdicts(pd.concat(tables), real_range(adata, design, args))
    found.round(4).to_csv(args.out / "verdicts.csv", index=False)
    print(summary.apply(lambda row: f"{row['mean']:.3f} ± {row['std']:.3f}", axis=1).unstack().to_string())
    print(pd.DataFrame(costs).groupby("model")["seconds"].median().round(1).to_string())


if __name__ == "__main__":
    main()

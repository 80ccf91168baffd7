"""Recall of rare classes in cells of other donors, before and after generated cells are added.

    python benchmarks/augmentation.py --data-dir DATA --out augmentation

In every seed two of the eight donors of Kang are held out; 2,000 genes are chosen on the cells of the others. The
training cells grow to twice their number, classes in proportion to 1 / (their cells) as published, or so that no class
gets more than five cells for each real one (x5); by CFGen, by independent negative binomials and by copies of real
cells: gains that copies reach as well are no merit of a generator. Written: scores.csv, copies.csv (is it a copy of a
training cell?), summary.csv, gain.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.bench import oversampled, rare_recall
from invirtuo.genes import variable_genes

BY, DONOR = "cell_type", "donor"
FOLDS = {"": None, " x5": 5.0}  # most generated cells for each real one
COLORS = {"cfgen": "#d55e00", "copies": "#0072b2", "independent_nb": "#009e73"}


def divided(adata, seed: int, n_genes: int):
    """Cells of six donors and of two others, in genes chosen on the former."""
    donors = np.random.default_rng(0).permutation(sorted(adata.obs[DONOR].astype(str).unique()))
    held_out = np.roll(donors, -2 * seed)[:2]
    test = adata.obs[DONOR].astype(str).isin(held_out).to_numpy()
    genes = variable_genes(adata.X[~test], n_genes)
    split = pd.Series(np.where(test, "test", "train"), index=adata.obs_names)
    return adata[:, genes].copy(), split, sorted(held_out)


def augmented(cells, split, seed: int):
    """Added cells of every origin and recipe, and the table of distances to training cells."""
    train = cells[(split == "train").to_numpy()].copy()
    design = iv.Design.from_adata(train, covariates=[BY])
    added, copies = {}, []
    for name in ("cfgen", "independent_nb"):
        model = iv.models.MODELS[name](design, train.var_names)
        options = vars(model.fit_config) | {"seed": seed, "progress": False}
        model.fit(cells, split=split, config=iv.FitConfig(**options))
        for recipe, fold in FOLDS.items():
            both = model.augment(cells, BY, 2 * train.n_obs, max_fold=fold, split=split, check_copies=True, seed=seed)
            added[name + recipe] = both[both.obs["is_generated"].to_numpy()].copy()
            copies.append(both.uns["invirtuo"]["copying"].assign(model=name + recipe, seed=seed))
            counts = json.loads(both.uns["invirtuo"]["augmented"])
            added["copies" + recipe] = oversampled(train, BY, counts, seed=seed)
    return train, added, pd.concat(copies)


def gains(scores: pd.DataFrame) -> pd.DataFrame:
    """Value minus that of the real cells alone, by classifier, model, class and metric: mean over seeds."""
    keys = ["seed", "classifier", "class", "metric"]
    before = scores[scores["model"] == "real cells"].set_index(keys)["value"].rename("before")
    after = scores[scores["model"] != "real cells"].join(before, on=keys)
    after["gain"] = after["value"] - after["before"]
    keys = ["classifier", "metric", "model", "class"]
    return after.groupby(keys, as_index=False)[["n_training", "before", "value", "gain"]].mean()


def picture(table: pd.DataFrame, path: Path) -> None:
    """Gain of recall and F1 against the number of real training cells."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for (row, metric), (column, classifier) in ((r, c) for r in enumerate(("recall", "f1"))
                                                for c in enumerate(("knn", "logistic"))):  # fmt: skip
        ax = axes[row][column]
        for model, color in COLORS.items():
            for recipe, marker in zip(FOLDS, "o^", strict=True):
                here = {"metric": metric, "classifier": classifier, "model": model + recipe}
                part = table[np.all([table[column] == value for column, value in here.items()], axis=0)]
                ax.scatter(
                    part["n_training"], part["gain"], s=22, c=color, marker=marker, label=model + recipe, alpha=0.8
                )
        ax.axhline(0, color="grey", lw=0.8)
        ax.set(xscale="log", title=f"{classifier}, {metric}")
    for ax in axes[1]:
        ax.set_xlabel("real training cells of the class")
    for ax in axes[:, 0]:
        ax.set_ylabel("gain over real cells alone")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, augment, classify; print gains of rare classes and of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("augmentation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--genes", type=int, default=2000)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    adata = iv.datasets.load("kang_full", data_dir=args.data_dir)
    adata = adata[(adata.obs["demuxlet_call"] == "SNG").to_numpy()].copy()
    args.out.mkdir(parents=True, exist_ok=True)
    tables, copies = [], []
    for seed in range(args.seeds):
        cells, split, held_out = divided(adata, seed, args.genes)
        train, added, near = augmented(cells, split, seed)
        test = cells[(split == "test").to_numpy()].copy()
        scores = rare_recall(train, added, test, BY, seed=seed)
        tables.append(scores.assign(seed=seed, held_out="+".join(held_out)))
        copies.append(near)
        pd.concat(tables).round(4).to_csv(args.out / "scores.csv", index=False)
        pd.concat(copies).round(4).to_csv(args.out / "copies.csv", index=False)
    table = gains(pd.concat(tables))
    table.round(4).to_csv(args.out / "summary.csv", index=False)
    picture(table, args.out / "gain.png")
    rare = table.assign(rare=np.where(table["n_training"] < 250, "rare", "frequent"))
    index = ["classifier", "rare", "metric"]
    print(rare.pivot_table(index=index, columns="model", values="gain").round(3).to_string())
    trend = table[table["metric"] == "recall"].groupby(["classifier", "model"])
    print(trend.apply(lambda part: part["n_training"].corr(part["gain"], method="spearman")).round(2).to_string())


if __name__ == "__main__":
    main()

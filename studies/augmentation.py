"""Recall of rare classes in cells of other donors, before and after generated cells are added.

In every seed two of the eight donors of Kang are held out; 2,000 genes are chosen on the cells of the others. The
training cells grow to twice their number, classes in proportion to 1 / (their cells) as published, or so that no class
gets more than five (two) cells for each real one (x5, x2); by CFGen, with several weights of guidance, by independent
negative binomials and by copies of real cells: gains that copies reach as well are no merit of a generator. With
--validation the two donors that the first seed holds out are left aside, and pairs of the other six are held out in
turn: what is chosen there has not seen the former. Written besides: copies.csv (is it a copy of a training cell?),
gain.png.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

import invirtuo as iv
from invirtuo.bench import oversampled, rare_recall
from invirtuo.cells.genes import variable_genes
from studies.harness import Rows, Tables, filled, fit, part, study

BY, DONOR = "cell_type", "donor"
RECIPES = {  # most generated cells for each real one, and weight of guidance
    "": (None, 1.0),
    " x5": (5.0, 1.0),
    " x5, weight 1.5": (5.0, 1.5),
    " x5, weight 2": (5.0, 2.0),
    " x2, weight 1.5": (2.0, 1.5),
}
MARKERS = "o^vs+"
COLORS = {"cfgen": "#d55e00", "copies": "#0072b2", "independent_nb": "#009e73"}


@study(quick={"seeds": 1, "genes": 200})
def augmentation(
    *, out: Path, data_dir: str | None = None, seeds: int = 3, genes: int = 2000, validation: bool = False
) -> Tables:
    """Recall of rare types before and after generated cells are added, and copies of real ones.

    Parameters
    ----------
    genes
        Most variable genes of the training cells.
    validation
        Hold out donors among the six that the first seed learns from.
    """
    adata = iv.datasets.load("kang_full", data_dir=data_dir)
    adata = adata[(adata.obs["demuxlet_call"] == "SNG").to_numpy()].copy()
    copies = Rows(out / "copies.csv")

    def one(seed: int) -> pd.DataFrame:
        cells, split, held_out = divided(adata, seed, genes, validation)
        train, added, near = augmented(cells, split, seed)
        copies.add({"seed": seed}, near)
        scores = rare_recall(train, added, part(cells, split, "test"), BY, seed=seed)
        return scores.assign(held_out="+".join(held_out))

    table = gains(filled(out / "scores.csv", one, seed=range(seeds)))
    picture(table, out / "gain.png")
    rare = table.assign(rare=np.where(table["n_training"] < 250, "rare", "frequent"))
    by_rarity = rare.pivot_table(index=["classifier", "rare", "metric"], columns="model", values="gain")
    return {"summary": table, "gain": by_rarity, "trend": trend(table)}


def divided(adata, seed: int, n_genes: int, validation: bool = False):
    """Cells of some donors and of two others, in genes chosen on the former."""
    donors = np.random.default_rng(0).permutation(sorted(adata.obs[DONOR].astype(str).unique()))
    if validation:
        donors = donors[2:]
        adata = adata[adata.obs[DONOR].astype(str).isin(donors).to_numpy()]
    held_out = np.roll(donors, -2 * seed)[:2]
    test = adata.obs[DONOR].astype(str).isin(held_out).to_numpy()
    genes = variable_genes(adata.X[~test], n_genes)
    split = pd.Series(np.where(test, "test", "train"), index=adata.obs_names)
    return adata[:, genes].copy(), split, sorted(held_out)


def augmented(cells, split, seed: int):
    """Added cells of every origin and recipe, and the table of distances to training cells."""
    train = part(cells, split, "train")
    design = iv.Design.from_adata(train, covariates=[BY])
    added, copies = {}, []
    for name in ("cfgen", "independent_nb"):
        model = fit(iv.models.MODELS[name](design, train.var_names), cells, split, seed=seed)
        for recipe, (fold, weight) in RECIPES.items():
            if name != "cfgen" and weight != 1:
                continue
            options = {"guidance": weight} if name == "cfgen" else {}
            both = model.augment(
                cells, BY, 2 * train.n_obs, max_fold=fold, split=split, check_copies=True, seed=seed, **options
            )
            added[name + recipe] = both[both.obs["is_generated"].to_numpy()].copy()
            near = both.uns["invirtuo"]["copying"].merge(both.uns["invirtuo"]["resemblance"][[BY, "unlike"]], on=BY)
            copies.append(near.assign(model=name + recipe))
            counts = json.loads(both.uns["invirtuo"]["augmented"])
            if weight == 1:
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


def trend(table: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of the gain of recall with the number of real training cells."""
    recall = table[table["metric"] == "recall"]
    rows = []
    for (classifier, model), group in recall.groupby(["classifier", "model"]):
        spearman = group["n_training"].corr(group["gain"], method="spearman")
        rows.append({"classifier": classifier, "model": model, "spearman": spearman})
    return pd.DataFrame(rows)


def picture(table: pd.DataFrame, path: Path) -> None:
    """Gain of recall and F1 against the number of real training cells."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    panels = product(("recall", "f1"), ("knn", "logistic"))
    for ax, (metric, classifier) in zip(axes.flat, panels, strict=True):
        panel = table[(table["metric"] == metric) & (table["classifier"] == classifier)]
        for model, color in COLORS.items():
            for recipe, marker in zip(RECIPES, MARKERS, strict=True):
                label = model + recipe
                own = panel[panel["model"] == label]
                if own.empty:
                    continue
                ax.scatter(own["n_training"], own["gain"], s=22, c=color, marker=marker, label=label, alpha=0.8)
        ax.axhline(0, color="grey", lw=0.8)
        ax.set(xscale="log", title=f"{classifier}, {metric}")
    for ax in axes[1]:
        ax.set_xlabel("real training cells of the class")
    for ax in axes[:, 0]:
        ax.set_ylabel("gain over real cells alone")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)

"""Generating PBMC3K: CFGen and cellFlow beside scVI sampled from its prior and independent negative binomials.

A third of the cells is held out in every seed. Each generator draws as many cells of every type as are held out, and
`invirtuo.bench.judge` compares them with those: components from real cells that are not scored, the training cells as
the mark to meet. What of the numbers lies within the range of as many real cells, drawn several times, is in
verdicts.csv. scVI needs the extra ``scvi`` and is left out, with a warning, where it is not installed. Generated
cells are kept in OUT/seed-N and are not generated again. Rows "held-out cells, decoded" are these real cells merely
encoded, decoded and drawn by the autoencoder of the model: what is off in them, the flow cannot mend. Of 2-Wasserstein
they say little: each is paired with the cell that it was made of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

import invirtuo as iv
from invirtuo.bench import judge
from invirtuo.bench.comparators import COMPARATORS, sample_prior
from invirtuo.bench.entry import FLOOR
from invirtuo.cells.files import read_h5ad, writing
from invirtuo.cells.genes import variable_genes
from studies.harness import Tables, filled, fit, over_seeds, spent, study

logger = logging.getLogger(__name__)

VERDICTS = ["zeros_distance", "rmse_logvar", "rmse_mean", "correlation_error", "c2st", "mmd_rbf_disjoint",
            "mmd_rbf_median", "wasserstein2_disjoint"]  # fmt: skip
BY = "cell_type"
DECODED = "held-out cells, decoded"
MIN_CELLS = 20  # training cells in which a gene must be seen (CFGen, appendix F)


@study(quick={"models": ["independent_nb"], "genes": 100, "seeds": 1, "draws": 1})
def realism(
    *,
    out: Path,
    data_dir: str | None = None,
    dataset: str = "pbmc3k",
    models: Sequence[str] = ("cfgen", "cellflow_counts", "independent_nb", "scvi"),
    genes: int | None = None,
    seeds: int = 3,
    draws: int = 8,
) -> Tables:
    """Generated cells beside held-out ones, and beside the range of as many real cells.

    Parameters
    ----------
    dataset
        Data set of `invirtuo list datasets`.
    models
        MODEL, MODEL:PRESET or scvi.
    genes
        Most variable genes of the training cells; all by default.
    draws
        Draws of real cells, for their range.
    """
    adata = iv.datasets.load(dataset, data_dir=data_dir)
    design = iv.Design.from_adata(adata, covariates=[BY])
    tables, costs = [], []
    for seed in range(seeds):
        train, test = divided(adata, seed, genes)
        labels = test.obs[[BY]].reset_index(drop=True)
        folder, sides = out / f"seed-{seed}", {}
        for name in models:
            path = folder / f"{name.replace(':', '-')}.h5ad"
            fitted = cache(partial(fitted_model, name, train, design, seed))
            generate = partial(generated, name, fitted, train, design, labels, seed)
            try:
                sides[name], seconds = kept(path, generate)
            except ValueError as error:
                logger.warning("%s is left out: %s", name, error)
                continue
            costs.append({"model": name, "seed": seed, "seconds": seconds})
            if is_autoencoder(name):
                path = path.with_name(f"{path.stem}-decoded.h5ad")
                sides[f"{name}, {DECODED}"], _ = kept(path, lambda: fitted().reconstruct(test, seed=seed))  # noqa: B023
        about = {"dataset": dataset, "split": f"a third of the cells held out, seed {seed}"}
        scores = judge({**sides, "training cells": train}, test, design, folder, about=about)
        tables.append(scores.assign(seed=seed))
    table = pd.concat(tables, ignore_index=True)
    found = verdicts(table, real_range(adata, design, out, draws, genes))
    summary = over_seeds(table, ["task", "metric", "model"])
    return {"scores": table, "costs": pd.DataFrame(costs), "summary": summary, "verdicts": found}


def divided(adata, seed: int, n_genes: int | None = None):
    """Training and held-out cells, with the genes that enough training cells have, or the most variable of these."""
    held_out = np.random.default_rng(seed).random(adata.n_obs) < 1 / 3
    train, test = adata[~held_out], adata[held_out]
    genes = np.asarray((train.X > 0).sum(axis=0)).ravel() >= MIN_CELLS
    if n_genes is not None:
        genes = np.flatnonzero(genes)[variable_genes(train.X[:, genes], n_genes)]
    return train[:, genes].copy(), test[:, genes].copy()


def fitted_model(name: str, train, design, seed: int):
    """MODEL or MODEL:PRESET, fitted with one seed."""
    kind, _, preset = name.partition(":")
    return fit(iv.models.MODELS[kind](design, train.var_names, preset or None), train, seed=seed)


def is_autoencoder(name: str) -> bool:
    """Whether MODEL or MODEL:PRESET encodes cells and decodes them."""
    kind = iv.models.MODELS.get(name.partition(":")[0])
    return hasattr(kind, "reconstruct")


def generated(name: str, fitted: Callable, train, design, labels: pd.DataFrame, seed: int):
    """Cells of one generator; name is MODEL, MODEL:PRESET or a comparator."""
    if name in COMPARATORS:
        return sample_prior(name, train, design, labels, seed=seed)
    return fitted().generate(labels=labels, seed=seed)


def kept(path: Path, generate: Callable):
    """Generated cells, from the file if they have been drawn before; the CPU seconds that fitting and drawing took."""
    if path.exists():
        cells = read_h5ad(path)
        return cells, float(cells.uns["seconds"])
    with spent() as cost:
        cells = generate()
    cells.uns["seconds"] = cost["cpu_seconds"]
    with writing(path) as unfinished:
        cells.write_h5ad(unfinished, compression="gzip")
    return cells, cells.uns["seconds"]


def real_range(adata, design, out: Path, draws: int, n_genes: int | None) -> pd.DataFrame:
    """Scores of real against as many other real cells, drawn anew several times: mean over classes of each draw."""

    def one(seed: int) -> pd.DataFrame:
        train, test = divided(adata, seed, n_genes)
        rows = np.random.default_rng(seed).permutation(train.n_obs)[: test.n_obs]
        scores = judge({"real": train[rows].copy()}, test, design, out / "range", metrics=VERDICTS)
        real = scores[scores["model"] == "real"]
        return real.groupby(["task", "metric"], sort=False, as_index=False)["value"].mean()

    return filled(out / "range.csv", one, seed=range(100, 100 + draws))


def verdicts(scores: pd.DataFrame, real: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds beside the smallest and largest value of real cells; within: not above the largest."""
    scores = scores[scores["model"] != FLOOR]  # of halves: other numbers of cells
    ends = real.groupby(["task", "metric"], sort=False)["value"].agg(["min", "max"])
    means = scores.groupby(["task", "metric", "model"], sort=False)["value"].mean().rename("value").reset_index()
    table = means.join(ends, on=["task", "metric"], how="inner")
    return table.assign(within=table["value"] <= table["max"])

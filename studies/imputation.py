"""Filling in hidden counts: CFGen beside the posterior mean of scVI and answers that need no model.

Entries of PBMC3K are hidden, a tenth of those that are not zero or of all, and models are fitted to what is left, as in
CFGen, appendix I.6; 2,000 genes. All are told the cell types. Hidden entries are zeros to what is fitted, so a fifth of
the cells is not fitted to: rows "unseen" are of these, rows "seen" of the others. The table of mean shares is made of
the others, too. scVI needs the extra ``scvi``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import invirtuo as iv
from invirtuo.bench import imputation_scores, trivial_answers
from invirtuo.bench.comparators import posterior_mean
from invirtuo.cells.genes import variable_genes
from invirtuo.verbs.masking import mask_entries
from studies.harness import Tables, filled, over_seeds, part, study

logger = logging.getLogger(__name__)

BY, FRACTION = "cell_type", 0.1
UNSEEN = 0.2  # share of the cells
TABLE = "mean of the class x depth"


@study(quick={"which": ["nonzero"], "seeds": 1, "epochs": 1})
def imputation(
    *,
    out: Path,
    data_dir: str | None = None,
    which: Sequence[str] = ("nonzero", "all"),
    seeds: int = 3,
    flow: bool = False,
    epochs: int | None = None,
) -> Tables:
    """Hidden counts filled in by CFGen, beside scVI and answers that need no model.

    Parameters
    ----------
    which
        Entries that are hidden: nonzero, all, or first the ones and then the others.
    flow
        Train the flow, too, and add the row by way of noise. Without it the autoencoder gets the steps that it has by
        default, and the flow one.
    epochs
        Epochs of scVI, its own rule by default.
    """
    adata = iv.datasets.load("pbmc3k", data_dir=data_dir)
    adata = adata[:, variable_genes(adata.X, 2000)].copy()
    design = iv.Design.from_adata(adata, covariates=[BY])

    def one(masked: str, seed: int) -> pd.DataFrame:
        left, mask = mask_entries(adata, FRACTION, which=masked, seed=seed)
        held_out = np.random.default_rng(seed).random(adata.n_obs) < UNSEEN
        split = pd.Series(np.where(held_out, "test", "train"), index=adata.obs_names)
        found = answers(left, design, split, flow, epochs, seed)
        tables = []
        for cells, rows in (("seen", ~held_out), ("unseen", held_out)):
            own = {name: means[rows] for name, means in found.items()}
            tables.append(imputation_scores(adata.X[rows], own, mask[rows]).assign(cells=cells))
        return pd.concat(tables, ignore_index=True)

    scores = filled(out / "scores.csv", one, masked=which, seed=range(seeds))
    keys = ["masked", "cells", "model"]
    metrics = [column for column in scores if column not in (*keys, "seed")]
    return {"summary": over_seeds(scores, keys, metrics), "ahead": ahead(scores)}


def answers(masked, design, split: pd.Series, flow: bool, epochs: int | None, seed: int) -> dict[str, np.ndarray]:
    """Means of every entry of all cells, by origin, learned from the training cells."""
    model = iv.models.CFGen(design, masked.var_names)
    config = replace(model.fit_config, seed=seed, progress=False)
    if not flow:
        config = replace(config, steps=round(config.steps * model.config.autoencoder_share))
        model = iv.models.CFGen(design, masked.var_names, replace(model.config, autoencoder_share=1.0))
    model.fit(masked, split, config)
    found = trivial_answers(masked, BY, masked_fraction=FRACTION, split=split)
    given = {"masked_fraction": FRACTION, "seed": seed}
    found["cfgen"] = model.impute(masked, **given).layers["imputed"]
    if flow:
        by_noise = model.impute(masked, flow=True, n_draws=2, steps=10, **given)
        found["cfgen, by way of noise"] = by_noise.layers["imputed"]
    found["mean of cfgen and class"] = (found["cfgen"] + found[TABLE]) / 2
    try:
        train = part(masked, split, "train")
        found["scvi"] = posterior_mean(train, design, cells=masked, epochs=epochs, seed=seed) / (1 - FRACTION)
    except ValueError as error:
        logger.warning("scvi is left out: %s", error)
    return found


def ahead(scores: pd.DataFrame) -> pd.DataFrame:
    """In how many seeds CFGen is ahead of each other answer: a smaller distance, a larger correlation."""
    keys = ["masked", "cells", "seed"]
    own = scores[scores["model"] == "cfgen"].set_index(keys)
    rows = []
    for (masked, cells, model), others in scores.groupby(["masked", "cells", "model"], sort=False):
        if model in ("truth", "cfgen"):
            continue
        other = others.set_index(keys)
        gain = pd.DataFrame({"l1": other["l1"] - own["l1"], "pearson": own["pearson"] - other["pearson"]}).dropna()
        wins = {f"{metric}_ahead": int((gain[metric] > 0).sum()) for metric in gain}
        rows.append({"masked": masked, "cells": cells, "against": model, "seeds": len(gain), **gain.mean(), **wins})
    return pd.DataFrame(rows)

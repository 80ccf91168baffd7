"""Filling in hidden counts: CFGen beside its autoencoder, the posterior mean of scVI and answers that need no model.

Entries of PBMC3K are hidden, a tenth of those that are not zero or of all, and models are fitted to what is left, as in
CFGen, appendix I.6; 2,000 genes. All are told the cell types. scVI needs the extra ``scvi``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import invirtuo as iv
from invirtuo.bench import imputation_scores, trivial_answers
from invirtuo.bench.comparators import posterior_mean
from invirtuo.cells.genes import variable_genes
from invirtuo.verbs.masking import mask_entries
from studies.harness import Tables, filled, fit, over_seeds, study

logger = logging.getLogger(__name__)

BY, FRACTION = "cell_type", 0.1
NOISE = (0.0, 0.05, 0.1)


@study(quick={"which": ["nonzero"], "seeds": 1, "steps": 1, "epochs": 1})
def imputation(
    *,
    out: Path,
    data_dir: str | None = None,
    which: Sequence[str] = ("nonzero", "all"),
    seeds: int = 2,
    steps: int = 25,
    epochs: int | None = None,
) -> Tables:
    """Hidden counts filled in by CFGen, beside scVI and answers that need no model.

    Parameters
    ----------
    which
        Entries that are hidden: nonzero, all, or first the ones and then the others.
    steps
        Steps of the midpoint rule, each way.
    epochs
        Epochs of scVI, its own rule by default.
    """
    adata = iv.datasets.load("pbmc3k", data_dir=data_dir)
    adata = adata[:, variable_genes(adata.X, 2000)].copy()
    design = iv.Design.from_adata(adata, covariates=[BY])

    def one(masked: str, seed: int) -> pd.DataFrame:
        left, mask = mask_entries(adata, FRACTION, which=masked, seed=seed)
        return imputation_scores(adata.X, answers(left, design, steps, epochs, seed), mask)

    scores = filled(out / "scores.csv", one, masked=which, seed=range(seeds))
    metrics = [column for column in scores if column not in ("masked", "seed", "model")]
    return {"summary": over_seeds(scores, ["masked", "model"], metrics)}


def answers(masked, design, steps: int, epochs: int | None, seed: int) -> dict:
    """Means of every entry, by origin."""
    model = fit(iv.models.CFGen(design, masked.var_names), masked, seed=seed)
    found = trivial_answers(masked, BY, masked_fraction=FRACTION)
    given = {"masked_fraction": FRACTION, "seed": seed}
    found["cfgen, autoencoder alone"] = model.impute(masked, flow=False, **given).layers["imputed"]
    for noise in NOISE:
        n_draws = 1 if noise == 0 else 5
        filled = model.impute(masked, noise=noise, n_draws=n_draws, steps=steps, **given)
        found[f"cfgen, noise {noise:g}"] = filled.layers["imputed"]
    try:
        found["scvi"] = posterior_mean(masked, design, epochs=epochs, seed=seed) / (1 - FRACTION)
    except ValueError as error:
        logger.warning("scvi is left out: %s", error)
    return found

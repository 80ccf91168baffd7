"""Correcting batches: scIB scores of CFGen by weights of guidance, beside uncorrected cells, scVI and scANVI.

Kang, singlets, 3,000 genes, donors as batches, 13 cell types; all cells are learned from, some corrected and scored.
CFGen is told the types, as scANVI is, which flatters scores of biology. The collapse figure is the variance within
donors and types after over before. Needs the extras ``integration`` and, for the last two rows, ``scvi``. Embeddings
are kept in OUT and are not made again.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

import invirtuo as iv
from invirtuo.bench import integration_scores
from invirtuo.bench.comparators import embeddings
from invirtuo.cells.files import writing
from invirtuo.metrics.cells import per_10k
from invirtuo.metrics.numerics.axes import principal_axes
from studies.harness import Rows, Tables, fit, spent, study

logger = logging.getLogger(__name__)

BATCH, LABEL = "donor", "cell_type"
WEIGHTS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3))  # of biology and batch, as in table 11


@study(quick={"cells": 300, "steps": 2, "epochs": 1})
def correction(
    *, out: Path, data_dir: str | None = None, cells: int = 5000, steps: int = 15, epochs: int = 30, seed: int = 0
) -> Tables:
    """Batches corrected by CFGen's guidance, beside scVI and scANVI: scIB scores.

    Parameters
    ----------
    cells
        Cells that are corrected and scored.
    steps
        Steps of the midpoint rule, each way.
    epochs
        Epochs of scVI; its own rule would take 400.
    """
    adata = iv.datasets.load("kang_hvg3k", data_dir=data_dir)
    adata = adata[(adata.obs["demuxlet_call"] == "SNG").to_numpy()].copy()
    rows = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:cells])
    found = kept(out / "embeddings.npz")
    if not found:
        costs = Rows(out / "costs.csv")
        found = {"uncorrected": (uncorrected(adata)[rows], 1.0)}
        found |= corrected(adata, adata[rows].copy(), steps, seed, costs)
        found |= of_others(adata, rows, epochs, seed, costs)
        keep(out / "embeddings.npz", found)
    batch, label = (adata.obs[name].astype(str).to_numpy()[rows] for name in (BATCH, LABEL))
    vectors = {name: x for name, (x, _) in found.items()}
    scores = integration_scores(vectors, vectors["uncorrected"], batch, label)
    means = scores[scores["metric"] == "mean"]
    summary = means.pivot(index="model", columns="kind", values="value").loc[[*found]]
    summary["collapse"] = [collapse for _, collapse in found.values()]
    return {"scores": scores, "summary": summary}


def uncorrected(adata, n_pcs: int = 50) -> np.ndarray:
    """(n, d) principal components of log1p of counts per 10,000."""
    logged = per_10k(adata.X)
    centre, axes = principal_axes(logged, n_pcs)
    return logged @ axes - centre @ axes


def corrected(adata, some, steps: int, seed: int, costs: Rows) -> dict[str, tuple[np.ndarray, float]]:
    """Latent vectors of CFGen, as they are and corrected by weights, and how much they have collapsed."""
    design = iv.Design.from_adata(adata, covariates=[LABEL, BATCH])
    model = iv.models.CFGen(design, adata.var_names)
    with spent() as cost:
        fit(model, adata, seed=seed)
    costs.add({"step": "cfgen fit"}, cost)
    found = {"cfgen, not corrected": (model.embed(some).X, 1.0)}
    for bio, batch in WEIGHTS:
        with spent() as cost:
            new = model.correct(some, BATCH, guidance={LABEL: bio, BATCH: batch}, steps=steps, seed=seed)
        costs.add({"step": "cfgen correct"}, cost)
        collapse = float(new.uns["invirtuo"]["collapse"])
        found[f"cfgen, weights {bio}, {batch}"] = (new.obsm["X_invirtuo"], collapse)
    return found


def of_others(adata, rows, epochs: int, seed: int, costs: Rows) -> dict[str, tuple[np.ndarray, float]]:
    """Embeddings of scVI and scANVI, whose collapse is not known, where they are installed."""
    try:
        with spent() as cost:
            others = embeddings(adata, BATCH, LABEL, epochs=epochs, seed=seed)
    except ValueError as error:
        logger.warning("scvi and scanvi are left out: %s", error)
        return {}
    costs.add({"step": "scvi and scanvi"}, cost)
    return {name: (x[rows], np.nan) for name, x in others.items()}


def keep(path: Path, found: dict[str, tuple[np.ndarray, float]]) -> None:
    """Write embeddings and their collapse figures."""
    arrays = {}
    for name, (x, collapse) in found.items():
        arrays |= {name: x, f"{name}|collapse": collapse}
    with writing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def kept(path: Path) -> dict[str, tuple[np.ndarray, float]]:
    """Embeddings that have been made before."""
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        names = [name for name in arrays.files if not name.endswith("|collapse")]
        return {name: (arrays[name], float(arrays[f"{name}|collapse"])) for name in names}

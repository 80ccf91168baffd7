"""Correcting batches: scIB scores of CFGen by weights of guidance, beside uncorrected cells, scVI and scANVI.

Kang, singlets, 3,000 genes, donors as batches, 13 cell types; or marrow, 529 genes, sites as batches, three lineages.
All cells are learned from, some corrected and scored. CFGen is told the types, as scANVI is, which flatters scores of
biology. Rows are named by the weights of biology and batch on the way back; those on the way to noise are 1 and 1, as
in table 11, but for the rows "both ways". The collapse figure is the variance within batches and types after over
before. k-means starts at random: `nmi` and `ari` are means over ten starts, and `kmeans_sd` says by how much the mean
of biology moves for that alone. `same_label` and `same_batch` are shares among 30 neighbours. Needs the
extras ``integration`` and, for the last two rows, ``scvi``. Embeddings are kept in OUT and are not made again.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

import invirtuo as iv
from invirtuo.bench import integration_scores
from invirtuo.bench.comparators import embeddings
from invirtuo.cells.files import writing
from invirtuo.metrics.cells import per_10k
from invirtuo.metrics.numerics.axes import principal_axes
from studies.harness import Rows, Tables, filled, fit, over_seeds, spent, study

logger = logging.getLogger(__name__)

ROLES = {"kang_hvg3k": ("donor", "cell_type"), "hematopoiesis": ("site", "lineage")}  # batch and biology
WEIGHTS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3))  # of biology and batch on the way back, as in table 11
BOTH_WAYS = ((2, 1), (3, 3))  # the same weights on the way to noise
STARTS = 10  # of k-means


@study(quick={"cells": 300, "steps": 2, "epochs": 1, "seeds": 1})
def correction(
    *,
    out: Path,
    data_dir: str | None = None,
    dataset: str = "kang_hvg3k",
    cells: int = 4000,
    steps: int = 15,
    epochs: int = 20,
    seeds: int = 3,
) -> Tables:
    """Batches corrected by CFGen's guidance, beside scVI and scANVI: scIB scores.

    Parameters
    ----------
    dataset
        kang_hvg3k or hematopoiesis.
    cells
        Cells that are corrected and scored.
    steps
        Steps of the midpoint rule, each way.
    epochs
        Epochs of scVI; its own rule would take 400.
    """
    batch, label = ROLES[dataset]
    adata = known_cells(dataset, data_dir)
    costs = Rows(out / "costs.csv")

    def one(seed: int) -> pd.DataFrame:
        rows = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:cells])
        path = out / f"seed-{seed}.npz"
        found = kept(path)
        if not found:
            found = {"uncorrected": (uncorrected(adata)[rows], 1.0)}
            found |= corrected(adata, adata[rows].copy(), batch, label, steps, seed, costs)
            found |= of_others(adata, rows, batch, label, epochs, seed, costs)
            keep(path, found)
        batches, labels = (adata.obs[name].astype(str).to_numpy()[rows] for name in (batch, label))
        return scored(found, batches, labels)

    scores = filled(out / "scores.csv", one, seed=range(seeds))
    means = scores[(scores["metric"] == "mean") | ~scores["kind"].isin(["batch", "bio"])]
    wide = means.pivot(index=["model", "seed"], columns=["kind", "metric"], values="value")
    wide.columns = [kind if metric == "mean" else metric for kind, metric in wide.columns]
    order = scores["model"].unique()
    return {"scores": scores, "summary": over_seeds(wide.reset_index(), ["model"], [*wide.columns]).loc[order]}


def known_cells(dataset: str, data_dir: str | None):
    """Cells with their batches: singlets of Kang; marrow with the site of each donor."""
    adata = iv.datasets.load(dataset, data_dir=data_dir)
    if dataset == "kang_hvg3k":
        return adata[(adata.obs["demuxlet_call"] == "SNG").to_numpy()].copy()
    adata.obs["site"] = adata.obs["donor"].astype(str).str[:2]  # s1d2 is the second donor of the first site
    return adata


def uncorrected(adata, n_pcs: int = 50) -> np.ndarray:
    """(n, d) principal components of log1p of counts per 10,000."""
    logged = per_10k(adata.X)
    centre, axes = principal_axes(logged, n_pcs)
    return logged @ axes - centre @ axes


def corrected(
    adata, some, batch: str, label: str, steps: int, seed: int, costs: Rows
) -> dict[str, tuple[np.ndarray, float]]:
    """Latent vectors of CFGen, as they are and corrected by weights, and how much they have collapsed."""
    design = iv.Design.from_adata(adata, covariates=[label, batch])
    model = iv.models.CFGen(design, adata.var_names)
    with spent() as cost:
        fit(model, adata, seed=seed)
    costs.add({"seed": seed, "step": "cfgen fit"}, cost)
    found = {"cfgen, not corrected": (model.embed(some).X, 1.0)}
    ways = [(weights, None, "") for weights in WEIGHTS]
    ways += [(weights, weights, " both ways") for weights in BOTH_WAYS]
    for back, there, note in ways:
        guidance = dict(zip((label, batch), back, strict=True))
        inverse = None if there is None else guidance
        with spent() as cost:
            new = model.correct(some, batch, guidance=guidance, invert_guidance=inverse, steps=steps, seed=seed)
        collapse = float(new.uns["invirtuo"]["collapse"])
        found[f"cfgen, weights {back[0]}, {back[1]}{note}"] = (new.obsm["X_invirtuo"], collapse)
    costs.add({"seed": seed, "step": "cfgen correct"}, cost)
    return found


def of_others(
    adata, rows, batch: str, label: str, epochs: int, seed: int, costs: Rows
) -> dict[str, tuple[np.ndarray, float]]:
    """Embeddings of scVI and scANVI, whose collapse is not known, where they are installed."""
    try:
        with spent() as cost:
            others = embeddings(adata, batch, label, epochs=epochs, seed=seed)
    except ValueError as error:
        logger.warning("scvi and scanvi are left out: %s", error)
        return {}
    costs.add({"seed": seed, "step": "scvi and scanvi"}, cost)
    return {name: (x[rows], np.nan) for name, x in others.items()}


def scored(found: dict[str, tuple[np.ndarray, float]], batch: np.ndarray, label: np.ndarray) -> pd.DataFrame:
    """Scores of scIB, and what they leave out."""
    vectors = {name: x for name, (x, _) in found.items()}
    scores = integration_scores(vectors, vectors["uncorrected"], batch, label)
    return pd.concat([scores, further(found, batch, label)], ignore_index=True)


def further(found: dict[str, tuple[np.ndarray, float]], batch: np.ndarray, label: np.ndarray) -> pd.DataFrame:
    """Collapse; shares of neighbours of the own label and batch; k-means over its starts, its part of scIB's mean."""
    rows = []
    for name, (x, collapse) in found.items():
        agreement = np.array([clustered(x, label, start) for start in range(STARTS)])
        nmi, ari = agreement.mean(axis=0)
        spread = agreement.sum(axis=1).std() / 5  # NMI and ARI are two of five scores
        values = {"collapse": collapse, "nmi": nmi, "ari": ari, "kmeans_sd": spread}
        near = neighbours(x)
        values |= {"same_label": (label[near] == label[:, None]).mean()}
        values |= {"same_batch": (batch[near] == batch[:, None]).mean()}
        rows += [{"model": name, "kind": "", "metric": metric, "value": value} for metric, value in values.items()]
    return pd.DataFrame(rows)


def clustered(x: np.ndarray, label: np.ndarray, start: int) -> tuple[float, float]:
    """NMI and ARI with the labels of k-means from one random start."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    clusters = KMeans(len(set(label)), n_init=1, random_state=start).fit_predict(x)
    return normalized_mutual_info_score(label, clusters), adjusted_rand_score(label, clusters)


def neighbours(x: np.ndarray, k: int = 30) -> np.ndarray:
    """(n, k) rows of the nearest other cells."""
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(x) - 1)
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors(return_distance=False)


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

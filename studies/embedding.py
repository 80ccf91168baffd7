"""SE trained on several data sets at once, beside principal components of the same number: what each knows of cells.

Training: PBMC3K, the control cells of Kang, and CD34+ marrow, without the cell types HELD_OUT. Components are fitted on
the same cells and genes, those that have a vector. Then all cells of PBMC3K and Kang are embedded, held-out types and
stimulated cells too, and `label_scores` reads from them: the type, of all cells and of those of held-out types alone,
and in Kang, in every type, whether a cell was stimulated. `transfer` is the balanced accuracy on Kang of a
logistic regression of the types that was trained on PBMC3K. The embedding is also computed a second time, backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

import invirtuo as iv
from invirtuo.cells.genes import read_vectors
from invirtuo.metrics import label_scores
from studies.harness import Rows, Tables, filled, over_seeds, spent, study

HELD_OUT = ("B cells", "NK cells", "Dendritic cells")  # in no training cell


@study(quick={"steps": 2, "seeds": 1})
def embedding(
    *,
    out: Path,
    vectors: Path,
    data_dir: str | None = None,
    steps: int | None = None,
    variants: Sequence[str] = ("SE, gene2vec", "SE, random vectors"),
    seeds: int = 2,
) -> Tables:
    """What SE, trained on several data sets, knows of cells, beside principal components.

    Parameters
    ----------
    variants
        Vectors of genes that SE begins with, beside components of as many numbers.
    """
    with np.load(vectors) as arrays:
        data = cells(data_dir, arrays["genes"].astype(str))
    train = training_cells(data)
    print(f"{train.n_obs} training cells of {train.obs['dataset'].nunique()} data sets, {train.n_vars} genes")
    design = iv.Design.from_adata(train, covariates=["dataset"])
    kind = iv.models.StateEmbedding
    width = read_vectors(vectors, train.var_names[:1]).shape[1]
    options = {"SE, gene2vec": {"gene_vectors": str(vectors), "gene_width": width}, "SE, random vectors": {}}
    preset = replace(kind.PRESETS["default"].fit, progress=False)
    preset = replace(preset, steps=steps) if steps else preset
    costs = Rows(out / "costs.csv")

    def one(embedding: str, seed: int) -> pd.DataFrame:
        if embedding not in options:
            return scores(components(train, data, n, seed), data, seed)
        model = kind(design, train.var_names, replace(kind.Config(), **options[embedding]))
        with spent() as fitting:
            model.fit(train, config=replace(preset, seed=seed))
        with spent() as embedded:
            z = {name: model.embed(adata).X for name, adata in data.items()}
        again = model.embed(data["pbmc3k"][::-1].copy()).X[::-1]
        backwards = np.abs(again - z["pbmc3k"]).max()
        row = {"fit_seconds": fitting["cpu_seconds"], "embed_seconds": embedded["cpu_seconds"], "backwards": backwards}
        costs.add({"embedding": embedding, "seed": seed}, row)
        return scores(z, data, seed)

    n = kind(design, train.var_names).n_embedding
    names = [*(name for name in options if name in variants), f"PCA, {n} components"]
    table = filled(out / "scores.csv", one, seed=range(seeds), embedding=names)
    summary = over_seeds(table, ["data", "task", "metric", "embedding"])
    return {"summary": summary, "means": summary["mean"].unstack()}


def cells(data_dir: str | None, genes: Sequence[str]) -> dict[str, anndata.AnnData]:
    """Log expression of the data sets, with `kind`: the type, or "" where it is not known."""
    found = {
        "pbmc3k": iv.datasets.load("pbmc3k", data_dir=data_dir),
        "kang": iv.datasets.load("kang_full", data_dir=data_dir),
        "marrow": iv.datasets.load("marrow", data_dir=data_dir),
    }
    column = {"pbmc3k": "cell_type", "kang": "cell_type_coarse"}
    for name, adata in found.items():
        adata = iv.preprocess.normalize(adata, n_genes=None)
        adata = adata[:, adata.var_names.isin(genes)].copy()
        adata.obs["kind"] = adata.obs[column[name]].astype(str) if name in column else ""
        found[name] = adata
    return found


def training_cells(data: dict[str, anndata.AnnData]) -> anndata.AnnData:
    """Untouched cells of the types that are not held out, with the genes of all data sets."""
    parts = {}
    for name, adata in data.items():
        keep = ~adata.obs["kind"].isin(HELD_OUT).to_numpy()
        if name == "kang":
            keep &= (adata.obs["perturbation"] == "control").to_numpy()
        parts[name] = adata[keep]
    return anndata.concat(parts, join="outer", label="dataset", index_unique="-", fill_value=0)


def components(train: anndata.AnnData, data: dict[str, anndata.AnnData], n: int, seed: int) -> dict[str, np.ndarray]:
    """Principal components of every data set, fitted on the training cells."""
    pca = PCA(n, svd_solver="randomized", random_state=seed).fit(train.X.toarray())
    z = {}
    for name, adata in data.items():
        own, shared = np.arange(adata.n_vars), train.var_names.get_indexer(adata.var_names)
        spread = sparse.csr_matrix((np.ones(adata.n_vars), (own, shared)), (adata.n_vars, train.n_vars))
        z[name] = pca.transform((adata.X @ spread).toarray())
    return z


def scores(z: dict[str, np.ndarray], data: dict[str, anndata.AnnData], seed: int) -> pd.DataFrame:
    """Everything that is read from one embedding."""
    tables = []
    for name in ("pbmc3k", "kang"):
        kind = data[name].obs["kind"].to_numpy()
        rare = np.isin(kind, HELD_OUT)
        tables.append(label_scores(z[name], kind, seed=seed).assign(data=name, task="cell type"))
        tables.append(label_scores(z[name][rare], kind[rare], seed=seed).assign(data=name, task="held-out cell types"))
    obs = data["kang"].obs
    common = obs["kind"].isin(obs["kind"].value_counts()[lambda n: n >= 200].index).to_numpy()
    stimulated = label_scores(z["kang"][common], obs["perturbation"][common], groups=obs["kind"][common], seed=seed)
    tables.append(stimulated.assign(data="kang", task="stimulated or not, by type"))
    table = pd.concat(tables).drop(columns="n_labels").melt(["data", "task", "group"], var_name="metric")
    transfer = {
        "data": "kang",
        "task": "cell type",
        "group": "all",
        "metric": "transfer",
        "value": transferred(z, data),
    }
    return pd.concat([table, pd.DataFrame([transfer])], ignore_index=True)


def transferred(z: dict[str, np.ndarray], data: dict[str, anndata.AnnData]) -> float:
    """Balanced accuracy on untouched cells of Kang of a classifier of PBMC3K, over the types that both have."""
    kinds = [adata.obs["kind"].to_numpy() for adata in (data["pbmc3k"], data["kang"])]
    both = sorted(set(kinds[0]) & set(kinds[1]))
    at = [np.isin(kind, both) for kind in kinds]
    at[1] &= (data["kang"].obs["perturbation"] == "control").to_numpy()
    mean, spread = z["pbmc3k"].mean(axis=0), z["pbmc3k"].std(axis=0) + 1e-6
    model = LogisticRegression(max_iter=2000).fit((z["pbmc3k"][at[0]] - mean) / spread, kinds[0][at[0]])
    return balanced_accuracy_score(kinds[1][at[1]], model.predict((z["kang"][at[1]] - mean) / spread))

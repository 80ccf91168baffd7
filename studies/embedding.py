"""SE trained on several data sets at once, beside principal components of the same number: what each knows of cells.

    python benchmarks/embedding.py --data-dir DATA --out embedding --vectors gene2vec_200d_f16.npz --seeds 2

Training: PBMC3K, the control cells of Kang, and CD34+ marrow, without the cell types HELD_OUT. Components are fitted on
the same cells and genes, those that have a vector. Then all cells of PBMC3K and Kang are embedded, held-out types and
stimulated cells too, and `label_scores` reads from them: the type, of all cells and of those of held-out types alone,
and in Kang, in every type, whether a cell was stimulated. `transfer` is the balanced accuracy on Kang of a
logistic regression of the types that was trained on PBMC3K. The embedding is also computed a second time, backwards.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

import invirtuo as iv
from invirtuo.genes import read_vectors
from invirtuo.metrics import label_scores

HELD_OUT = ("B cells", "NK cells", "Dendritic cells")  # in no training cell


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
    place = {name: train.var_names.get_indexer(adata.var_names) for name, adata in data.items()}
    spread = {
        name: sparse.csr_matrix(
            (np.ones(adata.n_vars), (np.arange(adata.n_vars), place[name])), (adata.n_vars, train.n_vars)
        )
        for name, adata in data.items()
    }
    return {name: pca.transform((adata.X @ spread[name]).toarray()) for name, adata in data.items()}


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, embed, score; print means over groups and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--vectors", required=True, help=".npz with vectors of genes, such as gene2vec")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("embedding"))
    parser.add_argument("--lr", type=float)
    parser.add_argument("--variants", nargs="*", default=["SE, gene2vec", "SE, random vectors"])
    parser.add_argument("--set", nargs="*", default=[], help="field=value of the Config")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    with np.load(args.vectors) as arrays:
        data = cells(args.data_dir, arrays["genes"].astype(str))
    train = training_cells(data)
    print(f"{train.n_obs} training cells of {train.obs['dataset'].nunique()} data sets, {train.n_vars} genes")
    design = iv.Design.from_adata(train, covariates=["dataset"])
    kind = iv.models.StateEmbedding
    width = read_vectors(args.vectors, train.var_names[:1]).shape[1]
    changes = {k: type(getattr(kind.Config(), k))(v) for k, v in (pair.split("=") for pair in args.set)}
    variants = {"SE, gene2vec": {"gene_vectors": str(args.vectors), "gene_width": width}, "SE, random vectors": {}}
    tables = []
    for seed in range(args.seeds):
        n_embedding = 0
        for name, options in variants.items():
            if name not in args.variants:
                continue
            model = kind(design, train.var_names, replace(kind.Config(), **options, **changes))
            fit = replace(kind.PRESETS["default"].fit, seed=seed, progress=False)
            fit = replace(fit, steps=args.steps) if args.steps else fit
            fit = replace(fit, lr=args.lr) if args.lr else fit
            start = time.process_time()
            model.fit(train, config=fit)
            fitted = time.process_time() - start
            z = {d: model.embed(adata).X for d, adata in data.items()}
            seconds = time.process_time() - start - fitted
            again = model.embed(data["pbmc3k"][::-1].copy()).X[::-1]
            print(f"{name}, seed {seed}: fit {fitted:.0f}, embedding {seconds:.0f} CPU s; "
                  f"backwards differs by {np.abs(again - z['pbmc3k']).max():.1e}", flush=True)  # fmt: skip
            tables.append(scores(z, data, seed).assign(embedding=name, seed=seed))
            model.history.to_csv(args.out / f"history-{seed}.csv", index=False)
            n_embedding = model.n_embedding
        z = components(train, data, n_embedding, seed)
        tables.append(scores(z, data, seed).assign(embedding=f"PCA, {n_embedding} components", seed=seed))
        table = pd.concat(tables, ignore_index=True)
        table.to_csv(args.out / "scores.csv", index=False)
    means = table.groupby(["data", "task", "metric", "embedding", "seed"])["value"].mean().groupby(level=[0, 1, 2, 3])
    summary = means.agg(["mean", "std"]).round(4)
    summary.to_csv(args.out / "summary.csv")
    print(summary["mean"].unstack().to_string())


if __name__ == "__main__":
    main()

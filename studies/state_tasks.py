"""ST on genes, on principal components and on SE's embeddings, beside means, ridge and PRiMeFlow, in contexts held out.

    python benchmarks/state_tasks.py --data-dir DATA --vectors gene2vec_200d_f16.npz --out state-tasks --seeds 3

SE is trained once, on PBMC3K, CD34+ marrow, and control cells: of Kang without the cell types and donors that a task
holds out, of glioblastoma and of THP-1 all of them, as ST has these as well. It never sees a perturbed cell. The cells
of every task are then written with their embedding, and `invirtuo.benchmark` does the rest; it resumes after a kill.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

import invirtuo as iv
from invirtuo.bench import TASKS, Entry, Task, paired_differences
from invirtuo.genes import read_vectors
from invirtuo.metrics import label_scores
from invirtuo.preprocess import with_embedding

N_GENES, N_CELLS = 500, 300  # at most so many genes; predicted cells of each condition
METRICS = ("energy_distance", "pearson_delta", "de_overlap_n", "variance_ratio")  # beside those of the task
UNSEEN_TYPES, UNSEEN_DONORS = ("B cells", "FCGR3A+ Monocytes", "NK cells"), ("101", "1015", "1256")
ON_SE = {"space": "obsm", "obsm": "X_state"}


def entries(n_embedding: int, steps: int, ablations: bool) -> list[Entry]:
    """Models that are compared; the simple baselines are added by the benchmark."""
    variants = {"ST": {}, "ST on PCA": {"space": "pca"}, "ST on SE": {**ON_SE, "n_embedding": n_embedding}}
    if ablations:
        variants |= {
            "ST, no attention": {"mixing": "none"},
            "ST, mean": {"mixing": "mean"},
            "ST, sets of 1": {"set_size": 1},
        }
    return [
        *(Entry(label, "state_transition", config, {"steps": steps}) for label, config in variants.items()),
        Entry("ridge", "ridge"),
        Entry("ridge:kernel", "ridge", "kernel"),
        Entry("primeflow", "primeflow", None, {"steps": steps}),
    ]


def controls(data_dir: str | None) -> dict[str, anndata.AnnData]:
    """What SE is trained on: log expression of untouched cells, data set by data set."""
    loaded = {name: iv.datasets.load(name, data_dir=data_dir)
              for name in ("pbmc3k", "marrow", "kang_full", "glioblastoma", "papalexi")}  # fmt: skip
    seen = {"pbmc3k": ~loaded["pbmc3k"].obs["cell_type"].isin(UNSEEN_TYPES)}
    kang = loaded["kang_full"].obs
    seen["kang_full"] = ~kang["cell_type_coarse"].isin(UNSEEN_TYPES) & ~kang["donor"].isin(UNSEEN_DONORS)
    parts = {}
    for name, adata in loaded.items():
        keep = seen.get(name, pd.Series(True, adata.obs_names)).to_numpy()
        if "perturbation" in adata.obs:
            keep = keep & (adata.obs["perturbation"].astype(str) == "control").to_numpy()
        parts[name] = iv.preprocess.normalize(adata[keep])
    return parts


def encoder(data_dir: str | None, vectors: Path, out: Path, steps: int | None) -> iv.models.StateEmbedding:
    """SE, trained on control cells or read from an earlier run."""
    if (out / "encoder" / "config.json").exists():
        return iv.load(out / "encoder")
    cells = anndata.concat(controls(data_dir), join="outer", label="dataset", index_unique="-", fill_value=0)
    known = np.isfinite(read_vectors(vectors, cells.var_names)[:, 0])
    cells = cells[:, known].copy()
    kind = iv.models.StateEmbedding
    width = read_vectors(vectors, cells.var_names[:1]).shape[1]
    config = replace(kind.Config(), gene_vectors=str(vectors), gene_width=width)
    fit = kind.PRESETS["default"].fit
    model = kind(iv.Design.from_adata(cells, covariates=["dataset"]), cells.var_names, config)
    model.fit(cells, config=replace(fit, steps=steps) if steps else fit, folder=out / "encoder-fit", resume=True)
    model.save(out / "encoder", overwrite=True)
    return model


def embedded_task(name: str, model: iv.models.StateEmbedding, out: Path, data_dir: str | None) -> Task:
    """A task at the size of this comparison, whose cells have their embedding in obsm."""
    task = replace(TASKS[name], n_genes=TASKS[name].n_genes and N_GENES, n_cells=N_CELLS)
    path = out / "cells" / f"{name}.h5ad"
    adata, design, _ = task.load(data_dir=data_dir)
    if not path.exists():
        whole = iv.preprocess.normalize(iv.datasets.load(task.dataset, data_dir=data_dir))
        adata = with_embedding(adata, model.embed(whole[adata.obs_names]))
        path.parent.mkdir(parents=True, exist_ok=True)
        adata.write_h5ad(path)
    return replace(task, dataset=str(path), design=design, covariates=(), keep=None, n_genes=None,
                   metrics=(*task.metrics, *METRICS))  # fmt: skip


def recognised(task: Task, chosen: Sequence[Entry], n_components: int = 50) -> pd.DataFrame:
    """How often a network that was trained on real cells names the perturbation of predicted ones (extrinsic, fig. 2D).

    It reads principal components of the real test cells. The row "real cells" is its score on a fifth of these.
    """
    adata, design, split = task.load()
    real = adata[(split == "test").to_numpy() & ~design.is_control(adata.obs)]
    pca = PCA(n_components, random_state=0).fit(real.X.toarray())
    z, labels = pca.transform(real.X.toarray()), real.obs[design.perturbation]
    rows = [label_scores(z, labels).assign(model="real cells")]
    for entry in (entry for entry in chosen if entry.task == task.name):
        model, fit = entry.make(design, adata.var_names)
        model.fit(adata, split, replace(fit, progress=False))
        cells = model.predict("test", task.n_cells)
        predicted = pca.transform(np.asarray(cells.X)), cells.obs[design.perturbation]
        rows.append(label_scores(z, labels, predicted=predicted).assign(model=entry.label))
    return pd.concat(rows).drop(columns=["group", "silhouette"]).assign(task=task.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Embed, fit, score; print means, differences of ST to the others, and how well predicted cells are recognised."""
    names = ("kang-celltype", "kang-donor", "glioblastoma-donor", "papalexi-replicate")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=names)
    parser.add_argument("--data-dir")
    parser.add_argument("--vectors", type=Path, required=True, help=".npz with vectors of genes, such as gene2vec")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--encoder-steps", type=int)
    parser.add_argument("--ablations", nargs="*", default=["kang-celltype"], help="tasks on which ST is taken apart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("state-tasks"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    model = encoder(args.data_dir, args.vectors, args.out, args.encoder_steps)
    tasks = [embedded_task(name, model, args.out, args.data_dir) for name in args.tasks]
    chosen = [
        replace(entry, task=task.name)
        for task in tasks
        for entry in entries(model.n_embedding, args.steps, task.name in args.ablations)
    ]
    scores = iv.benchmark(tasks, chosen, args.seeds, args.out, n_jobs=args.jobs, progress=True)
    shown = ["mmd_gex", "energy_distance", "pearson_delta", "deg_recall", "cosine_logfc", "variance_ratio"]
    scores = scores[scores["metric"].isin(shown)]
    means = scores.groupby(["task", "model", "metric"])["value"].mean().unstack()[shown]
    print(means.round(3).to_string())
    pairs = paired_differences(scores[scores["metric"].isin(["mmd_gex", "pearson_delta"])])
    pairs = pairs[pairs["model"].str.startswith("ST")]
    print(pairs.round(3).to_string(index=False))
    several = [task for task in tasks if len(task.design.perturbations) > 1]
    for task in several:
        table = recognised(task, chosen)
        table.to_csv(args.out / f"recognised-{task.name}.csv", index=False)
        print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()

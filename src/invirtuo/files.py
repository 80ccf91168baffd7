"""Reading h5ad files that may be damaged or hostile, and writing files that are whole or not there at all."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData

__all__ = ["bytes_by_row", "check_h5ad", "read_h5ad", "writing", "writing_h5ad"]

BLOCK = 1 << 22  # values read at a time
INFLATION = 2000  # gzip reaches about 1000


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes the place of `path`, on failure it is removed.

    Missing folders are made. The temporary name keeps the suffix, so that writers that look at it agree.

    Parameters
    ----------
    path
        The file to write or replace.

    Raises
    ------
    ValueError
        If `path` is a folder.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> with writing(folder / "scores.csv") as part:
    ...     _ = part.write_text("a,b")
    >>> (folder / "scores.csv").read_text()
    'a,b'
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing_h5ad(path: str | os.PathLike, obs: pd.DataFrame, var: pd.DataFrame, uns: dict) -> Iterator[h5py.File]:
    """An h5ad with all but X, open to be written to; it appears as `path` on success, and on failure not at all.

    Parameters
    ----------
    path
        The file to write or replace.
    obs, var, uns
        What X is to lie beside.
    """
    import anndata

    with writing(path) as part:
        anndata.AnnData(None, obs=obs, var=var, uns=uns).write_h5ad(part)
        with h5py.File(part, "r+") as file:
            yield file


def read_h5ad(path: str | os.PathLike, *, backed: bool = False) -> AnnData:
    """Read an h5ad file after :func:`check_h5ad` found nothing wrong with it.

    Parameters
    ----------
    path
        File written by AnnData.
    backed
        Leave X on disk (read-only).

    Raises
    ------
    ValueError
        If the file is missing, truncated, not an h5ad, or its parts contradict each other.
    """
    import anndata
    from anndata.io import read_h5ad as read

    check_h5ad(path)
    trouble = (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError)
    try:
        adata = read(path, backed="r" if backed else None)
    except (*trouble, anndata._io.specs.registry.IORegistryError) as error:
        raise ValueError(
            f"{path} is not a readable h5ad file: {_first_line(error)}. Write it again with AnnData"
        ) from error
    if adata.X is None:
        raise ValueError(
            f"{path} has no X; expected cells x genes. Put the matrix into adata.X and write the file again"
        )
    return adata


def bytes_by_row(path: str | os.PathLike) -> int:
    """Bytes that X takes in memory; 0 if it is not stored by rows (CSR or dense), or not there.

    Raises
    ------
    ValueError
        As :func:`check_h5ad`.
    """
    check_h5ad(path, values=False)
    with h5py.File(path, "r") as file:
        x = file.get("X")
        if isinstance(x, h5py.Group) and x.attrs.get("encoding-type") == "csr_matrix":
            return sum(x[name].nbytes for name in ("data", "indices") if name in x)
        return x.nbytes if isinstance(x, h5py.Dataset) else 0


def check_h5ad(path: str | os.PathLike, *, values: bool = True) -> None:
    """Refuse a file that leads out of itself or whose matrices contradict themselves.

    Refused are soft and external links, external storage and virtual datasets (a file from elsewhere could make
    us read any file of this machine), datasets that declare far more than they store, and sparse matrices whose
    indices leave the matrix. Without `values` matrices are not read; who reads them then checks the indices.

    Raises
    ------
    ValueError
        Saying what was found where.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected an h5ad file")
    try:
        if not h5py.is_hdf5(path):
            raise ValueError(f"{path} is not an HDF5 file; expected an h5ad file written by AnnData")
        with h5py.File(path, "r") as file:
            missing = [name for name in ("obs", "var") if name not in file]
            if missing:
                raise ValueError(f"{path} is HDF5 but has no {' and no '.join(missing)}; expected an h5ad file")
            _check_group(file, path, (), values)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged: {_first_line(error)}. Copy or download it again") from error


def _check_group(group: h5py.Group, path: Path, above: tuple[int, ...], values: bool) -> None:
    address = h5py.h5o.get_info(group.id).addr
    if address in above:
        raise ValueError(f"{path}: {group.name} contains itself; write the file again with AnnData")
    for name in group:
        where = f"{group.name.rstrip('/')}/{name}"
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            target = f"{link.filename}:{link.path}" if isinstance(link, h5py.ExternalLink) else link.path
            raise ValueError(f"{path}: {where} is a link to {target}; links are not followed. Store the data itself")
        item = group[name]
        if isinstance(item, h5py.Group):
            _check_group(item, path, (*above, address), values)
        elif isinstance(item, h5py.Dataset):
            _check_dataset(item, path, where)
    if values and group.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        _check_sparse(group, path)


def _check_dataset(data: h5py.Dataset, path: Path, where: str) -> None:
    if data.is_virtual or data.external:
        raise ValueError(
            f"{path}: {where} keeps its values in other files; these are not opened. Store the data itself"
        )
    stored = data.id.get_storage_size()
    if data.shape is not None and data.nbytes > INFLATION * stored + 2**27:
        raise ValueError(f"{path}: {where} declares {data.nbytes:,} bytes but the file holds {stored:,} of them")


def _check_sparse(group: h5py.Group, path: Path) -> None:
    """Shape, indptr and indices of a sparse matrix agree; reads indices a block at a time."""
    where = f"{path}: sparse matrix {group.name}"
    if not {"data", "indices", "indptr"} <= set(group) or "shape" not in group.attrs:
        raise ValueError(f"{where} needs data, indices, indptr and the attribute shape; found {sorted(group)}")
    shape = np.asarray(group.attrs["shape"])
    data, indices, indptr = group["data"], group["indices"], group["indptr"]
    if shape.shape != (2,) or (shape < 0).any():
        raise ValueError(f"{where} has shape {shape.tolist()}; expected two numbers >= 0")
    n_major, n_minor = shape if group.attrs["encoding-type"] == "csr_matrix" else shape[::-1]
    if indptr.shape != (n_major + 1,):
        raise ValueError(f"{where} has indptr of shape {indptr.shape}; its shape {tuple(shape)} asks for {n_major + 1}")
    if data.ndim != 1 or data.shape != indices.shape:
        raise ValueError(f"{where} has {data.shape} values but {indices.shape} indices")
    pointers = indptr[:]
    if pointers[0] != 0 or pointers[-1] != len(indices) or (np.diff(pointers.astype(np.int64)) < 0).any():
        raise ValueError(f"{where} has an indptr that does not rise from 0 to the {len(indices)} stored values")
    for start in range(0, len(indices), BLOCK):
        block = indices[start : start + BLOCK]
        if block.min() < 0 or block.max() >= n_minor:
            raise ValueError(f"{where} has indices from {block.min()} to {block.max()}; expected 0 to {n_minor - 1}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

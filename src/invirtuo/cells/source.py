"""The door through which cells are read: in memory, in one file that stays on disk, or in a store of files.

It knows labels, names of genes and values by rows; not what the labels mean.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.files import bytes_by_row, read_h5ad
from invirtuo.cells.packed import plain
from invirtuo.cells.preprocess import TOTAL
from invirtuo.cells.store import CellStore
from invirtuo.cells.values import AnyMatrix, canonical_csr, check_values
from invirtuo.errors import preview

if TYPE_CHECKING:
    from hashlib import blake2b

    from anndata import AnnData

    from invirtuo.design import Design

__all__ = [
    "AnyCells",
    "BackedSource",
    "MemorySource",
    "Source",
    "StoreSource",
    "TrainingSource",
    "opened",
    "source_of",
    "to_csr",
    "training_source",
]

AnyCells: TypeAlias = "AnnData | CellStore | str | Path | Sequence[str | Path]"
IN_MEMORY = 512 << 20  # bytes of X, beyond which a file stays on disk even where small ones are read into memory
BLOCK = 4096  # cells of a backed file that are in memory at a time

Matrix = TypeVar("Matrix")  # CSR, or a dense array
Matrix_co = TypeVar("Matrix_co", covariant=True)


class Source(Protocol[Matrix_co]):
    """Cells, whose values are read by rows.

    `obs` (n, columns) has their labels, `genes` (g,) the names of the columns of values; `on_disk` says whether values
    are read from files.
    """

    obs: pd.DataFrame
    genes: pd.Index
    on_disk: bool

    def read(self, rows: np.ndarray) -> Matrix_co:
        """(m, g) values of rows."""
        ...

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Matrix_co]]:
        """Pass over rows (rising), as many at a time as memory should hold: rows and their values."""
        ...


class MemorySource(Generic[Matrix]):
    """Cells in memory.

    Parameters
    ----------
    obs, genes
        Labels of the cells, and names of the columns.
    matrix
        (n, g), CSR or dense.
    counts
        (n, g'), values whose sums are the depths of cells without a column ``total_counts``; None takes `matrix`.
    """

    on_disk = False

    def __init__(self, obs: pd.DataFrame, genes: pd.Index, matrix: Matrix, counts: Any = None):
        self.obs = obs
        self.genes = genes
        self.matrix = matrix
        self._counts: Any = matrix if counts is None else counts

    def read(self, rows: np.ndarray) -> Matrix:
        values: Matrix = self.matrix[rows]  # type: ignore[index]
        return values

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Matrix]]:
        yield rows, self.read(rows)

    def depth(self, *, signed: bool = False) -> np.ndarray:
        """(n,) depth of each cell."""
        if TOTAL in self.obs:
            known: np.ndarray = self.obs[TOTAL].to_numpy(np.float64)
            return known
        return np.asarray(self._counts.sum(axis=1), dtype=np.float64).ravel()

    def add_to(self, digest: blake2b) -> None:
        """Let the values count in a hash; how they are stored does not."""
        matrix: Any = self.matrix
        if not matrix.data.all():
            matrix = matrix.copy()
            matrix.eliminate_zeros()
        for array in (matrix.data, matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)):
            digest.update(np.ascontiguousarray(array).data)


class BackedSource:
    """Cells of an AnnData in backed mode, whose X stays on disk."""

    on_disk = True

    def __init__(self, adata: AnnData):
        self.adata = adata
        self.obs = adata.obs
        self.genes = adata.var_names.astype(str)

    def read(self, rows: np.ndarray) -> AnyMatrix:
        return _in_rows(self.adata[rows].X)

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, AnyMatrix]]:
        for start in range(0, len(rows), BLOCK):
            own = rows[start : start + BLOCK]
            yield own, self.read(own)

    def close_at_the_end(self) -> None:
        """Close the file when nobody reads from here any more; AnnData waits for garbage collection."""
        weakref.finalize(self, self.adata.file.close)


class StoreSource:
    """Cells of a :class:`CellStore`."""

    on_disk = True

    def __init__(self, store: CellStore):
        self.store = store
        self.obs = store.obs
        self.genes = store.var_names.astype(str)

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        return self.store.read(rows)

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        yield from self.store.blocks(rows)

    def depth(self, *, signed: bool = False) -> np.ndarray:
        """(n,) depth of each cell; values that were not checked when they were written are checked here."""
        known: np.ndarray | None = self.obs[TOTAL].to_numpy(np.float64) if TOTAL in self.obs else None
        if known is not None and self.store.manifest is not None:
            return known
        totals = self.store.scan(signed=signed).totals
        return totals if known is None else known

    def add_to(self, digest: blake2b) -> None:
        """Let the values count in a hash, and the memory and the block that they are read with."""
        digest.update(self.store.digest().encode() + b"\0")

    def close_at_the_end(self) -> None:
        """Close the files when nobody reads from here any more."""
        for file in self.store.parts:
            weakref.finalize(self, file.close)


TrainingSource: TypeAlias = "MemorySource[sparse.csr_matrix] | StoreSource"


def opened(
    cells: AnyCells,
    design: Design | None = None,
    *,
    small_in_memory: bool = False,
    layer: str | None = None,
    **options: Any,
) -> AnnData | CellStore:
    """What a path, a folder, or a list of them stands for; cells are given back as they are.

    Parameters
    ----------
    cells
        Paths of h5ad or zarr, a folder of them, or cells.
    design
        Columns of obs to read; None reads all.
    small_in_memory
        Read an h5ad with an X of at most 512 MiB, or stored by columns, whole. False leaves all files on disk.
    layer
        What is to be read instead of X, which takes an h5ad into memory.
    options
        As for :meth:`CellStore.open`.
    """
    if isinstance(cells, str | os.PathLike):
        if small_in_memory and not os.path.isdir(cells):
            path = plain(cells)
            return read_h5ad(path, backed=layer is None and bytes_by_row(path) > IN_MEMORY)
    elif not isinstance(cells, list | tuple):
        return cells
    columns = None if design is None else [*design.columns, TOTAL]
    return CellStore.open(cells, columns=columns, **options)  # type: ignore[arg-type]


def training_source(cells: AnnData | CellStore, *, signed: bool = False) -> TrainingSource:
    """Cells for training, as CSR in float32; those of a file in backed mode are read.

    Raises
    ------
    ValueError
        If values in memory are not finite, or, unless `signed`, negative. Those of a store are looked at for its depth.
    """
    if isinstance(cells, CellStore):
        return StoreSource(cells)
    check_values(cells, allow_negative=signed)
    return MemorySource(cells.obs, cells.var_names.astype(str), to_csr(cells), cells.layers.get("counts"))


def source_of(cells: AnnData | CellStore, *, layer: str | None = None, name: str = "the data") -> Source[AnyMatrix]:
    """Cells as they are stored: CSR, dense, or on disk.

    Parameters
    ----------
    cells
        In memory, backed, or in a store.
    layer
        A layer or an entry of obsm to read instead of X.
    name
        For messages.

    Raises
    ------
    ValueError
        If there are no cells, no values, or no such layer; if the columns of an entry of obsm have no names.
    """
    if isinstance(cells, CellStore):
        if layer is not None:
            raise ValueError(
                f"{name}: layer={layer!r}, but of a store only X is read; put the values into X, or pass one h5ad file"
            )
        _check_filled(cells, name, layer)
        return StoreSource(cells)
    _check_filled(cells, name, layer)
    genes = cells.var_names.astype(str)
    if layer is not None:
        return MemorySource(cells.obs, *_named_values(cells, genes, layer, name))

    # a backed view cannot be indexed again, and rows of CSC are slow: both are read into memory
    is_indexable = cells.isbacked and not cells.is_view
    if is_indexable and getattr(cells[:1].X, "format", None) != "csc":
        return BackedSource(cells)
    return MemorySource(cells.obs, genes, _in_rows(cells.to_memory().X if cells.isbacked else cells.X))


def to_csr(adata: AnnData) -> sparse.csr_matrix:
    """X as CSR float32, every entry stored once; a copy only where the format demands it."""
    return canonical_csr(adata.to_memory().X if adata.isbacked else adata.X, np.float32)


def _check_filled(cells: AnnData | CellStore, name: str, layer: str | None) -> None:
    if cells.n_obs and (layer is not None or (cells.n_vars and cells.X is not None)):
        return
    others = [*cells.layers, *cells.obsm]
    advice = f". If it stands in {preview(others)}, name it with layer=" if cells.n_obs and others else ""
    raise ValueError(
        f"{name}: expected cells and genes with log1p expression in X; found {(cells.n_obs, cells.n_vars)}{advice}"
    )


def _named_values(adata: AnnData, names: pd.Index, layer: str, name: str) -> tuple[pd.Index, Any]:
    """Names of the columns and values of a layer or an entry of obsm."""
    if layer in adata.layers:
        return names, _in_rows(adata.layers[layer])
    if layer not in adata.obsm:
        raise ValueError(
            f"{name}: there is no layer and no obsm {layer!r}; found layers {preview(adata.layers) or 'none'}, "
            f"obsm {preview(adata.obsm) or 'none'}"
        )
    values = adata.obsm[layer]
    if isinstance(values, pd.DataFrame):
        return values.columns.astype(str), values.to_numpy()
    if values.shape[1] == len(names):
        return names, _in_rows(values)

    # without names: all genes, or those that were chosen
    is_variable = np.zeros(0, bool)
    if "highly_variable" in adata.var:
        is_variable = adata.var["highly_variable"].to_numpy(dtype=bool)
    if values.shape[1] == is_variable.sum():
        return names[is_variable], _in_rows(values)
    raise ValueError(
        f"{name}: obsm[{layer!r}] has {values.shape[1]} columns without gene names, var_names has {len(names)}, and "
        f"var['highly_variable'] marks {int(is_variable.sum())}. Store it as a DataFrame whose columns are gene names"
    )


def _in_rows(x: AnyMatrix) -> AnyMatrix:
    """CSR without duplicates, or dense."""
    return canonical_csr(x) if sparse.issparse(x) else np.asarray(x)

"""One file of a store: reads rows of its X, knows nothing of designs or of other files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from invirtuo.cells.files import check_h5ad
from invirtuo.cells.packed import plain
from invirtuo.cells.preprocess import EMBEDDED
from invirtuo.errors import preview

__all__ = ["Part"]

Fill = Callable[[int, np.ndarray], None]  # fill an array with the values that begin at a place

GAP = 4096  # unwanted values between two wanted rows that are read along rather than skipped
TROUBLE = (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError)


class Part:
    """Cells of one ``.h5ad``, packed with gzip or not, or ``.zarr``, X left on disk.

    Parameters
    ----------
    path
        The file. X is sparse by rows (CSR) or dense; compressed or not.

    Raises
    ------
    ValueError
        If the file is missing, truncated, contradicts itself, or holds X by columns.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_zarr = self.path.is_dir()
        self._plain = plain(path)  # where values are read, if the file is packed
        if not self.is_zarr:
            check_h5ad(self._plain, values=False)
        self.indptr: np.ndarray | None
        self.has_repeats = False  # whether an entry was met that is stored in pieces, or out of order
        self._root: Any = None
        self._read: tuple[Fill, Fill] | None = None
        self._descriptor: int | None = None
        try:
            self._describe()
        except TROUBLE as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self.path} cannot be read: {first}. Expected an h5ad or zarr file of AnnData with X by rows"
            ) from error
        finally:
            self.close()

    def _describe(self) -> None:
        """Names, shape and where rows begin."""
        root = self.root
        if "X" not in root:
            raise ValueError("it has no X")
        if any(isinstance(root[name], h5py.Dataset) for name in ("obs", "var")):
            raise ValueError("it is in the form of AnnData 0.6; read it with anndata.read_h5ad and write it again")
        x = root["X"]
        self.genes = _names(root["var"]).astype(str)
        encoding = x.attrs.get("encoding-type", "array")
        if encoding == "csc_matrix":
            raise ValueError("X is stored by columns (CSC); write it as CSR: adata.X = adata.X.tocsr()")
        if encoding not in ("csr_matrix", "array"):
            raise ValueError(f"X is stored as {encoding}; expected csr_matrix or a dense array")
        self.is_dense = encoding == "array"
        shape = x.shape if self.is_dense else x.attrs["shape"]
        self.n_obs, self.n_vars = (int(n) for n in shape)
        self.indptr = None
        if len(self.genes) != self.n_vars:
            raise ValueError(f"X has {self.n_vars} columns and var {len(self.genes)} names")
        if not self.is_dense:
            self.indptr = np.asarray(x["indptr"][:], dtype=np.int64)
            self._check_pointers(self.indptr, x["data"].shape[0], x["indices"].shape[0])

    def _check_pointers(self, indptr: np.ndarray, n_data: int, n_indices: int) -> None:
        ends = indptr[[0, -1]].tolist() if len(indptr) else []
        if len(indptr) != self.n_obs + 1 or ends != [0, n_data] or n_data != n_indices:
            raise ValueError(f"X has {n_data} values, {n_indices} indices and an indptr that ends {ends}")
        if bool((indptr[1:] < indptr[:-1]).any()):
            raise ValueError("the indptr of X falls")

    # ---- opening -----------------------------------------------------------------------------------------------

    @property
    def root(self) -> Any:
        """The open file; opened at first use."""
        if self._root is None and self.is_zarr:
            import zarr

            self._root = zarr.open_group(str(self.path), mode="r")
        elif self._root is None:
            self._root = h5py.File(self._plain, "r")
        return self._root

    def close(self) -> None:
        """Give the handles back; the next reading opens the file again."""
        if self._root is not None and not self.is_zarr:
            self._root.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._root = self._read = self._descriptor = None

    def obs(self, columns: list[str] | None) -> pd.DataFrame:
        """The table of the cells: some of its columns, those that exist; text as categories."""
        from anndata.io import read_elem

        group = self.root["obs"]
        known = [str(name) for name in group.attrs["column-order"]]
        wanted = known if columns is None else [name for name in columns if name in known]
        if (
            group.attrs.get("encoding-version") == "0.1.0"
        ):  # AnnData 0.7: labels are codes with a reference to their names
            read = read_elem(group)[wanted]
        else:
            read = {name: pd.Series(read_elem(group[name])) for name in wanted}
        table = {name: _coded(read[name]) for name in wanted}
        return pd.DataFrame({name: c.array for name, c in table.items()}, index=_names(group), columns=wanted)

    def embeddings(self) -> dict[str, str]:
        """Keys of obsm that hold an array, and by which encoder (``uns["invirtuo_obsm"]``) each was made."""
        from anndata.io import read_elem

        root = self.root
        obsm = root["obsm"] if "obsm" in root else {}
        keys = [key for key in obsm if len(getattr(obsm[key], "shape", ())) == 2]  # neither tables nor sparse
        is_told = "uns" in root and EMBEDDED in root["uns"]
        made_by = read_elem(root["uns"][EMBEDDED]) if is_told else {}
        return {key: str(made_by.get(key, "")) for key in keys}

    def embedding(self, key: str) -> np.ndarray:
        """(n, d) float32, an entry of obsm."""
        values = np.asarray(self.root["obsm"][key][:], dtype=np.float32)
        if len(values) != self.n_obs:
            raise ValueError(f"{self.path}: obsm[{key!r}] has {len(values)} rows for {self.n_obs} cells")
        return values

    # ---- rows --------------------------------------------------------------------------------------------------

    def lengths(self) -> np.ndarray:
        """(n,) stored values of each row."""
        if self.indptr is None:
            return np.full(self.n_obs, self.n_vars, dtype=np.int32)
        return np.diff(self.indptr).astype(np.int32)

    def gather(self, rows: np.ndarray, data: np.ndarray, indices: np.ndarray) -> None:
        """Read rows, which rise, one after the other into (m,) float32 `data` and int32 `indices`.

        Rows that lie close together are read at once.
        """
        if self.indptr is None:
            self._gather_dense(rows, data, indices)
            return
        first, last = self.indptr[rows], self.indptr[rows + 1]
        breaks = np.flatnonzero(first[1:] - last[:-1] > GAP) + 1
        ends = np.concatenate([[0], np.cumsum(last - first)])
        fill = self._filling()
        for a, b in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            place, where = slice(ends[a], ends[b]), int(first[a])
            whole = int(last[b - 1]) - where
            if whole == ends[b] - ends[a]:
                fill[0](where, data[place]), fill[1](where, indices[place])
                continue
            wanted = np.repeat(first[a:b] - where - ends[a:b] + ends[a], last[a:b] - first[a:b])
            wanted += np.arange(len(wanted))
            for values, read in ((data, fill[0]), (indices, fill[1])):
                buffer = np.empty(whole, dtype=values.dtype)
                read(where, buffer)
                values[place] = buffer[wanted]
        self._check_indices(indices, ends[1:-1])

    def _check_indices(self, indices: np.ndarray, starts: np.ndarray) -> None:
        """Columns exist, and rise within a row (rows after the first begin at `starts`) unless entries repeat."""
        falls = np.diff(indices) <= 0
        falls[starts[(starts > 0) & (starts < len(indices))] - 1] = False
        self.has_repeats |= bool(falls.any())
        if len(indices) and (indices.min() < 0 or indices.max() >= self.n_vars):
            raise ValueError(
                f"{self.path}: X has column numbers from {indices.min()} to {indices.max()}; expected 0 to "
                f"{self.n_vars - 1}. The file is damaged: write it again"
            )

    def _gather_dense(self, rows: np.ndarray, data: np.ndarray, indices: np.ndarray) -> None:
        g = self.n_vars
        breaks = np.flatnonzero(np.diff(rows) > max(GAP // max(g, 1), 1)) + 1
        for a, b in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            block = np.asarray(self.root["X"][int(rows[a]) : int(rows[b - 1]) + 1])
            data[a * g : b * g] = block[rows[a:b] - rows[a]].ravel()
        indices[:] = np.tile(np.arange(g, dtype=np.int32), len(rows))

    def _filling(self) -> tuple[Fill, Fill]:
        if self._read is None:
            x = self.root["X"]
            self._read = self._fill(x["data"]), self._fill(x["indices"])
        return self._read

    def _fill(self, stored: Any) -> Fill:
        """How the values of a stored array are read: past HDF5 where they lie in one piece, which frees the GIL."""
        is_plain = isinstance(stored, h5py.Dataset) and stored.chunks is None and stored.dtype.isnative
        offset = stored.id.get_offset() if is_plain else None
        if offset is None or stored.dtype.itemsize * stored.size > os.path.getsize(self._plain) - offset:
            return lambda start, out: np.copyto(out, stored[start : start + len(out)], casting="unsafe")
        dtype = stored.dtype
        if self._descriptor is None:
            self._descriptor = os.open(self._plain, os.O_RDONLY)
        descriptor = self._descriptor

        def fill(start: int, out: np.ndarray) -> None:
            buffer = out if out.dtype == dtype else np.empty(len(out), dtype)
            _read_bytes(descriptor, buffer, offset + start * dtype.itemsize)
            if buffer is not out:
                np.copyto(out, buffer, casting="unsafe")

        return fill


def _read_bytes(descriptor: int, buffer: np.ndarray, offset: int) -> None:
    """Fill a buffer from a place of a file."""
    view, done = memoryview(buffer.data).cast("B"), 0
    while done < len(view):
        n = os.preadv(descriptor, [view[done:]], offset + done)
        if n == 0:
            raise ValueError(f"the file ends {len(view) - done} bytes too early; copy or write it again")
        done += n


def _names(group: Any) -> pd.Index:
    """Index of a stored table."""
    from anndata.io import read_elem

    return pd.Index(np.asarray(read_elem(group[group.attrs["_index"]])).astype(object))


def _coded(column: pd.Series) -> pd.Series:
    """Text as categories, everything else as it is."""
    is_text = column.dtype == object or pd.api.types.is_string_dtype(column)
    return column.astype(object).astype("category") if is_text else column


def aligned(parts: list[Part]) -> np.ndarray:
    """Genes of the first part, after a check that the others have the same, in whatever order.

    Raises
    ------
    ValueError
        Naming the file and the genes in which it differs.
    """
    first = parts[0]
    genes = first.genes
    for part in parts:
        if not part.genes.is_unique:
            twice = part.genes[part.genes.duplicated()].unique()
            raise ValueError(f"{part.path}: gene names repeat ({preview(twice)}); expected each once")
        if missing := sorted(set(genes) ^ set(part.genes)):
            names = preview(missing)
            raise ValueError(
                f"{part.path} has {part.n_vars} genes, {first.path} {first.n_vars}; {len(missing)} are in one of "
                f"them only: {names}. Write the files with the same genes (in any order), for example "
                "adata[:, genes].write_h5ad(...)"
            )
    return np.asarray(genes.to_numpy(dtype=str))

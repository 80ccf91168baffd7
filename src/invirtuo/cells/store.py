"""CellStore: cells in any number of files as one table, of which only X stays on disk."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.files import is_zarr_folder
from invirtuo.cells.one_file import Part, aligned
from invirtuo.cells.packed import is_packed
from invirtuo.cells.preprocess import EMBEDDED
from invirtuo.cells.values import canonical_csr, look, require_same_scale
from invirtuo.errors import preview

__all__ = ["MANIFEST", "CellStore", "Scan", "n_bytes"]

MANIFEST = "store.json"  # what a folder written by `shuffle` says of itself
ENDINGS = (".h5ad", ".h5", ".h5ad.gz", ".zarr")  # of names of files in a folder
BLOCK = 512  # rows that are read in one piece, where nothing is said
SHUFFLED_BLOCK = 4096  # the same in shuffled stores, whose neighbours have nothing in common
OPEN = 256  # files that are kept open at a time
PREVIEW = 200  # rows of every file that are looked at when several are opened
VALUE = 8  # bytes of a stored value and its column number
ROW = 16  # bytes of a row beside its values
STREAM = 1 << 22  # stored values that a pass over a store holds at a time

Paths = str | Path | Sequence[str | Path]


class CellStore:
    """Cells in several h5ad or zarr files, like an AnnData of which only ``obs`` is in memory.

    Made by :meth:`open`. Files may have their genes in different orders; X is read where rows of it are asked for.

    Parameters
    ----------
    parts
        The files.
    obs
        (n,) labels of all cells, in the order of the files.
    genes
        (g,) names of the genes, in the order of columns read.
    memory
        Bytes that reading may take: two windows of cells and a cache of control cells.
    block
        Rows that are read in one piece.
    manifest
        What a shuffled store says of itself; None for other files.

    Examples
    --------
    >>> import invirtuo as iv
    >>> folder, adata = getfixture("tmp_path"), iv.datasets.toy()
    >>> adata[:400].write_h5ad(folder / "a.h5ad")
    >>> adata[400:].write_h5ad(folder / "b.h5ad")
    >>> store = iv.CellStore.open(folder)
    >>> store.n_obs == adata.n_obs, store.X[[3, 1]].shape == (2, adata.n_vars)
    (True, True)
    """

    isbacked = True

    def __init__(
        self,
        parts: list[Part],
        obs: pd.DataFrame,
        genes: np.ndarray,
        *,
        memory: int,
        block: int,
        manifest: dict[str, Any] | None = None,
    ):
        self.parts = parts
        self.obs = obs
        self.memory = memory
        self.block = block
        self.manifest = manifest
        self.var_names = pd.Index(genes)
        self.layers: dict[str, Any] = {}
        made_by = _embeddings(parts)
        self.uns: dict[str, Any] = {EMBEDDED: made_by}
        self.obsm: Mapping[str, np.ndarray] = _Embeddings(parts, tuple(made_by))
        self.starts = np.concatenate([[0], np.cumsum([part.n_obs for part in parts])])
        self.lengths = np.concatenate([part.lengths() for part in parts])
        self._columns = [_columns(part.genes, self.var_names) for part in parts]
        self._lock = threading.Lock()
        self._scan: Scan | None = None

    @classmethod
    def open(
        cls,
        paths: Paths,
        *,
        columns: Sequence[str] | None = None,
        memory: int | str = "256 MiB",
        block: int | None = None,
    ) -> Self:
        """Open files, or the files of folders.

        Parameters
        ----------
        paths
            ``.h5ad`` files (also ``.h5ad.gz``, and AnnData in ``.h5``), ``.zarr`` folders, folders of such, or what
            ``invirtuo prepare --shuffle-to`` wrote, which has no entries of obsm.
        columns
            Columns of obs to hold in memory, where they exist; None holds all that every file has.
        memory
            Bytes that reading may take, like "256 MiB" or "4 GB". A seed gives the same batches only with the same.
        block
            Rows that are read in one piece; None takes 512, and 4096 for shuffled stores. Cells that lie together in
            the files are met together in training: larger is faster, smaller is better mixed.

        Raises
        ------
        ValueError
            If files are missing, damaged, do not hold the same genes, or hold values on different scales.
        """
        files, manifest = _files(paths)
        parts = [Part(path) for path in files]
        genes = aligned(parts)

        # one table of obs, and the genes that all files have
        wanted = None if columns is None else list(columns)
        obs = _joined([(part.path, part.obs(wanted)) for part in parts])
        if manifest is not None and len(obs) != manifest["n_obs"]:
            raise ValueError(
                f"{Path(files[0]).parent}: {MANIFEST} tells of {manifest['n_obs']} cells, the files hold {len(obs)}; "
                "write the store again"
            )
        if manifest is None and len(parts) > 1:
            require_same_scale((str(part.path), look(_Preview(part), PREVIEW)) for part in parts)
        for part in parts:
            part.close()
        if block is not None and block < 1:
            raise ValueError(f"block is {block}; expected at least 1 row")

        # neighbours in a shuffled store are random already: longer pieces are read faster
        size = block or (BLOCK if manifest is None else SHUFFLED_BLOCK)
        return cls(parts, obs, genes, memory=n_bytes(memory), block=size, manifest=manifest)

    # ---- like an AnnData -----------------------------------------------------------------------------------------

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return int(self.starts[-1])

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var_names)

    @property
    def X(self) -> DiskMatrix:
        """(n, g) on disk; rows of it are read as CSR."""
        return DiskMatrix(self)

    def __getitem__(self, key: tuple[slice, Sequence[str]]) -> Self:
        """``store[:, genes]``: the same cells with the named genes, in that order."""
        rows, genes = key
        if rows != slice(None):
            raise ValueError("a store is not cut by rows; a split says which cells are trained on")
        other = copy.copy(self)
        other.var_names = pd.Index(np.asarray(genes, dtype=str))
        other._columns = [_columns(part.genes, other.var_names) for part in self.parts]
        other._scan = None
        return other

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """(m, g) float32 values of rows, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.n_obs):
            raise IndexError(f"rows from {rows.min()} to {rows.max()}; the store has {self.n_obs}")
        if (np.diff(rows) > 0).all():
            return self._gather(rows)
        ordered, position = np.unique(rows, return_inverse=True)
        return self._gather(ordered)[position]

    def _gather(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Values of rows that rise."""
        lengths = self.lengths[rows].astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        data = np.empty(indptr[-1], np.float32)
        indices = np.empty(indptr[-1], np.int32)
        # every file fills its own range of the arrays
        bounds = np.searchsorted(rows, self.starts)
        with self._lock:
            for i in np.flatnonzero(np.diff(bounds)):
                own = rows[bounds[i] : bounds[i + 1]] - self.starts[i]
                values = slice(indptr[bounds[i]], indptr[bounds[i + 1]])
                self._read_file(int(i), own, data[values], indices[values])
        x = _assembled(data, indices, indptr, self.n_vars, dropped=any(part.is_dense for part in self.parts))
        return canonical_csr(x) if any(part.has_repeats for part in self.parts) else x

    def _read_file(self, i: int, rows: np.ndarray, data: np.ndarray, indices: np.ndarray) -> None:
        """Read rows of one file, its columns renamed to those of the store; -1 for genes that are not wanted."""
        try:
            self.parts[i].gather(rows, data, indices)
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"{self.parts[i].path} is truncated or damaged: {error}. Write it again") from error
        columns = self._columns[i]
        if columns is not None:
            indices[:] = columns[indices]
        if len(self.parts) > OPEN:
            self.parts[i].close()

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Pass over rows (rising; None: all) in their order, about 32 MiB at a time: rows and their values."""
        rows = np.arange(self.n_obs) if rows is None else np.asarray(rows)
        ends = np.cumsum(self.lengths[rows], dtype=np.int64)
        step = min(STREAM, max(self.memory // (8 * VALUE), 1))
        breaks = np.flatnonzero(np.diff(ends // step)) + 1
        for chunk in np.split(rows, breaks) if len(rows) else []:
            yield chunk, self.read(chunk)

    def scan(self, *, signed: bool = False) -> Scan:
        """Pass over all values once: check them, and find the row sums, a hash, and whether they may be counts.

        Raises
        ------
        ValueError
            If values are not finite, or, unless `signed`, negative; naming the file.
        """
        if self._scan is None:
            totals, lowest, is_whole = [], 0.0, True
            digest = hashlib.blake2b(digest_size=8)
            digest.update(self.lengths.tobytes())
            for rows, x in self.blocks():
                # min and max are not finite as soon as one value is not
                if len(x.data) and not (np.isfinite(x.data.min()) and np.isfinite(x.data.max())):
                    raise ValueError(
                        f"{self._bad_row(rows, ~np.isfinite(x.data), x)} NaN or infinite values; remove them"
                    )
                if not signed and len(x.data) and x.data.min() < 0:
                    raise ValueError(
                        f"{self._bad_row(rows, x.data < 0, x)} negative values, as scaled data do; expected values >= 0"
                    )
                digest.update(x.data)
                digest.update(x.indices)
                # what tells counts from other values
                lowest = min(lowest, float(x.data.min(initial=0)))
                is_whole = is_whole and bool((x.data == np.rint(x.data)).all())
                totals.append(np.asarray(x.sum(axis=1, dtype=np.float64)).ravel())
            self._scan = Scan(np.concatenate(totals), digest.hexdigest(), lowest, is_whole)
        return self._scan

    def _bad_row(self, rows: np.ndarray, bad: np.ndarray, x: sparse.csr_matrix) -> str:
        """File and row of the first bad value, as the beginning of a message."""
        row = rows[np.searchsorted(x.indptr, np.argmax(bad), side="right") - 1]
        i = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{self.parts[i].path}: X holds (first in row {row - self.starts[i]})"

    def digest(self) -> str:
        """Short hash of the values and of how they are read."""
        values = self.manifest["digest"] if self.manifest is not None else self.scan().digest
        settings = json.dumps([self.memory, self.block, list(self.var_names)])
        return hashlib.blake2b(f"{values}{settings}".encode(), digest_size=8).hexdigest()


class Scan:
    """What a pass over all values found: row sums (n,), a hash, the smallest value, whether all are whole numbers."""

    def __init__(self, totals: np.ndarray, digest: str, lowest: float, whole: bool):
        self.totals = totals
        self.digest = digest
        self.lowest = lowest
        self.whole = whole


class _Preview:
    """Rows of one file, for a look at its values."""

    def __init__(self, part: Part):
        self.part = part
        self.shape = (part.n_obs, part.n_vars)

    def __getitem__(self, rows: Any) -> sparse.csr_matrix:
        rows = np.arange(self.part.n_obs)[rows]
        lengths = self.part.lengths()[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        data = np.empty(indptr[-1], np.float32)
        indices = np.empty(indptr[-1], np.int32)
        self.part.gather(rows, data, indices)
        return sparse.csr_matrix((data, indices, indptr), (len(rows), self.part.n_vars))


class DiskMatrix:
    """X of a store: ``X[rows]`` reads a CSR matrix."""

    dtype = np.dtype(np.float32)

    def __init__(self, store: CellStore):
        self.store = store

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return self.store.n_obs, self.store.n_vars

    def __getitem__(self, rows: Any) -> sparse.csr_matrix:
        if isinstance(rows, slice):
            rows = np.arange(self.store.n_obs)[rows]
        rows = np.asarray(rows)
        return self.store.read(np.flatnonzero(rows) if rows.dtype == bool else rows)


def n_bytes(text: int | str) -> int:
    """Number of bytes that "256 MiB", "4 GB" or a number stand for.

    Raises
    ------
    ValueError
        If it is none of these, or less than 1 MiB.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", str(text))
    if not found:
        raise ValueError(f"memory is {text!r}; expected a number of bytes, or like 256 MiB or 4 GB")
    number, prefix, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size < 1 << 20:
        raise ValueError(f"memory is {text!r}; expected at least 1 MiB")
    return size


class _Embeddings(Mapping[str, np.ndarray]):
    """Entries of obsm that all files have, (n, d) of all cells; read when they are asked for."""

    def __init__(self, parts: Sequence[Part], keys: tuple[str, ...]):
        self._parts, self._keys = parts, keys

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise KeyError(key)
        read = [part.embedding(key) for part in self._parts]
        widths = sorted({values.shape[1] for values in read})
        if len(widths) > 1:
            raise ValueError(f"obsm[{key!r}] is {preview(widths)} wide in different files; embed all with one model")
        return np.concatenate(read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _embeddings(parts: Sequence[Part]) -> dict[str, str]:
    """Entries of obsm that all files have, and the encoder that made each; several are told apart by a comma."""
    found = [part.embeddings() for part in parts]
    keys = set.intersection(*map(set, found))
    encoders = pd.DataFrame(found)[sorted(keys)]
    return {key: ", ".join(sorted(encoders[key].unique())) for key in encoders}


def _files(paths: Paths) -> tuple[list[Path], dict[str, Any] | None]:
    """Files that paths stand for, and the manifest, if they are one shuffled store."""
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if len(given) == 1 and (given[0] / MANIFEST).is_file():
        return _from_manifest(given[0])
    files: list[Path] = []
    for path in given:
        if not path.is_dir() or is_zarr_folder(path):
            files.append(path)
            continue
        # a folder stands for its files
        found = [file for file in path.iterdir() if file.name.endswith(ENDINGS) and not file.name.startswith(".")]
        if not found:
            raise ValueError(f"{path} holds no .h5ad or .zarr; expected files of AnnData, or a folder of them")
        # cells that lie there packed and unpacked are taken once
        found = sorted(file for file in found if not (is_packed(file) and file.with_suffix("") in found))
        files += found
    if not files:
        raise ValueError("no files were given; expected paths of .h5ad or .zarr, or a folder of them")
    if len({path.resolve() for path in files}) < len(files):
        raise ValueError(f"files are named twice among {preview(files)}; name each once")
    return files, None


def _from_manifest(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = [str(name) for name in manifest["files"]]
        if not isinstance(manifest["n_obs"], int) or not isinstance(manifest["digest"], str) or not names:
            raise ValueError("fields have other types")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); write the store again") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(
            f"{folder / MANIFEST} names files outside of its folder: {preview(outside)}; write the store again"
        )
    return [folder / name for name in names], manifest


def _joined(tables: list[tuple[Path, pd.DataFrame]]) -> pd.DataFrame:
    """Tables of all files as one, with the columns that all of them have; labels as categories."""
    if len(tables) == 1:
        return tables[0][1]
    every = {name: None for _, table in tables for name in table.columns}
    columns, lacking = {}, {}
    for name in every:
        if without := [str(path) for path, table in tables if name not in table.columns]:
            lacking[name] = without
            continue
        pieces = [table[name] for _, table in tables]
        # categories of files differ, so they are united
        if any(isinstance(piece.dtype, pd.CategoricalDtype) for piece in pieces):
            columns[name] = _united([piece.astype("category") for piece in pieces])
        else:
            columns[name] = pd.concat(pieces, ignore_index=True).array
    first, *others = [table.index for _, table in tables]
    joined = pd.DataFrame(columns, index=first.append(others), columns=list(columns))
    joined.attrs["lacking"] = lacking  # named where a column is missed
    return joined


def _united(pieces: list[pd.Series]) -> pd.Categorical:
    """Categories of all pieces; as text where they are of different types."""
    if len({piece.cat.categories.dtype for piece in pieces}) > 1:
        pieces = [piece.cat.rename_categories(piece.cat.categories.astype(str)) for piece in pieces]
    return pd.api.types.union_categoricals(pieces, sort_categories=True, ignore_order=True)


def _columns(own: pd.Index, wanted: pd.Index) -> np.ndarray | None:
    """(own,) number of each column of a file among the wanted ones, -1 if it is not wanted; None if they are equal."""
    return None if own.equals(wanted) else wanted.get_indexer(own).astype(np.int32)


def _assembled(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, n_vars: int, *, dropped: bool
) -> sparse.csr_matrix:
    """CSR without columns -1 and, where X was `dropped` into it from a dense array, without its zeros."""
    keep = None
    if len(indices) and indices.min() < 0:
        keep = indices >= 0
    if dropped:
        keep = data != 0 if keep is None else keep & (data != 0)
    if keep is not None:
        # values before each row that are kept
        indptr = np.concatenate([[0], np.cumsum(keep)])[indptr]
        data, indices = data[keep], indices[keep]
    if indptr[-1] < 2**31:
        indptr = indptr.astype(np.int32)
    return sparse.csr_matrix((data, indices, indptr), (len(indptr) - 1, n_vars))

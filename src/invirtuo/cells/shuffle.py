"""Shuffled stores: the cells of any number of files in random order, in files that are read without decompression.

Cells are dealt to buckets in one pass over the files and each bucket is put in order in memory, so that memory does not
grow with the number of cells. The folder appears when all of it is written.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.files import making, writing_hdf5
from invirtuo.cells.genes import variable_genes_of
from invirtuo.cells.preprocess import TOTAL, check_target_sum, provenance
from invirtuo.cells.store import MANIFEST, ROW, VALUE, CellStore
from invirtuo.cells.values import log_normalised, looks_like_counts
from invirtuo.errors import preview, whole_number

__all__ = ["shuffle"]

COMPRESSIONS = ("none", "lzf", "gzip")


def shuffle(
    store: CellStore,
    folder: str | Path,
    *,
    counts: bool = False,
    n_genes: int | None = None,
    keep: list[str] | None = None,
    size_factor: str | None = None,
    target_sum: float = 1e4,
    split: pd.Series | None = None,
    compression: str = "none",
    seed: int = 0,
) -> dict[str, Any]:
    """Write the cells of a store in random order, ready for models.

    Parameters
    ----------
    store
        Cells; its `memory` bounds what is needed here, beside labels and 24 bytes per cell.
    folder
        The folder to make; h5ad files that AnnData reads, and what they are in ``store.json``.
    counts
        Keep raw counts, for count models. False: raw counts become log1p(counts per `target_sum`), as
        :func:`invirtuo.preprocess.normalize` makes them; other values stay as they are.
    n_genes, keep
        Highly variable genes (seurat_v3) to keep, and genes to keep in any case; None keeps all.
    size_factor
        Column of obs with the depth of each cell; None takes the sum over the given genes.
    split
        Genes are chosen on its "train" cells only.
    compression
        "none" reads fastest; "lzf" and "gzip" take less room.
    seed
        Of the order.

    Returns
    -------
    What ``store.json`` says.

    Raises
    ------
    ValueError
        If the folder exists, values are not fit for use, or genes are to be chosen on other values than counts.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; give the name of a new folder, or remove it")
    check_target_sum(target_sum)
    n_genes = None if n_genes is None else whole_number("n_genes", n_genes)
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression is {compression!r}; expected one of {', '.join(COMPRESSIONS)}")

    # what X holds, and the depth of every cell
    scan = store.scan()
    is_counts = scan.whole and looks_like_counts(store.X)
    if not is_counts and (counts or n_genes is not None):
        raise ValueError("counts and n_genes ask for raw counts; X holds other values. Give files with raw counts in X")
    depth = _depths(store, size_factor)
    if is_counts and not counts and not (np.isfinite(depth) & (depth > 0)).all():
        raise ValueError(
            f"{int((~(depth > 0)).sum())} cells have no counts, or no depth in {size_factor or 'X'}; remove them first"
        )

    # which genes, and on which scale they are written
    genes = store.var_names if n_genes is None else _chosen(store, n_genes, keep or [], split)
    plan = _Plan(store, genes, depth, target_sum if is_counts and not counts else None, compression, seed)
    values = "as given"
    if is_counts:
        values = "counts" if counts else "log1p"
    facts = {"values": values} | provenance(target_sum, size_factor, n_genes, "seurat_v3", split)

    # a folder that is whole, or none
    with making(folder) as temporary:
        manifest = plan.write(temporary, facts)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return manifest


def _depths(store: CellStore, column: str | None) -> np.ndarray:
    """(n,) depth of each cell: a column, what an earlier preparation noted, or the row sums."""
    if column is None:
        return store.obs[TOTAL].to_numpy(np.float64) if TOTAL in store.obs else store.scan().totals
    if column not in store.obs:
        raise ValueError(f"size_factor: column {column!r} is not in obs; found {preview(store.obs.columns, 12)}")
    depths: np.ndarray = pd.to_numeric(store.obs[column], errors="coerce").to_numpy(np.float64)
    return depths


def _chosen(store: CellStore, n_genes: int, keep: list[str], split: pd.Series | None) -> pd.Index:
    """Names of the genes that stay, in their order."""
    if unknown := [gene for gene in keep if gene not in store.var_names]:
        raise ValueError(f"keep: {len(unknown)} genes are not in the data: {preview(unknown)}")
    if split is not None and (len(split) != store.n_obs or not (split == "train").any()):
        raise ValueError(f"the split has {len(split)} entries for {store.n_obs} cells; make it from store.obs")
    rows = None if split is None else np.flatnonzero(np.asarray(split) == "train")
    mask = variable_genes_of(lambda: (x for _, x in store.blocks(rows)), n_genes)
    return store.var_names[mask | store.var_names.isin(keep)]


class _Plan:
    """Where every cell goes, and how it is written."""

    def __init__(
        self,
        store: CellStore,
        genes: pd.Index,
        depth: np.ndarray,
        target_sum: float | None,
        compression: str,
        seed: int,
    ):
        self.depth = depth
        self.target_sum = target_sum
        self.compression = compression
        self.seed = seed
        self.obs = store.obs.assign(**{TOTAL: depth})
        self.store = store if genes is store.var_names else store[:, genes]
        size = int(store.lengths.sum(dtype=np.int64)) * VALUE + store.n_obs * ROW
        self.n_files = max(-(-size // (store.memory // 4)), 1)
        self.order = np.random.default_rng(seed).permutation(store.n_obs)  # position of every cell
        self.bucket = (self.order * self.n_files // store.n_obs).astype(np.int32)
        self.lengths = np.zeros(store.n_obs, np.int32)

    def write(self, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Deal all cells to buckets, and put these in order."""
        buckets = folder / "buckets"
        buckets.mkdir()
        for rows, x in self.store.blocks():
            if self.target_sum is not None:
                x = log_normalised(x, self.depth[rows], self.target_sum)
            self._deal(rows, x, buckets)

        # a bucket fits into memory: put its rows in order, write the file
        digest, names = hashlib.blake2b(digest_size=16), []
        for k in range(self.n_files):
            names.append(f"{k:05d}.h5ad")
            rows, x = self._ordered(k, buckets)
            self._write_file(folder / names[-1], self.obs.iloc[rows], x, facts)
            for array in (x.data, x.indices, x.indptr):
                digest.update(array)
        buckets.rmdir()
        sizes = {"n_obs": self.store.n_obs, "n_vars": self.store.n_vars}
        sizes["n_values"] = int(self.lengths.sum(dtype=np.int64))
        return facts | {"files": names} | sizes | {"shuffled": self.seed, "digest": digest.hexdigest()}

    def _deal(self, rows: np.ndarray, x: sparse.csr_matrix, buckets: Path) -> None:
        """Append rows to their buckets, in the order of the files."""
        self.lengths[rows] = np.diff(x.indptr)
        # rows of one bucket beside each other, so that each file is opened once a block
        by_bucket = np.argsort(self.bucket[rows], kind="stable")
        x = x[by_bucket]
        number = self.bucket[rows][by_bucket]
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        for a, b in zip(starts, [*starts[1:], len(rows)], strict=True):
            values = slice(x.indptr[a], x.indptr[b])
            for name, array, dtype in (("data", x.data, np.float32), ("indices", x.indices, np.int32)):
                with (buckets / f"{number[a]}.{name}").open("ab") as file:
                    file.write(array[values].astype(dtype, copy=False).data)  # unlike tofile, says that a disk is full

    def _ordered(self, k: int, buckets: Path) -> tuple[np.ndarray, sparse.csr_matrix]:
        """Rows of a bucket and their values in the order of the store; the bucket is removed."""
        rows = np.flatnonzero(self.bucket == k)
        arrays = []
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            path = buckets / f"{k}.{name}"
            arrays.append(np.fromfile(path, dtype) if path.exists() else np.zeros(0, dtype))
            path.unlink(missing_ok=True)
        indptr = np.concatenate([[0], np.cumsum(self.lengths[rows], dtype=np.int64)])
        x = sparse.csr_matrix((*arrays, indptr), (len(rows), self.store.n_vars))
        order = np.argsort(self.order[rows])
        return rows[order], x[order]

    def _write_file(self, path: Path, obs: pd.DataFrame, x: sparse.csr_matrix, facts: dict[str, Any]) -> None:
        """An h5ad whose values lie in one piece, unless they are compressed."""
        from anndata.io import write_elem

        # without compression arrays are contiguous, and are read without HDF5
        options = {} if self.compression == "none" else {"compression": self.compression, "shuffle": True}
        with writing_hdf5(path) as file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            write_elem(file, "obs", obs)
            write_elem(file, "var", pd.DataFrame(index=self.store.var_names))
            write_elem(file, "uns", {"invirtuo": facts | {"size_factor": TOTAL}})
            group = file.create_group("X")
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            group.attrs["shape"] = np.array(x.shape, dtype=np.int64)
            group.create_dataset("indptr", data=x.indptr.astype(np.int64))
            for name, array in (("data", x.data), ("indices", x.indices.astype(np.int32))):
                group.create_dataset(name, data=array, **options)

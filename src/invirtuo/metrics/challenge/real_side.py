"""What scores on counts need of the real cells alone, kept in files that are named by the content of these cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from invirtuo.cells.files import writing
from invirtuo.metrics.cells import Cells
from invirtuo.metrics.measures.counts import Bulk, CountTests, control_bulk
from invirtuo.metrics.numerics.streamed import BLOCK
from invirtuo.metrics.pair import Pair

__all__ = ["fingerprint", "kept_table", "with_real_side"]

FORMAT = 1  # of what is kept; another one is computed anew


def fingerprint(cells: Cells, **facts: object) -> str:
    """Hash of the counts, labels and genes of a file, in any storage, and of what else the numbers depend on."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps([FORMAT, facts], sort_keys=True, default=str).encode())
    for name in cells.genes:
        digest.update(str(name).encode() + b"\0")
    for name, rows in [*cells.rows.items(), *cells.controls.items()]:
        digest.update(f"{name}\0{len(rows)}\0".encode())
        for start in range(0, len(rows), BLOCK):
            block = cells.read_counts(rows[start : start + BLOCK])
            block.sort_indices()
            for array in (block.indptr.astype(np.int64), block.indices.astype(np.int64), block.data):
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def kept_table(folder: Path | None, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table that is read if it was computed before, and else computed and kept; without a folder it is not kept."""
    if folder is None:
        return compute()
    path = folder / f"{name}.csv"
    if not path.is_file():
        table = compute()
        folder.mkdir(parents=True, exist_ok=True)
        with writing(path) as unfinished:
            table.to_csv(unfinished, index=False)
    # read again, so that the first call gives what later ones give
    return pd.read_csv(path, float_precision="round_trip", keep_default_na=False, na_values=[""])


def with_real_side(pair: Pair, folder: Path | None) -> Pair:
    """The pair, with pseudobulks and tests of the real cells read, or computed and kept."""
    if folder is None:
        return pair
    path = folder / "real.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        arrays = dict(_arrays(pair))
        with writing(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return pair
    with np.load(path, allow_pickle=False) as arrays:
        for group in pair.groups:
            pair.keep("real", ("bulk", group), _bulk(arrays, f"control {group}"))
            pair.keep("real", ("count tests", group), {name: _tests(arrays, name) for name in pair.names(group)})
        for name in pair.conditions.index:
            pair.keep("real", ("view", "bulk", name), _bulk(arrays, name))
    return pair


def _arrays(pair: Pair) -> dict[str, np.ndarray]:
    """Pseudobulks and tests of the real cells, by condition and field."""
    found: dict[str, np.ndarray] = {}
    for group in pair.groups:
        found |= _fields(f"control {group}", control_bulk(pair, "real", group))
    for name in pair.conditions.index:
        found |= _fields(name, pair.see("bulk", "real", name)) | _fields(name, pair.see("count_tests", "real", name))
    return found


def _fields(name: str, record: Bulk | CountTests) -> dict[str, np.ndarray]:
    return {f"{name}|{field}": np.asarray(value) for field, value in record._asdict().items()}


def _bulk(arrays: Mapping[str, np.ndarray], name: str) -> Bulk:
    return Bulk(arrays[f"{name}|profile"], float(arrays[f"{name}|noise"]))


def _tests(arrays: Mapping[str, np.ndarray], name: str) -> CountTests:
    return CountTests(*(arrays[f"{name}|{field}"] for field in CountTests._fields))

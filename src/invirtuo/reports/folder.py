"""Reads the tables of a folder of results, or says what is wrong with them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from invirtuo.reports.genes import ORIGINS

__all__ = [
    "read_comparisons",
    "read_costs",
    "read_discrimination",
    "read_distributions",
    "read_effects",
    "read_flags",
    "read_gene_sets",
    "read_history",
    "read_panels",
    "read_populations",
    "read_published",
    "read_run",
    "read_scores",
]

NEEDED = ("condition", "metric", "value")
EMPTY = ("", "nan", "NaN", "NA")  # how a missing number is written
PUBLISHED = ("published", "published_sd", "ours", "ours_sd", "difference")
LABELS = {
    "against", "condition", "error", "flag", "gene", "gene_set", "kind", "metric", "model", "perturbation", "status",
    "task",
}  # fmt: skip
PANEL_COLUMNS = ("pc1", "pc2", "kind", "model", "condition")
DISTRIBUTIONS = ("condition", "gene", "top", *ORIGINS)
COSTS = ("fit_seconds", "predict_seconds", "score_seconds", "peak_memory_mib", "parameters")


def read_scores(path: Path) -> pd.DataFrame:
    """Scores with numbers as values and text as labels; model and task are filled in."""
    table = _read_csv(path, NEEDED)
    if table.empty:
        raise ValueError(f"{path} has no rows; expected one per condition, metric and model. Run the evaluation again")
    values = pd.to_numeric(table["value"], errors="coerce")
    # a missing value may be, text may not
    wrong = values.isna() & ~table["value"].isin(EMPTY) & table["value"].notna()
    if wrong.any():
        raise ValueError(
            f"{path}: {int(wrong.sum())} values are not numbers, for example {table['value'][wrong].iloc[0]!r}"
        )
    table["value"] = values.astype(float)
    for column, default in (("model", "model"), ("task", "")):
        table[column] = table[column].replace("", default) if column in table else default
    return table


def read_panels(folder: Path, name: str = "panels") -> pd.DataFrame | None:
    """Cells on two components (or on a map, "umap"), from the packed or the plain table."""
    packed, plain = folder / f"{name}.npz", folder / f"{name}.csv"
    if packed.is_file():
        arrays = _read_npz(packed)
        if len({array.shape for array in arrays.values()}) > 1:
            raise ValueError(f"{packed} is not a readable npz of equally long arrays")
        table = pd.DataFrame(arrays)
    elif plain.is_file():
        table = _read_csv(plain, ("pc1", "pc2", "kind"))
    else:
        return None

    # coordinates and kind must be there, labels may be missing
    lacking = [name for name in PANEL_COLUMNS[:3] if name not in table]
    if lacking:
        raise ValueError(f"{packed} lacks {', '.join(lacking)}; found {', '.join(map(str, table.columns))}")
    for column in (*PANEL_COLUMNS[3:], "task"):
        table[column] = table[column].fillna("").astype(str) if column in table else ""
    return table if (table["kind"] == "predicted").any() else None


def read_populations(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Mean, variance and zeros of genes, and zeros of cells, by origin; None unless both tables are there."""
    numbers = ("mean", "variance", "zeros")
    genes = _optional(folder / "genes.csv", ("model", "gene"), (), numbers)
    cells = _optional(folder / "cells.csv", ("model",), (), ("zeros",))
    if genes is None or cells is None or not (genes["model"] != "real").any():
        return None
    return genes, cells


def read_effects(path: Path) -> pd.DataFrame | None:
    """Predicted effects gene by gene, with intervals and what was seen, if there are any."""
    table = _optional(path, ("condition", "gene"), (), ("effect", "low", "high", "real", "q", "q_real"))
    return None if table is None or table["effect"].isna().all() else table


def read_distributions(path: Path, effects: pd.DataFrame) -> dict[str, np.ndarray] | None:
    """Distributions of the values of genes, if there are any; those of the conditions and genes of the effects."""
    if not path.is_file():
        return None
    arrays = _read_npz(path)
    lacking = [name for name in DISTRIBUTIONS if name not in arrays]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; found {', '.join(arrays)}")
    same_genes = list(arrays["gene"]) == list(dict.fromkeys(effects["gene"]))
    if not same_genes or not set(effects["condition"]) <= set(arrays["condition"]):
        raise ValueError(f"{path} and effects.csv are of different cells; run the comparison again")
    return arrays


def read_history(path: Path) -> pd.DataFrame | None:
    """Losses by step, if there are any to draw."""
    if not path.is_file():
        return None
    table = _read_csv(path, ("step",))
    if "model" not in table:
        table["model"] = "model"
    numeric = table.drop(columns=["step", "model"]).select_dtypes("number")
    return table if len(table) > 1 and numeric.shape[1] else None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable npz of arrays: {error}") from error


def read_run(path: Path) -> dict[str, Any]:
    """What was run; nothing if the file is not there."""
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} holds a {type(run).__name__}; expected an object with what was run")
    return run


def read_flags(path: Path) -> pd.DataFrame:
    """What is suspect about predicted cells; no row if the file is not there."""
    return _by_task(path, ("model", "flag", "text"), ())


def read_gene_sets(path: Path) -> pd.DataFrame | None:
    """Tests of sets of genes by condition, if there are any."""
    return _optional(path, ("condition", "gene_set"), (), ("n_genes", "effect", "q", "real", "q_real"))


def read_discrimination(path: Path) -> pd.DataFrame:
    """Dynamic range fraction of metrics; no row if the file is not there."""
    return _by_task(path, ("metric",), ("drf",))


def _by_task(path: Path, labels: tuple[str, ...], numbers: tuple[str, ...]) -> pd.DataFrame:
    """A table with a column `task`, empty text if there is one task alone; no row if the file is not there."""
    table = _optional(path, labels, ("task",), numbers)
    if table is None:
        return pd.DataFrame(columns=["task", *labels, *numbers])
    return table.assign(task=table["task"].fillna("").astype(str))


def read_costs(path: Path) -> pd.DataFrame | None:
    """Seconds, memory and failures of each cell of a benchmark."""
    return _optional(path, ("task", "model"), ("seed", "status", "error"), COSTS)


def read_comparisons(path: Path) -> pd.DataFrame | None:
    """Paired differences with intervals."""
    needed = ("task", "metric", "model", "against")
    return _optional(path, needed, (), ("difference", "low", "high", "n_conditions"))


def read_published(path: Path) -> pd.DataFrame | None:
    """Means that a paper printed, and ours."""
    return _optional(path, ("task", "model", "name", "metric", "source"), (), PUBLISHED)


def _optional(
    path: Path, labels: tuple[str, ...], extra: tuple[str, ...], numbers: tuple[str, ...]
) -> pd.DataFrame | None:
    """Read a table that need not be there; columns that it lacks, beyond the labels, are filled with nothing."""
    if not path.is_file():
        return None
    table = _read_csv(path, labels)
    for column in labels:
        table[column] = table[column].fillna("").astype(str)
    for column in (*extra, *numbers):
        if column not in table:
            table[column] = np.nan
    for column in numbers:
        table[column] = pd.to_numeric(table[column], errors="coerce").astype(float)
    return table


def _read_csv(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a table with the columns {', '.join(needed)}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False).apply(_typed)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV file: {error}") from error
    lacking = [name for name in needed if name not in table.columns]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}; found {', '.join(map(str, table.columns))}")
    return table


def _typed(column: pd.Series) -> pd.Series:
    """A column of text as numbers, if it holds nothing else; labels stay as they are written, also "NA"."""
    if column.name in LABELS:
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    is_number = numbers.notna().any() and (numbers.notna() | column.isin(EMPTY)).all()
    return numbers if is_number else column

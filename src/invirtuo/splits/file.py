"""Splits that were saved to a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.errors import preview
from invirtuo.splits.parts import PARTS

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["from_csv"]


def from_csv(path: str | Path, obs: pd.DataFrame) -> pd.Series:
    """Read a saved split: two columns without header, cell name and "train", "val", "test" or nothing.

    Parameters
    ----------
    path
        The file. Cells of obs that it does not name are unassigned.
    obs
        (n, columns), one row per cell; the index holds the cell names.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".

    Raises
    ------
    ValueError
        If the file has not two columns, names a cell twice or one that is not in obs, or holds another value.
    """
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; expected a file of two columns (cell name, split)") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is empty or not a table of two columns (cell name, split): {error}") from error
    if table.shape[1] != 2:
        raise ValueError(f"{path}: expected two columns (cell name, split), no header; found {table.shape[1]} columns")

    # the values, the names of the file, and those of obs
    cells, values = table[0], table[1]
    wrong = ~values.isin([*PARTS, ""])
    if wrong.any():
        line = int(np.flatnonzero(wrong)[0]) + 1
        raise ValueError(
            f"{path}: split values must be train, val, test or empty; found {preview(values[wrong].unique())} "
            f"in line {line}. The file has no header line"
        )
    if cells.duplicated().any():
        raise ValueError(f"{path}: cells named more than once: {preview(cells[cells.duplicated()].unique())}")
    if not obs.index.is_unique:
        raise ValueError(
            "obs: cell names are not unique, a split file cannot be matched; call adata.obs_names_make_unique()"
        )
    unknown = cells[~cells.isin(obs.index.astype(str))]
    if len(unknown):
        raise ValueError(f"{path}: cells that are not in obs: {preview(unknown)}; obs has {preview(obs.index, 3)}")

    # cells that the file leaves out are unassigned
    split = pd.Series(values.to_numpy(dtype=object), index=cells).reindex(obs.index.astype(str), fill_value="")
    return pd.Series(split.to_numpy(), index=obs.index, name="split", dtype=object)

"""Conditions as people name them, in one grammar for splits, predictions, forecasts and the command line.

A condition is a text (``"B cell|IFN-beta"``: the values of the Design's columns, joined as in :meth:`Design.names`), a
mapping of column to value, or a row of a table. All are read in the canonical form of the Design.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from invirtuo.design import Design
from invirtuo.errors import preview

__all__ = ["Conditions", "as_table", "matches", "wanted"]

Conditions: TypeAlias = pd.DataFrame | Mapping[str, Any] | str | Sequence[Any]  # a table, a condition, or several


def wanted(conditions: Conditions, columns: Sequence[str], design: Design) -> list[dict[str, Any]]:
    """Each condition as column to value, the values in canonical form.

    Parameters
    ----------
    conditions
        A table, whose other columns are not read; a text or mapping; or several of these.
    columns
        Those that a condition may name: a text names all of them in this order, a mapping some.
    design
        What the columns mean.

    Raises
    ------
    ValueError
        If a condition names other columns, or a text has not a value for each column.
    """
    if isinstance(conditions, pd.DataFrame):
        conditions = conditions[[column for column in columns if column in conditions]].to_dict("records")
    elif isinstance(conditions, str | Mapping):
        conditions = [conditions]
    elif not isinstance(conditions, Sequence | np.ndarray | pd.Series | pd.Index):
        raise ValueError(
            f"conditions is a {type(conditions).__name__}; expected a table, or names like {'|'.join(columns)!r}, or "
            f"mappings of {preview(columns)} to values"
        )
    if len(conditions) == 0:
        what = "condition" if list(columns) == design.columns else "context"
        raise ValueError(f"conditions is empty; expected at least one {what}, named by {preview(columns)}")
    return [_values(condition, columns, design) for condition in conditions]


def as_table(conditions: Conditions, design: Design) -> pd.DataFrame:
    """Conditions that name every column of the Design as a tidy table, each once.

    Raises
    ------
    ValueError
        As :func:`wanted`, or if a condition leaves a column out.
    """
    if isinstance(conditions, pd.DataFrame):
        if not len(conditions):
            raise ValueError("the table of conditions is empty; expected one row per wanted condition")
        return design.tidy(conditions).drop_duplicates(ignore_index=True)
    rows = wanted(conditions, design.columns, design)
    for row in rows:
        if missing := [column for column in design.columns if column not in row]:
            raise ValueError(f"condition {row} lacks {preview(missing)}; expected {preview(design.columns)}")
    return pd.DataFrame(rows, columns=design.columns).drop_duplicates(ignore_index=True)


def matches(condition: Mapping[str, Any], table: pd.DataFrame) -> np.ndarray:
    """(n,) bool, the rows of a tidy table that agree with all the values of a condition."""
    agrees = np.ones(len(table), dtype=bool)
    for column, value in condition.items():
        agrees &= (table[column] == value).to_numpy()
    return agrees


def _values(condition: Any, columns: Sequence[str], design: Design) -> dict[str, Any]:
    """One condition as column to canonical value."""
    if isinstance(condition, str):
        # a label may hold the separator where it stands alone
        values = condition.split("|") if len(columns) > 1 else [condition]
    elif isinstance(condition, tuple | list):
        values = list(condition)
    elif isinstance(condition, Mapping):
        if any(isinstance(value, list | tuple | np.ndarray | pd.Series) for value in condition.values()):
            raise ValueError(
                f"conditions is a {type(condition).__name__}; expected a DataFrame, or single values in it"
            )
        if not condition or set(condition) - set(columns):
            if list(columns) == design.columns:
                raise ValueError(f"{dict(condition)} must name columns of the design; expected {preview(columns)}")
            raise ValueError(f"{dict(condition)} must name covariates of the design; found {preview(columns)}")
        return {column: design.value(column, value) for column, value in condition.items()}
    else:
        raise ValueError(
            f"{condition!r} is a {type(condition).__name__}; expected a text like {'|'.join(columns)!r}, or a mapping"
        )

    # a text or a list names every column
    if len(values) != len(columns):
        raise ValueError(
            f"{condition!r} has {len(values)} value(s); expected {len(columns)}, joined by '|': {'|'.join(columns)}"
        )
    return {column: design.value(column, value) for column, value in zip(columns, values, strict=True)}

"""What errors are made of: the kinds that callers may want to tell apart, and words for their messages."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ExistsError", "preview", "require_column", "whole_number", "with_likely"]


class ExistsError(ValueError, FileExistsError):
    """What would be replaced is there already, and nobody said that it may be."""


def preview(values: Iterable[object], limit: int = 5) -> str:
    """The first few values, joined, and how many there are in all."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:limit]) + (f", ... ({len(texts)} in all)" if len(texts) > limit else "")


def require_column(
    obs: pd.DataFrame, column: str, where: str, *, allow_missing: bool = False, advice: str = ""
) -> None:
    """Raise ValueError if a table of cells lacks a column, or a label of it is missing.

    Parameters
    ----------
    obs
        (n, columns)
    column
        Its name.
    where
        What the message begins with: whose table it is, or what the column is for.
    allow_missing
        Whether labels may be missing.
    advice
        What else could be done about missing labels.
    """
    if column not in obs.columns:
        files = obs.attrs.get("lacking", {}).get(column, ())
        lacking = f" ({preview(files)} lacks it)" if files else ""
        raise ValueError(f"{where}: column {column!r} is not in the table{lacking}; found {preview(obs.columns)}")
    n_missing = 0 if allow_missing else int(obs[column].isna().sum())
    if n_missing:
        raise ValueError(
            f"{where}: column {column!r} has {n_missing} missing values; remove these cells or label them{advice}"
        )


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`, also of another type than int.

    Raises
    ------
    ValueError
        If it is none.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if not is_number or not float(value).is_integer() or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")
    return int(value)


def with_likely(wanted: str, known: Iterable[str]) -> str:
    """The first few known names for a message, and those that may have been meant."""
    names = list(map(str, known))
    likely = [name for name in names if name.casefold() == wanted.casefold()]
    likely += [name for name in get_close_matches(wanted, names, n=3) if name not in likely]
    return f"{preview(names)}; did you mean {' or '.join(map(repr, likely))}?" if likely else preview(names)

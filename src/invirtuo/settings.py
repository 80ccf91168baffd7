"""Settings: what all Config records share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

__all__ = ["Settings"]


class Settings:
    """Base of Config records, whose fields become plain Python values, which JSON can hold.

    ``for seed in np.arange(5)`` gives NumPy integers, which compute like Python's and cannot be saved. A record that
    checks its fields in `__post_init__` calls this one first.

    Examples
    --------
    >>> import numpy as np
    >>> from invirtuo import FitConfig
    >>> FitConfig(seed=np.int64(3)).seed
    3
    """

    def __post_init__(self) -> None:
        """Turn NumPy scalars, arrays, lists and paths into numbers, tuples and text."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _plain(value))


def _plain(value: Any) -> Any:
    """The value without what NumPy or pathlib put around it."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value

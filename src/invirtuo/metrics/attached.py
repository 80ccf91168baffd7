"""Tables that other tables carry along."""

from __future__ import annotations

from typing import Any

import pandas as pd

__all__ = ["Attached"]


class Attached(pd.DataFrame):  # type: ignore[misc]  # pandas ships no types
    """A table for `attrs`: pandas compares the attrs of pieces of a table when it prints or joins them.

    It takes equal tables for an error, but one and the same for equal; so a copy of attrs holds the same table.

    Examples
    --------
    >>> wide = pd.DataFrame([range(40)])
    >>> wide.attrs["more"] = Attached({"x": [1, 2]})
    >>> pd.concat([wide, wide]).attrs["more"]["x"].to_list()
    [1, 2]
    """

    def __deepcopy__(self, memo: Any = None) -> Attached:
        return self

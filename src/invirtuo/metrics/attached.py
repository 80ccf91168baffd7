"""Tables that other tables carry along."""

from __future__ import annotations

from typing import Any

import pandas as pd

__all__ = ["Attached"]


class Attached(pd.DataFrame):  # type: ignore[misc]  # noqa: PLW1641 - pandas ships no types, tables have no hash
    """A table for `attrs`: pandas compares the attrs of pieces of a table when it prints or joins them.

    It takes a comparison value by value for an error; so two attached tables are equal if they are one and the same,
    which a copy of attrs holds.

    Examples
    --------
    >>> one, other = pd.DataFrame([range(40)]), pd.DataFrame([range(40)])
    >>> one.attrs["more"] = Attached({"x": [1, 2]})
    >>> pd.concat([one, one]).attrs["more"]["x"].to_list()
    [1, 2]
    >>> other.attrs["more"] = Attached({"x": [1, 2]})
    >>> pd.concat([one, other]).attrs
    {}
    """

    def __eq__(self, other: object) -> Any:
        return self is other if isinstance(other, Attached) else super().__eq__(other)

    def __deepcopy__(self, memo: Any = None) -> Attached:
        return self

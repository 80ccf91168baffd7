"""How objects show themselves: as lines of text, and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

__all__ = ["Rows", "Shown"]

Rows: TypeAlias = Sequence[tuple[str, str]]


class Shown:
    """Base of what shows itself by a few facts; a class writes `shown`."""

    __slots__ = ()

    def shown(self) -> Rows:
        """Name and text of every fact."""
        raise NotImplementedError

    def __str__(self) -> str:
        rows = self.shown()
        width = max(len(name) for name, _ in rows)
        return "\n".join([type(self).__name__, *(f"  {name:<{width}}  {text}" for name, text in rows)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """A table, in notebooks."""
        left = 'style="text-align: left"'
        rows = (f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(text)}</td></tr>" for name, text in self.shown())
        return f"<table><caption>{escape(type(self).__name__)}</caption><tbody>{''.join(rows)}</tbody></table>"

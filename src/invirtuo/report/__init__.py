"""A folder of results -> one self-contained HTML page. It knows tables and pictures, not models.

The module can be called: ``iv.report(results, out)`` is :func:`write_report`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

from invirtuo.report.page import write_report

__all__ = ["report", "write_report"]


class _CallableModule(ModuleType):
    """Makes ``iv.report`` a function whether the name was bound by the package or by an import of the module."""

    def __call__(
        self, results: str | os.PathLike, out: str | os.PathLike = "report.html", *, title: str | None = None
    ) -> Path:
        return write_report(results, out, title=title)


_CallableModule.__call__.__doc__ = write_report.__doc__
sys.modules[__name__].__class__ = _CallableModule
report = sys.modules[__name__]

"""Templates of this package to a page that is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from invirtuo import __version__
from invirtuo.cells.files import writing

__all__ = ["render"]


def render(template: str, shown: Mapping[str, Any], out: str | os.PathLike[str]) -> Path:
    """Write a page; all that it shows is escaped, and an existing one is replaced only when the new one is complete."""
    files = resources.files("invirtuo.reports")
    loader = FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["asset"] = lambda name: Markup(files.joinpath(name).read_text(encoding="utf-8"))
    page = environment.get_template(template).render(shown, version=__version__)
    path = Path(out)
    with writing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path

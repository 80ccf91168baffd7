"""What a verb was asked, as a file: read in place of options, and written beside what came of it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from invirtuo.errors import preview

__all__ = ["Config", "write_run"]

NAME = "run.toml"
NOT_KEPT = ("config", "out", "overwrite", "resume", "quiet")  # of one call, not of what was asked


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Take what is not given on the command line from a file."""
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config: {path} cannot be read as TOML: {error}") from error
    names = {word: name for name, word in _words(context).items() if name not in NOT_KEPT}
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"--config: {path} holds {preview(unknown)}; expected some of {', '.join(sorted(names))}")
    context.default_map = {names[word]: value for word, value in found.items()}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help=f"FILE.toml with arguments and options that are not given here; {NAME} of a run is one.",
        callback=_read,
        is_eager=True,
    ),
]


def write_run(context: typer.Context, folder: Path) -> None:
    """Write what was asked into a folder of results: the same again with ``--config``."""
    from invirtuo.cells.files import writing

    words = _words(context)
    lines = [f"# invirtuo {context.info_name} --config {NAME} --out FOLDER"]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        is_given = value not in (None, [], (), parameter.default)
        if is_given and parameter.name in words and parameter.name not in NOT_KEPT:
            lines.append(f"{words[parameter.name]} = {json.dumps(_plain(value))}")
    with writing(folder / NAME) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _words(context: typer.Context) -> dict[str, str]:
    """Name of every parameter of a verb to the word that a user writes."""
    found = {}
    for parameter in context.command.params:
        longest = max(parameter.opts, key=len)
        found[str(parameter.name)] = longest.removeprefix("--")
    return found


def _plain(value: Any) -> Any:
    """Paths as text; JSON writes text, numbers, booleans and lists of them as TOML does."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

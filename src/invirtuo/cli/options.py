"""Options that several verbs take, and what they read and print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer


def writable_file(path: Path | None) -> Path | None:
    """The path of a file, once it is known that it can be written."""
    from invirtuo.files import check_writable

    if path is not None:
        check_writable(path)
    return path


def writable_folder(path: Path | None) -> Path | None:
    """The path of a folder, once it is known that it can be written."""
    from invirtuo.files import check_writable

    if path is not None:
        check_writable(path, folder=True)
    return path


Covariate = Annotated[list[str] | None, typer.Option(help="Covariate column of obs; may be given several times.")]
Perturbation = Annotated[
    str | None,
    typer.Option("--perturbation", help="Column of obs with the perturbation labels, if cells were perturbed."),
]
Control = Annotated[str | None, typer.Option("--control", help="Label of the control cells in that column.")]
Unknown = Annotated[
    str | None, typer.Option(help="Covariate label of cells whose label is not known; so are empty ones.")
]
Run = Annotated[Path, typer.Argument(help="Folder of a fitted model.")]
Cells = Annotated[Path, typer.Argument(help="h5ad file with raw counts.")]
Weights = Annotated[
    list[str] | None,
    typer.Option("--guidance", help="Weight of all attributes, or attribute=weight; may be given several times."),
]
Steps = Annotated[int | None, typer.Option(help="Steps of the solver; the model's own if not given.")]
Solver = Annotated[
    str | None, typer.Option(help="euler, midpoint, heun, ab2, rk4 or dopri5; the model's own if not given.")
]
Separator = Annotated[str, typer.Option(help="Joins the parts of a combination.")]
Out = Annotated[Path, typer.Option(help="Where the result goes.", callback=writable_file)]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder where the results go.", callback=writable_folder)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model or the checkpoints that are there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no summary.")]


def fail(message: str, code: int = 2) -> NoReturn:
    """End with an exit code and one message, on one line."""
    typer.echo(f"invirtuo: {' '.join(message.split())}", err=True)
    sys.exit(code)


def pairs(option: str, assignments: list[str] | None) -> dict[str, str]:
    """``attribute=label`` as a mapping."""
    pairs: dict[str, str] = {}
    for text in assignments or []:
        name, equals, value = text.partition("=")
        if not equals or not name or name in pairs:
            raise ValueError(f"{option} {text!r}; expected attribute=value, each attribute once")
        pairs[name] = value
    return pairs


def read_csv(path: Path, option: str = "--conditions"):
    """A CSV table as text."""
    import pandas as pd

    if not path.is_file():
        expected = "a CSV file, test or val" if option == "--conditions" else "a CSV file"
        raise ValueError(f"{option}: {path} does not exist; expected {expected}")
    try:
        return pd.read_csv(path, dtype=str)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from error


def print_scores(scores) -> None:
    """Mean over conditions: a row per model, or, for one model, a row per metric."""
    table = scores.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", sort=False)
    if len(table) == 1:
        table = table.T
    rows = [(str(name), *(f"{value:.3f}" for value in row)) for name, row in table.iterrows()]
    print_rows(rows, header=(table.index.name, *map(str, table.columns)))


def print_rows(rows, header: tuple[str, ...] | None = None) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = [tuple(escape(str(value)) for value in row) for row in rows]
    if not rows:
        return
    table = Table(show_header=header is not None, box=None, pad_edge=False)
    for name in header or [""] * len(rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def model_with(run: Path, verb: str) -> Any:
    """The model of a folder, if it has the verb."""
    from invirtuo.models import MODELS, load

    model = load(run)
    if not hasattr(model, verb):
        able = [name for name, kind in MODELS.items() if hasattr(kind, verb)]
        raise ValueError(f"{run} holds {model.name}, which cannot {verb}; models that can: {', '.join(able)}")
    return model

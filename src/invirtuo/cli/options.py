"""Options that several verbs take, and what they read and print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

BETTER = {"higher": "↑", "lower": "↓"}
MOST_COLUMNS = 6  # metrics beside each other; of more each has a row

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
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; if not given, a GPU that the fit was allowed."),
]
Separator = Annotated[str, typer.Option(help="Joins the parts of a combination.")]
Out = Annotated[Path, typer.Option(help="Where the result goes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no summary.")]


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one message."""
    typer.echo(f"invirtuo: {message}", err=True)
    sys.exit(2)


def pairs(option: str, assignments: list[str] | None) -> dict[str, str]:
    """``attribute=label`` as a mapping."""
    pairs: dict[str, str] = {}
    for text in assignments or []:
        name, equals, value = text.partition("=")
        if not equals or not name or name in pairs:
            raise ValueError(f"{option} {text!r}; expected attribute=value, each attribute once")
        pairs[name] = value
    return pairs


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: a model refuses those that cannot act on it."""
    return {name: value for name, value in options.items() if value is not None}


def read_csv(path: Path, option: str = "--conditions"):
    """A CSV table as text."""
    import pandas as pd

    if not path.is_file():
        expected = "a CSV file, test or val" if option == "--conditions" else "a CSV file"
        raise ValueError(f"{option}: {path} does not exist; expected {expected}")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])  # "NA" may be a label
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from error


def print_scores(scores, console: Console | None = None) -> None:
    """Mean over conditions: a row per model, or, of many metrics or for one model, a row per metric."""
    from invirtuo.metrics import METRICS

    def labelled(name: str) -> str:
        direction = METRICS[name].direction if name in METRICS else None
        return f"{name} {BETTER[direction]}" if direction else name

    table = scores.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", sort=False)
    table = table.rename(columns=labelled)
    if len(table) == 1 or table.shape[1] > MOST_COLUMNS:
        table = table.T
    rows = [(str(name), *(f"{value:.3f}" for value in row)) for name, row in table.iterrows()]
    print_rows(rows, header=(str(table.index.name), *map(str, table.columns)), console=console)


def print_rows(rows, header: tuple[str, ...] | None = None, console: Console | None = None) -> None:
    """Print a table; with a header, columns that do not fit beside each other follow below, after the first one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = [tuple(str(value) for value in row) for row in rows]
    if not rows:
        return
    console = console or Console()
    names = header or ("",) * len(rows[0])
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    blocks = [range(len(names))] if header is None else _beside_each_other(widths, console.width)
    for number, columns in enumerate(blocks):
        table = Table(show_header=header is not None, box=None, pad_edge=False)
        for column in columns:
            numeric = all(_is_number(row[column]) for row in rows)
            table.add_column(escape(names[column]), overflow="fold", justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(escape(row[column]) for column in columns))
        if number:
            console.print()
        console.print(table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _beside_each_other(widths: list[int], width: int) -> list[list[int]]:
    """Numbers of the columns of each block that fits into a width; the first column is in all of them."""
    gap = 2  # spaces between columns
    blocks, used = [[0]], widths[0]
    for column in range(1, len(widths)):
        if used + gap + widths[column] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(column)
        used += gap + widths[column]
    return blocks


def model_with(run: Path, verb: str) -> Any:
    """The model of a folder, if it has the verb."""
    from invirtuo.models import MODELS, load

    model = load(run)
    if not hasattr(model, verb):
        able = [name for name, kind in MODELS.items() if hasattr(kind, verb)]
        raise ValueError(f"{run} holds {model.name}, which cannot {verb}; models that can: {', '.join(able)}")
    return model

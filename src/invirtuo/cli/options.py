"""Options that several verbs take, and what they read and print."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from invirtuo.errors import preview

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from rich.console import Console

TABLES = (".csv", ".tsv", ".txt", ".h5ad")  # endings that name a file and no condition
GROUPS = {
    "groups": "GROUP,GROUP",
    "contexts": "GROUP,GROUP",
    "context": "GROUP",
}  # arguments of splits that name groups
MOST_COLUMNS = 6  # metrics beside each other; of more each has a row


def writable_file(path: Path | None) -> Path | None:
    """The path of a file, once it is known that it can be written."""
    from invirtuo.cells.files import check_writable

    if path is not None:
        check_writable(path)
    return path


def writable_cells(path: Path | None) -> Path | None:
    """The path of an h5ad file, once it is known that it can be written."""
    from invirtuo.cells.files import check_h5ad_name

    if path is not None:
        check_h5ad_name(path)
    return writable_file(path)


def writable_folder(path: Path | None) -> Path | None:
    """The path of a folder, once it is known that it can be written."""
    from invirtuo.cells.files import check_writable

    if path is not None:
        check_writable(path, folder=True)
    return path


Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="field=value of the model's Config; `invirtuo list models NAME` lists them."),
]
FitSet = Annotated[
    list[str] | None,
    typer.Option(help="field=value of the FitConfig; `invirtuo list models NAME --fit` lists them."),
]
Covariate = Annotated[list[str] | None, typer.Option(help="Covariate column of obs; may be given several times.")]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch", help="Column with technical batches, in which cells are held against controls; no covariate."
    ),
]
Perturbation = Annotated[
    str | None,
    typer.Option("--perturbation", help="Column of obs with the perturbation labels, if cells were perturbed."),
]
Control = Annotated[str | None, typer.Option("--control", help="Label of the control cells in that column.")]
Unknown = Annotated[
    str | None, typer.Option(help="Covariate label of cells whose label is not known; so are empty ones.")
]
Run = Annotated[Path, typer.Argument(help="Folder of a fitted model.")]
Cells = Annotated[Path, typer.Argument(help="File with raw counts: h5ad, zarr, h5mu (FILE.h5mu/rna), 10x Genomics.")]
Weights = Annotated[
    list[str] | None,
    typer.Option("--guidance", help="Weight of all attributes, or attribute=weight; may be given several times."),
]
Steps = Annotated[int | None, typer.Option(help="Steps of the solver; the model's own if not given.")]
Split = Annotated[
    str | None,
    typer.Option(
        help="One that `invirtuo list splits` names, a file.csv, or a file.toml[:DATASET[:CONTEXT COLUMN]] of STATE."
    ),
]
HoldOut = Annotated[
    list[str] | None,
    typer.Option(help="Condition to hold out (B cell|IFN-beta), or column=value; may be given several times."),
]
HoldOutVal = Annotated[
    list[str] | None,
    typer.Option(help="Condition to hold out for validation, which intervals of effects need; like --hold-out."),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        help="test (if not given), val, FILE.csv with a row per condition, or conditions like B cell|IFN-beta."
    ),
]
Solver = Annotated[
    str | None, typer.Option(help="euler, midpoint, heun, ab2, rk4 or dopri5; the model's own if not given.")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; if not given, a GPU that the fit was allowed."),
]
Time = Annotated[str | None, typer.Option(help="Numeric column of obs with time or pseudotime.")]
Separator = Annotated[str, typer.Option(help="Joins the parts of a combination.")]
Out = Annotated[Path, typer.Option(help="Where the result goes.", callback=writable_file)]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder where the results go.", callback=writable_folder)]
OutCells = Annotated[Path, typer.Option("--out", help="h5ad file to write.", callback=writable_cells)]
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


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: a model refuses those that cannot act on it."""
    return {name: value for name, value in options.items() if value is not None}


def read_csv(path: Path, option: str = "--conditions") -> pd.DataFrame:
    """A CSV table as text."""
    import pandas as pd

    if not path.is_file():
        expected = "a CSV file, test or val" if option == "--conditions" else "a CSV file"
        raise ValueError(f"{option}: {path} does not exist; expected {expected}")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])  # "NA" may be a label
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from error


def read_conditions(given: list[str] | None) -> str | pd.DataFrame | list[str | dict[str, str]]:
    """Conditions as a model takes them: "test", "val", a table, or names."""
    if not given:
        return "test"
    if len(given) == 1 and given[0] in ("test", "val"):
        return given[0]
    path = Path(given[0])
    if len(given) == 1 and _is_file(path):
        return read_csv(path)
    return [condition(text) for text in given]


def _is_file(path: Path) -> bool:
    """Whether a word that may name a condition names a file."""
    return "|" not in str(path) and (path.suffix in TABLES or path.exists())


def read_labels(given: list[str] | None, option: str = "--where") -> Any:
    """Labels of courses as a model takes them: a table, names, or one mapping of every ``covariate=label``."""
    if not given:
        return None
    if any("=" in text for text in given):
        return pairs(option, given)
    if len(given) > 1:
        return given
    path = Path(given[0])
    return read_csv(path, option) if _is_file(path) else given[0]


def read_genes(given: list[str], known: Iterable[str], option: str) -> list[str]:
    """Genes by name; of files with one a line, those that the data have."""
    there, found = set(known), []
    for word in given:
        path = Path(word)
        if not _is_file(path):
            found.append(word)
            continue
        if not path.is_file():
            raise ValueError(f"{option}: {path} does not exist; expected names of genes, or a file with one a line")
        lines = path.read_text(encoding="utf-8").splitlines()
        named = [re.split(r"[\s,;]", line.strip())[0] for line in lines if line.strip() and not line.startswith("#")]
        in_data = [gene for gene in dict.fromkeys(named) if gene in there]
        if not in_data:
            raise ValueError(f"{option}: none of the {len(named):,} genes in {path} are in the data: {preview(named)}")
        typer.echo(f"{option}: {len(in_data):,} of the {len(named):,} genes in {path} are in the data", err=True)
        found += in_data
    return list(dict.fromkeys(found))


def condition(text: str) -> str | dict[str, str]:
    """``cell_type=B cell`` as a mapping, anything else as the name of a condition."""
    column, equals, value = text.partition("=")
    return {column: value} if equals else text


def split_of(
    obs: Any, design: Any, split: str | None, hold_out: list[str] | None, hold_out_val: list[str] | None = None
) -> Any:
    """The split that --split, or --hold-out and --hold-out-val, ask for; None trains on all cells."""
    from invirtuo import splits

    if split and (hold_out or hold_out_val):
        raise ValueError("--split and --hold-out exclude each other; give one of them")
    if hold_out_val and not hold_out:
        raise ValueError("--hold-out-val needs --hold-out; give what is held out for the test as well")

    # conditions, or of time courses whole courses, held out by name
    if hold_out and design.perturbation is None:
        if hold_out_val:
            raise ValueError("--hold-out-val is for perturbations; give courses for validation in a --split file")
        return splits.courses(obs, design, [condition(text) for text in hold_out])
    if hold_out:
        val = [condition(text) for text in hold_out_val] if hold_out_val else None
        return splits.hold_out(obs, design, [condition(text) for text in hold_out], val=val)

    # a file, or a split by its name
    if split is None:
        return None
    path, dot, named = split.partition(".toml")
    if dot:
        dataset, _, context = named.removeprefix(":").partition(":")
        return splits.from_toml(path + dot, obs, design, dataset=dataset or None, context=context or None)
    if Path(split).suffix == ".csv" or Path(split).is_file():
        return splits.from_csv(Path(split), obs)
    return _named_split(obs, design, split)


def named_splits() -> dict[str, str]:
    """Names that --split takes, and how each is written; those of groups say which argument names them."""
    from invirtuo.splits import SPLITS

    written = {}
    for name, function in SPLITS.items():
        parameters = list(inspect.signature(function).parameters.values())[2:]  # after obs and design
        needed = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
        if not needed:
            written[name] = name
        elif needed[0].name in GROUPS:
            written[name] = f"{name}:{GROUPS[needed[0].name]}"
    return written


def _named_split(obs: Any, design: Any, split: str) -> Any:
    """``transfer``, or ``manual:k562|IFNG,mcf7|IFNG``."""
    from invirtuo.splits import SPLITS

    name, _, given = split.partition(":")
    written = named_splits()
    if name not in written:
        known = ", ".join(("a file.csv", "a file.toml", *written.values()))
        raise ValueError(f"--split is {split!r}; expected one of {known}; or use --hold-out")
    takes = inspect.signature(SPLITS[name]).parameters
    needs_groups, may_have = written[name] != name, bool(GROUPS.keys() & takes)
    if bool(given) != needs_groups and not (given and may_have):
        advice = f" with groups of the covariates, here {preview(sorted(set(design.groups(obs))))}" if not given else ""
        raise ValueError(f"--split is {split!r}; expected {written[name]}{advice}")
    if not given:
        return SPLITS[name](obs, design)

    groups = [condition(text.strip()) for text in given.split(",")]
    argument = next(word for word in GROUPS if word in takes)
    if argument == "context" and len(groups) > 1:
        raise ValueError(f"--split is {split!r}; {name} holds out one group, found {len(groups)}")
    return SPLITS[name](obs, design, **{argument: groups[0] if argument == "context" else groups})


def print_scores(scores: pd.DataFrame, console: Console | None = None) -> None:
    """Mean over conditions: a row per model, or, of many metrics or for one model, a row per metric."""
    from rich.console import Console

    from invirtuo.metrics.scores import ARROWS, directions, floor_note

    labels = {name: f"{name} {ARROWS[direction]}" for name, direction in directions(scores).items()}
    console = console or Console()
    table = scores.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", sort=False)
    table = table.rename(columns=labels)
    if len(table) == 1 or table.shape[1] > MOST_COLUMNS:
        table = table.T
    rows = []
    for name, row in table.iterrows():
        rows.append((str(name), *(f"{value:.3f}" for value in row)))
    print_rows(rows, header=(str(table.index.name), *map(str, table.columns)), console=console)
    if note := floor_note(scores):
        console.print(f"\n{note}", highlight=False)


def print_rows(
    rows: Iterable[Iterable[object]], header: tuple[str, ...] | None = None, console: Console | None = None
) -> None:
    """Print a table; with a header, columns that do not fit beside each other follow below, after the first one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    texts = [tuple(map(str, row)) for row in rows]
    if not texts:
        return

    # columns of each block
    console = console or Console()
    names = header or ("",) * len(texts[0])
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    blocks = [range(len(names))] if header is None else _beside_each_other(widths, console.width)

    for number, columns in enumerate(blocks):
        table = Table(show_header=header is not None, box=None, pad_edge=False)
        for column in columns:
            numeric = all(_is_number(row[column]) for row in texts)
            table.add_column(escape(names[column]), overflow="fold", justify="right" if numeric else "left")
        for row in texts:
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
    from invirtuo.models import load, model_class, model_names

    model = load(run)
    if not hasattr(model, verb):
        able = [name for name in model_names() if hasattr(model_class(name), verb)]
        raise ValueError(f"{run} holds {model.name}, which cannot {verb}; models that can: {', '.join(able)}")
    return model


def with_fields(config: Any, assignments: list[str] | None, listing: str) -> Any:
    """A Config with fields replaced by ``field=value``; `listing` is the command that explains them."""
    # values are JSON, or else text
    known = {field.name for field in dataclasses.fields(config)}
    changes = {}
    for text in assignments or []:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ValueError(f"cannot set {text!r}; expected field=value with a field that `{listing}` lists")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise ValueError(f"{error}; `{listing}` explains the settings") from error

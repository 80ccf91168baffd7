"""The command line of the studies: one list, one parser, one meaning of every common option."""

from __future__ import annotations

import argparse
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pandas as pd

import studies
from studies.harness import STUDIES, Study

COMMON = {
    "data_dir": "folder of the data sets that do not come with the package",
    "seeds": "number of seeds, from 0 on",
    "jobs": "processes at the same time",
    "tasks": "tasks of `invirtuo list tasks`",
    "models": "rows of the table",
    "steps": "training steps of every fit",
    "cells": "predicted cells of every condition",
    "genes": "variable genes, at most",
    "vectors": "file .npz with vectors of genes, such as gene2vec",
    "seed": "seed of everything",
    "repeats": "turns, of which the median counts",
}
ENOUGH = {"out", "data_dir", "seeds", "jobs"}  # these say where, and how many rows, as lists do; not what a row is


def main(arguments: Sequence[str] | None = None) -> None:
    """List the studies, or run one."""
    for module in modules():
        import_module(module)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listed())
        return
    name, *rest = arguments
    if name not in STUDIES:
        sys.exit(f"no study {name!r}; there are:\n{listed()}")
    run(name, rest)


def modules() -> list[str]:
    """Names of all modules of studies."""
    return [f"studies.{module.name}" for module in pkgutil.iter_modules(studies.__path__)]


def listed() -> str:
    """A line for every study."""
    width = max(map(len, STUDIES))
    lines = [f"  {name:{width}}  {summary(study.run)}" for name, study in sorted(STUDIES.items())]
    return "\n".join(["python -m studies NAME [--help | --out DIR ...]", "", *lines])


def summary(function: Callable) -> str:
    """First line of a docstring."""
    return inspect.getdoc(function).partition("\n")[0]


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a study; print its tables and write them."""
    import torch

    study = STUDIES[name]
    options = parsed(name, study, arguments)
    keep_settings(name, options)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    taken = inspect.signature(study.run).parameters
    tables = study.run(**{key: value for key, value in options.items() if key in taken})
    for title, table in (tables or {}).items():
        print(f"\n{title}\n{table.round(4).to_string()}", flush=True)
        written(table).to_csv(options["out"] / f"{title}.csv", index=False, float_format="%.6g")


def keep_settings(name: str, options: dict) -> None:
    """Note what rows are made with in OUT/NAME.json; refuse to add rows to those of other settings."""
    single = {key: str(value) for key, value in options.items() if not isinstance(value, (list, tuple))}
    settings = {key: value for key, value in single.items() if key not in ENOUGH}
    file = options["out"] / f"{name}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
    other = sorted(key for key in settings | before if settings.get(key) != before.get(key))
    if other:
        was = ", ".join(f"{key} {before.get(key)}" for key in other)
        sys.exit(f"{options['out']} holds rows of {was}; give these again, or another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def written(table: pd.DataFrame) -> pd.DataFrame:
    """A table without levels: names in columns, and one name for each column."""
    if table.columns.nlevels > 1:
        table = table.set_axis(["_".join(map(str, column)) for column in table.columns], axis=1)
    plain = isinstance(table.index, pd.RangeIndex)
    return table if plain else table.reset_index()


# ---- the parser ----------------------------------------------------------------------------------------------------


def parsed(name: str, study: Study, arguments: Sequence[str]) -> dict:
    """Options by name; those of ``--quick`` where they are not given."""
    found = parser(name, study)
    if "--quick" in arguments:
        found.set_defaults(**study.quick)
    options = vars(found.parse_args(arguments))
    del options["quick"]
    return options


def parser(name: str, study: Study) -> argparse.ArgumentParser:
    """Arguments and options of a study, by its signature, and those that all studies have."""
    _, _, about = sys.modules[study.run.__module__].__doc__.partition("\n\n")
    text = f"{summary(study.run)}\n\n{about}"
    found = argparse.ArgumentParser(
        prog=f"python -m studies {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    notes, kinds = COMMON | described(study.run), get_type_hints(study.run)
    for parameter in inspect.signature(study.run).parameters.values():
        if parameter.name not in ("out", "threads"):
            add(found, parameter, kinds[parameter.name], notes.get(parameter.name))
    threads = inspect.signature(study.run).parameters.get("threads")
    everywhere = found.add_argument_group("of every study")
    out = Path("results") / name
    everywhere.add_argument("--out", type=Path, default=out, help=f"folder of rows and tables ({out})")
    default = threads.default if threads else 1
    everywhere.add_argument("--threads", type=int, default=default, help=f"threads, 0: as PyTorch chooses ({default})")
    quick = ", ".join(f"{key}{shown(value)}" for key, value in study.quick.items()) or "none here"
    everywhere.add_argument("--quick", action="store_true", help=f"a run to see that it works: {quick}")
    return found


def add(found: argparse.ArgumentParser, parameter: inspect.Parameter, kind: type, note: str | None) -> None:
    """Add a parameter: an argument if it can be given by position, else an option."""
    options: dict = {"help": note}
    if get_origin(kind) is Sequence:
        (kind,) = get_args(kind)
        options["nargs"] = "+" if parameter.default is parameter.empty else "*"
    if kind is bool:
        options["action"] = "store_true"
    else:
        options["type"] = next(iter(get_args(kind)), kind)  # X of X | None
    if parameter.kind is not parameter.KEYWORD_ONLY:
        found.add_argument(parameter.name, **options)
        return
    required = parameter.default is parameter.empty
    if not required:
        options["default"] = parameter.default
        options["help"] += shown(parameter.default)
    found.add_argument(f"--{parameter.name.replace('_', '-')}", required=required, **options)


def shown(default) -> str:
    """A default as help shows it."""
    if default is None or default is False or default == ():
        return ""
    text = ", ".join(map(str, default)) if isinstance(default, (list, tuple)) else f"{default}"
    return f" ({text.replace('%', '%%')})"


def described(function: Callable) -> dict[str, str]:
    """What a numpydoc docstring says of every parameter, by name, a line each."""
    _, _, parameters = inspect.getdoc(function).partition("Parameters\n----------\n")
    found = re.findall(r"^(\w[\w, ]*)\n((?: .*\n?)+)", parameters, flags=re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for names, text in found for name in names.split(", ")}


if __name__ == "__main__":
    main()

"""Reads a folder of results and renders the page."""

from __future__ import annotations

import json
import os
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from invirtuo import __version__
from invirtuo.files import writing
from invirtuo.report.figures import curves, panels
from invirtuo.report.tables import BASELINES, FLOOR, condition_tables, headline, score_table

__all__ = ["write_report"]

NEEDED = ("condition", "metric", "value")
PANEL_COLUMNS = ("pc1", "pc2", "kind", "model", "condition")


def write_report(
    results: str | os.PathLike, out: str | os.PathLike = "report.html", *, title: str | None = None
) -> Path:
    r"""Write one self-contained HTML page about a folder of results.

    Parameters
    ----------
    results
        Folder with ``scores.csv`` (columns ``condition``, ``metric``, ``value``, ``model``; optionally ``seed``,
        ``task``, ``direction``). Shown if present: ``panels.npz`` or ``panels.csv`` (``pc1``, ``pc2``, ``kind``,
        ``model``, ``condition``), ``history.csv`` (``step``, ``model``, one column per quantity) and ``run.json``
        (what was run; the keys ``title``, ``dataset``, ``split``, ``baselines``, ``floor`` and ``notes`` have a place
        of their own, anything else is listed).
    out
        The page to write; an existing one is replaced only when the new one is complete.
    title
        Heading; None takes ``title`` from ``run.json``.

    Returns
    -------
    Path of the page.

    Raises
    ------
    ValueError
        If the folder or its tables are missing, damaged or without the columns above.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "scores.csv").write_text("condition,metric,value,model\nT|A,rmse_mean,0.2,mine\n")
    >>> write_report(folder, folder / "report.html").name
    'report.html'
    """
    folder = Path(results)
    scores, run = _scores(folder / "scores.csv"), _run(folder / "run.json")
    cells, history = _panels(folder), _history(folder / "history.csv")
    picture, n_columns, left_out = panels(cells) if cells is not None else ("", 0, "")
    page = _template().render(
        title=title or run.pop("title", None) or "How well were the cells predicted?",
        subtitle=" · ".join(str(run[key]) for key in ("dataset", "split") if isinstance(run.get(key), str)),
        sections=_sections(scores, run.get("baselines", BASELINES), run.get("floor", FLOOR)),
        panels=picture,
        panels_columns=n_columns,
        panels_note=left_out,
        curves=curves(history) if history is not None else "",
        notes=_notes(run),
        run=_flat({key: value for key, value in run.items() if key != "notes"}),
        version=__version__,
    )
    out = Path(out)
    with writing(out) as part:
        part.write_text(page, encoding="utf-8")
    return out


def _template():
    source = resources.files("invirtuo.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _sections(scores: pd.DataFrame, baselines: list[str], floor: str) -> list[dict[str, Any]]:
    """One section per task, in the order of the table."""
    found = []
    for task, part in scores.groupby("task", sort=False):
        table = score_table(part, baselines, floor)
        found.append(
            {
                "task": task,
                "headline": headline(table),
                "table": table,
                "conditions": condition_tables(part, table),
                "n_seeds": part["seed"].nunique() if "seed" in part else 1,
            }
        )
    return found


def _scores(path: Path) -> pd.DataFrame:
    table = _read_csv(path, NEEDED)
    if table.empty:
        raise ValueError(f"{path} has no rows; expected one per condition, metric and model. Run the evaluation again")
    values = pd.to_numeric(table["value"], errors="coerce")
    wrong = values.isna() & table["value"].notna()
    if wrong.any():
        raise ValueError(
            f"{path}: {int(wrong.sum())} values are not numbers, for example {table['value'][wrong].iloc[0]!r}"
        )
    table["value"] = values.astype(float)
    for column, default in (("model", "model"), ("task", "")):
        table[column] = table[column].fillna(default).astype(str) if column in table else default
    for column in ("condition", "metric"):
        table[column] = table[column].astype(str)
    return table


def _panels(folder: Path) -> pd.DataFrame | None:
    packed, plain = folder / "panels.npz", folder / "panels.csv"
    if packed.is_file():
        try:
            with np.load(packed, allow_pickle=False) as arrays:
                table = pd.DataFrame({name: arrays[name] for name in arrays.files})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{packed} is not a readable npz of equally long arrays: {error}") from error
    elif plain.is_file():
        table = _read_csv(plain, ("pc1", "pc2", "kind"))
    else:
        return None
    lacking = [name for name in PANEL_COLUMNS[:3] if name not in table]
    if lacking:
        raise ValueError(f"{packed} lacks {', '.join(lacking)}; found {', '.join(map(str, table.columns))}")
    for column in PANEL_COLUMNS[3:]:
        table[column] = table[column].fillna("").astype(str) if column in table else ""
    return table if (table["kind"] == "predicted").any() else None


def _history(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    table = _read_csv(path, ("step",))
    if "model" not in table:
        table["model"] = "model"
    numeric = table.drop(columns=["step", "model"]).select_dtypes("number")
    return table if len(table) > 1 and numeric.shape[1] else None


def _run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} holds a {type(run).__name__}; expected an object with what was run")
    return run


def _read_csv(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a table with the columns {', '.join(needed)}")
    try:
        table = pd.read_csv(path, keep_default_na=True, low_memory=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV file: {error}") from error
    lacking = [name for name in needed if name not in table.columns]
    if lacking:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)}; found {', '.join(map(str, table.columns))}")
    return table


def _notes(run: dict[str, Any]) -> list[str]:
    notes = run.get("notes", [])
    return [str(note) for note in notes] if isinstance(notes, list) else [str(notes)]


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines "a.b" -> value."""
    lines = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            lines += _flat(value, f"{name}.")
        else:
            lines.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return lines

"""The arena: questions for those who predict elsewhere, and one table of what several groups computed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invirtuo.bench.cell import Cell, Record, scores_of
from invirtuo.bench.entry import BASELINES, FLOOR, Entry
from invirtuo.bench.question import Asked, Question
from invirtuo.bench.run import one_task, record_path, write_results
from invirtuo.bench.task import Task
from invirtuo.bench.tasks import TASKS
from invirtuo.cells.files import check_writable, making, writing
from invirtuo.errors import preview
from invirtuo.fit import FitConfig

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ask", "merge"]

SHARED = ("task", "part", "metrics", "controls", "version")  # what rows of one table must have in common
ALIKE = 1e-3  # relative difference of scores that other machines may make


def ask(
    task: Task | str,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    controls: Literal["train", "evaluated"] = "train",
    data_dir: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the question of a task: cells to learn from, and the conditions to predict, without held-out cells.

    Parameters
    ----------
    task
        Name in ``bench.TASKS``, or a :class:`Task`.
    out
        New folder for the question; of a task with several splits for a folder ``0``, ``1``, ... for each.
    seed
        Seed that is asked for.
    controls
        Control cells from which predictions may start, as in :func:`invirtuo.benchmark`.
    data_dir
        Folder with data files, as in `invirtuo.datasets.load`.

    Returns
    -------
    The folders.

    Raises
    ------
    ValueError
        If the task is unknown, its data are missing, or the folder exists.
    """
    chosen, out = one_task(task), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; give the name of a new folder")
    n_folds = len(chosen.splits)
    names = [str(fold) for fold in range(n_folds)] if n_folds > 1 else [""]
    with making(out) as folder:
        for fold, name in enumerate(names):
            adata, design, split = chosen.load(fold, data_dir=data_dir)
            asked = Asked(n_cells=chosen.n_cells, fold=fold, controls=controls)
            Question(adata, design, split, asked, FitConfig(seed=seed)).write(folder / name)
    return [out / name for name in names]


def merge(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> pd.DataFrame:
    """Join what several folders of :func:`invirtuo.benchmark` hold into one, with all tables and the page.

    Nothing is computed again. A row that several folders have, like the baselines, must have the same scores in all:
    it shows that the cells were the same.

    Parameters
    ----------
    folders
        Results of named tasks.
    out
        New folder for the joined results.

    Returns
    -------
    pd.DataFrame
        The content of ``scores.csv``.

    Raises
    ------
    ValueError
        If a folder holds no results, tasks, metrics, versions or shared rows differ, or `out` holds results.
    """
    out = Path(out)
    check_writable(out, folder=True)
    if (out / "cells").exists():
        raise ValueError(f"{out} holds a benchmark already; give a new folder")

    # every cell once, held against the first that has its task, or itself
    kept: dict[str, tuple[Path, Cell, Record]] = {}
    of_task: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in map(Path, folders):
        for file in _records(folder):
            record = json.loads(file.read_text(encoding="utf-8"))
            cell = _cell(file, record)
            shared = {"controls": "train", **record["settings"]}
            _check_shared(folder, shared, *of_task.setdefault(cell.task.name, (folder, shared)))
            if cell.name in kept and _is_kept(cell, (file, record), kept[cell.name]):
                continue
            kept[cell.name] = (file, cell, record)

    found = sorted(kept.values(), key=lambda one: _rank(one[1].entry))
    files, cells, records = zip(*found, strict=True)
    for file, cell in zip(files, cells, strict=True):
        with writing(record_path(out, cell)) as path:
            shutil.copyfile(file, path)
    return write_results(out, cells, records)


def _records(folder: Path) -> list[Path]:
    """Files with the records of a folder."""
    files = sorted((folder / "cells").glob("*/*/*.json"))
    if not files:
        raise ValueError(f"{folder} holds no cells of a benchmark; expected what `invirtuo benchmark --out` wrote")
    return files


def _cell(file: Path, record: Record) -> Cell:
    """The cell of a record, as far as tables need it."""
    try:
        settings = record["settings"]
        facts = dict(settings["entry"])
        facts.pop("files", None)
        task, how = TASKS[settings["task"]["name"]], {name: settings[name] for name in ("threads", "precision")}
        return Cell(task, Entry(**facts), settings["seed"], **how)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no record of a named task that this version knows: {error}") from error


def _check_shared(folder: Path, own: dict[str, Any], other: Path, first: dict[str, Any]) -> None:
    """Refuse a record whose scores mean something else than those of the first of its task."""
    differing = [name for name in SHARED if own[name] != first[name]]
    if differing:
        name = differing[0]
        fields = [name]
        if name == "task":
            theirs = first[name]
            fields = [f"task.{key}" for key, value in own[name].items() if value != theirs.get(key)]
        raise ValueError(
            f"{other} and {folder} cannot stand in one table: {preview(fields)} differs in {own['task']['name']}; "
            "run the benchmark with the same version, options and data"
        )


def _is_kept(cell: Cell, new: tuple[Path, Record], old: tuple[Path, Cell, Record]) -> bool:
    """Whether the record of another folder stays; two that contradict each other are refused."""
    file, record = new
    first, _, before = old
    if "ok" not in (record["status"], before["status"]) or record["status"] != before["status"]:
        return bool(before["status"] == "ok" or record["status"] != "ok")
    if record["settings"]["entry"] != before["settings"]["entry"]:
        raise ValueError(f"{first} and {file} are rows of the same name with other settings; give one another label")
    a, b = _values(before), _values(record)
    if not a.index.equals(b.index) or not np.allclose(a, b, rtol=ALIKE, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"{first} and {file} have other scores of {cell.entry.label!r}: the cells were not the same, or the "
            "machines compute differently; leave one of them out"
        )
    return True


def _values(record: Record) -> pd.Series:
    """Scores of a record by model, condition and metric."""
    scores = scores_of(record).set_index(["model", "condition", "metric"])
    return scores["value"].astype(float).sort_index()


def _rank(entry: Entry) -> int:
    """Models, then baselines, then the noise floor."""
    return 2 if entry.label == FLOOR else int(entry.label in {baseline.label for baseline in BASELINES})

"""`benchmark`: tasks x models x seeds, cell by cell, resumable; the tables of what came out."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from invirtuo.bench.cell import CONTROLS, LABELS, Cell, Record, failed, scores_of
from invirtuo.bench.engine import ENGINES
from invirtuo.bench.entry import BASELINES, FLOOR, Entry, Spec, as_entries
from invirtuo.bench.notes import DISCRIMINATION, FLAGS
from invirtuo.bench.paired import paired_differences
from invirtuo.bench.published import set_beside
from invirtuo.bench.task import Task
from invirtuo.bench.tasks import TASKS
from invirtuo.cells.files import writing
from invirtuo.cells.packed import Unpacked
from invirtuo.errors import preview, with_likely
from invirtuo.fit import bf16_pays
from invirtuo.metrics import choose
from invirtuo.metrics.scores import MEASURED
from invirtuo.models import MODELS
from invirtuo.reports import report

__all__ = [
    "benchmark",
    "chosen_entries",
    "one_task",
    "record_path",
    "resumable",
    "shared_plan",
    "software",
    "write_results",
    "write_table",
]

logger = logging.getLogger(__name__)

FIGURES = "paper"  # stands for the conditions that the paper of a task draws
COSTS = ("fit_seconds", "predict_seconds", "score_seconds", "peak_memory_mib", "parameters", "cpu_seconds")


def benchmark(
    tasks: Sequence[Task | str] | Task | str,
    models: Sequence[Spec] | Spec | None = None,
    seeds: int | Sequence[int] = 5,
    out: str | os.PathLike[str] = "results",
    engine: Literal["local", "ray"] = "local",
    *,
    baselines: bool = True,
    controls: Literal["train", "evaluated"] = "train",
    metrics: Sequence[str] | str | None = None,
    panels: Sequence[str] | str = (),
    n_jobs: int | None = None,
    threads: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Fit and score every model on every task with every seed, beside the simple baselines and the noise floor.

    Each cell of the grid is computed in a process of its own and kept as one file under ``cells/``, written completely
    or not at all. A benchmark that was killed goes on where it stopped, inside a fit too, and ends with equal tables.
    A cell that fails is reported and does not stop the rest; the next run tries it again.

    Parameters
    ----------
    tasks
        Names in ``bench.TASKS``, or :class:`Task` records.
    models
        Entries; names in ``MODELS``, ``model:preset``, ``module:Class`` or classes of your own; or JSON files of an
        entry (what `tune` writes) or of a list of them. None: every model that predicts.
    seeds
        Number of seeds (0, 1, ...), or the seeds.
    out
        Folder of the results: ``scores.csv`` (one row per task, model, seed, condition and metric), ``summary.csv``
        (mean and standard deviation over seeds), ``comparisons.csv`` (every two models, paired over conditions),
        ``published.csv`` (of tasks of a paper: its means, ours and the difference), ``panels.csv`` (cells to draw),
        ``costs.csv`` (seconds, memory, failures), ``run.json`` and ``report.html``.
    engine
        "local": processes on this machine, through joblib. "ray": a Ray cluster. Both give the same tables.
    baselines
        Add the simple baselines that are not among the models.
    controls
        Control cells from which models start that need some: those of training, or those of the evaluated part of the
        split, as PerturBench does. Effects are measured from the latter: a model that starts from training controls is
        rewarded where noise of the evaluated ones, which it shares with the real cells, is larger than the effects.
    metrics
        Metrics or profiles; None: those of each task.
    panels
        Tested conditions (names like ``"k562|A+B"``) whose predicted cells of the first seed are kept under
        ``predicted/`` and drawn beside the real ones in the report, all models with their scores; "paper": those that
        the paper of a task draws. Cells that an earlier call computed without them are not computed again.
    n_jobs
        Cells computed at a time; None: what the machine has room for.
    threads
        Threads of each cell, on which the last digits of its numbers depend; None: 1, or what the folder began with.
    data_dir
        Folder with data files, as in `invirtuo.datasets.load`.
    progress
        Show a progress bar.

    Returns
    -------
    pd.DataFrame
        The content of ``scores.csv``.

    Raises
    ------
    ValueError
        If a name is unknown, the data of a task are missing or not what they should be, or `out` holds cells that were
        made with other settings.
    """
    chosen = _tasks(tasks)
    entries = chosen_entries(models, baselines=baselines)
    wanted = _seeds(seeds)
    names = () if metrics is None else tuple(choose(metrics))
    if controls not in CONTROLS:
        raise ValueError(f"controls is {controls!r}; expected one of {', '.join(CONTROLS)}")
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    out = Path(out)

    # every entry on every task that it is for, with every seed
    shared = shared_plan(out, threads)
    shared |= {"metrics": names, "controls": controls, "work": str(out.resolve() / "work")}
    shared["data_dir"] = None if data_dir is None else str(Path(data_dir).resolve())
    grid = []
    for task in chosen:
        for entry in entries:
            is_lost = task.unseen and entry in BASELINES and not entry.kind.any_target
            if entry.task in (None, task.name) and not is_lost:
                grid += [Cell(task, entry, seed, **shared) for seed in wanted]

    # cells that an earlier call computed are read
    records = {cell.name: _read(out, cell) for cell in grid}
    missing = [cell for cell in grid if records[cell.name]["status"] != "ok"]
    # data that are not what they should be are refused before a process starts; packed ones are unpacked once
    data = {cell.task.name: cell.task for cell in missing}
    found = {name: task.look(shared["data_dir"]) for name, task in data.items()}
    drawn = _drawn([panels] if isinstance(panels, str) else panels, data, {name: found[name][1] for name in found})
    missing = [_to_compute(cell, found[cell.task.name][0], engine) for cell in missing]
    if drawn:
        kept = str(out.resolve() / "predicted")
        first = wanted[0]
        missing = [replace(c, drawn=drawn[c.task.name], kept=kept) if c.seed == first else c for c in missing]
    computed = ENGINES[engine](missing, n_jobs) if missing else []
    with resumable(out):
        for cell, record in _track(computed, len(missing), progress):
            if record["status"] != "ok":
                logger.warning("%s failed: %s", cell.name, record["error"])
            with writing(record_path(out, cell)) as path:
                path.write_text(json.dumps(record), encoding="utf-8")
            records[cell.name] = record
    kept_from_before = [cell.name for cell in grid if cell.seed == wanted[0] and not records[cell.name].get("points")]
    if panels and kept_from_before:
        logger.warning(
            "nothing to draw of %s: failed, or computed before without panels; delete these files of %s to compute "
            "them again",
            preview(kept_from_before),
            out / "cells",
        )
    return write_results(out, grid, [records[cell.name] for cell in grid])


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Add a note on how to go on to the exception, if the work in a folder is stopped by a signal."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(f"the same command, or call, resumes what is in {out}")
        raise


def write_page(out: Path, facts: Mapping[str, Any]) -> None:
    """Write down what was run, and make the page of the tables in the folder."""
    with writing(out / "run.json") as path:
        path.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    report(out, out / "report.html")


def software() -> dict[str, str]:
    """Versions of packages and machine, on which the last digits of numbers depend."""
    packages = {name: version(name) for name in ("invirtuo", "torch", "lightning", "anndata", "numpy")}
    return packages | {"python": platform.python_version(), "machine": platform.machine()}


# ---- what is wanted ------------------------------------------------------------------------------------------------


def _tasks(tasks: Sequence[Task | str] | Task | str) -> list[Task]:
    chosen = [one_task(task) for task in ([tasks] if isinstance(tasks, Task | str) else tasks)]
    if not chosen:
        raise ValueError(f"no task is named; known: {', '.join(TASKS)}")
    _refuse_repeats("tasks", [task.name for task in chosen])
    return chosen


def one_task(task: Task | str) -> Task:
    """A Task from itself or from its name."""
    if isinstance(task, str) and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    return TASKS[task] if isinstance(task, str) else task


def chosen_entries(
    models: Sequence[Spec] | Spec | None, *, baselines: bool, floor: bool = True, verb: str | None = "predict"
) -> list[Entry]:
    """Entries as asked for, the simple baselines that are missing, and the noise floor."""
    if models is None:
        models = [name for name, model in MODELS.items() if model.verb == "predict"]
    elif isinstance(models, Entry | str | Path | type):
        models = [models]
    chosen = [entry for spec in models for entry in as_entries(spec, verb)]
    if baselines:
        labels = {entry.label for entry in chosen}
        chosen += [entry for entry in BASELINES if entry.label not in labels]
    if floor:
        chosen.append(Entry(FLOOR, FLOOR))

    # rows of a task need labels of their own
    for name in {entry.task for entry in chosen}:
        rows = [label for entry in chosen if entry.task in (None, name) for label in entry.rows]
        _refuse_repeats("models", rows)
    return chosen


def _refuse_repeats(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} named more than once: {preview(repeated)}; give each its own label")


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    wanted = list(range(seeds)) if isinstance(seeds, int | np.integer) else [int(seed) for seed in seeds]
    if not wanted or min(wanted) < 0 or len(set(wanted)) < len(wanted):
        raise ValueError(f"seeds is {seeds}; expected a number above 0, or different numbers of at least 0")
    return wanted


def shared_plan(out: Path, threads: int | None) -> dict[str, Any]:
    """What all cells of a folder share, decided when the folder is begun."""
    path = out / "plan.json"
    if path.is_file():
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if threads not in (None, plan["threads"]):
            raise ValueError(
                f"{out} was begun with threads={plan['threads']}, now it is {threads}; results would not be the same "
                "in the last digits. Use another folder, or leave threads out"
            )
        return plan  # the measured precision stays, whatever this machine would choose
    plan = {"threads": threads or 1, "precision": "bf16" if bf16_pays() else "fp32"}
    with writing(path) as partial:
        partial.write_text(json.dumps(plan), encoding="utf-8")
    return plan


# ---- records -----------------------------------------------------------------------------------------------------


def record_path(out: Path, cell: Cell) -> Path:
    """Where the record of a cell lies."""
    return out / "cells" / f"{cell.name}.json"


def _read(out: Path, cell: Cell) -> Record:
    """The record of a cell, failed if there is none; one that was made with other settings is an error."""
    path = record_path(out, cell)
    if not path.is_file():
        return failed(cell, "not computed")
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        found = record["settings"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, and the cell is computed again") from error

    # a failed cell is computed again, whatever its settings
    wanted = json.loads(json.dumps(cell.settings()))
    differing = [name for name in wanted if wanted[name] != found.get(name)]
    if differing and record["status"] == "ok":
        name = differing[0]
        raise ValueError(
            f"{path} was made with other settings: {name} was {_short(found.get(name))}, now it is "
            f"{_short(wanted[name])}. Use another folder, or delete the file"
        )
    return record


def _to_compute(cell: Cell, file: str | os.PathLike[str], engine: str) -> Cell:
    """The cell, told where its data were unpacked to; machines of a cluster unpack for themselves."""
    if engine != "local" or not isinstance(file, Unpacked):
        return cell
    return replace(cell, file=os.fspath(file))


def _drawn(
    panels: Sequence[str], tasks: Mapping[str, Task], tested: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Conditions that are drawn of each task; nothing if none are."""
    if not panels:
        return {}
    chosen = {}
    for name, task in tasks.items():
        absent = [condition for condition in task.figures if condition not in tested[name]]
        if FIGURES in panels and absent:
            logger.warning("%s: not tested here, so not drawn: %s", name, preview(absent))
        asked = [condition for one in panels for condition in (task.figures if one == FIGURES else [one])]
        chosen[name] = tuple(condition for condition in dict.fromkeys(asked) if condition in tested[name])

    # a name of no task is a mistake
    known = {condition for conditions in tested.values() for condition in conditions}
    unknown = [condition for condition in panels if condition != FIGURES and condition not in known]
    if unknown and tasks:
        raise ValueError(
            f"panels: {unknown[0]!r} is no tested condition; found {with_likely(unknown[0], sorted(known))}"
        )
    return chosen


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else f"{text[:300]}..."


def _track(items: Iterable[tuple[Cell, Record]], total: int, progress: bool) -> Iterator[tuple[Cell, Record]]:
    if not progress or not total:
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as bar:
        task = bar.add_task("computing", total=total)
        for cell, record in items:
            bar.update(task, advance=1, description=f"{cell.name}: {record['status']}")
            yield cell, record


# ---- tables ------------------------------------------------------------------------------------------------------


def write_results(out: Path, grid: Sequence[Cell], records: Sequence[Record]) -> pd.DataFrame:
    """Write all tables and the report; gives the scores."""
    costs = _costs(grid, records)
    write_table(out / "costs.csv", costs)
    tables = [scores_of(record) for record in records if record["scores"] is not None]
    if not tables:
        raise ValueError(f"no cell was computed; the first said: {records[0]['error']}. See {out / 'costs.csv'}")
    scores = _joined(tables)
    write_table(out / "scores.csv", scores)
    summary = _summary(scores)
    write_table(out / "summary.csv", summary)
    published = set_beside(summary)
    if published["ours"].notna().any():
        write_table(out / "published.csv", published)
    write_table(out / "flags.csv", _notes(grid, records, "flags", FLAGS))
    write_table(out / "discrimination.csv", _notes(grid, records, "discrimination", DISCRIMINATION))
    points = _notes(grid, records, "points", ["model", "condition", "kind", "pc1", "pc2"])
    if len(points):
        write_table(out / "panels.csv", points.drop(columns="fold"))
    write_table(out / "comparisons.csv", paired_differences(scores[scores["model"] != FLOOR]))
    write_page(out, _facts(grid))
    return scores


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Scores of all cells; covariates of any task between condition and metric."""
    scores = pd.concat(tables, ignore_index=True)
    front = [*LABELS, "condition", "perturbation"]
    back = ["metric", *MEASURED]
    covariates = [name for name in scores if name not in (*front, *back)]
    return scores.reindex(columns=[*front, *covariates, *back])


def _summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over conditions, then mean and standard deviation (n - 1) over seeds."""
    keys = ["task", "model", "metric"]
    counts = scores.groupby(keys, sort=False)["value"].agg(n_scored="count", n="size")
    seed_means = scores.groupby([*keys, "seed"], sort=False)["value"].mean()
    summary = seed_means.groupby(keys, sort=False).agg(mean="mean", sd="std", n_seeds="size")
    summary["n_scored"] = counts["n_scored"]
    summary["n_nan"] = counts["n"] - counts["n_scored"]
    return summary.reset_index()


def _notes(grid: Sequence[Cell], records: Sequence[Record], kind: str, columns: Sequence[str]) -> pd.DataFrame:
    """What records say beside scores, by task and seed."""
    rows = []
    for cell, record in zip(grid, records, strict=True):
        for note in record.get(kind, []):
            rows.append({"task": cell.task.name, "seed": cell.seed, **note})
    return pd.DataFrame(rows, columns=["task", "seed", "fold", *columns])


def _costs(grid: Sequence[Cell], records: Sequence[Record]) -> pd.DataFrame:
    """One row for each row of an entry, task and seed: status, seconds, memory, parameters."""
    rows = []
    for cell, record in zip(grid, records, strict=True):
        costs = record["costs"]
        of_cell = {name: costs[name] for name in COSTS if name in costs}
        for label in cell.entry.rows:
            row = {"task": cell.task.name, "model": label, "seed": cell.seed}
            row |= {"status": record["status"], "error": record["error"]}
            row |= dict.fromkeys(COSTS, np.nan)
            rows.append(row | costs.get("rows", {}).get(label, {}) | of_cell)
    return pd.DataFrame(rows)


def _facts(grid: Sequence[Cell]) -> dict[str, Any]:
    tasks = {cell.task.name: cell.task.title for cell in grid}

    # models under the labels of the tables
    entries = {}
    for cell in grid:
        entry = cell.entry
        label = f"{entry.task}/{entry.label}" if entry.task else entry.label
        entries[label] = entry.describe()
    baselines = [entry.label for entry in BASELINES if entry.label in entries]
    seeds = {cell.seed for cell in grid}
    return {
        "title": f"Benchmark: {', '.join(tasks)}",
        "tasks": tasks,
        "baselines": baselines,
        "floor": FLOOR,
        "seeds": sorted(seeds),
        "threads": grid[0].threads,
        "precision": grid[0].precision,
        "models": entries,
        "software": software(),
    }


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, completely or not at all."""
    with writing(path) as partial:
        table.to_csv(partial, index=False)

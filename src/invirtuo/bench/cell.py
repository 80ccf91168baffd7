"""One cell of a benchmark: one entry, fitted and scored on one task with one seed, in a process of its own.

Run as a module it is that process: it reads a pickled :class:`Cell` of its parent from standard input and writes the
record to the file named on the command line, beside the number of the parent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from invirtuo.bench.entry import FLOOR, Entry
from invirtuo.bench.foreign import MIB, Foreign, end_commands
from invirtuo.bench.notes import copies, discrimination, flagged
from invirtuo.bench.panels import PAPER_CELLS, Axes, predicted_points, tested_points
from invirtuo.bench.question import Asked
from invirtuo.bench.task import Task
from invirtuo.cells.files import write_h5ad, writing
from invirtuo.metrics.numerics.axes import principal_axes
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import SampleConfig

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["Cell", "Record", "compute", "failed", "launch", "scores_of"]

Record = dict[str, Any]  # what is kept of a cell: its settings, status, scores and costs, as JSON
Notes = dict[str, list[dict[str, Any]]]  # rows of tables beside the scores, by kind
LABELS = ("task", "model", "seed")
LOGGED = 20_000  # last characters of what a command said that are kept
CONTROLS = ("train", "evaluated")  # parts of a split whose control cells models may start from


@dataclass(frozen=True)
class Cell:
    """One cell of the grid of a benchmark, with all that a process needs to compute it."""

    task: Task
    entry: Entry
    seed: int
    part: str = "test"  # which held-out conditions are predicted and scored
    metrics: tuple[str, ...] = ()  # empty: those of the task
    data_dir: str | None = None
    file: str | None = None  # where the data of the task were unpacked; None looks for them
    work: str | None = None  # folder for checkpoints
    drawn: tuple[str, ...] = ()  # tested conditions whose cells are kept and drawn
    kept: str | None = None  # folder for these predicted cells
    threads: int = 1
    controls: Literal["train", "evaluated"] = "train"  # cells that models start from
    # what precision="auto" of an entry means, so that a cell does not depend on its machine
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def name(self) -> str:
        """Name of the file with its record."""
        return f"{self.task.name}/{_file_name(self.entry.label)}/{self.seed}"

    def settings(self) -> dict[str, Any]:
        """All settings that the numbers depend on."""
        settings = {
            "task": self.task.describe(self.data_dir),
            "entry": self.entry.describe(),
            "seed": self.seed,
            "part": self.part,
            "metrics": list(self.metrics or self.task.metrics),
            "threads": self.threads,
            "precision": self.precision,
            "version": version("invirtuo"),
        }
        return settings if self.controls == "train" else settings | {"controls": self.controls}


class _Clock:
    """Seconds spent on the rows of an entry, by what they were spent on."""

    def __init__(self, labels: Iterable[str]):
        self.seconds = {label: dict.fromkeys(("fit", "predict", "score"), 0.0) for label in labels}
        self.of_commands: dict[str, float | None] = {}  # costs outside of this process
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()

    def add(self, what: str, label: str | None = None) -> None:
        """The time since the last call went to one row, or to all of them together."""
        spent = time.perf_counter() - self.started
        for name, seconds in self.seconds.items():
            seconds[what] += spent if label in (None, name) else 0.0
        self.restart()

    def add_command(self, costs: Mapping[str, float | None]) -> None:
        """Costs of a command, of which an entry has one for each split."""
        before = self.of_commands
        for name, value in costs.items():
            joined = max if name == "peak_memory_mib" else sum
            before[name] = value if value is None else joined((before.get(name) or 0, value))


def compute(cell: Cell) -> Record:
    """Fit, predict and score; an error is part of the record."""
    costs: dict[str, Any] = {}
    try:
        scores, costs, notes = _scores(cell)
    except Exception as error:  # noqa: BLE001 - one cell must not end the benchmark
        record = failed(cell, f"{type(error).__name__}: {error}", traceback.format_exc())
    else:
        record = failed(cell, "") | {"status": "ok", "scores": as_json(_in_order(scores)), **notes}

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    return record | {"costs": {"peak_memory_mib": round(peak), **costs}}


def launch(cell: Cell) -> Record:
    """:func:`compute` in a new process with a fixed number of threads; a process that dies is a failed cell."""
    import cloudpickle

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = os.environ | {name: str(cell.threads) for name in names}
    with tempfile.TemporaryDirectory(prefix="invirtuo-") as folder:
        out, log = Path(folder) / "record.json", Path(folder) / "log.txt"
        with log.open("wb") as messages:
            command = [sys.executable, "-m", "invirtuo.bench.cell", str(out), str(os.getpid())]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=messages, stderr=messages, env=environment
            ) as ended:
                try:
                    ended.communicate(cloudpickle.dumps(cell))
                except BaseException:
                    ended.terminate()  # and not kill: it ends what it began
                    raise

        # the record, or the last messages of a process that wrote none
        if out.is_file():
            record: Record = json.loads(out.read_text(encoding="utf-8"))
            return record
        last = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
    killed = f"was killed by signal {-ended.returncode}, perhaps for want of memory"
    how = killed if ended.returncode < 0 else f"ended with exit code {ended.returncode}"
    return failed(cell, f"the process {how}", last)


def failed(cell: Cell, error: str, trace: str = "") -> Record:
    """The record of a cell without scores."""
    return {
        "settings": cell.settings(),
        "status": "failed",
        "error": error,
        "traceback": trace,
        "costs": {},
        "scores": None,
        "flags": [],
        "discrimination": [],
        "points": [],
    }


def scores_of(record: Record) -> pd.DataFrame:
    """The scores of a record of a cell that was computed."""
    return pd.DataFrame(record["scores"]["rows"], columns=record["scores"]["columns"])


def _scores(cell: Cell) -> tuple[pd.DataFrame, dict[str, Any], Notes]:
    """Scores of a cell over all its splits; seconds and number of parameters; what is noted and drawn beside them."""
    # a task may have several splits; scores of all of them make a table
    clock = _Clock(cell.entry.rows)
    tables, n_parameters = [], 0
    notes: Notes = {"flags": [], "discrimination": [], "points": [], "logs": []}
    for fold in range(len(cell.task.splits)):
        adata, design, split = cell.task.load(fold, data_dir=cell.data_dir, file=cell.file)
        clock.restart()
        if cell.entry.model == FLOOR:
            table, known, points = _floor(cell, adata, design, split)
            tables.append(table)
            notes["discrimination"] += known.assign(fold=fold).to_dict("records")
            notes["points"] += points.to_dict("records")
            clock.add("score")
        else:
            table, n_parameters, beside = _fold(cell, fold, adata, design, split, clock)
            tables.append(table)
            for kind, found in beside.items():
                notes[kind] += found
    table = pd.concat(tables, ignore_index=True).assign(task=cell.task.name, seed=cell.seed)

    seconds: dict[str, dict[str, float]] = {}
    for label, spent in clock.seconds.items():
        seconds[label] = {f"{what}_seconds": round(value, 2) for what, value in spent.items()}
    return table, {"rows": seconds, "parameters": n_parameters, **clock.of_commands}, notes


def _fold(
    cell: Cell, fold: int, adata: AnnData, design: Design, split: pd.Series, clock: _Clock
) -> tuple[pd.DataFrame, int, Notes]:
    """Scores of an entry and its variants on one split, the number of parameters, what is suspect, cells to draw."""
    from invirtuo.metrics import Pair, score

    # fit, going on from the checkpoint of a benchmark that was stopped
    work = None if cell.work is None else Path(cell.work) / f"{_hash(cell.settings())}-{fold}"
    asked = Asked(cell.part, cell.task.n_cells, fold, cell.controls)
    model, fit = cell.entry.make(design, adata.var_names, asked)
    precision = cell.precision if fit.precision == "auto" else fit.precision
    fit = replace(fit, seed=cell.seed, progress=False, precision=precision, keep_checkpoints=True)
    model.fit(adata, split=split, config=fit, folder=work, resume=work is not None)
    clock.add("fit")

    # predict and score the entry and its variants, against the same real cells
    real = adata[(split == cell.part).to_numpy()].copy()
    common: dict[str, Any] = {"precision": cell.precision} if issubclass(model.Sampling, SampleConfig) else {}
    if cell.controls == "evaluated" and isinstance(model, PerturbationModel) and model.needs_source:
        common["controls"] = real[design.is_control(real.obs)]
    axes = principal_axes(real.X, 2) if cell.drawn else None
    pair, tables = None, []
    notes: Notes = {"flags": [], "points": [], "logs": []}
    if isinstance(model, Foreign):
        clock.add_command(model.costs)
        notes["logs"].append({"fold": fold, "text": model.log[-LOGGED:]})
    for label, options in cell.entry.rows.items():
        options = {**common, **options}
        predicted = model.predict(cell.part, n_cells=cell.task.n_cells, seed=cell.seed, **options)
        clock.add("predict", label)
        pair = Pair(predicted, real, design, n_pcs=cell.task.n_pcs) if pair is None else pair.against(predicted)
        tables.append(score(pair, cell.metrics or cell.task.metrics).assign(model=label))
        found = pd.concat([flagged(pair, label), copies(predicted, adata, design, split, cell.part, label)])
        notes["flags"] += found.assign(fold=fold).to_dict("records")
        if axes is not None:
            notes["points"] += _points(cell, predicted, label, design, axes)
        clock.add("score", label)
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return pd.concat(tables), sum(p.numel() for p in model.parameters()), notes


def _points(cell: Cell, predicted: AnnData, label: str, design: Design, axes: Axes) -> list[dict[str, Any]]:
    """Predicted cells of the conditions to draw, on the components of the tested cells; they are written down too."""
    names = design.names(predicted.obs)
    if cell.kept is not None and names.isin(cell.drawn).any():
        kept = predicted[names.isin(cell.drawn).to_numpy()].copy()
        write_h5ad(kept, Path(cell.kept) / cell.task.name / _file_name(label) / f"{cell.seed}.h5ad")
    rows: list[dict[str, Any]] = []
    for condition in cell.drawn:
        own = predicted[(names == condition).to_numpy()]
        if own.n_obs:
            rows += predicted_points(own, label, design, axes, cell.seed, PAPER_CELLS).to_dict("records")
    return rows


def _floor(
    cell: Cell, adata: AnnData, design: Design, split: pd.Series
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Scores of halves of the real cells of held-out conditions, how metrics discriminate on them, cells to draw."""
    from invirtuo.metrics import noise_floor

    real = adata[(split == cell.part).to_numpy()].copy()
    trained = set(design.names(adata.obs[(split == "train").to_numpy()]))
    metrics, n_pcs = cell.metrics or cell.task.metrics, cell.task.n_pcs
    table = noise_floor(real, design, metrics, n_pcs=n_pcs, seed=cell.seed)
    known = discrimination(real, design, metrics, n_pcs=n_pcs, seed=cell.seed)
    if not cell.drawn:
        return table[~table["condition"].isin(trained)].assign(model=FLOOR), known, pd.DataFrame()
    points = tested_points(real, design, principal_axes(real.X, 2), cell.drawn, cell.seed)
    return table[~table["condition"].isin(trained)].assign(model=FLOOR), known, points


def as_json(scores: pd.DataFrame) -> dict[str, Any]:
    """A table that :func:`scores_of` a record reads to the last digit."""
    table = scores.astype(object)
    return {"columns": list(table), "rows": table.where(table.notna(), None).to_numpy().tolist()}


def _in_order(scores: pd.DataFrame) -> pd.DataFrame:
    """Columns that identify a row first."""
    front = [*LABELS, "condition"]
    return scores[front + [name for name in scores if name not in front]]


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _file_name(label: str) -> str:
    """A label as part of a file name; labels that differ give names that differ."""
    plain = "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in label)
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, so that a restarted benchmark never meets an old worker."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        end_commands()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(number: int, _: object) -> None:
    """End this process, and commands, which have process groups of their own."""
    end_commands()
    os._exit(128 + number)


def _main() -> None:
    _end_with(int(sys.argv[2]))  # the parent may be gone by now
    signal.signal(signal.SIGTERM, _end)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cell = pickle.loads(sys.stdin.buffer.read())  # of the parent process
    import torch

    torch.set_num_threads(cell.threads)
    record = compute(cell)
    with writing(sys.argv[1]) as path:
        path.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    _main()

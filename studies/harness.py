"""What all studies share: their list, rows that are kept, clocks and processes of their own, fits and scores."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from invirtuo.threads import VARIABLES

ROOT = Path(__file__).parents[1]
SERVE = "from studies.harness import serve; serve()"

# ---- the list ------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """A function and the options of its smallest run."""

    run: Callable[..., Any]
    quick: dict[str, Any]


STUDIES: dict[str, Study] = {}
Tables = dict[str, pd.DataFrame]  # by name


def study(quick: Mapping[str, Any] | None = None) -> Callable:
    """Make a function a study, named like its module, with its own name behind if that is another.

    Its keywords become options, what comes before them arguments; the Parameters of its docstring describe them. What
    it returns, tables by name, is printed and written to OUT/NAME.csv. `quick` are the options of ``--quick``.
    """

    def register(function: Callable) -> Callable:
        module = function.__module__.rpartition(".")[2]
        own = function.__name__
        name = module if own == module else f"{module}-{own}"
        STUDIES[name.replace("_", "-")] = Study(function, dict(quick or {}))
        return function

    return register


# ---- rows ----------------------------------------------------------------------------------------------------------


class Failed(RuntimeError):
    """A case that could not be measured; the others go on without it."""


class Rows:
    """A CSV file of tidy rows that grows case by case; a case whose rows are there is not computed again."""

    def __init__(self, path: Path):
        self.path = path
        self.table = pd.DataFrame()
        if path.exists():
            self.table = pd.read_csv(path, float_precision="round_trip")

    def has(self, case: Mapping[str, Any]) -> bool:
        """Whether there are rows of a case."""
        return bool(self._of(case).any())

    def add(self, case: Mapping[str, Any], rows: pd.DataFrame | Mapping | Sequence[Mapping]) -> None:
        """Put the rows of a case in the place of those it had, and write the file."""
        from invirtuo.cells.files import writing

        rows = pd.DataFrame([rows] if isinstance(rows, Mapping) else rows).reset_index(drop=True)
        others = [column for column in rows if column not in case]
        rows = rows.assign(**case)[[*case, *others]]
        before = self.table[~self._of(case)]
        self.table = pd.concat([before, rows], ignore_index=True) if len(before) else rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path) as unfinished:
            self.table.to_csv(unfinished, index=False)

    def fill(self, cases: Iterable[Mapping[str, Any]], compute: Callable, jobs: int = 1) -> pd.DataFrame:
        """Compute the cases that are missing, in their order, and give the whole table.

        Parameters
        ----------
        cases
            What tells one case from the others: names of columns and their values, strings or numbers.
        compute
            Gives the row or rows of a case, whose values it takes as keywords; a case that raises `Failed` is left out.
        jobs
            Processes that compute.
        """
        from joblib import Parallel, delayed

        cases = list(cases)
        missing = [case for case in cases if not self.has(case)]
        if len(missing) < len(cases):
            print(f"{len(cases) - len(missing)} of {len(cases)} cases are in {self.path}", flush=True)
        found = Parallel(jobs, return_as="generator")(delayed(_computed)(compute, case) for case in missing)
        for case, (rows, seconds) in zip(missing, found, strict=True):
            name = ", ".join(f"{key} {value}" for key, value in case.items())
            if isinstance(rows, Failed):
                print(f"{name}: left out, {rows}", flush=True)
                continue
            self.add(case, rows)
            print(f"{name}: {seconds:.1f} s", flush=True)
        if self.table.empty:
            raise Failed("no case could be computed")
        return self.table

    def _of(self, case: Mapping[str, Any]) -> pd.Series:
        """Which rows are those of a case."""
        found = pd.Series(True, index=self.table.index)
        for column, value in case.items():
            if column not in self.table:
                return pd.Series(False, index=self.table.index)
            found &= self.table[column].astype(str) == str(value)
        return found


def _computed(compute: Callable, case: Mapping[str, Any]) -> tuple[Any, float]:
    """Rows of a case, or why there are none, and wall seconds."""
    started = time.perf_counter()
    try:
        rows = compute(**case)
    except Failed as failure:
        rows = failure
    return rows, time.perf_counter() - started


def grid(**axes: Iterable) -> list[dict[str, Any]]:
    """A case for every combination of values, the last of them changing fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def filled(path: Path, compute: Callable, jobs: int = 1, **axes: Iterable) -> pd.DataFrame:
    """All rows of a grid of cases, those computed that the file lacks; see `Rows.fill`."""
    return Rows(path).fill(grid(**axes), compute, jobs)


def over_seeds(table: pd.DataFrame, by: Sequence[str], values: str | list[str] = "value") -> pd.DataFrame:
    """Mean and standard deviation over seeds, in each of which rows are averaged first."""
    by = list(by)
    means = table.groupby([*by, "seed"], sort=False)[values].mean()
    return means.groupby(by, sort=False).agg(["mean", "std"])


# ---- clocks and processes ------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    return time.process_time() + sum(os.times()[2:4])


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage has at least what the parent had
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


@contextmanager
def spent() -> Iterator[dict[str, float]]:
    """CPU and wall seconds of a block: a dictionary that is filled at its end."""
    cost: dict[str, float] = {}
    cpu, wall = cpu_seconds(), time.perf_counter()
    yield cost
    cost["cpu_seconds"] = cpu_seconds() - cpu
    cost["wall_seconds"] = time.perf_counter() - wall


def in_turn(functions: Mapping[str, Callable], repeats: int, clock: Callable = time.process_time) -> pd.DataFrame:
    """Seconds of several functions that take turns, a column each; a first turn warms up and does not count."""
    rows = []
    for _ in range(repeats + 1):
        row = {}
        for name, function in functions.items():
            started = clock()
            function()
            row[name] = clock() - started
        rows.append(row)
    return pd.DataFrame(rows[1:])


def process(
    command: Sequence, threads: int = 1, limit: float | None = None, environment: Mapping[str, str] | None = None
) -> tuple[str, dict[str, float]]:
    """Run a command to its end; its standard output, and CPU seconds, wall seconds and peak memory with its children.

    Linux counts the memory of this process at the start as a child's own: no peak is smaller.

    Raises
    ------
    Failed
        If it exits with an error, or takes longer than `limit` seconds.
    """
    variables = os.environ | dict.fromkeys(VARIABLES, str(threads)) | dict(environment or {})
    folders = (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH"))
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(list(map(str, command)), env=variables, stdout=output, stderr=log)
        timer = threading.Timer(limit or threading.TIMEOUT_MAX, child.kill)
        timer.daemon = True
        timer.start()
        _, status, used = os.wait4(child.pid, 0)
        timer.cancel()
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode and limit and wall >= limit:
            raise Failed(f"not done after {limit:g} s")
        if child.returncode:
            log.seek(0)
            raise Failed(f"{command[0]} ended with {child.returncode}:\n{log.read()[-3000:]}")
        output.seek(0)
        cost = {"cpu_seconds": used.ru_utime + used.ru_stime, "wall_seconds": wall, "peak_gib": used.ru_maxrss / 2**20}
        return output.read(), cost


def apart(
    function: Callable,
    *,
    python: str | Path = sys.executable,
    threads: int = 1,
    limit: float | None = None,
    environment: Mapping[str, str] | None = None,
    **options,
) -> dict[str, Any]:
    """Call a function of a study in a process of its own: what it returns, a dictionary, over what the process cost.

    Parameters
    ----------
    function
        At the top of a module of studies; for an interpreter of another environment, of one that imports nothing else.
    options
        Its keywords, as far as JSON has them; paths become strings.
    """
    call = [function.__module__, function.__name__, json.dumps(options, default=str)]
    output, cost = process([python, "-W", "ignore", "-c", SERVE, *call], threads, limit, environment)
    return cost | json.loads(output.splitlines()[-1])


def serve() -> None:
    """Be the process of `apart`."""
    module, name, options = sys.argv[1:]
    found = getattr(import_module(module), name)(**json.loads(options))
    print(json.dumps({"peak_gib": peak_gib()} | dict(found or {})))


# ---- fits and scores -----------------------------------------------------------------------------------------------


def part(cells, split: pd.Series, name: str):
    """The cells of one part of a split."""
    return cells[(split == name).to_numpy()].copy()


def fit(model, cells, split=None, *, callbacks=(), **settings):
    """Fit a model as it would be, without a progress bar and but for some fields of its FitConfig."""
    config = replace(model.fit_config, **{"progress": False} | settings)
    return model.fit(cells, split, config, callbacks=callbacks)


def mean_scores(pair, metrics: Sequence[str], conditions=None) -> dict[str, float]:
    """Mean of every metric over some conditions, by default all."""
    from invirtuo.metrics import score

    scores = score(pair, metrics)
    if conditions is not None:
        scores = scores[scores["condition"].isin(conditions)]
    return scores.groupby("metric")["value"].mean().reindex(list(metrics)).to_dict()

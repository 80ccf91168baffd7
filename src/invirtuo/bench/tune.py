"""`tune`: choose hyperparameters of a model on the validation conditions of a task."""

from __future__ import annotations

import json
import logging
import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from invirtuo.bench.cell import Cell, Record, launch, scores_of
from invirtuo.bench.entry import Entry, as_entry
from invirtuo.bench.run import one_task, resumable, shared_plan, write_table
from invirtuo.bench.task import Task
from invirtuo.cells.files import writing
from invirtuo.metrics import METRICS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

__all__ = ["PERTURBENCH", "tune"]

logger = logging.getLogger(__name__)

PERTURBENCH = {"rmse_mean": 1.0, "rmse_mean_rank": 0.1}  # objective of PerturBench
STARTUP = 5  # random trials before the sampler learns


def tune(
    model: Entry | str,
    task: Task | str,
    trials: int = 20,
    out: str | os.PathLike[str] = "tuned",
    *,
    objective: Mapping[str, float] = PERTURBENCH,
    search: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Entry:
    """Search hyperparameters with Optuna's TPE sampler; a search that was killed goes on where it stopped.

    Parameters
    ----------
    model
        Entry, name in ``MODELS``, or ``model:preset``; what is not searched keeps its setting.
    task
        Name in ``bench.TASKS`` or a :class:`Task`; its validation conditions are predicted and scored.
    trials
        Number of trials that end, with or without a value; those of earlier runs in `out` count. The first is the
        entry's own setting, whatever the ranges; the draws of the others depend on `seed` and the entry's label.
    out
        Folder for ``study.log`` (all trials, for Optuna), ``trials.csv`` and ``best.json``, an entry that `benchmark`
        takes.
    objective
        Metric to weight; the weighted sum of the means over conditions is minimised. Metrics of which more is better
        need a negative weight.
    search
        Field of the model's Config, or ``fit.`` and a field of FitConfig, to (low, high) or a list of choices; None
        takes the ``SEARCH`` of the model, as much wider as the entry's own values need. Two numbers are searched on a
        log scale if both are above 0.
    seed
        Of the search and of the fits.
    threads, data_dir, progress
        As in `benchmark`.

    Returns
    -------
    Entry
        With the best setting, also in ``best.json``.

    Raises
    ------
    ValueError
        If the model has nothing to search, a name is unknown, the task holds out no validation conditions, no trial
        ended with a value, or `out` holds a search for something else.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ValueError("tune needs the package optuna: pip install 'invirtuo[tune]'") from error

    # the search is checked before a study is opened
    seed = int(seed)
    entry, chosen = as_entry(model), one_task(task)
    unknown = [name for name in objective if name not in METRICS]
    if unknown or not objective:
        raise ValueError(f"objective names unknown metrics: {unknown or 'none named'}; see `invirtuo list metrics`")
    if trials < 1:
        raise ValueError(f"trials is {trials}; expected at least 1")
    space = _space(entry, search)

    # the study in the folder, if it is a search for the same
    out = Path(out)
    plan = shared_plan(out, threads)
    _check_same(out / "search.json", entry, chosen, objective, space, seed)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(out / "study.log")))
    study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
    for unfinished in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a run that was killed
        study.tell(unfinished.number, state=optuna.trial.TrialState.FAIL)

    # trial by trial, each a cell of a benchmark on the validation conditions
    shared = {**plan, "part": "val", "metrics": tuple(objective), "work": str(out.resolve() / "work")}
    shared["data_dir"] = None if data_dir is None else str(Path(data_dir).resolve())
    with resumable(out):
        for number in _numbers(len(_ended(study)), trials, progress):
            # the first trial is the entry itself, also where a range cannot hold its value
            fixed = {} if number else _own(entry, space)
            study.sampler = _sampler(_draw_seed(seed, entry, number), fixed)
            trial = study.ask()
            searched = space if number else fixed
            values = {name: _suggest(trial, name, space[name]) for name in searched}
            candidate = replace(_candidate(entry, values), variants={})
            cell = Cell(chosen, candidate, seed, **shared)
            _tell(study, trial, launch(cell), objective)
            _write(out, entry, study)
    return _best(entry, study)


def _draw_seed(seed: int, entry: Entry, number: int) -> int:
    """Seed of the draws of a trial: entries that are searched beside each other draw different settings."""
    return zlib.crc32(f"{seed} {entry.label} {number}".encode())


def _sampler(seed: int, fixed: dict[str, Any]) -> BaseSampler:
    """A sampler whose draws depend on its seed alone, so that a resumed search draws the same."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
    if not fixed:
        return sampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(fixed, sampler)


def _own(entry: Entry, space: Mapping[str, Any]) -> dict[str, Any]:
    """The entry's own values of what is searched, where the search could draw them."""
    found = {}
    for name, value in _settings(entry).items():
        choice = space.get(name, [])
        can_be_drawn = value in choice if isinstance(choice, list) else choice[0] <= value <= choice[1]
        if can_be_drawn:
            found[name] = value
    return found


def _settings(entry: Entry) -> dict[str, Any]:
    """All fields of the entry by the names under which they are searched."""
    config, fit = map(asdict, entry.settings())
    return config | {f"fit.{name}": value for name, value in fit.items()}


def _widened(choice: Any, value: Any) -> Any:
    """A range or a list of choices that holds the value too; a log scale stays one, and None is in no range."""
    if isinstance(choice, list):
        return choice if value in choice else [*choice, value]
    low, high = choice
    if value is None or low > 0 >= value:
        return choice
    return min(low, value), max(high, value)


def _ended(study: Study) -> list[FrozenTrial]:
    """Trials that ended by themselves, with a value or with a reason."""
    return [trial for trial in study.get_trials() if trial.state.is_finished() and "seconds" in trial.user_attrs]


def _numbers(done: int, trials: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(done, trials)
    from rich.progress import track

    return track(range(done, trials), description="tuning", total=trials - done)


def _tell(study: Study, trial: Trial, record: Record, objective: Mapping[str, float]) -> None:
    """Report the record of a trial to the study: its value, or why it has none."""
    import optuna

    spent = record["costs"].get("rows", {})
    trial.set_user_attr("seconds", sum(sum(seconds.values()) for seconds in spent.values()))

    # weighted sum of the means over conditions
    value, error = math.nan, record["error"]
    if record["scores"] is not None:
        means = scores_of(record).groupby("metric")["value"].mean()
        # a rank among others is NaN in every trial where there is one perturbation, and decides nothing
        undefined = [name for name in objective if METRICS[name].relative and math.isnan(means[name])]
        scored = {name: float(means[name]) for name in objective if name in means and name not in undefined}
        for name, mean in scored.items():
            trial.set_user_attr(name, mean)
        value = sum(objective[name] * mean for name, mean in scored.items()) if scored else math.nan
        error = "" if math.isfinite(value) else "the objective is not finite"

    if math.isfinite(value):
        study.tell(trial, value)
        return
    trial.set_user_attr("error", error)
    logger.warning("trial %d failed: %s", trial.number, error)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _space(entry: Entry, search: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is searched, checked."""
    model = entry.kind
    own = _settings(entry)
    space = dict(search or {})
    if search is None:
        space = {name: _widened(choice, own[name]) for name, choice in model.SEARCH.items()}
    if not space:
        raise ValueError(f"{entry.model} has nothing to search; name fields with search= or choose another model")
    unknown = sorted(set(space) - set(own))
    if unknown:
        raise ValueError(f"cannot search {', '.join(unknown)}; known: {', '.join(sorted(own))}")
    for name, choice in space.items():
        is_range = isinstance(choice, tuple) and len(choice) == 2 and choice[0] < choice[1]
        if not is_range and not (isinstance(choice, list) and choice):
            raise ValueError(f"search of {name} is {choice!r}; expected (low, high) or a list of choices")
    return space


def _suggest(trial: Trial, name: str, choice: Any) -> Any:
    if isinstance(choice, list):
        return trial.suggest_categorical(name, choice)
    low, high = choice
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=low > 0)
    return trial.suggest_float(name, low, high, log=low > 0)


def _candidate(entry: Entry, values: Mapping[str, Any]) -> Entry:
    """The entry with these fields of its Config and FitConfig replaced."""
    config, fit = map(asdict, entry.settings())
    config |= {name: value for name, value in values.items() if not name.startswith("fit.")}
    fit |= {name.removeprefix("fit."): value for name, value in values.items() if name.startswith("fit.")}
    return replace(entry, config=config, fit=fit)


def _best(entry: Entry, study: Study) -> Entry:
    try:
        return _candidate(entry, study.best_params)
    except ValueError:
        reasons = [trial.user_attrs.get("error") for trial in _ended(study)]
        raise ValueError(f"no trial ended with a value; the last said: {reasons[-1]}") from None


def _write(out: Path, entry: Entry, study: Study) -> None:
    """Write the trials that ended, and the best of them."""
    rows = []
    for i, trial in enumerate(_ended(study)):
        row = {"trial": i, "state": trial.state.name.lower(), "value": trial.value}
        rows.append({**row, **trial.params, **trial.user_attrs})
    write_table(out / "trials.csv", pd.DataFrame(rows))
    if any(row["state"] == "complete" for row in rows):
        with writing(out / "best.json") as path:
            path.write_text(json.dumps(_best(entry, study).describe(), indent=2), encoding="utf-8")


def _check_same(
    path: Path, entry: Entry, task: Task, objective: Mapping[str, float], space: Mapping[str, Any], seed: int
) -> None:
    wanted = {"entry": entry.describe(), "task": task.describe(), "objective": objective, "space": space, "seed": seed}
    wanted = json.loads(json.dumps(wanted))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in wanted if wanted[name] != found.get(name)]
        if differing:
            raise ValueError(f"{path.parent} holds a search with another {differing[0]}; use another folder")
        return
    with writing(path) as partial:
        partial.write_text(json.dumps(wanted, indent=2), encoding="utf-8")

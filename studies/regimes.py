"""What can be said of a new context, a new target, both, and pairs: networks beside closed forms, regime by regime.

Targets that were seen nowhere are known by the GO terms of their genes. `mean of the others`: the mean effect of the
same perturbation in other contexts where there is one, else of all perturbations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from invirtuo import splits
from invirtuo.bench import TASKS, Entry, Task, benchmark, paired_differences
from studies.comparison import NOTHING
from studies.harness import Tables, study

MEAN = "mean of the others"
EVERYBODY = Entry("mean of all", "ridge", {"kernel": "rbf", "mode": "move_cells", "penalty": 1e6})
KNOWN = (
    Entry(MEAN, "perturbation_mean", "move-cells"),
    EVERYBODY,
    Entry("magnitude only", "magnitude_only", "move-cells"),
    Entry("fold change", "fold_change"),
)
EITHER = (
    Entry("ridge", "ridge", {"mode": "move_cells", "penalty": 1.0}),
    Entry("kernel ridge", "ridge", {"kernel": "rbf", "mode": "move_cells"}),
    Entry("kernel ridge, penalty 1", "ridge", {"kernel": "rbf", "mode": "move_cells", "penalty": 1.0}),
    Entry("primeflow", "primeflow", None, {"steps": 500}),
    Entry("state_transition", "state_transition", None, {"steps": 500}),
)
ROWS = tuple(entry.label for entry in (*KNOWN, *EITHER))


def without(name: str, dataset: str, n_folds: int, **options: object) -> Task:
    """A task whose targets were seen nowhere, each tested once, told by the gene sets of `papalexi-target`."""
    folds = tuple(partial(splits.unseen_targets, fold=fold, n_folds=n_folds, **options) for fold in range(n_folds))
    return replace(TASKS["papalexi-target"], name=name, dataset=dataset, splits=folds, keep=None)


OTHERS = (
    NOTHING,
    without("norman-mini-target", "norman_mini", 5),
    without("mcfaline-target", "mcfaline_mini", 3),
    without("mcfaline-both", "mcfaline_mini", 3, contexts=("T98G",)),
)
JUDGED: dict[str, Task] = {
    name: {**TASKS, **{task.name: task for task in OTHERS}}[name]
    for name in ("kang-celltype", "papalexi-replicate", "mcfaline-null", "papalexi-target", "norman-mini-target",
                 "mcfaline-target", "papalexi-both", "mcfaline-both", "norman-mini-combo")
}  # fmt: skip


@study(quick={"tasks": ["papalexi-both"], "models": ["kernel ridge"]})
def regimes(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = tuple(JUDGED),
    models: Sequence[str] = ROWS,
    seeds: int = 1,
    jobs: int = 1,
) -> Tables:
    """What can be said of new contexts, new targets, both, and pairs.

    Parameters
    ----------
    models
        Rows beside the mean of the others.
    """
    judged = [replace(JUDGED[name], n_cells=300) for name in tasks]
    entries = [
        replace(entry, task=task.name)
        for task in judged
        for entry in (*((replace(EVERYBODY, label=MEAN),) if task.unseen else KNOWN), *EITHER)
        if entry.label in (MEAN, *models)
    ]
    scores = benchmark(judged, entries, seeds, out, controls="evaluated", n_jobs=jobs, data_dir=data_dir, progress=True)
    seen = pd.concat({task.name: regimes_of(task, data_dir) for task in judged}, names=["task", "condition"])
    scores = scores.merge(seen.rename("regime").reset_index(), on=["task", "condition"])

    means = scores.groupby(["regime", "task", "model", "metric"], sort=False)["value"].mean().unstack("metric")
    alike = scores.groupby("regime", sort=False)
    differences = pd.concat({regime: paired_differences(own) for regime, own in alike}, names=["regime"])
    return {"means": means, "differences": differences[differences["against"] == MEAN]}


def regimes_of(task: Task, data_dir: str | None) -> pd.Series:
    """Regime of every tested condition of a task."""
    found = []
    for fold in range(len(task.splits)):
        adata, design, split = task.load(fold, data_dir=data_dir)
        found.append(splits.regimes(adata.obs, design, split))
    return pd.concat(found)

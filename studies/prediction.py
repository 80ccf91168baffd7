"""What predictions of PRiMeFlow promise and what guidance does to them, on conditions that were never seen.

prediction-effects: intervals are made to cover a share of all genes' effects, calibrated on the validation conditions
of a task; how many do they cover on its test conditions, and how wide are they, for each model and for all seeds taken
together?

prediction-guidance: weights of classifier-free guidance, each acting all the time, early, in the middle or late.

Models are fitted once and kept in OUT/models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd

import invirtuo as iv
from invirtuo.bench import TASKS
from invirtuo.bench import effects as effects_of
from invirtuo.metrics import Pair
from invirtuo.reports.effects import coverage
from studies.harness import Rows, Tables, filled, fit, mean_scores, part, study

KANG_AND_PAPALEXI = ("kang-celltype", "kang-donor", "papalexi-replicate")
METRICS = ("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean", "variance_ratio")
MODELS = {"primeflow": None, "perturbation_mean": "shift-cells"}
LARGEST = 50  # predicted effects of a condition that are looked at by themselves
LEVELS = (0.5, 0.8, 0.9, 0.95)
WEIGHTS = (1.0, 1.5, 2.0, 3.0)
WINDOWS = ((0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0))


@cache
def loaded(task: str, data_dir: str | None):
    """Cells, Design and split of a task, at most 500 genes."""
    found = TASKS[task]
    return replace(found, n_genes=found.n_genes and min(found.n_genes, 500)).load(0, data_dir=data_dir)


def fitted(task: str, kind: str, seed: int, *, out: Path, data_dir: str | None, steps: int):
    """A model of one seed, from its folder if it has been fitted before."""
    folder = out / "models" / task / kind / str(seed)
    if not (folder / "config.json").exists():
        adata, design, split = loaded(task, data_dir)
        model = iv.models.MODELS[kind](design, adata.var_names, MODELS[kind])
        fit(model, adata, split, steps=steps, seed=seed).save(folder)
    return iv.load(folder)


@study(quick={"tasks": ["kang-celltype"], "seeds": 1, "steps": 2, "cells": 20})
def effects(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = KANG_AND_PAPALEXI,
    seeds: int = 3,
    steps: int = 800,
    cells: int = 300,
) -> Tables:
    """Coverage and width of intervals of effects on test conditions."""
    together = f"all {seeds}"

    def one(task: str, model: str, seed: str) -> list[dict]:
        group = range(seeds) if seed == together else [int(seed)]
        models = [fitted(task, model, k, out=out, data_dir=data_dir, steps=steps) for k in group]
        adata, _, _ = loaded(task, data_dir)
        tables = {level: effects_of(models, adata, level=level, n_cells=cells) for level in LEVELS}
        return [{"level": level} | of_intervals(table) for level, table in tables.items()]

    table = filled(out / "effects.csv", one, task=tasks, model=MODELS, seed=[*map(str, range(seeds)), together])
    label = table["seed"].astype(str)
    table = table.drop(columns="seed").assign(of=label.where(label.str.startswith("all"), "each alone"))
    return {"effects-summary": table.groupby(["task", "model", "level", "of"]).mean(numeric_only=True)}


def of_intervals(table: pd.DataFrame) -> dict[str, float]:
    """Coverage, width and error, of all genes and of the largest predicted effects of each condition."""
    rank = table["effect"].abs().groupby(table["condition"]).rank(ascending=False)
    row = {}
    for genes, chosen in (("all", table), ("large", table[rank <= LARGEST])):
        row |= {
            f"covered, {genes}": coverage(chosen),
            f"half-width, {genes}": (chosen["high"] - chosen["low"]).mean() / 2,
            f"error, {genes}": (chosen["effect"] - chosen["real"]).abs().mean(),
            f"effect, {genes}": chosen["effect"].abs().mean(),
        }
    return row


@study(quick={"tasks": ["kang-celltype"], "seeds": 1, "steps": 2, "cells": 20})
def guidance(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = KANG_AND_PAPALEXI,
    seeds: int = 3,
    steps: int = 800,
    cells: int = 300,
) -> Tables:
    """Scores of PRiMeFlow by the weight of guidance and where on the path it acts."""
    pairs: dict[str, Pair] = {}

    def one(task: str, seed: int, weight: float, start: float, end: float) -> dict:
        adata, design, split = loaded(task, data_dir)
        model = fitted(task, "primeflow", seed, out=out, data_dir=data_dir, steps=steps)
        drawn = model.predict("test", cells, guidance=weight, interval=(start, end), seed=seed)
        if task not in pairs:
            pairs[task] = Pair(drawn, part(adata, split, "test"), design, n_pcs=30)
        pairs[task] = pairs[task].against(drawn)
        return mean_scores(pairs[task], METRICS, design.names(drawn.obs).unique())

    cases = [
        {"task": task, "seed": seed, "weight": weight, "start": start, "end": end}
        for task, seed, weight in product(tasks, range(seeds), WEIGHTS)
        for start, end in (WINDOWS if weight != 1 else WINDOWS[:1])
    ]
    table = Rows(out / "guidance.csv").fill(cases, one)
    keys = ["task", "weight", "start", "end"]
    return {"guidance-summary": table.groupby(keys)[list(METRICS)].mean()}

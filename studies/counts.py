"""Predictions as whole counts: under the yardstick of the Virtual Cell Challenge 2026, and as populations of cells.

Knock-outs of Papalexi replicate 2, learned from the other two, all of them; types of Kang that were never seen
responding. Every model predicts counts; CFGen draws them from a model in counts. Rows "fresh depths" are the same cells
of a model in log space with depths of other control cells, drawn at random, and rounding at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata
import numpy as np
from scipy import sparse

import invirtuo as iv
from invirtuo import splits
from invirtuo.bench import TASKS, Entry
from invirtuo.cells.values import log_normalised
from invirtuo.metrics import challenge_score
from studies.comparison import task_of
from studies.harness import Tables, filled, over_seeds, part, spent, study

METRICS = ("c2st", "zeros_distance", "mmd_gex", "deg_recall", "de_false_calls", "de_recall_at_fdr", "de_recall_active")
ENTRIES = {
    entry.label: entry
    for entry in (
        Entry("no_change", "no_change"),
        Entry("perturbation_mean:move-cells", "perturbation_mean", "move-cells"),
        Entry("fold_change", "fold_change"),
        Entry("ridge:move-cells", "ridge", "move-cells"),
        Entry("primeflow", "primeflow", None, {"steps": 800}),
        Entry("ST", "state_transition", None, {"steps": 800}),
        Entry("fm_pca", "fm_pca", None, {"steps": 1500}),
        Entry("cpa", "cpa"),
        Entry("cfgen", "cfgen", {"conditioning": "joint"}),
    )
}
REPLICATE_2 = replace(
    TASKS["papalexi-replicate"], splits=(partial(splits.hold_out, conditions=({"replicate": "rep_2"},)),)
)
QUESTIONS = {"papalexi-replicate-2": REPLICATE_2, "kang-celltype": task_of("kang-celltype")}


def judged(task: str, model: str, seed: int, *, data_dir: str | None) -> list[dict]:
    """Scores of the counts of one fit."""
    adata, design, split = QUESTIONS[task].load(0, data_dir=data_dir)
    fitted, fit = ENTRIES[model].make(design, adata.var_names)
    cells = adata
    if model == "cfgen":
        cells = adata.copy()
        cells.X = cells.layers["counts"]
    with spent() as cost:
        fitted.fit(cells, split, replace(fit, seed=seed, progress=False))
        predicted = {"counts": fitted.predict("test", 300, seed=seed, output="counts")}
    real = part(adata, split, "test")
    real.X = real.layers["counts"]
    if model in ("primeflow", "no_change"):
        train = part(adata, split, "train")
        predicted["fresh depths"] = fresh(fitted.predict("test", 300, seed=seed), train, design, seed)

    rows = []
    targets = None if task.startswith("papalexi") else {"*": None}
    for emission, counts in predicted.items():
        about = {"emission": emission, "seconds": cost["cpu_seconds"]}
        table = challenge_score(counts, real, design, target_genes=targets)
        rows += [about | {"metric": f"challenge {name}", "value": value} for name, value in table["score"].items()]
        raw = table.attrs["scores"].groupby("metric")["value"].mean()
        rows += [about | {"metric": name, "value": value} for name, value in raw.items()]
        scores = iv.evaluate(logarithm(counts), logarithm(real), design, metrics=list(METRICS)).groupby("metric")[
            "value"
        ]
        rows += [about | {"metric": name, "value": value} for name, value in scores.mean().items()]
        rows += [about | {"metric": f"{name}, median", "value": value} for name, value in scores.median().items()]
    return rows


def fresh(cells: anndata.AnnData, train: anndata.AnnData, design: iv.Design, seed: int) -> anndata.AnnData:
    """Counts with depths of training control cells of the group, drawn at random, rounded at random."""
    rng = np.random.default_rng(seed)
    control = train[design.is_control(train.obs)]
    depth = control.obs["total_counts"].groupby(design.groups(control.obs).to_numpy()).agg(list)
    own = np.array([rng.choice(depth[group]) for group in design.groups(cells.obs)])
    linear = np.expm1(np.clip(cells.X, 0, None)) * (own / train.uns["invirtuo"]["target_sum"])[:, None]
    counts = sparse.csr_matrix(np.floor(linear + rng.random(linear.shape)).astype(np.float32))
    return anndata.AnnData(counts, obs=cells.obs.copy(), var=cells.var.copy())


def logarithm(counts: anndata.AnnData) -> anndata.AnnData:
    """log1p of ten thousand counts a cell, of the genes that are there."""
    cells = counts.copy()
    total = np.asarray(counts.X.sum(axis=1), dtype=np.float64).ravel()
    cells.X = log_normalised(sparse.csr_matrix(counts.X), total, 1e4)
    return cells


@study(quick={"tasks": ["papalexi-replicate-2"], "models": ["no_change"], "seeds": 1})
def counts(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = tuple(QUESTIONS),
    models: Sequence[str] = tuple(ENTRIES),
    seeds: int = 3,
) -> Tables:
    """Predicted counts under the yardstick of 2026, and as populations of cells."""
    table = filled(out / "scores.csv", partial(judged, data_dir=data_dir), task=tasks, seed=range(seeds), model=models)
    means = over_seeds(table, ["task", "model", "emission", "metric"])["mean"].unstack("metric")
    return {"means": means}

"""Closed forms and trained models under the measures of 2026: predicted cells are kept, scores can be taken again.

Settings are those of `comparison` at their defaults (at most 500 genes, 300 predicted cells of a condition). Seeds are
done one after the other, each for all tasks. Every set of predicted cells is a file; what is there is not fitted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import anndata
import pandas as pd

from invirtuo.bench import Entry
from invirtuo.cells.files import writing
from invirtuo.metrics import Pair, noise_floor, score
from studies.comparison import task_of
from studies.harness import Rows, Tables, part, spent, study

NAMES = ("kang-celltype", "kang-donor", "papalexi-replicate", "norman-mini-combo", "glioblastoma-donor")
CLOSED = (
    Entry("no_change", "no_change"),
    Entry("perturbation_mean", "perturbation_mean", "profile"),
    Entry("perturbation_mean:shift-cells", "perturbation_mean", "shift-cells"),
    Entry("perturbation_mean:move-cells", "perturbation_mean", "move-cells"),
    Entry("magnitude_only:move-cells", "magnitude_only", "move-cells"),
    Entry("fold_change", "fold_change"),
    Entry("ridge:shift-cells", "ridge", "shift-cells"),
    Entry("ridge:move-cells", "ridge", "move-cells"),
    Entry("ridge:kernel", "ridge", "kernel"),
)
TRAINED = (
    Entry("primeflow", "primeflow", None, {"steps": 500}),
    Entry("ST", "state_transition", None, {"steps": 500}),
    Entry("fm_pca", "fm_pca", None, {"steps": 1500}),
    Entry("cpa", "cpa"),
    Entry("ST:moved", "state_transition", None, {"steps": 500}, {"zeros": "moved"}),
    Entry("fm_pca:threshold", "fm_pca", None, {"steps": 1500}, {"zeros": "threshold"}),
    Entry("cpa:moved", "cpa", None, None, {"zeros": "moved"}),
)
ENTRIES = {entry.label: entry for entry in (*CLOSED, *TRAINED)}
FLOOR = "noise_floor"
METRICS = (
    *("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean", "pearson_delta", "de_overlap_n"),
    *("de_false_calls", "de_fdr", "de_recall_at_fdr", "de_recall_active", "de_silent"),
    *("pds_cosine_panel", "expr_mse_unbiased_capped_norm", "de_wilcoxon_direction_fidelity_yield_raw"),
    *("de_wilcoxon_direction_reach_raw", "de_wilcoxon_sig_jaccard", "de_wilcoxon_lfc_nmae"),
)


@study(quick={"tasks": ["kang-celltype"], "models": ["no_change", "fold_change"], "seeds": 1})
def yardstick(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = NAMES,
    models: Sequence[str] = tuple(ENTRIES),
    metrics: Sequence[str] = METRICS,
    seeds: int = 3,
    only_fit: bool = False,
) -> Tables:
    """Models under the measures of 2026, on five tasks.

    Parameters
    ----------
    metrics
        What is scored.
    only_fit
        Fit and predict what is missing, and score nothing.
    """
    for seed, name, label in product(range(seeds), tasks, models):
        for fold in range(len(task_of(name).splits)):
            predicted(out, ENTRIES[label], name, fold, seed, data_dir)
    if only_fit:
        return {}
    rows = Rows(out / "scores.csv")
    for name, label, seed in product(tasks, [*models, FLOOR], range(seeds)):
        case = {"task": name, "model": label, "seed": seed}
        if not (rows.has(case) and set(metrics) <= set(rows.table["metric"])):
            rows.add(case, scores_of(out, name, label, seed, metrics, data_dir))
    means = rows.table.groupby(["task", "model", "metric"], sort=False)["value"].mean().unstack()
    return {"means": means[list(metrics)]}


def predicted(out: Path, entry: Entry, name: str, fold: int, seed: int, data_dir: str | None) -> anndata.AnnData:
    """Cells of the test conditions, predicted or read."""
    file = out / "cells" / name / entry.label.replace(":", "-") / f"seed-{seed}-fold-{fold}.h5ad"
    if file.exists():
        return anndata.read_h5ad(file)
    task = task_of(name)
    adata, design, split = task.load(fold, data_dir=data_dir)
    model, fit = entry.make(design, adata.var_names)
    with spent() as cost:
        model.fit(adata, split=split, config=replace(fit, seed=seed, progress=False))
        cells = model.predict("test", n_cells=task.n_cells, seed=seed, **entry.predict)
    cells.uns["cost"] = cost
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file) as unfinished:
        cells.write_h5ad(unfinished, compression="gzip")
    print(f"{name}, {entry.label}, seed {seed}, fold {fold}: {cost['cpu_seconds']:.0f} CPU seconds", flush=True)
    return cells


def scores_of(
    out: Path, name: str, label: str, seed: int, metrics: Iterable[str], data_dir: str | None
) -> pd.DataFrame:
    """Scores of a model, or of halves of the real cells, on all folds of a task."""
    tables = []
    task = task_of(name)
    for fold in range(len(task.splits)):
        adata, design, split = task.load(fold, data_dir=data_dir)
        real = part(adata, split, "test")
        if label == FLOOR:
            trained = set(design.names(adata.obs[(split == "train").to_numpy()]))
            table = noise_floor(real, design, list(metrics), seed=seed)
            tables.append(table[~table["condition"].isin(trained)])
        else:
            cells = predicted(out, ENTRIES[label], name, fold, seed, data_dir)
            tables.append(score(Pair(cells, real, design), list(metrics)))
    return pd.concat(tables)[["condition", "metric", "value"]]

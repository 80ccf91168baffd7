"""Fit several models on one split, predict what was held out, score all of them beside the noise floor."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from invirtuo.bench.effects import effects_of
from invirtuo.bench.entry import FLOOR, Entry
from invirtuo.bench.run import software, write_table
from invirtuo.bench.task import PUBLISHED
from invirtuo.files import writing
from invirtuo.metrics import Pair, noise_floor, score
from invirtuo.metrics.axes import principal_axes

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design
    from invirtuo.fit import FitConfig
    from invirtuo.model import Model

__all__ = ["compare", "panels"]

logger = logging.getLogger(__name__)

EFFECT_LEVEL = 0.9  # share of genes that intervals of effects cover
PANEL_CELLS = 400  # cells of one kind drawn in one panel


def compare(
    adata: AnnData,
    design: Design,
    split: pd.Series,
    entries: Sequence[Entry],
    out: str | Path,
    *,
    part: str = "test",
    metrics: Sequence[str] | None = PUBLISHED,
    n_cells: int = 1000,
    n_pcs: int = 30,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Fit, predict and score every entry; write what a report needs.

    Parameters
    ----------
    adata
        log1p of counts per 10 000.
    design, split
        Roles of the columns, and "train" / "val" / "test" per cell.
    entries
        What to compare.
    out
        Folder for ``scores.csv``, ``predicted.h5ad`` and ``effects.csv`` (of the first entry), ``history.csv``,
        ``panels.csv``, ``run.json`` and the fitted models. Effects have intervals if the split holds out conditions
        for validation.
    part
        Which held-out part is predicted and scored.
    metrics, n_cells, n_pcs
        As in `evaluate` and `Model.predict`.
    seed
        Of sampling and of the halves of the noise floor.
    about
        More facts for ``run.json``.

    Returns
    -------
    The tidy scores with a column ``model``, the noise floor among them.
    """
    out = Path(out)
    real = adata[(split == part).to_numpy()].copy()
    tables, histories, predictions, runs = [], [], {}, []
    pair: Pair | None = None
    for entry in entries:
        started = time.perf_counter()
        model, fit = entry.make(design, adata.var_names)
        logger.info("fitting %s", entry.label)
        model.fit(adata, split=split, config=fit)
        fitted = time.perf_counter()
        options = dict(entry.predict)
        if entry is entries[0] and _gives_intervals(model, part):
            options.setdefault("effect_level", EFFECT_LEVEL)
        predicted = model.predict(part, n_cells=n_cells, seed=seed, **options)
        done = time.perf_counter()
        pair = Pair(predicted, real, design, n_pcs=n_pcs) if pair is None else pair.against(predicted)
        tables.append(score(pair, metrics).assign(model=entry.label))
        histories.append(model.history.assign(model=entry.label))
        predictions[entry.label] = predicted
        model.save(out / "models" / entry.label)
        runs.append(_facts(entry, model, fit, fitted - started, done - fitted))
    tables.append(noise_floor(real, design, metrics, n_pcs=n_pcs, seed=seed).assign(model=FLOOR))
    scores = pd.concat(tables, ignore_index=True)
    scores = scores[scores["condition"].isin(set(tables[0]["condition"]))].reset_index(drop=True)
    write_table(out / "scores.csv", scores)
    write_table(out / "history.csv", pd.concat(histories, ignore_index=True))
    write_table(out / "panels.csv", panels(adata, real, predictions, design, seed))
    main = predictions[entries[0].label]
    write_table(out / "effects.csv", effects_of(main, adata, design))
    with writing(out / "predicted.h5ad") as path:
        main.write_h5ad(path, compression="gzip")
    facts = {**(about or {}), "seed": seed, "cells per condition": n_cells, "models": runs, "software": software()}
    if "effect" in main.varm:
        facts["effect level"] = EFFECT_LEVEL
    with writing(out / "run.json") as path:
        path.write_text(json.dumps(facts, indent=2))
    return scores


def _gives_intervals(model: Model, part: str) -> bool:
    """Whether the fit held out conditions for validation, and all groups have control cells."""
    held_out, seen, design = model.card["held_out"], model._pseudobulks, model.design
    asked = pd.DataFrame(held_out["val"] + held_out[part], columns=design.columns)
    return bool(held_out["val"]) and seen is not None and set(design.groups(asked)) <= set(seen.groups)


def _facts(entry: Entry, model: Model, fit: FitConfig, fit_seconds: float, predict_seconds: float) -> dict[str, Any]:
    trained = any(p.requires_grad for p in model.parameters())
    return {
        "label": entry.label,
        "model": entry.model,
        "config": asdict(model.config),
        "fit": asdict(fit) if trained else "closed form",
        "parameters": sum(p.numel() for p in model.parameters()),
        "fit seconds": round(fit_seconds, 1),
        "predict seconds": round(predict_seconds, 1),
        "data hash": model.card["data_hash"],
    }


def panels(
    adata: AnnData, real: AnnData, predictions: Mapping[str, AnnData], design: Design, seed: int
) -> pd.DataFrame:
    """Cells on the two leading components of all cells: all (background), real and predicted per condition."""
    rng = np.random.default_rng(seed)
    centre, axes = principal_axes(adata.X, 2)

    def project(cells: AnnData, kind: str, limit: int, condition: str = "", model: str = "") -> pd.DataFrame:
        rows = np.sort(rng.permutation(cells.n_obs)[:limit])
        x = cells.X[rows]
        xy = (np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float64) - centre) @ axes
        return pd.DataFrame(
            {"pc1": xy[:, 0], "pc2": xy[:, 1], "kind": kind, "model": model, "condition": condition}
        ).round(4)

    tables = [project(adata, "background", 4 * PANEL_CELLS)]
    names = design.names(real.obs)
    for label, predicted in predictions.items():
        own = design.names(predicted.obs)
        for condition in own.unique():
            cells = predicted[(own == condition).to_numpy()]
            tables.append(project(cells, "predicted", PANEL_CELLS, condition, label))
    for condition in names[~design.is_control(real.obs)].unique():
        tables.append(project(real[(names == condition).to_numpy()], "real", PANEL_CELLS, condition))
    return pd.concat(tables, ignore_index=True)

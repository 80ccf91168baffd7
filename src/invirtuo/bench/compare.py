"""Fit several models on one split, predict what was held out, score all of them beside the noise floor."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from invirtuo.bench.cell import as_json, scores_of
from invirtuo.bench.effects import effects_of
from invirtuo.bench.entry import FLOOR, Entry
from invirtuo.bench.notes import discrimination, flagged
from invirtuo.bench.panels import predicted_points, real_points
from invirtuo.bench.run import software, write_table
from invirtuo.bench.task import JUDGED
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import check_writable, write_h5ad, writing
from invirtuo.errors import preview
from invirtuo.metrics import Pair, noise_floor, score
from invirtuo.metrics.numerics.axes import principal_axes
from invirtuo.verbs.predict import PerturbationModel

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.bench.entry import Predictor
    from invirtuo.design import Design
    from invirtuo.fit import FitConfig

__all__ = ["compare"]

logger = logging.getLogger(__name__)

EFFECT_LEVEL = 0.9  # share of genes that intervals of effects cover


def compare(
    adata: AnnData,
    design: Design,
    split: pd.Series,
    entries: Sequence[Entry],
    out: str | Path,
    *,
    part: str = "test",
    metrics: Sequence[str] | None = JUDGED,
    n_cells: int = 1000,
    n_pcs: int = 30,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Fit, predict and score every entry; write what a report needs.

    Scores are written as they come. A comparison that was stopped goes on with the same call: entries that are done are
    read, a fit goes on from its last checkpoint, and the numbers are the same.

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
        ``panels.csv``, ``flags.csv`` (:func:`invirtuo.metrics.flags`), ``discrimination.csv``
        (:func:`invirtuo.metrics.calibration`), ``run.json`` and the fitted models. Effects have intervals if the split
        holds out conditions for validation.
    part
        Which held-out part is predicted and scored.
    metrics, n_cells, n_pcs
        As in `evaluate` and `PerturbationModel.predict`.
    seed
        Of sampling and of the halves of the noise floor.
    about
        More facts for ``run.json``.
    overwrite
        Compute entries anew that `out` holds with other settings or of other data.

    Returns
    -------
    The tidy scores with a column ``model``, the noise floor among them.

    Raises
    ------
    ValueError
        If `out` holds an entry with other settings, and is not to be overwritten.
    """
    check_writable(out, folder=True)
    out, seed = Path(out), int(seed)
    real = adata[(split == part).to_numpy()].copy()

    # rows that an earlier call computed are read
    split_hash = hashlib.sha256("|".join(split).encode()).hexdigest()[:16]
    asked = [part, metrics, n_cells, n_pcs, seed, version("invirtuo")]
    plan = {"data": CellDataset(adata, design, split).fingerprint(), "split": split_hash, "asked": asked}
    rows = [_Row(out, entry, plan) for entry in entries]
    for row in rows:
        row.check(overwrite=overwrite)

    # the others are fitted, drawn and scored; effects are those of the first
    axes = principal_axes(adata.X, 2)
    pair: Pair | None = None
    done: list[pd.DataFrame] = []
    for row in rows:
        if not row.record:
            is_first = row is rows[0]
            level = EFFECT_LEVEL if is_first else None
            predicted, facts, history = _drawn(row, adata, design, split, part, n_cells, seed, level)
            pair = Pair(predicted, real, design, n_pcs=n_pcs) if pair is None else pair.against(predicted)
            if is_first:
                write_table(out / "effects.csv", effects_of(predicted, adata, design))
                write_h5ad(predicted, out / "predicted.h5ad")
            write_table(row.folder / "history.csv", history)
            write_table(row.folder / "flags.csv", flagged(pair, row.entry.label))
            write_table(row.folder / "panels.csv", predicted_points(predicted, row.entry.label, design, axes, seed))
            row.write(score(pair, metrics).assign(model=row.entry.label), facts)
        done = [scores_of(row.record) for row in rows if row.record]
        write_table(out / "scores.csv", pd.concat(done))

    # scores of all rows and of the noise floor, for the conditions of the first
    floor = noise_floor(real, design, metrics, n_pcs=n_pcs, seed=seed).assign(model=FLOOR)
    scores = pd.concat([*done, floor], ignore_index=True)
    is_scored = scores["condition"].isin(set(done[0]["condition"]))
    scores = scores[is_scored].reset_index(drop=True)
    write_table(out / "scores.csv", scores)

    # which scores can tell anything here
    write_table(out / "discrimination.csv", discrimination(real, design, metrics, n_pcs=n_pcs, seed=seed))

    # what the report draws
    points = [real_points(adata, real, design, axes, seed)]
    points += [row.table("panels.csv") for row in rows]
    write_table(out / "panels.csv", pd.concat(points, ignore_index=True))
    write_table(out / "flags.csv", pd.concat([row.table("flags.csv") for row in rows], ignore_index=True))
    history = pd.concat([row.table("history.csv") for row in rows], ignore_index=True)
    if "step" in history:  # something was trained
        write_table(out / "history.csv", history)

    facts = {**(about or {}), "seed": seed, "cells per condition": n_cells, "software": software()}
    facts["models"] = [row.record["facts"] for row in rows]
    if rows[0].record["facts"]["intervals"]:
        facts["effect level"] = EFFECT_LEVEL
    with writing(out / "run.json") as path:
        path.write_text(json.dumps(facts, indent=2))
    return scores


class _Row:
    """One entry of a comparison in a folder of its own, by which a comparison that was stopped goes on."""

    def __init__(self, out: Path, entry: Entry, plan: Mapping[str, Any]):
        self.out, self.entry = out, entry
        self.folder = out / "rows" / entry.label
        described = entry.describe()
        for options in (described["fit"], described["predict"]):
            (options or {}).pop("progress", None)  # changes no number
        self.settings = json.loads(json.dumps({**plan, "entry": described}))
        self.record: dict[str, Any] = {}  # empty until the row is done

    def check(self, *, overwrite: bool) -> None:
        """Read what an earlier call computed, if it asked for the same.

        Raises
        ------
        ValueError
            If the folder holds a row with other settings, unless it may be overwritten.
        """
        path = self.folder / "record.json"
        if not path.is_file():
            return
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] == self.settings:
            self.record = record
        elif not overwrite:
            other = [name for name in self.settings if record["settings"].get(name) != self.settings[name]]
            raise ValueError(
                f"{self.out} holds {self.entry.label} with another {preview(other)}; give another folder, or "
                "overwrite it"
            )

    def table(self, name: str) -> pd.DataFrame:
        """A table of the row; labels stay as they are written."""
        return pd.read_csv(self.folder / name, keep_default_na=False, na_values=[""])

    def write(self, scores: pd.DataFrame, facts: Mapping[str, Any]) -> None:
        """Write the record, after everything else: it marks the row as done."""
        self.record = {"settings": self.settings, "facts": facts, "scores": as_json(scores)}
        with writing(self.folder / "record.json") as path:
            path.write_text(json.dumps(self.record), encoding="utf-8")


def _drawn(
    row: _Row,
    adata: AnnData,
    design: Design,
    split: pd.Series,
    part: str,
    n_cells: int,
    seed: int,
    level: float | None,
) -> tuple[AnnData, dict[str, Any], pd.DataFrame]:
    """Cells that an entry draws, facts about it, and its history; the model is saved."""
    started = time.perf_counter()
    model, fit = row.entry.make(design, adata.var_names)
    logger.info("fitting %s", row.entry.label)
    model.fit(adata, split=split, config=fit, folder=row.folder / "checkpoints", resume=True)
    fitted = time.perf_counter()
    options = dict(row.entry.predict)
    if level is not None and _gives_intervals(model, part):
        options.setdefault("effect_level", level)
    predicted = model.predict(part, n_cells=n_cells, seed=seed, **options)
    done = time.perf_counter()
    model.save(row.out / "models" / row.entry.label, overwrite=True)
    facts = _facts(row.entry, model, fit, fitted - started, done - fitted)
    facts["intervals"] = "effect" in predicted.varm
    return predicted, facts, model.history.assign(model=row.entry.label)


def _gives_intervals(model: Predictor, part: str) -> bool:
    """Whether the fit held out conditions for validation, and all groups have control cells."""
    held_out, design = model.card["held_out"], model.design
    observed = model._observed_means if isinstance(model, PerturbationModel) else None
    if observed is None or not held_out["val"]:
        return False
    conditions = pd.DataFrame(held_out["val"] + held_out[part], columns=design.columns)
    return set(design.groups(conditions)) <= set(observed.groups)


def _facts(
    entry: Entry, model: Predictor, fit: FitConfig, fit_seconds: float, predict_seconds: float
) -> dict[str, Any]:
    trained = any(p.requires_grad for p in model.parameters())
    n_parameters = sum(p.numel() for p in model.parameters())
    return {
        "label": entry.label,
        "model": entry.model,
        "config": asdict(model.config),
        "fit": asdict(fit) if trained else "closed form",
        "parameters": n_parameters,
        "fit seconds": round(fit_seconds, 1),
        "predict seconds": round(predict_seconds, 1),
        "data hash": model.card["data_hash"],
    }

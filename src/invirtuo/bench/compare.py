"""Fit several models on one split, predict what was held out, score all of them beside the noise floor."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from invirtuo.bench.by_gene import by_gene
from invirtuo.bench.cell import as_json, scores_of
from invirtuo.bench.effects import effects_of
from invirtuo.bench.entry import BASELINES, FLOOR, Entry
from invirtuo.bench.notes import discrimination, flagged
from invirtuo.bench.panels import predicted_points, real_points
from invirtuo.bench.run import chosen_entries, software, write_table
from invirtuo.bench.task import JUDGED
from invirtuo.cells import preprocess
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import check_writable, write_h5ad, writing
from invirtuo.cells.values import looks_like_counts, require_log
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.fit import FitConfig
from invirtuo.metrics import Pair, noise_floor, score
from invirtuo.metrics.numerics.axes import principal_axes
from invirtuo.reports import report
from invirtuo.verbs.predict import PerturbationModel

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.bench.entry import Predictor, Spec

__all__ = ["compare"]

logger = logging.getLogger(__name__)

EFFECT_LEVEL = 0.9  # share of genes that intervals of effects cover


def compare(
    adata: AnnData,
    design: Design,
    models: Sequence[Spec] | Spec,
    *,
    split: pd.Series,
    out: str | Path = "results",
    part: str = "test",
    baselines: bool = True,
    n_genes: int | None = None,
    size_factor: str | None = None,
    metrics: Sequence[str] | None = JUDGED,
    n_cells: int = 1000,
    n_pcs: int = 30,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """From cells to an answer: fit models, predict what was held out, judge all beside baselines and the noise floor.

    Scores are written as they come. A comparison that was stopped goes on with the same call: models that are done are
    read, a fit goes on from its last checkpoint, and the numbers are the same.

    Parameters
    ----------
    adata
        Raw counts, which are normalised, or log1p of normalised counts.
    design
        Roles of the columns.
    models
        Entries, names of models, ``model:preset``, or classes of your own. Effects are shown of the first.
    split
        "train" / "val" / "test" per cell, as made by :mod:`invirtuo.splits`. Effects have intervals if it holds out
        conditions for validation.
    out
        Folder for the page ``report.html`` and what it shows: ``scores.csv``, ``predicted.h5ad``, ``effects.csv`` and
        ``distributions.npz`` (of the first model), ``history.csv``, ``panels.csv``, ``flags.csv``
        (:func:`invirtuo.metrics.flags`), ``discrimination.csv`` (:func:`invirtuo.metrics.calibration`), ``run.json``;
        and for the fitted models.
    part
        Which held-out part is predicted and scored.
    baselines
        Add the simple baselines that are not among the models; without those that know nothing of a perturbation that
        training has not seen.
    n_genes
        Number of variable genes to keep, chosen on training cells; None keeps all. For raw counts.
    size_factor
        Column of obs with the depth of each cell, for raw counts of some of the genes.
    metrics, n_cells, n_pcs
        As in `evaluate` and `PerturbationModel.predict`.
    seed
        Of sampling, of the halves of the noise floor, and of fits, unless an entry brings a FitConfig or a seed.
    about
        More facts for ``run.json`` and the page: ``title``, ``dataset``, ``split``, ``notes``.
    overwrite
        Compute anew what `out` holds with other settings or of other data.

    Returns
    -------
    The tidy scores with a column ``model``, the noise floor among them.

    Raises
    ------
    ValueError
        If the values are neither counts nor logarithms of them, a model is unknown, nothing is held out, or `out` holds
        a model with other settings and is not to be overwritten.
    """
    check_writable(out, folder=True)
    out = Path(out)
    entries = [_seeded(entry, int(seed)) for entry in chosen_entries(models, baselines=False, floor=False)]
    adata = _log_values(adata, n_genes, size_factor, split)
    dataset = CellDataset(adata, design, split)
    asked = _Asked(adata, design, split, part, metrics, n_cells, n_pcs, int(seed))
    if baselines:
        entries += _baselines(entries, asked)

    # rows that an earlier call computed are read, the others fitted, drawn and scored
    split_hash = hashlib.sha256("|".join(split).encode()).hexdigest()[:16]
    plan = {"data": dataset.fingerprint(), "split": split_hash, "asked": asked.plan()}
    rows = [_Row(out, entry, plan) for entry in entries]
    for row in rows:
        row.check(overwrite=overwrite)
    done = _computed(rows, asked, out)

    # scores of all rows and of the noise floor, for the conditions of the first
    judged: dict[str, Any] = {"metrics": metrics, "n_pcs": n_pcs, "seed": asked.seed}
    floor = noise_floor(asked.real, design, **judged).assign(model=FLOOR)
    scores = pd.concat([*done, floor], ignore_index=True)
    is_scored = scores["condition"].isin(set(done[0]["condition"]))
    scores = scores[is_scored].reset_index(drop=True)
    write_table(out / "scores.csv", scores)

    # which scores can tell anything here, and what the page draws
    write_table(out / "discrimination.csv", discrimination(asked.real, design, **judged))
    points = real_points(adata, asked.real, design, asked.axes, asked.seed)
    write_table(out / "panels.csv", pd.concat([points, *(row.table("panels.csv") for row in rows)], ignore_index=True))
    write_table(out / "flags.csv", pd.concat([row.table("flags.csv") for row in rows], ignore_index=True))
    history = pd.concat([row.table("history.csv") for row in rows], ignore_index=True)
    if "step" in history:  # something was trained
        write_table(out / "history.csv", history)

    # how all of this was made
    facts = {
        **asked.described(),
        "baselines": [entry.label for entry in entries if entry in BASELINES],
        **(about or {}),
    }
    facts |= {"seed": asked.seed, "cells per condition": n_cells, "software": software()}
    facts["models"] = [row.record["facts"] for row in rows]
    if rows[0].record["facts"]["intervals"]:
        facts["effect level"] = EFFECT_LEVEL
    with writing(out / "run.json") as path:
        path.write_text(json.dumps(facts, indent=2))
    report(out, out / "report.html")
    return scores


@dataclass(frozen=True)
class _Asked:
    """What all rows of a comparison are asked: cells, roles, parts, and how they are judged."""

    adata: Any  # AnnData
    design: Design
    split: pd.Series
    part: str
    metrics: Sequence[str] | None
    n_cells: int
    n_pcs: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse a split that holds out nothing."""
        if not len(self.perturbed(self.part)):
            raise ValueError(
                f"the split holds out no perturbed cell for {self.part!r}; hold out a condition of these data"
            )

    @cached_property
    def real(self) -> AnnData:
        """Cells of the part that is predicted, controls among them."""
        return self.adata[(self.split == self.part).to_numpy()].copy()

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal axes of all cells, for pictures."""
        return principal_axes(self.adata.X, 2)

    def plan(self) -> list[Any]:
        """What other numbers would follow from."""
        return [self.part, self.metrics, self.n_cells, self.n_pcs, self.seed, version("invirtuo")]

    def perturbed(self, part: str) -> pd.DataFrame:
        """Perturbed conditions of a part, tidy."""
        return self.design.conditions(self.adata.obs[(self.split == part).to_numpy()])

    def singles(self, part: str) -> set[str]:
        """Single perturbations of a part."""
        labels = self.perturbed(part)[self.design.perturbation]
        return {single for label in labels for single in self.design.parts(label)}

    def described(self) -> dict[str, str]:
        """What the page says of cells and split."""
        cells, design = self.adata, self.design
        tested, validated = (preview(sorted(design.names(self.perturbed(part)))) for part in (self.part, "val"))
        groups = f"; {preview(design.covariates)}" if design.covariates else ""
        shape = f"{cells.n_obs:,} cells, {cells.n_vars:,} genes; {preview(design.perturbations)}{groups}"
        held_out = f"held out: {tested}"
        if self.part != "val" and len(self.perturbed("val")):
            held_out += f"; for validation: {validated}"
        return {"title": f"How well were {tested} predicted?", "dataset": shape, "split": held_out}


def _computed(rows: Sequence[_Row], asked: _Asked, out: Path) -> list[pd.DataFrame]:
    """Scores of all rows; what was not computed before is fitted and drawn, effects are those of the first."""
    pair: Pair | None = None
    done: list[pd.DataFrame] = []
    for row in rows:
        if not row.record:
            is_first = row is rows[0]
            predicted, facts, history = _drawn(row, asked, EFFECT_LEVEL if is_first else None)
            pair = (
                Pair(predicted, asked.real, asked.design, n_pcs=asked.n_pcs)
                if pair is None
                else pair.against(predicted)
            )
            if is_first:
                effects = effects_of(predicted, asked.adata, asked.design)
                effects, distributions = by_gene(effects, predicted, asked.adata, asked.design)
                write_table(out / "effects.csv", effects)
                with writing(out / "distributions.npz") as path:
                    np.savez_compressed(path, allow_pickle=False, **distributions)
                write_h5ad(predicted, out / "predicted.h5ad")
            label = row.entry.label
            points = predicted_points(predicted, label, asked.design, asked.axes, asked.seed)
            write_table(row.folder / "history.csv", history)
            write_table(row.folder / "flags.csv", flagged(pair, label))
            write_table(row.folder / "panels.csv", points)
            row.write(score(pair, asked.metrics).assign(model=label), facts)
        done = [scores_of(row.record) for row in rows if row.record]
        write_table(out / "scores.csv", pd.concat(done))
    return done


def _seeded(entry: Entry, seed: int) -> Entry:
    """The entry, fitted with the seed unless it says how."""
    if isinstance(entry.fit, FitConfig):
        return entry
    return replace(entry, fit={"seed": seed, **(entry.fit or {})})


def _log_values(adata: AnnData, n_genes: int | None, size_factor: str | None, split: pd.Series) -> AnnData:
    """The cells as log1p values: raw counts normalised, with genes chosen on training cells."""
    if looks_like_counts(adata.X):
        return preprocess.normalize(adata, n_genes=n_genes, size_factor=size_factor, split=split)
    if n_genes is not None or size_factor is not None:
        raise ValueError(
            "n_genes and size_factor act on raw counts, and X holds other values; give counts, or leave them out"
        )
    require_log(adata)
    return adata


def _baselines(entries: Sequence[Entry], asked: _Asked) -> list[Entry]:
    """Simple baselines that are not among the entries, and can say something of all that is held out."""
    labels = {entry.label for entry in entries}
    is_known = asked.singles(asked.part) <= asked.singles("train")
    able = [entry for entry in BASELINES if is_known or entry.kind.any_target]
    return [entry for entry in able if entry.label not in labels]


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


def _drawn(row: _Row, asked: _Asked, level: float | None) -> tuple[AnnData, dict[str, Any], pd.DataFrame]:
    """Cells that an entry draws, facts about it, and its history; the model is saved."""
    started = time.perf_counter()
    model, fit = row.entry.make(asked.design, asked.adata.var_names)
    logger.info("fitting %s", row.entry.label)
    model.fit(asked.adata, split=asked.split, config=fit, folder=row.folder / "checkpoints", resume=True)
    fitted = time.perf_counter()
    options = dict(row.entry.predict)
    if level is not None and _gives_intervals(model, asked.part):
        options.setdefault("effect_level", level)
    predicted = model.predict(asked.part, n_cells=asked.n_cells, seed=asked.seed, **options)
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

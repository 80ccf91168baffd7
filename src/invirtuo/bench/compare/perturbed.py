"""Fit several models on one split, predict what was held out, score all of them beside the noise floor."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from invirtuo.bench.cell import scores_of
from invirtuo.bench.compare.by_gene import by_gene
from invirtuo.bench.compare.gene_sets import gene_sets as gene_sets_of
from invirtuo.bench.compare.rows import Row, normalized, of_part, rows_of, write_history
from invirtuo.bench.effects import effects_of
from invirtuo.bench.entry import BASELINES, FLOOR, Entry
from invirtuo.bench.notes import copies, discrimination, flagged
from invirtuo.bench.panels import predicted_points, real_points, umap_points
from invirtuo.bench.question import Asked
from invirtuo.bench.run import software, write_page, write_table
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import read_h5ad, write_h5ad, writing
from invirtuo.cells.values import require_log
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics import Pair, noise_floor, score
from invirtuo.metrics.numerics.axes import principal_axes
from invirtuo.reports import folder
from invirtuo.verbs.predict import PerturbationModel

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.bench.entry import Predictor

__all__ = ["compare_perturbed"]

logger = logging.getLogger(__name__)

N_CELLS = 1000  # drawn for each condition
EFFECT_LEVEL = 0.9  # share of genes that intervals of effects cover


def compare_perturbed(
    adata: AnnData,
    design: Design,
    entries: Sequence[Entry],
    *,
    split: pd.Series,
    part: str,
    out: Path,
    baselines: bool,
    n_genes: int | None,
    size_factor: str | None,
    metrics: Sequence[str] | None,
    n_cells: int | None,
    n_pcs: int,
    gene_sets: str | Path | None,
    umap: bool | None,
    seed: int,
    about: Mapping[str, Any],
    overwrite: bool,
) -> pd.DataFrame:
    """Fit models, predict perturbed cells that were held out, judge them beside baselines and the noise floor.

    As :func:`invirtuo.bench.compare`.
    """
    n_cells = N_CELLS if n_cells is None else n_cells
    adata = normalized(adata, n_genes, size_factor, split)
    require_log(adata)
    dataset = CellDataset(adata, design, split)
    asked = _Asked(adata, design, split, part, metrics, n_cells, n_pcs, seed)
    if baselines:
        entries = [*entries, *_baselines(entries, asked)]

    # rows that an earlier call computed are read, the others fitted, drawn and scored
    rows = rows_of(out, entries, dataset, split, asked.plan(), overwrite=overwrite)
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
    if umap:
        first = read_h5ad(out / "predicted.h5ad")
        points = umap_points(first, rows[0].entry.label, adata, asked.real, design, asked.seed)
        write_table(out / "umap.csv", points)
    else:
        (out / "umap.csv").unlink(missing_ok=True)  # of an earlier call, perhaps of other cells
    write_table(out / "flags.csv", pd.concat([row.table("flags.csv") for row in rows], ignore_index=True))
    write_history(rows, out)
    if gene_sets is not None:
        effects = folder.read_effects(out / "effects.csv")
        if effects is None:
            raise ValueError("gene_sets are tested on effects, and no condition has control cells of its covariates")
        write_table(out / "gene_sets.csv", gene_sets_of(effects, gene_sets))

    # how all of this was made
    facts = {
        **asked.described(),
        "baselines": [entry.label for entry in entries if entry in BASELINES],
        **about,
    }
    facts |= {"seed": asked.seed, "cells per condition": n_cells, "software": software()}
    facts["models"] = [row.record["facts"] for row in rows]
    if rows[0].record["facts"]["intervals"]:
        facts["effect level"] = EFFECT_LEVEL
    write_page(out, facts)
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
        return of_part(self.adata, self.split, self.part)

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal axes of all cells, for pictures."""
        return principal_axes(self.adata.X, 2)

    def plan(self) -> list[Any]:
        """What other numbers would follow from."""
        return [self.part, self.metrics, self.n_cells, self.n_pcs, self.seed]

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


def _computed(rows: Sequence[Row], asked: _Asked, out: Path) -> list[pd.DataFrame]:
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
            copied = copies(predicted, asked.adata, asked.design, asked.split, asked.part, label)
            write_table(row.folder / "flags.csv", pd.concat([flagged(pair, label), copied]))
            write_table(row.folder / "panels.csv", points)
            row.write(score(pair, asked.metrics).assign(model=label), facts)
        done = [scores_of(row.record) for row in rows if row.record]
        write_table(out / "scores.csv", pd.concat(done))
    return done


def _baselines(entries: Sequence[Entry], asked: _Asked) -> list[Entry]:
    """Simple baselines that are not among the entries, and can say something of all that is held out."""
    labels = {entry.label for entry in entries}
    is_known = asked.singles(asked.part) <= asked.singles("train")
    able = [entry for entry in BASELINES if is_known or entry.kind.any_target]
    return [entry for entry in able if entry.label not in labels]


def _drawn(row: Row, asked: _Asked, level: float | None) -> tuple[AnnData, dict[str, Any], pd.DataFrame]:
    """Cells that an entry draws, facts about it, and its history; the model is saved."""
    model, facts = row.fitted(asked.design, asked.adata, asked.split, Asked(asked.part, asked.n_cells))
    started = time.perf_counter()
    options = dict(row.entry.predict)
    if level is not None and _gives_intervals(model, asked.part):
        options.setdefault("effect_level", level)
    predicted = model.predict(asked.part, n_cells=asked.n_cells, seed=asked.seed, **options)
    facts["predict seconds"] = round(time.perf_counter() - started, 1)
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

"""From cells to an answer, whatever was done to them: perturbed cells, populations, time courses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invirtuo import splits
from invirtuo.bench.compare.courses import compare_courses
from invirtuo.bench.compare.perturbed import compare_perturbed
from invirtuo.bench.compare.populations import compare_populations
from invirtuo.bench.compare.rows import as_asked
from invirtuo.bench.run import chosen_entries
from invirtuo.bench.task import JUDGED
from invirtuo.cells.files import check_writable
from invirtuo.errors import preview

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from invirtuo.bench.entry import Entry, Spec
    from invirtuo.design import Design

__all__ = ["compare"]

N_PCS = 30  # of metrics in the space of principal components


def compare(
    adata: AnnData,
    design: Design,
    models: Sequence[Spec] | Spec,
    *,
    split: pd.Series | None = None,
    out: str | Path = "results",
    part: str = "test",
    baselines: bool = True,
    n_genes: int | None = None,
    size_factor: str | None = None,
    metrics: Sequence[str] | None = JUDGED,
    n_cells: int | None = None,
    n_pcs: int = N_PCS,
    gene_sets: str | Path | None = None,
    umap: bool = False,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """From cells to an answer: fit models, predict what was held out, judge all beside baselines and the noise floor.

    Scores are written as they come. A comparison that was stopped goes on with the same call: models that are done are
    read, a fit goes on from its last checkpoint, and the numbers are the same.

    Where nothing was perturbed (the Design names no perturbation), generators are compared by the populations that they
    draw (:func:`invirtuo.bench.judge`), and models of time courses by their forecasts of what was held out.

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
        conditions for validation. None, for generators alone: cells at random, :func:`invirtuo.splits.cells`.
    out
        Folder for the page ``report.html`` and what it shows: ``scores.csv``, ``predicted.h5ad``, ``effects.csv`` and
        ``distributions.npz`` (of the first model), ``history.csv``, ``panels.csv``, ``flags.csv``
        (:func:`invirtuo.metrics.flags`), ``discrimination.csv`` (:func:`invirtuo.metrics.calibration`), ``run.json``;
        and for the fitted models. Of populations `judge` says what is written, of time courses there are
        ``ahead.h5ad``, forecasts of the first model, and ``edges.csv``, its network.
    part
        Which held-out part is predicted and scored.
    baselines
        Add the simple baselines that are not among the models; without those that know nothing of a perturbation that
        training has not seen.
    n_genes
        Number of variable genes to keep, chosen on training cells; None keeps all. For raw counts.
    size_factor
        Column of obs with the depth of each cell, for raw counts of some of the genes.
    metrics
        As in `evaluate`; generators are judged by the profile "generation" unless others are named.
    n_cells
        Cells drawn for each condition, 1,000 if not given; of generators: in all, as many as were held out.
    n_pcs
        As in `evaluate`.
    gene_sets
        .gmt or .gmt.gz file: which sets of genes go up or down, predicted and seen, ``gene_sets.csv``
        (:func:`invirtuo.bench.compare.gene_sets.gene_sets`).
    umap
        Also draw real and predicted cells of the first model on a UMAP, ``umap.csv``; takes some seconds more.
    seed
        Of sampling, of the halves of the noise floor, and of fits, unless an entry brings a FitConfig or a seed.
    about
        More facts for ``run.json`` and the page: ``title``, ``dataset``, ``split``, ``notes``.
    overwrite
        Compute anew what `out` holds with other settings or of other data.
    progress
        Show progress bars of fits and of drawing; False shows none, whatever an entry says.

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
    verb = "predict" if design.perturbation else None
    chosen = chosen_entries(models, baselines=False, floor=False, verb=verb)
    entries = [as_asked(entry, int(seed), progress=progress) for entry in chosen]
    shared: dict[str, Any] = {"part": part, "out": out, "baselines": baselines, "n_genes": n_genes, "seed": int(seed)}
    shared |= {"about": dict(about or {}), "overwrite": overwrite}
    judged: dict[str, Any] = {"metrics": metrics, "n_cells": n_cells, "n_pcs": n_pcs}
    own: dict[str, Any] = {"size_factor": size_factor, "gene_sets": gene_sets, "umap": umap or None}
    if design.perturbation is None:
        return _unperturbed(adata, design, entries, split, shared, judged, own)
    if split is None:
        raise ValueError("nothing is held out; pass split=, as made by invirtuo.splits")
    return compare_perturbed(adata, design, entries, split=split, **shared, **judged, **own)


def _unperturbed(
    adata: AnnData,
    design: Design,
    entries: Sequence[Entry],
    split: pd.Series | None,
    shared: Mapping[str, Any],
    judged: Mapping[str, Any],
    own: Mapping[str, Any],
) -> pd.DataFrame:
    """Compare what generates populations, or what forecasts time courses; options that do not act are refused."""
    verbs = {entry.kind.verb for entry in entries if not entry.is_foreign} or {"generate"}  # a command can do so
    if any(value is not None for value in own.values()) or len(verbs) > 1 or not verbs <= {"generate", "forecast"}:
        given = preview([entry.label for entry in entries])
        raise ValueError(
            "the Design names no perturbation: compare generators, or models of time courses, without "
            f"{' and '.join(own)}; found {given}. To predict perturbed cells, name the column with perturbation="
        )
    if verbs == {"generate"}:
        split = splits.cells(adata.obs, design, seed=shared["seed"]) if split is None else split
        metrics = "generation" if judged["metrics"] == JUDGED else judged["metrics"]
        return compare_populations(adata, design, entries, split=split, **shared, **{**judged, "metrics": metrics})
    if foreign := [entry.label for entry in entries if entry.is_foreign]:
        raise ValueError(f"a command cannot forecast ({preview(foreign)}); compare models of time courses without it")
    if split is None or judged != {"metrics": JUDGED, "n_cells": None, "n_pcs": N_PCS}:
        raise ValueError(f"forecasts need a split, like iv.splits.courses, and do not take {', '.join(judged)}")
    return compare_courses(adata, design, entries, split=split, **shared)

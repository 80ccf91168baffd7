"""Verbs that judge: scores, benchmarks, reports."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from invirtuo.cli.options import (
    Batch,
    Conditions,
    Control,
    Covariate,
    FitSet,
    HoldOut,
    HoldOutVal,
    Out,
    OutFolder,
    Overwrite,
    Perturbation,
    Quiet,
    Separator,
    Set,
    Split,
    Time,
    model_with,
    pairs,
    print_rows,
    print_scores,
    read_conditions,
    read_csv,
    split_of,
    with_fields,
    writable_file,
)
from invirtuo.cli.toml import Config, write_run


def compare(
    context: typer.Context,
    data: Annotated[
        Path, typer.Argument(help="h5ad with raw counts, or log1p of normalised ones; controls among them.")
    ],
    model: Annotated[
        list[str],
        typer.Option(
            help="Name, name:preset, or FILE.json of an entry; may be given several times. Effects: the first."
        ),
    ],
    out: OutFolder,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    batch: Batch = None,
    separator: Separator = "+",
    split: Split = None,
    hold_out: HoldOut = None,
    hold_out_val: HoldOutVal = None,
    n_genes: Annotated[
        int | None, typer.Option(help="Variable genes to keep, chosen on training cells; all if not given.")
    ] = None,
    size_factor: Annotated[str | None, typer.Option(help="Column of obs with the depth of each cell.")] = None,
    baselines: Annotated[bool, typer.Option(help="Add the simple baselines.")] = True,
    metrics: Annotated[str | None, typer.Option(help="Names joined by commas; see `invirtuo list metrics`.")] = None,
    n_cells: Annotated[
        int | None,
        typer.Option(
            "-n", "--n-cells", help="Cells drawn for each condition, 1000 if not given; of generators in all."
        ),
    ] = None,
    gene_sets: Annotated[
        Path | None, typer.Option(help="FILE.gmt of gene sets (GO terms, pathways): which go up or down.")
    ] = None,
    umap: Annotated[
        bool, typer.Option("--umap", help="Also draw the cells of the first model on a UMAP; takes seconds.")
    ] = False,
    time: Time = None,
    fit_set: FitSet = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    seed: int = 0,
    overwrite: Overwrite = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """From a file to an answer: fit models, predict what is held out, judge all beside simple baselines; a page.

    Without --perturbation generators are judged on cells held out at random, models of time courses (--time) on what
    --hold-out or --split says.
    Stopped, it goes on with the same command.
    """
    import invirtuo
    from invirtuo.bench.entry import as_entries
    from invirtuo.bench.task import JUDGED
    from invirtuo.cells.files import read_h5ad

    if perturbation and not (split or hold_out):
        raise ValueError("nothing is held out; name conditions with --hold-out, or a split with --split")
    adata = read_h5ad(data)
    columns: dict[str, Any] = {"perturbation": perturbation, "control": control, "covariates": covariate or []}
    design = invirtuo.Design.from_adata(adata, **columns, separator=separator, batch=batch, time=time)
    named = [entry for name in model for entry in as_entries(name, "predict" if perturbation else None)]
    has_models = not all(entry.is_foreign for entry in named)
    entries = []
    for entry in named:
        # a command beside models takes the seed alone
        fields = [*([] if entry.is_foreign and has_models else fit_set or []), f"seed={seed}"]
        fit = with_fields(entry.settings()[1], fields, f"invirtuo list models {entry.model} --fit")
        entries.append(replace(entry, fit=fit))
    about = {"data": str(data), "command": shlex.join(["invirtuo", *sys.argv[1:]])}
    about |= {"date": f"{datetime.now():%Y-%m-%d}"} | ({"title": title} if title else {})
    options: dict[str, Any] = {"baselines": baselines, "n_genes": n_genes, "size_factor": size_factor, "seed": seed}
    options |= {"n_cells": n_cells, "gene_sets": gene_sets, "umap": umap, "overwrite": overwrite, "progress": not quiet}
    options["metrics"] = JUDGED if metrics is None else metrics.split(",")
    parts = split_of(adata.obs, design, split, hold_out, hold_out_val)
    scores = invirtuo.compare(adata, design, entries, split=parts, out=out, about=about, **options)
    write_run(context, out)
    if not quiet:
        print_scores(scores)
        typer.echo(f"\nreport: {out / 'report.html'}")


def evaluate(
    pred: Annotated[Path, typer.Argument(help="h5ad or zarr with predicted cells, or a folder of files or a store.")],
    real: Annotated[Path, typer.Argument(help="The same of real cells, controls among them.")],
    out: Out,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    metrics: Annotated[str | None, typer.Option(help="Names joined by commas; see `invirtuo list metrics`.")] = None,
    n_pcs: Annotated[int, typer.Option(help="Principal components of mmd_pca.")] = 30,
    controls: Annotated[str, typer.Option(help="real: real controls on both sides; pred: each file's own.")] = "real",
    scale: Annotated[str, typer.Option(help="log1p; counts: normalised to the median depth first; auto.")] = "log1p",
    layer: Annotated[
        list[str] | None, typer.Option(help="Layer or obsm with the values, or pred=LAYER and real=LAYER.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Folder for a page: the scores beside unchanged controls and the noise floor.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Score predicted cells against real cells; writes a tidy CSV, and says what is suspect about the cells."""
    import invirtuo
    from invirtuo.cells.files import writing
    from invirtuo.cells.source import opened
    from invirtuo.metrics import Pair, choose, score
    from invirtuo.metrics.cells import of_side
    from invirtuo.metrics.trust.flags import flags_of

    layers = _layers(layer)
    real_cells = opened(real, small_in_memory=True, layer=of_side(layers, "real"))
    design = invirtuo.Design.from_adata(
        real_cells.obs, perturbation=perturbation, control=control, covariates=covariate or [], separator=separator
    )
    chosen = choose(metrics.split(",") if metrics else None, design)
    options: dict[str, Any] = {"n_pcs": n_pcs, "controls": controls, "scale": scale, "layer": layers}
    pair = Pair(pred, real_cells, design, **options)
    scores = score(pair, chosen)
    with writing(out) as path:
        scores.to_csv(path, index=False)
    if page is not None:
        from invirtuo.bench.evaluation import evaluation_page

        about = {"dataset": str(real), "predicted": str(pred), "scale": scale}
        given = {name: options[name] for name in ("n_pcs", "scale", "layer")}
        evaluation_page(scores, pair, real_cells, design, page, model=pred.stem, about=about, **given)
        typer.echo(f"page: {page / 'report.html'}")
    if not quiet:
        print_scores(scores.assign(model=pred.stem))
        # the tests that flags need are there, if metrics were not chosen
        for text in flags_of(pair)["text"] if metrics is None and perturbation else ():
            typer.echo(f"suspect: {text}")


def score(
    pred: Annotated[Path, typer.Argument(help="Predicted cells, raw counts; genes and perturbations as in REAL.")],
    real: Annotated[Path, typer.Argument(help="Real cells, raw counts, controls among them.")],
    out: Out,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    target_genes: Annotated[
        str | None,
        typer.Option(
            help="FILE.csv with columns label and gene (empty: not measured); none: no label targets a gene; parts: "
            "the parts of combinations are genes. Labels that are not named are looked up among the genes."
        ),
    ] = None,
    bulk_target_sum: Annotated[
        float, typer.Option(help="Counts of a pseudobulk; for panels about ten times the counts of a cell.")
    ] = 50_000.0,
    emission: Annotated[str, typer.Option(help="How the mean response becomes cells: dispersed, tile.")] = "dispersed",
    splits: Annotated[int, typer.Option(help="Divisions of the real cells for the replicate.", min=1)] = 5,
    scale: Annotated[str, typer.Option(help="counts; log1p: what the values are the logarithm of; auto.")] = "counts",
    cache: Annotated[Path | None, typer.Option(help="Folder for what depends on the real cells alone.")] = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Score counts as the Virtual Cell Challenge 2026: 0 is the mean response, 1 a replicate; writes a CSV."""
    import invirtuo
    from invirtuo.cells.files import writing
    from invirtuo.cells.source import opened

    real_cells = opened(real, small_in_memory=True)
    design = invirtuo.Design.from_adata(
        real_cells.obs, perturbation=perturbation, control=control, covariates=covariate or [], separator=separator
    )
    table = invirtuo.metrics.challenge_score(
        pred,
        real_cells,
        design,
        bulk_target_sum=bulk_target_sum,
        target_genes=_targets(target_genes),
        emission=emission,  # type: ignore[arg-type]
        n_splits=splits,
        seed=seed,
        scale=scale,  # type: ignore[arg-type]
        cache=cache,
    )
    with writing(out) as path:
        table.to_csv(path)
    if not quiet:
        # scores beside their anchors, then what a reader must be warned of
        shown = table[["score", "user", "baseline", "replicate", "replicate_sd"]]
        rows = []
        for name, row in shown.iterrows():
            rows.append((name, *(f"{value:.3f}" for value in row)))
        print_rows(rows, header=("metric", *shown.columns))
        for name, reason in table["reason"].dropna().items():
            if reason:
                typer.echo(f"{name}: {reason}")
        if doubtful := [name for name, trusted in table["trusted"].iloc[:-1].items() if not trusted]:
            typer.echo(f"anchors too close for their scatter, read with care: {', '.join(doubtful)}")


def _targets(given: str | None) -> dict[str, str | None] | Literal["parts"] | None:
    """Which gene a label targets, as --target-genes says it."""
    if given is None or given == "parts":
        return given  # type: ignore[return-value]
    if given == "none":
        return {"*": None}
    table = read_csv(Path(given), "--target-genes")
    if not {"label", "gene"} <= set(table.columns):
        raise ValueError(f"{given} has the columns {', '.join(table.columns)}; expected label and gene")
    genes = table["gene"].fillna("").astype(str)
    return {str(label): gene or None for label, gene in zip(table["label"], genes, strict=True)}


def effects(
    data: Annotated[
        Path, typer.Argument(help="h5ad with real cells: controls, and the cells of validation conditions.")
    ],
    run: Annotated[list[Path], typer.Option(help="Folder of a fitted model; several (seeds) may be given.")],
    out: Out,
    conditions: Conditions = None,
    level: Annotated[float, typer.Option(help="Share of genes that intervals cover; 0 for no intervals.")] = 0.9,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Held-out conditions that set the width: val (if not given), test, FILE.csv, or names."),
    ] = None,
    n_cells: Annotated[int, typer.Option("-n", "--n-cells", help="Cells drawn for each condition.")] = 1000,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of the largest effects to write (.png, .pdf, .svg).", callback=writable_file),
    ] = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Predicted effect of each perturbation on each gene, with intervals; writes a tidy CSV."""
    from invirtuo.bench import effects as effects_
    from invirtuo.cells.files import read_h5ad, writing
    from invirtuo.reports.effects import plot_effects

    models = [model_with(folder, "predict") for folder in run]
    wanted = read_conditions(conditions)
    measured = read_conditions(calibration or ["val"])
    table = effects_(
        models,
        read_h5ad(data),
        wanted,
        level=level or None,
        calibration=measured,
        n_cells=n_cells,
        seed=seed,
    )
    with writing(out) as path:
        table.to_csv(path, index=False)
    if plot is not None:
        plot_effects(table, plot)
    if not quiet:
        typer.echo(f"{out}: {table['condition'].nunique()} conditions x {table['gene'].nunique():,} genes")


def judge(
    real: Annotated[Path, typer.Argument(help="h5ad with real cells that no generator was trained on.")],
    generated: Annotated[list[str], typer.Option(help="name=FILE with generated cells; may be given several times.")],
    out: OutFolder,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    metrics: Annotated[str, typer.Option(help="Names or profiles joined by commas.")] = "generation",
    n_pcs: Annotated[int, typer.Option(help="Principal components of metrics in that space.")] = 30,
    min_cells: Annotated[int, typer.Option(help="Real cells that a class needs to be scored by itself.")] = 20,
    max_cells: Annotated[
        int,
        typer.Option(
            help="Most cells of each class and origin that are scored, the others left out at random; 0: all."
        ),
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Of the noise floor and of the cells drawn.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Compare generated populations with real cells; writes tables and a report into a folder."""
    from invirtuo.bench import judge as judge_
    from invirtuo.cells.files import read_h5ad
    from invirtuo.design import Design

    real_cells = read_h5ad(real)
    design = Design.from_adata(real_cells, perturbation=perturbation, control=control, covariates=covariate or [])
    origins = {name: read_h5ad(path) for name, path in pairs("--generated", generated).items()}
    names = metrics.split(",")
    scores = judge_(
        origins,
        real_cells,
        design,
        out,
        metrics=names,
        n_pcs=n_pcs,
        min_cells=min_cells,
        max_cells=max_cells or None,
        seed=seed,
        progress=not quiet,
    )
    if not quiet:
        print_scores(scores[scores["task"] == scores["task"].iloc[-1]])
        for note in json.loads((out / "run.json").read_text(encoding="utf-8")).get("notes", []):
            typer.echo(note)
        typer.echo(f"report: {out / 'report.html'}")


def benchmark(
    tasks: Annotated[list[str], typer.Argument(help="Names of tasks; see `invirtuo list tasks`.")],
    out: OutFolder = Path("results"),
    model: Annotated[
        list[str] | None, typer.Option(help="MODEL, MODEL:PRESET or FILE.json; may be given several times.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 5,
    engine: Annotated[str, typer.Option(help="local: processes on this machine; ray: a Ray cluster.")] = "local",
    baselines: Annotated[bool, typer.Option(help="Add the simple baselines.")] = True,
    controls: Annotated[
        str, typer.Option(help="Control cells that models start from: train, or evaluated (as PerturBench).")
    ] = "train",
    metrics: Annotated[str | None, typer.Option(help="Names joined by commas, instead of those of the tasks.")] = None,
    panels: Annotated[
        list[str] | None,
        typer.Option(
            help="Tested condition to draw (k562|A+B), or paper: those of its figures; may be given several times."
        ),
    ] = None,
    n_jobs: Annotated[int | None, typer.Option(help="Cells computed at a time.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each cell.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with data files.")] = None,
    quiet: Quiet = False,
) -> None:
    """Fit and score models on tasks with several seeds; goes on where it was stopped."""
    from invirtuo import bench

    names = metrics.split(",") if metrics else None
    scores = bench.benchmark(
        tasks,
        model,
        seeds,
        out,
        engine,  # type: ignore[arg-type]
        baselines=baselines,
        controls=controls,  # type: ignore[arg-type]
        metrics=names,
        panels=panels or (),
        n_jobs=n_jobs,
        threads=threads,
        data_dir=data_dir,
        progress=not quiet,
    )
    if not quiet:
        for task, own in scores.groupby("task", sort=False):
            typer.echo(f"\n{task}")
            print_scores(own)
        typer.echo(f"\nreport: {out / 'report.html'}")
    if failed := _failed(out / "costs.csv"):
        typer.echo(f"invirtuo: {failed} cell(s) failed, see {out / 'costs.csv'}; run again to try them again", err=True)
        raise typer.Exit(1)


def tune(
    model: Annotated[str, typer.Argument(help="MODEL, MODEL:PRESET or FILE.json.")],
    task: Annotated[str, typer.Argument(help="Name of a task; its validation conditions are scored.")],
    out: OutFolder = Path("tuned"),
    trials: Annotated[int, typer.Option(help="Number of trials, those of earlier runs included.")] = 20,
    objective: Annotated[
        str, typer.Option(help="metric=weight joined by commas; the sum is minimised.")
    ] = "rmse_mean=1,rmse_mean_rank=0.1",
    search: Annotated[
        list[str] | None,
        typer.Option(help="field=LOW:HIGH or field=A,B,C, like fit.lr=1e-6:1e-2; in place of what the model searches."),
    ] = None,
    set_: Set = None,
    fit_set: FitSet = None,
    seed: Annotated[int, typer.Option(help="Of the search and of the fits.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of each fit.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with data files.")] = None,
    quiet: Quiet = False,
) -> None:
    """Choose hyperparameters on the validation conditions of a task; goes on where it was stopped."""
    from invirtuo import bench
    from invirtuo.bench.entry import as_entry

    # the entry, with fields replaced
    entry = as_entry(model)
    config, fit = entry.settings()
    listing = f"invirtuo list models {entry.model}"
    if set_:
        entry = replace(entry, config=with_fields(config, set_, listing))
    if fit_set:
        entry = replace(entry, fit=with_fields(fit, fit_set, f"{listing} --fit"))

    space = dict(map(_searched, search)) if search else None
    best = bench.tune(
        entry,
        task,
        trials,
        out,
        objective=_weights(objective),
        search=space,
        seed=seed,
        threads=threads,
        data_dir=data_dir,
        progress=not quiet,
    )
    if not quiet:
        typer.echo(f"best setting of {best.label}: {out / 'best.json'}; all trials: {out / 'trials.csv'}")


def report(
    results: Annotated[Path, typer.Argument(help="Folder with scores.csv.")],
    out: Out = Path("report.html"),
) -> None:
    """Write one HTML page about a folder of results."""
    from invirtuo.reports import report as write_report

    typer.echo(f"report: {write_report(results, out)}")


def _failed(costs: Path) -> int:
    import pandas as pd

    return int((pd.read_csv(costs)["status"] == "failed").sum())


def _weights(text: str) -> dict[str, float]:
    """``rmse_mean=1,rmse_mean_rank=0.1`` as a mapping."""
    weights = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--objective: {part!r}; expected metric=weight, for example rmse_mean=1") from None
    return weights


def _searched(text: str) -> tuple[str, Any]:
    """``fit.lr=1e-6:1e-2`` or ``width=[128, 256]`` as a field and its range or choices."""
    name, _, value = text.partition("=")
    try:
        if ":" in value:
            low, high = (json.loads(bound) for bound in value.split(":"))
            return name, (low, high)
        return name, json.loads(f"[{value}]")
    except ValueError:
        raise ValueError(
            f"--search: {text!r}; expected field=LOW:HIGH or field=A,B,C with text in quotes, like fit.lr=1e-6:1e-2"
        ) from None


def _layers(given: list[str] | None) -> str | dict[str, str] | None:
    """``X_hvg`` for both files, or ``pred=X_hvg`` for one of them."""
    if not given or (len(given) == 1 and "=" not in given[0]):
        return given[0] if given else None
    named = dict(text.partition("=")[::2] for text in given)
    if len(named) < len(given) or not set(named) <= {"pred", "real"}:
        raise ValueError(f"--layer {' '.join(given)}; expected one name, or pred=NAME and real=NAME")
    return named

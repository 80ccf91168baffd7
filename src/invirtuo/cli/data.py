"""Verbs that begin: the demo, what there is, what is in a file, and its preparation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from invirtuo.cli.options import (
    Control,
    Covariate,
    HoldOut,
    HoldOutVal,
    OutFolder,
    Perturbation,
    Quiet,
    Separator,
    Split,
    Time,
    Unknown,
    fail,
    named_splits,
    print_rows,
    print_scores,
    read_genes,
    split_of,
)

if TYPE_CHECKING:
    from rich.console import Console

NO_SPLIT = (
    "invirtuo: genes are chosen on all cells; if some will be held out, name them here, too, with --hold-out or --split"
)


def demo(
    out: OutFolder = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of split, fits and samples.")] = 0,
    minutes: Annotated[float, typer.Option(help="Scales the training; 2 is about two minutes on two cores.")] = 2.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a demo with other settings.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run the main job on the bundled cells and write a report; stopped, it goes on with the same command."""
    from invirtuo.bench import demo as run

    scores = run(out, seed=seed, minutes=minutes, progress=not quiet, overwrite=overwrite)
    if not quiet:
        print_scores(scores)
        typer.echo(f"\nreport: {out / 'report.html'}")


def list_(
    what: Annotated[str | None, typer.Argument(help="models, metrics, datasets, tasks, splits or features.")] = None,
    name: Annotated[str | None, typer.Argument(help="Of a model: list its settings and presets.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="With a model: also list the settings of fits.")] = False,
) -> None:
    """List what there is, with one line on each, or the settings of one model."""
    tables = {"models": _models, "metrics": _metrics, "datasets": _datasets, "tasks": _tasks, "splits": _splits}
    tables["features"] = _features
    if what is None:
        typer.echo("\n".join(f"invirtuo list {kind}" for kind in tables))
        return
    if what not in tables:
        raise ValueError(f"cannot list {what!r}; expected one of {', '.join(tables)}")
    if name is not None and what == "models":
        print_model(name, fit=fit)
        return
    if name is not None or fit:
        raise ValueError("a name and --fit go with models; `invirtuo list models primeflow --fit` lists its settings")
    print_rows(tables[what]())


def print_model(name: str, *, fit: bool = False, console: Console | None = None) -> None:
    """Print the settings of a model, its presets, and with `fit` the settings of fits."""
    from invirtuo.fit import FitConfig
    from invirtuo.models import model_class

    model = model_class(name)
    _print_settings(f"{name}, --set", model.Config, console)
    presets = [(preset, settings.source) for preset, settings in model.PRESETS.items()]
    _print_titled("presets, --preset", presets, console)
    if fit:
        _print_settings("fits, --fit-set", FitConfig, console)


def _print_settings(title: str, record: type, console: Console | None) -> None:
    """Name, default, and meaning with expected values, of every field."""
    from invirtuo.settings import described

    rows = []
    for each in described(record):
        default = each.default if isinstance(each.default, str) else json.dumps(each.default)
        rows.append((each.name, default or '""', f"{each.doc}\n({each.expected})"))
    _print_titled(title, rows, console)


def _print_titled(title: str, rows: Sequence[tuple[str, ...]], console: Console | None) -> None:
    from rich.console import Console

    console = console or Console()
    console.print(f"{title}:", highlight=False)
    print_rows(rows or [("none",)], console=console)
    console.print()


def _models() -> list[tuple[str, ...]]:
    from invirtuo.models import model_class, model_names

    models = {name: model_class(name) for name in model_names()}
    return [(name, _first_line(model), f"presets: {', '.join(model.PRESETS) or '-'}") for name, model in models.items()]


def _metrics() -> list[tuple[str, ...]]:
    from invirtuo.metrics import METRICS

    return [(name, record.definition, _better(record), record.reference) for name, record in METRICS.items()]


def _features() -> list[tuple[str, ...]]:
    from invirtuo.cells.features import SOURCES

    return list(SOURCES.items())


def _datasets() -> list[tuple[str, ...]]:
    from invirtuo.cells import datasets

    rows: list[tuple[str, ...]] = []
    for name, row in datasets.describe().iterrows():
        size = f"{row['cells']:,} x {row['genes']:,}"
        rows.append((str(name), row["title"], size, row["status"], row["licence"]))
    return rows


def _tasks() -> list[tuple[str, ...]]:
    from invirtuo.bench import TASKS

    return [(task.name, task.title, f"{task.dataset}; {', '.join(task.metrics)}") for task in TASKS.values()]


def _splits() -> list[tuple[str, ...]]:
    from invirtuo.splits import SPLITS

    written = named_splits()
    rows: list[tuple[str, ...]] = []
    for name, split in SPLITS.items():
        option = f"--split {written[name]}" if name in written else f"--{name.replace('_', '-')}"
        rows.append((name, _first_line(split), option))
    return rows


def _first_line(record: Any) -> str:
    """First line of a docstring."""
    return (record.__doc__ or "").strip().splitlines()[0]


def check(
    data: Annotated[Path, typer.Argument(help="Cells: h5ad, zarr, h5mu (FILE.h5mu/rna), or counts of 10x Genomics.")],
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    unknown: Unknown = None,
    time: Time = None,
) -> None:
    """Say what is in a file, and what would go wrong with it; exit code 2 if something would."""
    from invirtuo.cells import preprocess
    from invirtuo.cells.files import read_h5ad
    from invirtuo.design import Design

    adata = read_h5ad(data)
    columns = {"perturbation": perturbation, "control": control, "covariates": covariate or []}
    design = Design.from_adata(adata, **columns, separator=separator, unknown=unknown, time=time)  # type: ignore[arg-type]
    findings = preprocess.check(adata, design)
    print_rows(findings.itertuples(index=False))
    n_errors = int((findings["level"] == "error").sum())
    if n_errors:
        fail(f"{data}: {n_errors} error(s), listed above")


def prepare(
    files: Annotated[
        list[Path], typer.Argument(help="IN.h5ad OUT.h5ad; with --shuffle-to any number of files or folders.")
    ],
    n_genes: Annotated[int | None, typer.Option(help="Number of variable genes to keep; all if not given.")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Gene to keep in any case, or FILE with one a line; may be given several times."),
    ] = None,
    size_factor: Annotated[str | None, typer.Option(help="Column of obs with the depth of each cell.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer that holds the raw counts, if not X.")] = None,
    split: Split = None,
    hold_out: HoldOut = None,
    hold_out_val: HoldOutVal = None,
    knockdown: Annotated[bool, typer.Option("--knockdown", help="Keep only cells that show the knock-down.")] = False,
    drop_unmeasured: Annotated[
        bool, typer.Option("--drop-unmeasured", help="With --knockdown: drop targets that are no gene of the data.")
    ] = False,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    shuffle_to: Annotated[
        Path | None,
        typer.Option(help="Folder to write: the cells of all files in random order, in bounded memory."),
    ] = None,
    counts: Annotated[
        bool, typer.Option("--counts", help="With --shuffle-to: keep raw counts, for count models.")
    ] = False,
    memory: Annotated[str, typer.Option(help="With --shuffle-to: what may be in memory.")] = "256 MiB",
    compression: Annotated[str, typer.Option(help="With --shuffle-to: none, lzf or gzip.")] = "none",
    seed: Annotated[int, typer.Option(help="With --shuffle-to: of the order.")] = 0,
) -> None:
    """Normalise raw counts to log1p(CP10k), choose genes, filter knock-downs; or shuffle files larger than memory.

    Genes are chosen on training cells: name what fit will hold out with the same --hold-out or --split.
    """
    from invirtuo.design import Design

    columns = {"perturbation": perturbation, "control": control, "covariates": covariate or []}

    def design_of(obs: Any) -> Design:
        if perturbation is None or control is None:
            raise ValueError("--hold-out, --split by name and --knockdown need --perturbation and --control")
        return Design.from_adata(obs, **columns, separator=separator)  # type: ignore[arg-type]

    def split_for(obs: Any) -> Any:
        if not (split or hold_out):
            if n_genes is not None:
                typer.echo(NO_SPLIT, err=True)
            return None
        needs_design = hold_out or Path(str(split)).suffix != ".csv"
        return split_of(obs, design_of(obs) if needs_design else None, split, hold_out, hold_out_val)

    # many files, on disk
    if shuffle_to is not None:
        if knockdown or layer is not None:
            raise ValueError("--knockdown and --layer work in memory; prepare each file with them, then shuffle these")
        chosen = {"n_genes": n_genes, "keep": keep, "size_factor": size_factor, "compression": compression}
        _shuffle(files, shuffle_to, split_for, memory, counts=counts, seed=seed, **chosen)
        return

    # one file, in memory
    if len(files) != 2:
        raise ValueError(f"prepare takes IN.h5ad OUT.h5ad, found {len(files)} path(s); several files need --shuffle-to")
    data, out = files
    options: dict[str, Any] = {"n_genes": n_genes, "keep": keep or (), "size_factor": size_factor, "layer": layer}
    unmeasured: Literal["drop", "keep"] = "drop" if drop_unmeasured else "keep"
    _prepare(data, out, split_for, design_of if knockdown else None, unmeasured, **options)


def _prepare(
    data: Path, out: Path, split_for: Any, design_of: Any, unmeasured: Literal["drop", "keep"], **options: Any
) -> None:
    """Normalise one file, and filter knock-downs if there is a Design for it."""
    from invirtuo.cells import preprocess
    from invirtuo.cells.files import check_h5ad_name, check_writable, read_h5ad, write_h5ad

    check_h5ad_name(out)
    check_writable(out, inputs=[data])
    adata = read_h5ad(data)
    options["keep"] = read_genes(list(options["keep"]), adata.var_names, "--keep")
    prepared = preprocess.normalize(adata, split=split_for(adata.obs), **options)

    if design_of is not None:
        design = design_of(prepared.obs)
        prepared = preprocess.knockdown(prepared, design, unmeasured=unmeasured)
        table = prepared.uns["invirtuo"]["knockdown"]
        print_rows(table.drop(columns="context").itertuples(index=False), header=("target", "cells", "kept", "reason"))
        if design.is_control(prepared.obs).all():
            raise ValueError(f"{data}: the knock-down filter leaves no perturbed cell, see the reasons above")
    write_h5ad(prepared, out)
    typer.echo(f"{out}: {prepared.n_obs:,} cells x {prepared.n_vars:,} genes")


def _shuffle(files: list[Path], out: Path, split_for: Any, memory: str, **options: Any) -> None:
    """Write a shuffled store."""
    from invirtuo import CellStore
    from invirtuo.cells.files import check_writable
    from invirtuo.cells.shuffle import shuffle

    check_writable(out, folder=True)
    store = CellStore.open(files, memory=memory)
    options["keep"] = read_genes(options["keep"] or [], store.var_names, "--keep")
    manifest = shuffle(store, out, split=split_for(store.obs), **options)
    size = f"{manifest['n_obs']:,} cells x {manifest['n_vars']:,} genes"
    typer.echo(f"{out}: {size}, {manifest['values']}, {len(manifest['files'])} files")


def _better(metric: Any) -> str:
    """Direction and range of a metric."""
    ends = " to ".join(f"{end:g}".replace("inf", "∞") for end in metric.range)
    return f"{metric.direction} is better, {ends}" if metric.direction else ends

"""Verbs that begin: the demo, what there is, what is in a file, and its preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invirtuo.cli.options import (
    Control,
    Covariate,
    OutFolder,
    Perturbation,
    Quiet,
    Separator,
    Unknown,
    fail,
    print_rows,
    print_scores,
)


def demo(
    out: OutFolder = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of split, fits and samples.")] = 0,
    minutes: Annotated[float, typer.Option(help="Scales the training to about this long on two cores.")] = 4.0,
    quiet: Quiet = False,
) -> None:
    """Run the main job on the bundled cells and write a report."""
    from invirtuo.bench import demo as run

    scores = run(out, seed=seed, minutes=minutes, progress=not quiet)
    if not quiet:
        print_scores(scores)
        typer.echo(f"\nreport: {out / 'report.html'}")


def list_(what: Annotated[str, typer.Argument(help="models, metrics, datasets, tasks or splits.")]) -> None:
    """List what there is, with one line on each."""
    from invirtuo import bench, datasets, metrics, models, splits

    def first_line(thing: Any) -> str:
        return (thing.__doc__ or "").strip().splitlines()[0]

    tables = {
        "models": lambda: [
            (name, first_line(model), f"presets: {', '.join(model.PRESETS) or '-'}")
            for name, model in models.MODELS.items()
        ],
        "metrics": lambda: [
            (name, record.definition, _better(record), record.reference) for name, record in metrics.METRICS.items()
        ],
        "datasets": lambda: [
            (str(name), row["title"], "here" if row["here"] else f"needs {row['file']}")
            for name, row in datasets.describe().iterrows()
        ],
        "tasks": lambda: [
            (task.name, task.title, f"{task.dataset}; {', '.join(task.metrics)}") for task in bench.TASKS.values()
        ],
        "splits": lambda: [(name, first_line(split), "") for name, split in splits.SPLITS.items()],
    }
    if what not in tables:
        raise ValueError(f"cannot list {what!r}; expected one of {', '.join(tables)}")
    print_rows(tables[what]())


def check(
    data: Annotated[Path, typer.Argument(help="h5ad file.")],
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    unknown: Unknown = None,
) -> None:
    """Say what is in a file, and what would go wrong with it; exit code 2 if something would."""
    from invirtuo import preprocess
    from invirtuo.design import Design
    from invirtuo.files import read_h5ad

    adata = read_h5ad(data)
    columns = {"perturbation": perturbation, "control": control, "covariates": covariate or []}
    design = Design.from_adata(adata, **columns, separator=separator, unknown=unknown)  # type: ignore[arg-type]
    findings = preprocess.check(adata, design)
    print_rows([tuple(str(value) for value in row) for row in findings.itertuples(index=False)])
    if (findings["level"] == "error").any():
        fail(f"{data}: {int((findings['level'] == 'error').sum())} error(s), listed above")


def prepare(
    files: Annotated[
        list[Path], typer.Argument(help="IN.h5ad OUT.h5ad; with --shuffle-to any number of files or folders.")
    ],
    n_genes: Annotated[int | None, typer.Option(help="Number of variable genes to keep; all if not given.")] = None,
    size_factor: Annotated[str | None, typer.Option(help="Column of obs with the depth of each cell.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer that holds the raw counts, if not X.")] = None,
    split: Annotated[Path | None, typer.Option(help="Split file; genes are chosen on its training cells.")] = None,
    knockdown: Annotated[bool, typer.Option("--knockdown", help="Keep only cells that show the knock-down.")] = False,
    perturbation: Annotated[str | None, typer.Option(help="Needed for --knockdown.")] = None,
    control: Annotated[str | None, typer.Option(help="Needed for --knockdown.")] = None,
    covariate: Covariate = None,
    shuffle_to: Annotated[
        Path | None, typer.Option(help="Folder to write: the cells of all files in random order, in bounded memory.")
    ] = None,
    counts: Annotated[
        bool, typer.Option("--counts", help="With --shuffle-to: keep raw counts, for count models.")
    ] = False,
    memory: Annotated[str, typer.Option(help="With --shuffle-to: what may be in memory.")] = "256 MiB",
    compression: Annotated[str, typer.Option(help="With --shuffle-to: none, lzf or gzip.")] = "none",
    seed: Annotated[int, typer.Option(help="With --shuffle-to: of the order.")] = 0,
) -> None:
    """Normalise raw counts to log1p(CP10k), choose genes, filter knock-downs; or shuffle files larger than memory."""
    from invirtuo import preprocess, splits
    from invirtuo.design import Design
    from invirtuo.files import check_writable, read_h5ad, write_h5ad

    if shuffle_to is not None:
        if knockdown or layer is not None:
            raise ValueError("--knockdown and --layer work in memory; prepare each file with them, then shuffle these")
        _shuffle(files, shuffle_to, split, memory, counts=counts, n_genes=n_genes, size_factor=size_factor,
                 compression=compression, seed=seed)  # fmt: skip
        return
    if len(files) != 2:
        raise ValueError(f"prepare takes IN.h5ad OUT.h5ad, found {len(files)} path(s); several files need --shuffle-to")
    data, out = files
    check_writable(out, inputs=[data])
    adata = read_h5ad(data)
    parts = None if split is None else splits.from_csv(split, adata.obs)
    prepared = preprocess.normalize(adata, n_genes=n_genes, size_factor=size_factor, layer=layer, split=parts)
    if knockdown:
        if perturbation is None or control is None:
            raise ValueError("--knockdown needs --perturbation and --control")
        design = Design.from_adata(prepared, perturbation=perturbation, control=control, covariates=covariate or [])
        prepared = preprocess.knockdown(prepared, design)
    write_h5ad(prepared, out)
    typer.echo(f"{out}: {prepared.n_obs:,} cells x {prepared.n_vars:,} genes")


def _shuffle(files: list[Path], out: Path, split: Path | None, memory: str, **options: Any) -> None:
    """Write a shuffled store."""
    from invirtuo import CellStore, splits
    from invirtuo.files import check_writable
    from invirtuo.store import shuffle

    check_writable(out, folder=True)
    store = CellStore.open(files, memory=memory)
    parts = None if split is None else splits.from_csv(split, store.obs)
    made = shuffle(store, out, split=parts, **options)
    typer.echo(
        f"{out}: {made['n_obs']:,} cells x {made['n_vars']:,} genes, {made['values']}, {len(made['files'])} files"
    )


def _better(metric: Any) -> str:
    """Direction and range of a metric."""
    ends = " to ".join(f"{end:g}".replace("inf", "∞") for end in metric.range)
    return f"{metric.direction} is better, {ends}" if metric.direction else ends

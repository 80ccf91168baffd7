"""Verbs of the arena: what is asked of those who predict elsewhere, and tables of several groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from invirtuo.cli.options import OutFolder, print_scores


def ask(
    task: Annotated[str, typer.Argument(help="Name of a task; see `invirtuo list tasks`.")],
    out: OutFolder,
    seed: int = 0,
    controls: Annotated[str, typer.Option(help="Control cells to start from: train, or evaluated.")] = "train",
    data_dir: Annotated[Path | None, typer.Option(help="Folder with data files.")] = None,
) -> None:
    """Write the question of a task into a new folder: cells to learn from, and the conditions to predict."""
    from invirtuo import bench

    for folder in bench.ask(task, out, seed=seed, controls=controls, data_dir=data_dir):  # type: ignore[arg-type]
        typer.echo(f"{folder}: answer with {folder / 'predicted.h5ad'}")


def merge(
    results: Annotated[list[Path], typer.Argument(help="Folders of results of `invirtuo benchmark`.")],
    out: OutFolder,
) -> None:
    """Join the results of several folders into a new one, with all tables and the page; computes nothing."""
    from invirtuo import bench

    scores = bench.merge(results, out)
    for task, own in scores.groupby("task", sort=False):
        typer.echo(f"\n{task}")
        print_scores(own)
    typer.echo(f"\nreport: {out / 'report.html'}")

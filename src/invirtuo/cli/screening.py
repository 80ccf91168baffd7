"""Verbs that lead to the next experiment: which perturbations to try, and which pairs interact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invirtuo.cli.options import (
    Control,
    Covariate,
    Out,
    Perturbation,
    Quiet,
    Run,
    Separator,
    model_with,
    print_rows,
    read_csv,
    writable_file,
)

Level = Annotated[float, typer.Option("--level", help="Share that intervals cover.")]
Picture = Annotated[
    Path | None, typer.Option("--plot", help="Picture to write (.png, .pdf, .svg).", callback=writable_file)
]
Page = Annotated[
    Path | None, typer.Option("--report", help="HTML page to write: the answer, charts, table.", callback=writable_file)
]
SHOWN = 10  # rows that are printed


def responses(
    cells: Annotated[Path, typer.Argument(help="h5ad with real cells, controls among them: counts or log1p values.")],
    out: Out,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    draws: Annotated[int, typer.Option(help="Times that the control cells are halved.", min=1)] = 10,
    scale: Annotated[str, typer.Option(help="log1p; counts; auto: what the file seems to hold.")] = "auto",
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Which perturbations act in real cells: genes that change, beside halves of the control cells; writes a CSV."""
    from invirtuo.cells.files import writing
    from invirtuo.cells.source import opened
    from invirtuo.design import Design
    from invirtuo.metrics import responses as measured

    real = opened(cells, small_in_memory=True)
    design = Design.from_adata(
        real.obs, perturbation=perturbation, control=control, covariates=covariate or [], separator=separator
    )
    table = measured(real, design, n_draws=draws, seed=seed, scale=scale)  # type: ignore[arg-type]
    with writing(out) as path:
        table.to_csv(path, index=False)
    if not quiet:
        columns = ["condition", "n_cells", "n_control", "n_de", "n_de_null", "effect", "effect_null"]
        print_rows(table[columns].round(3).head(SHOWN).itertuples(index=False), header=tuple(columns))
        typer.echo(f"{out}: {table['acts'].sum():,} of {len(table):,} conditions change more genes than chance does")


def screen(
    run: Run,
    towards: Annotated[
        Path, typer.Option(help="FILE.csv with columns gene and weight (below 0: to lower), or h5ad of wanted cells.")
    ],
    out: Out,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            help="Perturbation or condition to try, or FILE.csv of them; all that the model knows if not given."
        ),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also all pairs of the candidates.")] = False,
    cells: Annotated[
        Path | None, typer.Option(help="h5ad with measured cells: controls, validation conditions.")
    ] = None,
    level: Level = 0.9,
    n_cells: Annotated[int, typer.Option("-n", "--n-cells", help="Cells drawn for each condition.")] = 300,
    plot: Picture = None,
    report: Page = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Rank perturbations by how near they bring control cells to a wanted state; writes a CSV, best first."""
    from invirtuo.bench import screen as screened
    from invirtuo.cells.files import read_h5ad, writing
    from invirtuo.reports.screen import plot_screen, screen_page

    model, wanted, tried = model_with(run, "predict"), _towards(towards), _candidates(candidates)
    options: dict[str, Any] = {"level": level, "pairs": pairs, "n_cells": n_cells, "seed": seed, "progress": not quiet}
    measured = None if cells is None else read_h5ad(cells)
    table = screened(model, wanted, tried, cells=measured, **options)
    with writing(out) as path:
        table.to_csv(path, index=False)
    if plot is not None:
        plot_screen(table, plot)
    if report is not None:
        screen_page(table, report)
    if not quiet:
        best = table.head(SHOWN)
        shown = zip(best["rank"].astype(str), best["condition"], best["change"].map("{:+.3g}".format), strict=True)
        print_rows(list(shown))
        typer.echo(f"{out}: {len(table):,} conditions, {table.attrs['n_calibration']} for intervals")


def interactions(
    cells: Annotated[
        Path, typer.Argument(help="h5ad with log1p values of pairs and their parts, predicted or measured.")
    ],
    out: Out,
    perturbation: Perturbation = None,
    control: Control = None,
    covariate: Covariate = None,
    separator: Separator = "+",
    controls: Annotated[Path | None, typer.Option(help="h5ad with the control cells, if CELLS has none.")] = None,
    level: Level = 0.9,
    report: Page = None,
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """How far the effects of pairs are from what their parts let expect; writes a tidy CSV."""
    import pandas as pd

    from invirtuo.bench import interactions as scored
    from invirtuo.cells.files import read_h5ad, writing
    from invirtuo.design import Design
    from invirtuo.reports.interactions import interactions_page

    own = read_h5ad(cells)
    reference = None if controls is None else read_h5ad(controls)
    obs = own.obs if reference is None else pd.concat([own.obs, reference.obs])
    design = Design.from_adata(
        obs, perturbation=perturbation, control=control, covariates=covariate or [], separator=separator
    )
    table = scored(own, design, controls=reference, level=level, seed=seed)
    with writing(out) as path:
        table.to_csv(path, index=False)
    if report is not None:
        interactions_page(table, report)
    if not quiet:
        typer.echo(f"{out}: {table['condition'].nunique():,} pairs")


def _towards(path: Path) -> Any:
    """A signature, or wanted cells."""
    import pandas as pd

    from invirtuo.cells.files import read_h5ad

    if path.suffix != ".csv":
        return read_h5ad(path)
    table = read_csv(path, "--towards")
    if not {"gene", "weight"} <= set(table.columns):
        raise ValueError(f"--towards: {path} has the columns {', '.join(table.columns)}; expected gene and weight")
    weights = pd.to_numeric(table["weight"], errors="coerce")
    if weights.isna().any():
        raise ValueError(f"--towards: {path} holds weights that are no numbers")
    return pd.Series(weights.to_numpy(), index=table["gene"])


def _candidates(words: list[str] | None) -> Any:
    """Names, or what a file lists: conditions in several columns, or perturbations in one."""
    if words is None or len(words) > 1 or Path(words[0]).suffix != ".csv":
        return words
    table = read_csv(Path(words[0]), "--candidates")
    return table.iloc[:, 0].tolist() if table.shape[1] == 1 else table

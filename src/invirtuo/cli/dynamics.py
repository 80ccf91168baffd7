"""Verbs of models of time courses: forecast, read out a network, hold genes at a level."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from invirtuo.cli.options import (
    Device,
    Out,
    Quiet,
    Run,
    model_with,
    print_rows,
    read_csv,
    read_labels,
    writable_file,
    writable_folder,
)

Times = Annotated[str | None, typer.Option(help="Times joined by commas; 30 along each course if not given.")]
Figure = Annotated[Path | None, typer.Option(help="Also draw a picture, FILE.png.", callback=writable_file)]
Genes = Annotated[list[str], typer.Argument(help="Genes to hold, all at once.")]
Courses = Annotated[Path | None, typer.Option("--cells", help="h5ad with cells to start from; else training courses.")]


def forecast(
    run: Run,
    data: Annotated[Path, typer.Argument(help="h5ad with cells whose first states are followed, or a CSV of states.")],
    out: Out,
    times: Times = None,
    level: Annotated[float, typer.Option(help="Of the interval.")] = 0.9,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Labels of the states of a CSV file: covariate=label, which may be given several times; a name like "
            "mono|s2d1, or one for each state; or FILE.csv with a row for each."
        ),
    ] = None,
    figure: Figure = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Folder for errors of courses that were not fitted, beside simple forecasts; see `invirtuo report`.",
            callback=writable_folder,
        ),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Follow time courses from their first states, with intervals."""
    from invirtuo.cells.files import read_h5ad, write_h5ad

    model = model_with(run, "forecast")
    is_table = data.suffix == ".csv"
    cells: Any = read_csv(data, "DATA").astype(float) if is_table else read_h5ad(data)
    found = model.forecast(cells, _times(times), labels=read_labels(where), level=level, device=device)
    write_h5ad(found, out)

    # picture and scores, if they are wanted
    if figure is not None:
        from invirtuo.reports import dynamics

        observed = None if is_table else cells
        _write_picture(dynamics.forecast(found, observed, time=model.design.time), figure)
    if scores is not None:
        if is_table:
            raise ValueError("--scores needs cells at later times; a CSV file holds first states alone")
        _write_scores(model, cells, level, scores, quiet)
    _done(model, out, found.n_obs, "states", quiet)


def network(
    run: Run,
    out: Out,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Courses to read along: covariate=label, several times if need be, or names, or FILE.csv."),
    ] = None,
    n_edges: Annotated[int | None, typer.Option("-n", "--n-edges", help="Strongest edges; all if not given.")] = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:
    """Read signed edges between genes from a fitted field."""
    from invirtuo.cells.files import writing

    model = model_with(run, "network")
    edges = model.network(read_labels(where), n_edges=n_edges)
    with writing(out) as path:
        edges.to_csv(path, index=False)
    if figure is not None:
        from invirtuo.reports import dynamics

        _write_picture(dynamics.network(edges), figure)
    if not quiet and len(edges):
        shown = edges.head(10)[["regulator", "target", "score", "sign", "gain", "fdr", "support"]]
        rows = []
        for row in shown.itertuples(index=False):
            rows.append(tuple(f"{value:.3g}" if isinstance(value, float) else value for value in row))
        print_rows(rows, header=tuple(shown.columns))
    _done(model, out, len(edges), "edges", quiet)


def knock_out(
    run: Run,
    genes: Genes,
    out: Out,
    cells: Courses = None,
    times: Times = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:
    """Hold genes at zero: change of every gene, and of where courses end."""
    _intervene(run, genes, 0.0, out, cells, times, figure, quiet)


def overexpress(
    run: Run,
    genes: Genes,
    out: Out,
    level: Annotated[float | None, typer.Option(help="In the data space; the highest seen if not given.")] = None,
    cells: Courses = None,
    times: Times = None,
    figure: Figure = None,
    quiet: Quiet = False,
) -> None:
    """Hold genes at a level: change of every gene, and of where courses end."""
    _intervene(run, genes, level, out, cells, times, figure, quiet)


def _intervene(
    run: Path,
    genes: list[str],
    level: float | None,
    out: Path,
    cells: Path | None,
    times: str | None,
    figure: Path | None,
    quiet: bool,
) -> None:
    """Hold genes at a level; write the change, draw it, and print the largest effects."""
    from invirtuo.cells.files import read_h5ad, write_h5ad

    model = model_with(run, "overexpress")
    change = model.overexpress(genes, level, None if cells is None else read_h5ad(cells), _times(times))
    write_h5ad(change, out)
    if figure is not None:
        from invirtuo.reports import dynamics

        _write_picture(dynamics.intervention(change, time=model.design.time), figure)
    if not quiet:
        effect = change.var.loc[~change.var["is_clamped"], "effect"]
        largest = effect.abs().sort_values(ascending=False).index[:10]
        rows = [(gene, f"{value:+.3f}") for gene, value in effect.reindex(largest).items()]
        print_rows(rows, header=("gene", "change at the end, sd"))
    _done(model, out, change.n_obs, "states", quiet)


def _write_scores(model: Any, cells: Any, level: float, folder: Path, quiet: bool) -> None:
    """Scores of forecasts of courses that were not fitted, as a folder that `report` reads."""
    from invirtuo.bench.compare.courses import WHAT_ERRORS_ARE, forecast_scores
    from invirtuo.cells.files import writing
    from invirtuo.verbs.naive_forecasts import ORACLES

    split = model.parts_of(cells)
    is_held_out = "test" in set(split)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = model.evaluate_forecast(cells, split if is_held_out else None, level=level)

    # scores and facts, as the report expects them
    with writing(folder / "scores.csv") as path:
        forecast_scores(table, model.name).to_csv(path, index=False)
    notes = [str(w.message) for w in caught if w.category is UserWarning]
    if not is_held_out:
        notes = ["the model was fitted to every course of this file: errors are those of a fit, not of forecasts"]
    elif n_fitted := int((split == "train").sum()):
        notes.append(f"{n_fitted:,} cells of courses to which the model was fitted are not judged")
    facts: dict[str, Any] = {"title": "Forecasts of time courses", "notes": [*notes, WHAT_ERRORS_ARE]}
    facts["beats_baselines"] = table.attrs["beats_baselines"] if is_held_out else None
    with writing(folder / "run.json") as path:
        path.write_text(json.dumps(facts))

    for note in notes:
        typer.echo(f"invirtuo: warning: {note}", err=True)
    if not quiet:
        wide = table.pivot_table(index="model", values=["mse", "mse_bins", "r2"], sort=False)
        rows = []
        for name, row in wide.iterrows():
            label = f"{name} (sees the answer)" if name in ORACLES else name
            rows.append((label, *(f"{value:.4f}" for value in row)))
        print_rows(rows, header=("model", *wide.columns))


def _times(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--times {text!r}; expected numbers joined by commas, for example 0.2,0.5,1") from None


def _write_picture(address: str, path: Path) -> None:
    """Write the picture of a data URL."""
    import base64

    from invirtuo.cells.files import writing

    with writing(path) as partial:
        partial.write_bytes(base64.b64decode(address.split(",", 1)[1]))


def _done(model: Any, out: Path, n: int, what: str, quiet: bool) -> None:
    if warning := model.card.get("warning"):
        typer.echo(f"invirtuo: warning: {warning}", err=True)
    if not quiet:
        typer.echo(f"{out}: {n:,} {what}")

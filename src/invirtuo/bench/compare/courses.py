"""Forecasts of time courses beside what was held out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from invirtuo.bench.cell import scores_of
from invirtuo.bench.compare.rows import described, normalized, of_part, rows_of
from invirtuo.bench.entry import Entry
from invirtuo.bench.run import software, write_page, write_table
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import write_h5ad
from invirtuo.metrics.scores import FLOOR
from invirtuo.reports.figures import save
from invirtuo.verbs.naive_forecasts import ORACLES

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["compare_courses", "forecast_scores"]

# what forecasts are judged by
DIRECTIONS = {"mse_cells": "lower", "mse_bins": "lower", "r2": "higher", "coverage": None}
DRAWN_EDGES = 100
WHAT_ERRORS_ARE = (
    "mse_cells is the squared error per cell and gene, mse_bins that of means of bins; genes are standardised by "
    f"training cells. {FLOOR} is a smoother that looks at the held-out course itself: no forecast."
)


def compare_courses(
    adata: AnnData,
    design: Design,
    entries: Sequence[Entry],
    *,
    split: pd.Series,
    part: str,
    out: Path,
    baselines: bool,
    n_genes: int | None,
    seed: int,
    about: Mapping[str, Any],
    overwrite: bool,
) -> pd.DataFrame:
    """Fit models of time courses, forecast what was held out, judge them beside means, lines and smoothers.

    As :func:`invirtuo.bench.compare`; ``ahead.h5ad`` holds the forecasts of the first model, ``edges.csv`` its network.
    """
    adata = normalized(adata, n_genes, None, split)
    rows = rows_of(out, entries, CellDataset(adata, design, split), split, [part, seed], overwrite=overwrite)
    for row in rows:
        if not row.record:
            model, facts = row.fitted(design, adata, split)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                table = model.evaluate_forecast(adata, split, part)
            facts["notes"] = [f"{row.entry.label}: {w.message}" for w in caught if w.category is UserWarning]
            if row is rows[0]:
                _draw_forecasts(model, of_part(adata, split, part), out, row.entry.predict)
            row.write(forecast_scores(table, row.entry.label), facts)

    # the rules without a model are those of the first row
    tables = [scores_of(row.record) for row in rows]
    labels = [row.entry.label for row in rows]
    rules = tables[0][~tables[0]["model"].isin(labels)]
    own = [table[table["model"] == label] for table, label in zip(tables, labels, strict=True)]
    scores = pd.concat([*own, rules], ignore_index=True)
    naive = [name for name in dict.fromkeys(rules["model"]) if name != FLOOR]
    scores = scores if baselines else scores[~scores["model"].isin(naive)]
    write_table(out / "scores.csv", scores)
    facts = {"title": "How well were time courses forecast?", **described(adata, design, split, part, rows), **about}
    notes = [note for row in rows for note in row.record["facts"]["notes"]]
    notes.append(WHAT_ERRORS_ARE)
    facts |= {"baselines": naive, "unit": "held-out course", "seed": seed, "notes": notes}
    write_page(out, facts | {"software": software()})
    return scores


def forecast_scores(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """Errors of forecasts as tidy scores.

    Parameters
    ----------
    table
        As `evaluate_forecast` of a model gives it.
    label
        What the model is to be called.

    Returns
    -------
    Columns ``condition``, ``model``, ``metric``, ``value`` and ``direction``. The smoother that looks at the course
    itself is the noise floor; other rules that look at it are left out.
    """
    own = set(table["model"]) - set(ORACLES)
    last = next(reversed(ORACLES))
    names = {name: name for name in own} | {table["model"].iloc[0]: label, last: FLOOR}
    table = table.rename(columns={"mse": "mse_cells"})  # "mse" is a metric of means
    tidy = table.melt(["condition", "model"], list(DIRECTIONS), var_name="metric").dropna(subset="value")
    tidy = tidy[tidy["model"].isin(list(names))]
    return tidy.assign(model=tidy["model"].map(names), direction=tidy["metric"].map(DIRECTIONS))


def _draw_forecasts(model: Any, cells: AnnData, out: Path, options: Mapping[str, Any]) -> None:
    """Forecasts of the held-out courses and the network, as files and pictures."""
    from invirtuo.reports import dynamics

    ahead = model.forecast(cells, **options)
    write_h5ad(ahead, out / "ahead.h5ad")
    save(dynamics.forecast_figure(ahead, cells, time=model.design.time), out / "courses.png")
    if hasattr(model, "network"):
        edges = model.network(n_edges=DRAWN_EDGES)
        write_table(out / "edges.csv", edges)
        if len(edges):
            save(dynamics.network_figure(edges), out / "network.png")

"""A page about predicted cells of anybody: their scores beside unchanged control cells and the noise floor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from invirtuo.bench.entry import FLOOR
from invirtuo.bench.notes import flagged
from invirtuo.bench.run import software, write_page, write_table
from invirtuo.metrics import Pair, noise_floor, score
from invirtuo.models import NoChange

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.cells.store import CellStore
    from invirtuo.design import Design

__all__ = ["evaluation_page"]

N_CELLS = 1000  # control cells of each condition


def evaluation_page(
    scores: pd.DataFrame,
    pair: Pair,
    real: AnnData | CellStore,
    design: Design,
    out: Path,
    *,
    model: str,
    about: Mapping[str, Any],
    **options: Any,
) -> None:
    """Write a folder with the scores, what they are to be read beside, what is suspect, and a page.

    Unchanged control cells are drawn from those of the real cells, where these are log values in memory.

    Parameters
    ----------
    scores, pair
        Of the predicted cells.
    real, design
        The real cells, and which columns mean what.
    model
        How the predicted cells are called.
    about
        Facts for ``run.json`` and the page: ``dataset`` and others.
    options
        ``n_pcs``, ``scale`` and ``layer`` of :func:`invirtuo.metrics.evaluate`.

    Raises
    ------
    ValueError
        If no cells were perturbed.
    """
    if design.perturbation is None:
        raise ValueError("a page about cells that were not perturbed is made by `invirtuo judge`; leave the page out")
    metrics = list(scores.loc[scores["value"].notna(), "metric"].unique())
    rows = {model: scores, FLOOR: noise_floor(real, design, metrics, **options)}
    if options["scale"] == "log1p" and options["layer"] is None and hasattr(real, "var_names"):
        unchanged = NoChange(design, real.var_names).fit(real)
        conditions = design.conditions(real.obs)
        perturbed = conditions[~design.is_control(conditions)]
        cells = unchanged.predict(perturbed, N_CELLS)
        rows[NoChange.name] = score(Pair(cells, real, design, **options), metrics)
    named = [table.assign(model=name) for name, table in rows.items()]

    write_table(out / "scores.csv", pd.concat(named, ignore_index=True))
    write_table(out / "flags.csv", flagged(pair, model))
    facts = {"title": f"How near are the cells of {model} to the real ones?", **about}
    write_page(out, {**facts, "baselines": [NoChange.name], "models": [model], "software": software()})

"""Generated populations beside held-out cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from invirtuo.bench.compare.rows import described, of_part, rows_of, write_history
from invirtuo.bench.entry import Entry
from invirtuo.bench.notes import FLAGS, copies
from invirtuo.bench.populations import REAL, judge, logged
from invirtuo.bench.question import Asked
from invirtuo.bench.run import write_table
from invirtuo.cells import preprocess
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import read_h5ad, write_h5ad
from invirtuo.cells.values import looks_like_counts

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["compare_populations"]

NAIVE = Entry("independent_nb", "independent_nb")  # genes drawn independently


def compare_populations(
    adata: AnnData,
    design: Design,
    entries: Sequence[Entry],
    *,
    split: pd.Series,
    part: str,
    out: Path,
    baselines: bool,
    n_genes: int | None,
    metrics: Sequence[str] | str,
    n_cells: int | None,
    n_pcs: int,
    seed: int,
    about: Mapping[str, Any],
    overwrite: bool,
) -> pd.DataFrame:
    """Fit generators, draw a cell for each held-out one, judge them beside independent genes and training cells.

    As :func:`invirtuo.bench.compare`, with raw counts; `n_cells`: at most so many cells are drawn. ``flags.csv`` says
    whose cells are copies of real ones.
    """
    if not looks_like_counts(adata.X):
        raise ValueError("generators learn raw counts, and X holds other values; give counts")
    if n_genes is not None:
        adata = adata[:, preprocess.normalize(adata, n_genes=n_genes, split=split).var_names].copy()
    if baselines and NAIVE.label not in {entry.label for entry in entries}:
        entries = [*entries, NAIVE]

    # cells with the labels of those that were held out
    real = of_part(adata, split, part)
    wanted = real.obs if n_cells is None else real.obs.sample(min(n_cells, len(real.obs)), random_state=seed)
    labels, values = wanted[design.columns], logged(adata)
    rows = rows_of(out, entries, CellDataset(adata, design, split), split, [part, n_cells, seed], overwrite=overwrite)
    for row in rows:
        if not row.record:
            model, facts = row.fitted(design, adata, split, Asked(part, labels=labels))
            made = model.generate(labels=labels, seed=seed, **row.entry.predict)
            write_h5ad(made, row.folder / "generated.h5ad")
            write_table(row.folder / "flags.csv", copies(logged(made), values, design, split, part, row.entry.label))
            write_table(row.folder / "history.csv", model.history.assign(model=row.entry.label))
            row.write(pd.DataFrame(), facts)
    write_history(rows, out)
    tables = [row.table("flags.csv") for row in rows if (row.folder / "flags.csv").is_file()]
    write_table(out / "flags.csv", pd.concat([pd.DataFrame(columns=FLAGS), *tables]))
    origins: dict[str, Any] = {row.entry.label: read_h5ad(row.folder / "generated.h5ad") for row in rows}
    origins[REAL] = of_part(adata, split, "train")
    facts = described(adata, design, split, part, rows) | {"unit": "held-out group", **about}
    return judge(origins, real, design, out, metrics=metrics, n_pcs=n_pcs, seed=seed, about=facts)

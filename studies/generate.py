"""Cells per second and peak memory of generating counts into a sparse file.

Models are fitted for a moment on the bundled cells (2,000 genes), so that counts are as sparse as real ones; speed does
not depend on how well they are fitted. Times are those of drawing, making sparse and writing. scVI samples z from its
prior, takes observed depths, and is written in the same way. Each runs in a process of its own, one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

import invirtuo as iv
from invirtuo.cells.files import read_h5ad
from studies import rivals
from studies.harness import Tables, apart, filled, spent, study

N_GENES = 2000


@study(quick={"models": ["independent_nb"], "cells": 2000})
def generate(
    *,
    out: Path,
    models: Sequence[str] = ("cfgen", "independent_nb"),
    cells: int = 100_000,
    scvi_python: str | None = None,
) -> Tables:
    """Cells per second and memory of drawing counts into a file, beside scVI.

    Parameters
    ----------
    models
        Count models of this package.
    cells
        Cells that each draws.
    scvi_python
        Interpreter of an environment with scvi-tools, to have scVI beside them.
    """

    def one(model: str) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            data, made = Path(folder) / "cells.h5ad", Path(folder) / "generated.h5ad"
            training_cells().write_h5ad(data)
            given = {"data": data, "out": made, "n": cells}
            if model == "scvi":
                row = apart(rivals.scvi, python=scvi_python, **given)
            else:
                row = apart(drawn, model=model, **given)
            row |= {"cells_per_cpu_second": cells / row["cpu_seconds"], "mb": made.stat().st_size / 1e6}
        return row | {"entries_per_cpu_second": N_GENES * row["cells_per_cpu_second"]}

    names = [*models, "scvi"] if scvi_python else models
    return {"generate": filled(out / "rows.csv", one, model=names)}


def training_cells() -> AnnData:
    """The bundled cells, 2,000 genes."""
    raw = iv.datasets.load("kang")[:, :N_GENES].copy()
    raw.obs = raw.obs[["cell_type"]].copy()
    return raw


def fitted(model: str, adata: AnnData):
    """A count model after 20 steps, and some cells drawn to warm it up."""
    design = iv.Design.from_adata(adata, covariates=["cell_type"])
    made = iv.models.MODELS[model](design, adata.var_names)
    made.fit(adata, config=iv.FitConfig(steps=20, progress=False, val_every=0))
    made.generate(1000)
    return made


def drawn(model: str, data: str, out: str, n: int) -> dict:
    """Fit for a moment and generate; in a process of its own."""
    made = fitted(model, read_h5ad(data))
    with spent() as cost:
        cells = made.generate(n, out=out, chunk_size=rivals.CHUNK)
    cells.file.close()
    return cost

"""What every model costs at its setting for a CPU: CPU seconds, wall seconds and peak memory of fit and prediction.

Kang, 14,000 cells, 2,000 genes, three cell types held out (task kang-celltype); 1,000 cells of each are predicted.
Every model runs in a process of its own; reading and normalising the data, 10 to 20 seconds, counts. On a busy machine
look at CPU seconds: with t threads, the wall time of an idle one lies between these and a t-th of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import invirtuo as iv
from invirtuo.bench import TASKS, Entry
from studies.harness import Tables, apart, filled, study

PREDICTORS = tuple(name for name, kind in iv.models.MODELS.items() if kind.verb == "predict")
QUICK = {"primeflow": "quick"}  # presets for a CPU, where it is not the default


@study(quick={"models": ["no_change"]})
def costs(*, out: Path, data_dir: str | None = None, models: Sequence[str] = PREDICTORS, threads: int = 2) -> Tables:
    """CPU seconds, wall seconds and memory of a fit and a prediction, model by model."""

    def one(model: str) -> dict:
        return apart(fitted, threads=threads, model=model, data_dir=data_dir)

    return {"costs": filled(out / "rows.csv", one, model=models)}


def fitted(model: str, data_dir: str | None) -> None:
    """Fit and predict; in a process of its own."""
    adata, design, split = TASKS["kang-celltype"].load(data_dir=data_dir)
    made, config = Entry(model, model, QUICK.get(model)).make(design, adata.var_names)
    made.fit(adata, split, replace(config, progress=False)).predict("test", 1000)

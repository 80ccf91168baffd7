"""The small model that comes with the package: fitted to the bundled cells, and what it is worth.

Its types are those of the demo: B cells and CD14 monocytes are held out for the test, NK cells for validation, so that
intervals of effects have something to be calibrated on.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

import invirtuo as iv
from invirtuo.bench import TASKS
from invirtuo.models import PRiMeFlow
from studies.harness import Tables, fit, part, study

N_GENES = 1000
CONFIG = replace(PRiMeFlow.Config(), hidden_dim=128, gene_width=48, cell_width=128, n_context=4)


@study(quick={"steps": 2})
def bundled(*, out: Path, data_dir: str | None = None, steps: int = 1200, seed: int = 0) -> Tables:
    """The small model that comes with the package."""
    task = replace(TASKS["kang-demo"], n_genes=N_GENES)
    adata, design, split = task.load(0, data_dir=data_dir)
    model = fit(PRiMeFlow(design, adata.var_names, CONFIG), adata, split, seed=seed, steps=steps)
    model.save(out / "kang-primeflow", overwrite=True)
    shutil.rmtree(out / "kang-primeflow" / "checkpoints", ignore_errors=True)

    # as a user has it
    size = sum(file.stat().st_size for file in (out / "kang-primeflow").rglob("*") if file.is_file())
    loaded = iv.load(out / "kang-primeflow")
    started = time.perf_counter()
    predicted = loaded.predict("test", 1000, seed=seed)
    seconds = time.perf_counter() - started
    scores = iv.evaluate(predicted, part(adata, split, "test"), design, metrics=list(task.metrics))
    means = scores.groupby("metric")["value"].mean()
    facts = pd.Series({"MiB": size / 2**20, "seconds": seconds})
    return {"scores": pd.concat([means, facts]).rename("value").to_frame()}

"""What can be said of perturbations that were seen nowhere: closed forms that know GO terms, and one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from invirtuo.bench import TASKS, Entry, benchmark, paired_differences
from studies.harness import Tables, study

MEAN = "mean of the others"
ENTRIES = (
    Entry(MEAN, "ridge", {"kernel": "rbf", "mode": "move_cells", "penalty": 1e6}),
    Entry("ridge", "ridge", {"mode": "move_cells", "penalty": 1.0}),
    Entry("ridge:kernel", "ridge", {"kernel": "rbf", "mode": "move_cells"}),
    Entry("ridge:kernel, penalty 1", "ridge", {"kernel": "rbf", "mode": "move_cells", "penalty": 1.0}),
)


@study(quick={"tasks": ["papalexi-both"]})
def regimes(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: Sequence[str] = ("papalexi-target", "papalexi-both"),
    jobs: int = 1,
) -> Tables:
    """Perturbations that were seen nowhere, in known contexts and in new ones."""
    judged = [replace(TASKS[name], n_cells=300) for name in tasks]
    scores = benchmark(judged, ENTRIES, 1, out, controls="evaluated", n_jobs=jobs, data_dir=data_dir, progress=True)
    differences = paired_differences(scores)
    means = scores.pivot_table(index=["task", "model"], columns="metric", values="value", sort=False)
    return {"means": means, "differences": differences[differences["against"] == MEAN]}

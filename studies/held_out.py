"""PRiMeFlow and the closed-form baselines on cell types of your choice, bundled cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import invirtuo as iv
from invirtuo.bench import Entry, compare
from studies.harness import Tables, study


@study(quick={"steps": 5})
def held_out(cell_types: Sequence[str], *, out: Path, steps: int = 1200, seed: int = 0) -> Tables:
    """PRiMeFlow and the closed forms where the response of some cell types is held out, bundled cells.

    Parameters
    ----------
    cell_types
        Cell types whose response is held out.
    """
    raw = iv.datasets.load("kang")
    design = iv.datasets.design("kang", raw)
    conditions = [{"cell_type": cell_type} for cell_type in cell_types]
    split = iv.splits.hold_out(raw.obs, design, conditions, seed=seed, control_fractions=(0.6, 0.1, 0.3))
    config = replace(iv.models.PRiMeFlow.PRESETS["default"].fit, steps=steps, val_every=0, seed=seed)
    scores = compare(raw, design, Entry("primeflow", "primeflow", None, config), split=split, out=out, seed=seed)
    indices = {"by-model": "model", "by-condition": ["condition", "model"]}
    return {
        title: scores.pivot_table(index=index, columns="metric", values="value", sort=False)
        for title, index in indices.items()
    }

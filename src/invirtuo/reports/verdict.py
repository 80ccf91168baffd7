"""The first sentences of a page: how often a model beats what is simple, and how far its directions are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from invirtuo.reports.tables import ScoreTable

__all__ = ["MAIN", "directions_right", "verdict"]

# the metric that stands for all, the first that is there
MAIN = ("mmd_gex", "mmd_pca", "energy_distance", "mmd_rbf_disjoint", "rmse_mean", "mse_cells")
TOP = 100  # genes of which the direction is judged


def verdict(
    scores: pd.DataFrame, table: ScoreTable, effects: pd.DataFrame | None, unit: str = "held-out condition"
) -> str:
    """How often the first model beats every simple baseline, and whether the directions of its effects can be trusted.

    Parameters
    ----------
    scores
        Tidy scores of one task.
    table
        Made of them.
    effects
        Effects of the first model, as :func:`invirtuo.bench.effects` gives them; None: not known.
    unit
        What a condition is called.

    Returns
    -------
    Sentences, or "" if no model stands beside baselines under a metric that can tell.
    """
    models = [name for name, kind in table.kinds.items() if kind == "model"]
    baselines = [name for name, kind in table.kinds.items() if kind == "baseline"]
    crowning = {column.name: column for column in table.columns if column.crowns}
    column = next((crowning[name] for name in MAIN if name in crowning), None)
    if not (models and baselines and column):
        return ""

    # the model that the table names first, against the best baseline of every condition
    own = scores[scores["metric"] == column.name]
    means = own.groupby(["condition", "model"])["value"].mean().unstack("model")
    first = next((model for model in dict.fromkeys(own["model"]) if model in models), models[0])
    sign = 1 if column.crowns == "lower" else -1
    judged = sign * means[[first, *baselines]].dropna()
    n_ahead = int((judged[first] < judged[baselines].min(axis=1)).sum())
    every = "the simple baseline" if len(baselines) == 1 else "every simple baseline"
    units = f"{len(judged):,} {unit}{'s' * (len(judged) != 1)}"
    text = f"Of {units} {first} is better than {every} in {n_ahead:,} ({column.label})."
    right = None if effects is None else directions_right(effects)
    if right is not None:
        share, n_genes = right
        text += f" Of the {n_genes:,} genes that it changes most, the direction is right for {share:.0%}."
    return text


def directions_right(effects: pd.DataFrame, top: int = TOP) -> tuple[float, int] | None:
    """Share of the genes with the largest predicted effects that go that way, mean over conditions, and their number.

    None if no real effect is known.
    """
    known = effects.dropna(subset=["effect", "real"])
    if not len(known):
        return None
    shares, n_genes = [], 0
    for _, own in known.groupby("condition"):
        largest = own.loc[own["effect"].abs().sort_values(ascending=False).index[:top]]
        shares.append(float((np.sign(largest["effect"]) == np.sign(largest["real"])).mean()))
        n_genes = max(n_genes, len(largest))
    return float(np.mean(shares)), n_genes

"""A picture of a ranking of perturbations."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from invirtuo.reports.figures import PREDICTED, save

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["plot_screen"]

SHOWN = 30  # conditions that are drawn


def plot_screen(table: pd.DataFrame, out: str | os.PathLike[str], *, n: int = SHOWN) -> None:
    """Draw the best conditions of a screen: how the score changes, with its interval.

    Parameters
    ----------
    table
        As :func:`invirtuo.screen` gives it.
    out
        Picture to write (.png, .pdf or .svg).
    n
        Conditions that are drawn.

    Raises
    ------
    ValueError
        If columns are missing.
    """
    from matplotlib.figure import Figure

    if missing := [name for name in ("condition", "change", "low", "high") if name not in table]:
        raise ValueError(f"the table has no column {', '.join(missing)}; expected one made by invirtuo.screen")
    best = table.head(n).iloc[::-1]
    row = np.arange(len(best))
    figure = Figure(figsize=(6, 0.24 * len(best) + 1), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.8", linewidth=0.8)
    if best["low"].notna().any():
        axes.hlines(row, best["low"], best["high"], color=PREDICTED, alpha=0.4, linewidth=3)
    axes.plot(best["change"], row, "o", color=PREDICTED, markersize=4)
    axes.set_yticks(row, best["condition"].astype(str), fontsize=8)
    axes.set_xlabel("change of the score against control cells")
    save(figure, out)

"""Colours, and axes that stay quiet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GREY", "LINES", "PREDICTED", "REAL", "axes_or_new", "clean"]

# Okabe & Ito: colour-blind readers distinguish them, on paper and on a dark page
GREY, REAL, PREDICTED = "#c4c8cc", "#0072b2", "#d55e00"
LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]


def axes_or_new(ax: Axes | None, width: float = 4.0, height: float = 3.2) -> Axes:
    """The axes, or those of a new figure of so many inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    _, new = pyplot.subplots(figsize=(width, height), layout="constrained")
    return new


def clean(ax: Axes) -> Axes:
    """The axes with small ticks, and without a frame."""
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#9aa0a6")
    return ax

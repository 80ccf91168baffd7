"""Effects on genes: with intervals, and as a volcano."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from invirtuo.errors import preview
from invirtuo.metrics.cells import compare_populations
from invirtuo.metrics.measures.wilcoxon import log2_fold_change, rank_sum
from invirtuo.metrics.numerics.streamed import dense
from invirtuo.plots.style import GREY, PREDICTED, REAL, axes_or_new, clean

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

    from invirtuo.design import Design

__all__ = ["check_effects", "effects", "volcano"]

FDR = 0.05


def effects(table: pd.DataFrame, condition: str | None = None, *, n_genes: int = 20, ax: Axes | None = None) -> Axes:
    """The genes with the largest predicted effects of a condition: effect, interval, and what was seen.

    Parameters
    ----------
    table
        As :func:`invirtuo.bench.effects` gives it: ``condition``, ``gene``, ``effect``, ``low``, ``high``, ``real``.
    condition
        Its name; None takes the first of the table.
    n_genes
        Number of genes, the largest effect on top.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If columns are missing, or the condition is.
    """
    check_effects(table)
    wanted = table["condition"].iloc[0] if condition is None else condition
    own = table[table["condition"] == wanted]
    if not len(own):
        raise ValueError(f"condition {wanted!r} is not in the table; found {preview(sorted(set(table['condition'])))}")
    largest = own["effect"].abs().sort_values(ascending=False).index[:n_genes]
    shown = own.reindex(largest).iloc[::-1]
    row = np.arange(len(shown))
    drawn = axes_or_new(ax, 3.8, 0.22 * len(shown) + 0.9)
    drawn.axvline(0, color="0.8", linewidth=0.8)
    if shown["low"].notna().any():
        drawn.hlines(row, shown["low"], shown["high"], color=PREDICTED, alpha=0.4, linewidth=3)
    drawn.plot(shown["effect"], row, "o", color=PREDICTED, markersize=4, label="predicted")
    if shown["real"].notna().any():
        drawn.plot(shown["real"], row, "D", markerfacecolor="none", color=REAL, markersize=5, label="seen")
    drawn.set_yticks(row, shown["gene"], fontsize=7)
    drawn.tick_params(axis="x", labelsize=7)
    drawn.set_xlabel("change of mean log expression", fontsize=8)
    drawn.set_title(str(wanted), fontsize=9)
    if ax is None:
        drawn.legend(frameon=False, fontsize=7)
    return clean(drawn)


def check_effects(table: pd.DataFrame) -> None:
    """It has the columns of `bench.effects`, or it is an error."""
    if missing := [name for name in ("condition", "gene", "effect", "low", "high", "real") if name not in table]:
        raise ValueError(f"the table has no column {', '.join(missing)}; expected one made by bench.effects")


def volcano(
    cells: AnnData,
    design: Design,
    condition: str,
    *,
    controls: AnnData | None = None,
    n_labels: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Fold change and rank-sum p-value of every gene in a condition, against the control cells of its group.

    Parameters
    ----------
    cells
        Log values, predicted or real.
    design
        Which columns mean what.
    condition
        Its name, like ``"B cell|IFN-beta"``.
    controls
        Cells that hold the control cells; None: they are among `cells`.
    n_labels
        Genes with the smallest p-values that are named.
    ax
        Axes to draw on; None makes a figure.

    Returns
    -------
    The axes; coloured are genes with an adjusted p-value below .05 (Benjamini and Hochberg).

    Raises
    ------
    ValueError
        If the condition or its control cells are missing, or their scales differ; where they only seem to, a warning
        is logged.
    """
    names = design.names(cells.obs)
    if condition not in set(names):
        raise ValueError(f"condition {condition!r} has no cells; found {preview(sorted(set(names)))}")
    own = cells[(names == condition).to_numpy()]
    reference = cells if controls is None else controls[:, cells.var_names]
    of_group = (design.groups(reference.obs) == design.groups(own.obs).iloc[0]).to_numpy()
    control = reference[of_group & design.is_control(reference.obs)]
    if not control.n_obs:
        raise ValueError(f"no control cells for {condition!r}; pass the cells that hold them as controls=")

    compare_populations({"control": control, condition: own})

    # tests of all genes
    x, reference_x = dense(own.X), dense(control.X)
    (p_value,), _ = rank_sum([x], reference_x)
    change = log2_fold_change(x.mean(axis=0, dtype=np.float64), reference_x.mean(axis=0, dtype=np.float64))
    height = -np.log10(np.clip(p_value, 1e-300, None))
    is_called = stats.false_discovery_control(p_value) < FDR

    drawn = axes_or_new(ax)
    drawn.scatter(change[~is_called], height[~is_called], s=6, color=GREY, linewidths=0)
    for side, color in ((change > 0, PREDICTED), (change < 0, REAL)):
        drawn.scatter(change[is_called & side], height[is_called & side], s=8, color=color, linewidths=0)
    for place in np.argsort(p_value, kind="stable")[:n_labels]:
        at = (change[place], height[place])
        drawn.annotate(cells.var_names[place], at, (2, 2), textcoords="offset points", fontsize=7)
    drawn.set_xlabel("log2 fold change", fontsize=8)
    drawn.set_ylabel("-log10 p", fontsize=8)
    drawn.set_title(f"{condition}: {is_called.sum():,} genes", fontsize=9)
    return clean(drawn)

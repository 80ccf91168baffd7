"""What makes a score suspect: traits of predicted cells that real cells do not have, and known ways to game metrics.

A flag is a fact in words, not a verdict: a baseline of one profile for all cells is rightly said to have no spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.metrics.cells import Scale
from invirtuo.metrics.measures.counts import MIN_CPM, control_mean_counts
from invirtuo.metrics.measures.false_calls import calls, measures
from invirtuo.metrics.measures.vcc2026 import MIN_GENES
from invirtuo.metrics.pair import CountOptions, Pair, TargetGenes

__all__ = ["FLAGS", "flags", "flags_of"]

MANY = 0.5  # share of the conditions in which a trait must be seen
FACTOR = 2.0  # a quantity this many times that of the real cells is not chance
SPREAD = 0.1  # variance over that of the real cells below which cells are all alike
FALSE_SHARE = 0.1  # of the tested genes, called where nothing changes
STRONG = 1.5  # fold changes over the real ones
ALIKE = 0.1  # differences between perturbations over what the scatter of the cells makes likely

NO_CONTROL = {"no_spread", "few_cells", "empty_cells", "other_depth"}  # flags that need no control cells
FLAGS: dict[str, Callable[[Pair], str]] = {}  # name to what gives the text, empty where there is nothing to say


def _flag(function: Callable[[Pair], str]) -> Callable[[Pair], str]:
    FLAGS[function.__name__] = function
    return function


def flags(
    pred: AnyCells,
    real: AnyCells,
    design: Design,
    *,
    target_genes: TargetGenes | None = None,
    controls: Literal["real", "pred"] = "real",
    scale: Scale = "log1p",
) -> pd.DataFrame:
    """What is suspect about predicted cells: no spread, few cells, other depth, false calls, counts in odd genes.

    Parameters
    ----------
    pred, real, design, controls, scale
        As in :func:`invirtuo.evaluate`.
    target_genes
        As in :func:`invirtuo.metrics.vcc2026`.

    Returns
    -------
    pd.DataFrame
        Columns `flag` (a name of `FLAGS`) and `text` (what was found); no row if there is nothing to say. Without
        control cells in every group only what needs none is looked at.
    """
    pair = Pair(pred, real, design, controls=controls, scale=scale, counts=CountOptions(target_genes=target_genes))
    return flags_of(pair)


def flags_of(pair: Pair, *, leave_out: Sequence[str] = ()) -> pd.DataFrame:
    """:func:`flags` for a Pair that is already made, but for some."""
    known = FLAGS if pair.has_controls else {name: FLAGS[name] for name in NO_CONTROL}
    found = {name: function(pair) for name, function in known.items() if name not in leave_out}
    rows = [{"flag": name, "text": text} for name, text in found.items() if text]
    return pd.DataFrame(rows, columns=["flag", "text"])


def _differs(pair: Pair, name: str, genes: np.ndarray) -> bool:
    """Whether the predicted cells have much more of some genes than the real and the control cells."""
    pred, real = pair.both("mean_counts", name)
    control = control_mean_counts(pair, pair.group_of(name))
    known = max(_share(real, genes), _share(control, genes))
    return _share(pred, genes) > FACTOR * known + 0.005


def _share(mean: np.ndarray, genes: np.ndarray) -> float:
    """Share of mean counts (g,) that falls on some genes."""
    return float(mean[genes].sum() / max(mean.sum(), 1e-12))


def _often(values: list[bool]) -> bool:
    return bool(values) and float(np.mean(values)) >= MANY


@_flag
def no_spread(pair: Pair) -> str:
    """Cells of a condition are alike: tests see differences that no cells have."""
    ratios = []
    for name in pair.conditions.index:
        pred, real = (np.nan_to_num(variance).sum() for variance in pair.both("variance", name))
        ratios.append(float(pred / real) if real > 0 else 1.0)
    n_alike = int((np.array(ratios) < SPREAD).sum())
    text = f"cells are alike in {n_alike} of {len(ratios)} conditions (variance below a tenth of that of real cells)"
    return text if n_alike else ""


@_flag
def few_cells(pair: Pair) -> str:
    """So few cells that tests see nothing, which scores well where nothing changes."""
    few = [pair.n_cells("pred", name) * FACTOR < pair.n_cells("real", name) for name in pair.conditions.index]
    return f"fewer than half as many cells as are real in {sum(few)} of {len(few)} conditions" if any(few) else ""


@_flag
def empty_cells(pair: Pair) -> str:
    """Conditions of which no cell has a count."""
    empty = [not pair.see("mean_counts", "pred", name).any() for name in pair.conditions.index]
    return f"no cell has any expression in {sum(empty)} of {len(empty)} conditions" if any(empty) else ""


@_flag
def other_depth(pair: Pair) -> str:
    """Another number of counts per cell: deeper cells call more genes. Not seen in log-normalised values."""
    ratios = []
    for name in pair.conditions.index:
        pred, real = pair.both("mean_counts", name)
        ratios.append(float(pred.sum() / max(real.sum(), 1e-12)))
    ratio = float(np.median(ratios))
    return "" if 1 / FACTOR < ratio < FACTOR else f"cells have {ratio:.2g} times the counts of real ones"


@_flag
def false_calls(pair: Pair) -> str:
    """Many genes called where nothing changes, or far more than are real."""
    table = calls(pair)
    shares = measures(table)["de_false_share"].dropna()
    if shares.mean() > FALSE_SHARE:
        return f"{shares.mean():.0%} of the tested genes are called in {len(shares)} conditions without a real DE gene"
    active = table[table["n_real"] > 0]
    called, real = active["n_pred"].sum(), active["n_real"].sum()
    is_far = called > 3 * real and called > FALSE_SHARE * active["n_tested"].sum()
    return f"{called / real:.1f} times as many genes are called as are real" if is_far else ""


@_flag
def amplified(pair: Pair) -> str:
    """Fold changes larger than the real ones: directions and ranks get easier."""
    ratios = []
    for name in pair.conditions.index:
        pred, real = pair.both("count_tests", name)
        genes = real.significant & pred.tested & pair.counted_genes(name)
        if genes.sum() >= MIN_GENES:
            size, real_size = (np.median(np.abs(tests.lfc[genes])) for tests in (pred, real))
            ratios.append(float(size / real_size))
    ratio = float(np.median(ratios)) if ratios else 1.0
    return f"fold changes of the real DE genes are {ratio:.1f} times the real ones" if ratio > STRONG else ""


@_flag
def silent_genes(pair: Pair) -> str:
    """Counts in genes that are too rare in the control cells to be tested."""
    odd = []
    for name in pair.conditions.index:
        control = control_mean_counts(pair, pair.group_of(name))
        silent = control * 1e6 <= MIN_CPM * max(control.sum(), 1e-12)
        odd.append(bool(silent.any()) and _differs(pair, name, silent))
    return "genes that control cells do not express have far more counts than in real cells" if _often(odd) else ""


@_flag
def genes_of_others(pair: Pair) -> str:
    """Counts in the genes that other perturbations target: other effects move away."""
    odd = []
    for group in pair.groups:
        names = pair.names(group)
        targeted = ~np.all([pair.counted_genes(name) for name in names], axis=0)
        for name in names:
            others = targeted & pair.counted_genes(name)
            if others.any():
                odd.append(_differs(pair, name, others))
    return "the genes that other perturbations target have far more counts than in real cells" if _often(odd) else ""


@_flag
def own_gene_scatter(pair: Pair) -> str:
    """Scatter in the targeted gene, which no error counts."""
    odd = []
    for name in pair.conditions.index:
        genes = pair.own_genes(name)
        if len(genes):
            pred, real = (variance[genes].sum() for variance in pair.both("variance", name))
            _, control, _ = pair.control_moments("real", pair.group_of(name))
            odd.append(bool(pred > 2 * FACTOR * max(real, control[genes].sum(), 1e-6)))
    return "targeted genes scatter far more than in real cells" if _often(odd) else ""


@_flag
def same_for_all(pair: Pair) -> str:
    """Pseudobulks of different perturbations are more alike than cells drawn at random would be."""
    ratios = []
    for group in pair.groups:
        names = pair.names(group)
        if len(names) > 1:
            found = [pair.see("bulk", "pred", name) for name in names]
            spread = np.var([bulk.profile for bulk in found], axis=0, ddof=1).sum()
            noise = np.mean([bulk.noise for bulk in found])
            ratios.append(float(spread / noise) if noise > 0 else 1.0)
    is_alike = bool(ratios) and min(ratios) < ALIKE
    return "all perturbations have the same pseudobulk, more so than cells drawn at random have" if is_alike else ""

"""What a score of 0 and one of 1 stand for: cells with the mean response, and halves of the real cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics.cells import Cells, Layer, Scale, read_scaled
from invirtuo.metrics.challenge.panel import LFC_ERROR, official, panels, read_real_counts
from invirtuo.metrics.measures.counts import control_mean_counts
from invirtuo.metrics.measures.vcc2026 import MIN_GENES
from invirtuo.metrics.pair import CountOptions, Pair, TargetGenes
from invirtuo.metrics.scores import choose, score, summarize

if TYPE_CHECKING:
    import anndata

__all__ = ["mean_response", "replicates"]


def mean_response(
    real: AnyCells | Cells,
    design: Design,
    *,
    emission: Literal["dispersed", "tile"] = "dispersed",
    seed: int = 0,
    target_genes: TargetGenes | None = None,
    scale: Scale = "counts",
) -> anndata.AnnData:
    """Cells that answer to every perturbation with the mean response to all: what a score of 0 stands for.

    The mean response is the mean over perturbations of their mean counts, each with the same weight, without those that
    target the gene. Contexts (combinations of covariates) have one each.

    Parameters
    ----------
    real
        Raw counts, as in :func:`invirtuo.metrics.vcc2026`.
    design, target_genes
        As there.
    emission
        "dispersed": control cells, drawn with replacement, times response over control mean: they scatter as cells do.
        "tile": the response itself in every cell, as the arm of the challenge; tests between such constants call nearly
        every gene of a small panel.
    seed
        Of the drawn control cells.
    scale
        "log1p": `real` holds log1p values, and so does the result; means are taken of what they are the logarithm of.

    Returns
    -------
    anndata.AnnData
        As many cells of each perturbation as `real` has, no control cells; X counts with fractions in float32, genes in
        the order of `real`. Score it with ``fractional=True``.

    Raises
    ------
    ValueError
        If every perturbation of a context targets the same gene.

    References
    ----------
    Virtual Cell Challenge 2026; cell-eval2 0.20.
    """
    import anndata

    if emission not in ("dispersed", "tile"):
        raise ValueError(f"emission must be 'dispersed' or 'tile'; found {emission!r}")
    cells = read_real_counts(real, design, scale=scale, fractional=True)
    pair = Pair(cells, cells, design, counts=CountOptions(target_genes=target_genes))
    rng = np.random.default_rng(seed)

    # the order of labels decides which control cells are drawn for whom
    blocks, labels = [], []
    for group in pair.groups:
        names = sorted(pair.names(group), key=lambda name: str(pair.conditions.at[name, "_label"]))
        response = _response(pair, names, group)
        control = pair.control_count_matrix("real", group)
        control_mean = control_mean_counts(pair, group)
        factors = np.divide(response, control_mean, out=np.zeros_like(response), where=control_mean > 0)
        for name in names:
            # as many cells as are real: all alike, or scattered as control cells are
            n = pair.n_cells("real", name)
            if emission == "tile":
                blocks.append(sparse.csr_array(np.tile(response, (n, 1)).astype(np.float32)))
            else:
                drawn = control[rng.integers(0, control.shape[0], n)].multiply(factors)
                blocks.append(sparse.csr_array(drawn, dtype=np.float32))
            labels += [name] * n

    # the labels and the genes as the file has them
    obs = pair.conditions.loc[labels, design.columns].reset_index(drop=True).rename(index=str)
    obs[design.perturbation] = pair.conditions.loc[labels, "_label"].to_numpy()
    x = sparse.csr_matrix(sparse.vstack(blocks, format="csr")[:, np.argsort(pair.file_order)])
    if cells.scale == "log1p":
        x.data = np.log1p(x.data)
    var = pd.DataFrame(index=pair.genes[np.argsort(pair.file_order)])
    return anndata.AnnData(x, obs=obs, var=var)


def _response(pair: Pair, names: Sequence[str], group: str) -> np.ndarray:
    """(g,) mean over perturbations of their mean counts, without those that target the gene."""
    means = np.stack([pair.see("mean_counts", "real", name) for name in names])
    counted = np.stack([pair.counted_genes(name) for name in names])
    if not counted.any(axis=0).all():
        always = pair.genes[~counted.any(axis=0)]
        raise ValueError(f"group {group!r}: every perturbation targets {preview(always)}; no response is left")
    return np.asarray((counted * means).sum(axis=0) / counted.sum(axis=0))


def replicates(
    real: AnyCells | Cells,
    design: Design,
    metrics: Sequence[str] | str | None = "vcc2026",
    *,
    n_splits: int = 5,
    seed: int = 0,
    n_pcs: int = 30,
    scale: Scale | None = None,
    layer: Layer = None,
    bulk_target_sum: float = 50_000.0,
    target_genes: TargetGenes | None = None,
) -> pd.DataFrame:
    """Score halves of the real cells against each other, several times: what a score of 1 stands for.

    Every perturbation and the control cells are divided at random into two halves of equal size; one is the prediction
    of the other, each with its own controls.

    Parameters
    ----------
    real, design
        As in :func:`invirtuo.evaluate`.
    metrics
        Names and profiles, as there; "vcc2026" gives the official names of :func:`invirtuo.metrics.vcc2026`.
    n_splits, seed
        Number of divisions, and the seed of their seeds.
    n_pcs, layer
        As in :func:`invirtuo.evaluate`.
    scale
        What X holds; None: "counts" for the profile "vcc2026", else "log1p".
    bulk_target_sum, target_genes
        As in :func:`invirtuo.metrics.vcc2026`.

    Returns
    -------
    pd.DataFrame
        Columns `split`, `seed`, `context`, `metric`, `value` (mean over perturbations). Errors of fold changes are
        taken over the DE genes of all real cells.

    References
    ----------
    Virtual Cell Challenge 2026; cell-eval2 0.20.
    """
    is_official = metrics == "vcc2026"
    stated = scale or ("counts" if is_official else "log1p")
    counts = CountOptions(bulk_target_sum, target_genes)
    if is_official or isinstance(real, Cells):
        cells = read_real_counts(real, design, scale=stated)
    else:
        cells = read_scaled(real, design, stated, layer)
    whole = Pair(cells, cells, design, counts=counts)

    tables = []
    for split, state in enumerate(np.random.SeedSequence(seed).generate_state(n_splits)):
        halves = Pair.equal_halves(cells, design, n_pcs=n_pcs, seed=int(state), counts=counts)
        if is_official:
            found = panels(official(halves))
            found[LFC_ERROR] = [_error_over_all_genes(halves, whole, group) for group in halves.groups]
        else:
            found = summarize(score(halves, choose(metrics, design)))["mean"].to_frame("all").T
        tidy = found.rename_axis("context").reset_index().melt("context", var_name="metric")
        tables.append(tidy.assign(split=split, seed=int(state)))
    return pd.concat(tables, ignore_index=True)[["split", "seed", "context", "metric", "value"]]


def _error_over_all_genes(halves: Pair, whole: Pair, group: str) -> float:
    """Error of fold changes between halves, over the DE genes and relative to the fold changes of all real cells."""
    errors = []
    for name in halves.names(group):
        truth = whole.see("count_tests", "real", name)
        gate = truth.significant & whole.counted_genes(name)
        if gate.sum() >= MIN_GENES:
            pred, real = halves.both("count_tests", name)
            difference = np.where(pred.tested, pred.lfc, 0.0) - np.where(real.tested, real.lfc, 0.0)
            errors.append(np.abs(difference[gate]).sum() / np.abs(truth.lfc[gate]).sum())
    return float(np.mean(errors)) if errors else np.nan

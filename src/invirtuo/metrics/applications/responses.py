"""Which perturbations act at all, in real cells before any model: genes that change, beside halves of the controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import preview, whole_number
from invirtuo.metrics.cells import Cells, Layer, Scale, labels_of, read_scaled
from invirtuo.metrics.measures.wilcoxon import CELLS_AT_ONCE, LEVEL, rank_sum
from invirtuo.metrics.numerics.streamed import mean_of_genes

__all__ = ["responses"]

FEWEST = 4  # control cells that can be halved, and tested


def responses(
    real: AnyCells,
    design: Design,
    *,
    n_draws: int = 10,
    seed: int = 0,
    scale: Scale = "auto",
    layer: Layer = None,
) -> pd.DataFrame:
    """Say of every perturbed condition how many genes change against its control cells, and how many do by chance.

    Rank-sum tests of each gene, adjusted within a condition (Benjamini and Hochberg), as in the profile "cell_eval".
    What chance does is seen in the control cells: they are halved at random, as many cells as the condition has (at
    most the half) are drawn of one half and tested against the other, `n_draws` times.

    Parameters
    ----------
    real
        As in :func:`invirtuo.evaluate`, control cells in every covariate group.
    design
        Names the perturbation.
    n_draws
        Times that the control cells are halved.
    seed
        Of the halves.
    scale, layer
        As in :func:`invirtuo.evaluate`; "auto" takes counts and log1p values.

    Returns
    -------
    pd.DataFrame
        One row per condition, most genes first: `condition`, `perturbation`, one column per covariate, `n_cells`,
        `n_control`, `n_de` (genes with an adjusted p-value below .05), `n_de_null` (the largest number in a draw of
        control cells), `effect` (root mean square over genes of the change of mean log expression), `effect_null` (the
        largest of the draws), and `acts`: whether more genes change than in any draw. A gene that the perturbation
        targets counts. Few cells hide effects: that a condition does not act here is no proof.

    Raises
    ------
    ValueError
        If the Design names no perturbation, a group has fewer than 4 control cells, or the values are on no known
        scale.

    Examples
    --------
    >>> import invirtuo as iv
    >>> cells = iv.datasets.toy()
    >>> design = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    >>> table = iv.metrics.responses(cells, design, n_draws=2)
    >>> table["condition"][0], int(table["acts"].sum()), len(table)
    ('b_cell|A+B', 18, 18)
    """
    if design.perturbation is None:
        raise ValueError("the Design names no perturbation; name its column, with perturbation=")
    n_draws, seed = whole_number("n_draws", n_draws), whole_number("seed", seed, 0)
    cells = read_scaled(real, design, scale, layer)
    groups = cells.table["_group"]
    few = [group for group in dict.fromkeys(groups) if len(cells.controls.get(group, ())) < FEWEST]
    if few:
        raise ValueError(
            f"fewer than {FEWEST} control cells ({design.control!r}) in {preview(few)}; leave these cells out, or give "
            "more controls"
        )

    table = labels_of(cells.table, design)
    table["n_cells"] = [len(cells.rows[name]) for name in table["condition"]]
    table["n_control"] = [len(cells.controls[group]) for group in groups]
    found = {}
    for group in dict.fromkeys(groups):
        rows = {name: cells.rows[name] for name in groups.index[groups == group]}
        real_ones = dict(_changes(cells, rows, cells.controls[group]))
        drawn = [dict(_changes(cells, *halves)) for halves in _halves(rows, cells.controls[group], n_draws, seed)]
        for name in rows:
            by_chance = np.max([draw[name] for draw in drawn], axis=0)
            found[name] = [*real_ones[name], *by_chance]
    measured = pd.DataFrame.from_dict(found, "index", columns=["n_de", "effect", "n_de_null", "effect_null"])
    for name in ("n_de", "n_de_null", "effect", "effect_null"):
        table[name] = measured.loc[table["condition"], name].to_numpy()
    table = table.astype({"n_de": int, "n_de_null": int})
    table["acts"] = table["n_de"] > table["n_de_null"]
    return table.sort_values(["n_de", "effect"], ascending=False, kind="stable", ignore_index=True)


def _halves(
    rows: Mapping[str, np.ndarray], controls: np.ndarray, n_draws: int, seed: int
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Control cells in the place of each condition, of one half, and the other half."""
    rng = np.random.default_rng(seed)
    for _ in range(n_draws):
        shuffled = rng.permutation(controls)
        half, rest = np.array_split(shuffled, 2)
        stand_in = {}
        for name, own in rows.items():
            stand_in[name] = np.sort(rng.choice(half, min(len(own), len(half)), replace=False))
        yield stand_in, np.sort(rest)


def _changes(
    cells: Cells, rows: Mapping[str, np.ndarray], controls: np.ndarray
) -> Iterator[tuple[str, tuple[int, float]]]:
    """Number of genes that differ from the control cells, and the size of the change, condition by condition."""
    control = cells.read(controls)
    control_mean = mean_of_genes(control)
    names = list(rows)
    ends = np.cumsum([len(rows[name]) for name in names]) // CELLS_AT_ONCE  # conditions in memory together
    for batch in np.unique(ends):
        together = [names[i] for i in np.flatnonzero(ends == batch)]
        blocks = [cells.read(rows[name]) for name in together]
        p_values, _ = rank_sum(blocks, control)
        n_called = (stats.false_discovery_control(p_values, axis=1) < LEVEL).sum(axis=1)
        for name, block, n in zip(together, blocks, n_called, strict=True):
            change = mean_of_genes(block) - control_mean
            yield name, (int(n), float(np.sqrt(np.mean(change**2))))

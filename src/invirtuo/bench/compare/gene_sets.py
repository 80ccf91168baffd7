"""Which sets of genes go up or down together, in predictions and in what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse, stats

from invirtuo.cells.gmt import read_gmt

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["gene_sets"]

SMALLEST = 5  # measured genes of a set


def gene_sets(effects: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Test of every set of genes in every condition: whether its effects rank above or below those of other genes.

    Rank-sum tests on the effects of genes, which take genes as independent: sets of genes that vary together come out
    too often. They order sets, and compare predicted with seen; they prove nothing.

    Parameters
    ----------
    effects
        As :func:`invirtuo.bench.effects` gives them.
    path
        .gmt or .gmt.gz.

    Returns
    -------
    A row for each condition and set of at least five measured genes, the strongest predicted first: ``condition``,
    ``gene_set``, ``n_genes``, ``effect`` and ``real``, mean effect of its genes, predicted and seen, ``z``, ``q`` and
    ``z_real``, ``q_real``, of the tests (Benjamini and Hochberg within a condition; NaN if nothing was seen).

    Raises
    ------
    ValueError
        If the file cannot be read, or no set has five of the genes.
    """
    genes = pd.Index(dict.fromkeys(effects["gene"]))
    sets = {name: genes.get_indexer_for(sorted(own & set(genes))) for name, own in read_gmt(path).items()}
    sets = {name: places for name, places in sets.items() if len(places) >= SMALLEST}
    if not sets:
        raise ValueError(f"no set of {path} has {SMALLEST} of the {len(genes):,} genes; are they named alike?")
    sizes = np.array([len(places) for places in sets.values()])
    rows, columns = np.repeat(np.arange(len(sets)), sizes), np.concatenate(list(sets.values()))
    member = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(sets), len(genes)))

    # a table of genes for each condition
    tables = []
    for condition, own in effects.groupby("condition", sort=False):
        values = own.set_index("gene").reindex(genes)
        table = pd.DataFrame({"condition": condition, "gene_set": list(sets), "n_genes": sizes})
        for column, suffix in (("effect", ""), ("real", "_real")):
            effect = values[column].to_numpy(float)
            z, q = _tested(effect, member, sizes)
            table = table.assign(**{column: member @ effect / sizes, f"z{suffix}": z, f"q{suffix}": q})
        tables.append(table.reindex(table["z"].abs().sort_values(ascending=False, kind="stable").index))
    return pd.concat(tables, ignore_index=True)


def _tested(effect: np.ndarray, member: sparse.csr_matrix, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and adjusted p-value of the rank sum of every set."""
    if np.isnan(effect).any():
        return np.full(len(sizes), np.nan), np.full(len(sizes), np.nan)
    n = len(effect)
    rank = stats.rankdata(effect)
    centre = sizes * (n + 1) / 2
    spread = np.sqrt(rank.var(ddof=1) * sizes * (n - sizes) / n)
    z = (member @ rank - centre) / np.maximum(spread, 1e-12)
    return z, stats.false_discovery_control(2 * stats.norm.sf(np.abs(z)))

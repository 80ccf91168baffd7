"""What metrics on counts see of a condition: its pseudobulk with the noise in it, and rank-sum tests on counts.

Of log1p values counts are what they are the logarithm of, so that every cell has the same weight whatever its depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.polynomial.chebyshev import Chebyshev
from scipy import sparse, stats

from invirtuo.metrics.cells import Side
from invirtuo.metrics.measures.wilcoxon import LEVEL, batches, rank_sum
from invirtuo.metrics.pair import Pair, view
from invirtuo.metrics.registry import each_condition

__all__ = ["Bulk", "CountTests", "bulk", "control_bulk", "mean_of", "of_tests"]

MILLION = 1e6
MIN_CPM = 5.0  # mean counts per million of the control cells above which a gene is tested
EPSILON = 1e-9  # added to mean counts per million before a fold change
FEW_CELLS = 64  # of so few cells every value left out is looked at
MOST_PAIRS = 2  # of a count and a depth, over the number of values
MOST_COUNTS = 1000  # of a gene in a cell that are looked up in a table
DEGREE = 24  # of the polynomial that stands for many cells without a count


class Bulk(NamedTuple):
    """Pseudobulk of a group of cells and the noise in it.

    Parameters
    ----------
    profile
        (g,) ``ln(1 + target_sum * sum of counts / all counts)``; zeros of cells without a count.
    noise
        Variance of the profile that comes from having so few cells, summed over genes: the jackknife over cells.
    """

    profile: np.ndarray
    noise: float


class CountTests(NamedTuple):
    """Rank-sum tests of a condition against the control cells on log1p of counts per million, gene by gene.

    Parameters
    ----------
    lfc
        (g,) log2 fold change of mean counts per million.
    p_value, p_adj
        (g,) two-sided, and adjusted over the tested genes (Benjamini-Hochberg); 1 for genes that are not tested.
    tested
        (g,) whether the control cells express the gene: a mean above 5 counts per million.
    """

    lfc: np.ndarray
    p_value: np.ndarray
    p_adj: np.ndarray
    tested: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        """(g,) whether the adjusted p-value is below 0.05."""
        return self.p_adj < LEVEL


@view("bulk")
def bulk_view(pair: Pair, side: Side, condition: str) -> Bulk:
    """Pseudobulk of the counts of a condition."""
    return bulk(pair.count_matrix(side, condition), pair.counts.target_sum)


def control_bulk(pair: Pair, side: Side, group: str) -> Bulk:
    """Pseudobulk of the control cells that this side is compared with."""

    def compute() -> Bulk:
        return bulk(pair.control_count_matrix(side, group), pair.counts.target_sum)

    return pair.once_of_control(side, ("bulk", group), compute)


@view("mean_counts")
def mean_counts_view(pair: Pair, side: Side, condition: str) -> np.ndarray:
    """(g,) mean counts of the cells of a condition."""
    return mean_of(pair.count_matrix(side, condition))


def control_mean_counts(pair: Pair, group: str) -> np.ndarray:
    """(g,) mean counts of the real control cells."""
    key = ("mean counts", group)
    return pair.once_of_control("real", key, lambda: mean_of(pair.control_count_matrix("real", group)))


@view("count_tests")
def count_tests_view(pair: Pair, side: Side, condition: str) -> CountTests:
    """Table of tests, made together with those of the other scored conditions of the group."""
    return _tests_of_group(pair, side, pair.group_of(condition), equal=False)[condition]


@view("equal_tests")
def equal_tests_view(pair: Pair, side: Side, condition: str) -> CountTests:
    """Like "count_tests", of at most as many predicted cells as there are real ones: more cells call more genes."""
    if side == "real" or pair.n_cells("pred", condition) <= pair.n_cells("real", condition):
        return count_tests_view(pair, side, condition)
    return _tests_of_group(pair, side, pair.group_of(condition), equal=True)[condition]


def _tests_of_group(pair: Pair, side: Side, group: str, *, equal: bool) -> dict[str, CountTests]:
    """Tables of tests of the scored conditions of a group."""

    def counts_of(name: str) -> sparse.csr_array:
        counts = pair.count_matrix(side, name)
        n_real = pair.n_cells("real", name)
        if not equal or counts.shape[0] <= n_real:
            return counts
        return counts[np.sort(pair.seeded_order(side, name)[:n_real])]

    def compute() -> dict[str, CountTests]:
        control = pair.control_count_matrix(side, group)
        found: dict[str, CountTests] = {}
        for names in batches(pair, side, pair.names(group)):
            found.update(zip(names, _tests([counts_of(name) for name in names], control), strict=True))
        return found

    return pair.once(side, ("equal tests" if equal else "count tests", group), compute)


def of_tests(
    on: str = "count_tests",
) -> Callable[[Callable[[CountTests, CountTests, np.ndarray], float]], Callable[[Pair, str], np.ndarray]]:
    """Make a metric of a group from a function of predicted tests, real tests and (g,) which genes count.

    A gene that the perturbation targets does not.
    """

    def make(compare: Callable[[CountTests, CountTests, np.ndarray], float]) -> Callable[[Pair, str], np.ndarray]:
        @wraps(compare)
        def of_condition(pair: Pair, name: str) -> float:
            return compare(*pair.both(on, name), pair.counted_genes(name))

        return each_condition(of_condition)

    return make


def bulk(counts: sparse.csr_array, target_sum: float = 50_000.0) -> Bulk:
    """Pseudobulk of (n, g) counts and its jackknife variance.

    Parameters
    ----------
    counts
        (n, g) CSR of counts >= 0.
    target_sum
        Counts to which the sum over cells is brought.

    References
    ----------
    Virtual Cell Challenge 2026; cell-eval2 0.20, `expr_mse_unbiased`.
    """
    total = counts.sum()
    if total == 0:
        return Bulk(np.zeros(counts.shape[1]), 0.0)
    scaled = target_sum * np.asarray(counts.sum(axis=0)).ravel() / total
    noise = _jackknife(counts, scaled, target_sum) if counts.shape[0] > 1 else 0.0
    return Bulk(np.log1p(scaled), noise)


def _jackknife(counts: sparse.csr_array, scaled: np.ndarray, target_sum: float) -> float:
    """Variance, summed over genes, of a pseudobulk by leaving out one cell after the other.

    With d the change of the profile when a cell is left out, ``(n - 1) / n * sum (d - mean d)^2``. Without its counts
    of the gene a cell changes the profile by its depth alone, so that only stored counts are looked at one by one.
    """
    n = counts.shape[0]
    depth = np.asarray(counts.sum(axis=1)).ravel()
    rest = depth.sum() - depth
    if (rest == 0).any():
        # one cell holds all counts; without it the profile is zero
        return float((n - 1) / n * np.square(np.log1p(scaled)).sum() * (1 - 1 / n))

    # the profile of the rest is log1p(scaled) + log1p(share * ratio - taken)
    ratio = depth / rest
    share = scaled / (1 + scaled)
    n_counts = np.diff(counts.indptr)
    genes = counts.indices
    left = share[genes] * np.repeat(ratio, n_counts)
    without = np.log1p(left)
    taken = counts.data * np.repeat(target_sum / rest, n_counts) / (1 + scaled)[genes]
    change = np.log1p(left - taken)

    # every cell as if it had no count of the gene, then the stored counts put right
    first = _summed_over_cells(ratio, share, 1) + np.bincount(genes, change - without, counts.shape[1])
    second = _summed_over_cells(ratio, share, 2)
    second = second + np.bincount(genes, np.square(change) - np.square(without), counts.shape[1])
    return max(float((n - 1) / n * (second - np.square(first) / n).sum()), 0.0)


def _summed_over_cells(ratio: np.ndarray, share: np.ndarray, power: int) -> np.ndarray:
    """(g,) sum over cells of ``log1p(share * ratio)`` to a power; of many cells by a polynomial in the share."""

    def summed(shares: np.ndarray) -> np.ndarray:
        values = np.log1p(shares[:, None] * ratio) ** power
        return np.asarray(values.sum(axis=1))

    if len(ratio) <= FEW_CELLS or ratio.max() > 0.5:
        return summed(share)
    # no singularity is near 0 to 1, so that the polynomial is exact to rounding
    return np.asarray(Chebyshev.interpolate(summed, DEGREE, domain=[0.0, 1.0])(share))


def _tests(groups: list[sparse.csr_array], control: sparse.csr_array) -> list[CountTests]:
    """Tables of tests of P groups of counts (n, g) against the same control cells."""
    control_mean = mean_of(_cpm(control))
    tested = control_mean > MIN_CPM
    p_values = np.ones((len(groups), len(tested)))
    if tested.any():
        compared = [block[:, tested] for block in _ranked([control, *groups])]
        p_values[:, tested], _ = rank_sum(compared[1:], compared[0])

    tables = []
    for counts, p_value in zip(groups, p_values, strict=True):
        p_adj = np.ones_like(p_value)
        p_adj[tested] = stats.false_discovery_control(p_value[tested])
        lfc = np.log2((mean_of(_cpm(counts)) + EPSILON) / (control_mean + EPSILON))
        tables.append(CountTests(lfc, p_value, p_adj, tested))
    return tables


def _cpm(counts: sparse.csr_array) -> sparse.csr_array:
    """(n, g) counts per million, each cell over its depth in millions as published: ties depend on it."""
    depth = np.asarray(counts.sum(axis=1)).ravel() / MILLION
    data = counts.data / np.repeat(depth, np.diff(counts.indptr))
    return sparse.csr_array((data, counts.indices, counts.indptr), shape=counts.shape)


def mean_of(counts: sparse.csr_array) -> np.ndarray:
    """(g,) mean of (n, g) over cells."""
    total = np.asarray(counts.sum(axis=0), dtype=np.float64)
    return total.ravel() / float(counts.shape[0])


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number (n,) of each value among the distinct ones, and these; small whole numbers are their own number."""
    largest = values.max(initial=0.0)
    if largest < MOST_COUNTS:
        number = values.astype(np.int32)
        if (number == values).all():
            return number, np.arange(int(largest) + 1)
    number, distinct = pd.factorize(values)
    return number.astype(np.int32), distinct


def _ranked(blocks: list[sparse.csr_array]) -> list[sparse.csr_array]:
    """Blocks of counts (n, g) with every count replaced by the place of its logarithm of counts per million among all.

    The test sees float32, in which different values may be equal; places are whole numbers.
    """
    depths = np.concatenate([np.asarray(block.sum(axis=1)).ravel() for block in blocks])
    counts = np.concatenate([block.data for block in blocks])
    per_cell = np.concatenate([np.diff(block.indptr) for block in blocks])

    # many cells share a depth and a count: of these pairs few are different
    depth, of_cell = np.unique(depths, return_inverse=True)
    of_count, count = _numbered(counts)
    if len(count) * len(depth) <= MOST_PAIRS * max(len(counts), 1):
        pair = of_count * np.int32(len(depth)) + np.repeat(of_cell.astype(np.int32), per_cell)
        present = np.zeros(len(count) * len(depth), dtype=bool)
        present[pair] = True
        known = np.flatnonzero(present)
        values = np.log1p(count[known // len(depth)] / (depth[known % len(depth)] / MILLION))
        distinct, place = np.unique(values, return_inverse=True)
        places = np.zeros(len(present), dtype=np.float32)
        places[known] = place + 1
        ranked = places[pair]
    else:
        # few repeat: every count by itself
        values = np.log1p(counts / np.repeat(depths / MILLION, per_cell))
        distinct, place = np.unique(values, return_inverse=True)
        ranked = (place + 1).astype(np.float32)

    # the test sees float32, which holds no larger whole numbers one by one
    if len(distinct) >= 2**24:
        raise ValueError(f"expected fewer than {2**24} different values; found {len(distinct)}; score fewer cells")

    # back into the blocks that the places came from
    ends = np.cumsum([block.nnz for block in blocks])[:-1]
    found = []
    for block, own in zip(blocks, np.split(ranked, ends), strict=True):
        found.append(sparse.csr_array((own, block.indices, block.indptr), shape=block.shape))
    return found

"""Real cells divided in two: a truth to score against, its duplicate, and what other perturbations would answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from scipy import stats

from invirtuo.cells.source import AnyCells
from invirtuo.cells.values import AnyMatrix
from invirtuo.design import Design
from invirtuo.errors import preview, whole_number
from invirtuo.metrics.cells import Cells, Layer, Scale, read_scaled
from invirtuo.metrics.measures.others import Others, Tests, keep_others, others_of, welch
from invirtuo.metrics.measures.wilcoxon import rank_sum
from invirtuo.metrics.numerics.streamed import mean_of_genes
from invirtuo.metrics.pair import CountOptions, Pair

__all__ = ["Control", "Halves", "Test", "halves", "rank_sum_tests"]

logger = logging.getLogger(__name__)

Rows: TypeAlias = dict[str, np.ndarray]
Test: TypeAlias = Literal["t-test", "rank-sum"]


class Control:
    """Names of what is scored against the truth."""

    DUPLICATE = "other half of the cells"
    INTERPOLATED = "interpolated duplicate"
    OTHER_CELLS = "cells of the other perturbations"
    OTHER_MEAN = "mean of the other perturbations"
    ALL_CELLS = "cells of all perturbations"
    ALL_MEAN = "mean of all perturbations"
    CONTROL_MEAN = "mean of the control cells"
    CONTROL_CELLS = "control cells"  # in place of other perturbations where there are none


@dataclass(frozen=True, eq=False)
class Halves:
    """Real cells, every condition divided in two, and what is known of the other perturbations. Made by :func:`halves`.

    Parameters
    ----------
    cells
        All real cells.
    duplicate
        The second halves as prediction of the first.
    truth_rows, duplicate_rows
        Condition to the rows of either half, sorted.
    others, tests
        Condition to what is known of the other perturbations, and to the tests of its duplicate against them.
    left_out
        Condition to the reason why it is not divided.
    seed, test
        Of the drawn cells, and which test.
    """

    cells: Cells
    duplicate: Pair
    truth_rows: Rows
    duplicate_rows: Rows
    others: Mapping[str, Others]
    tests: Mapping[str, Tests]
    left_out: Mapping[str, str]
    seed: int
    test: Test

    def group_of(self, name: str) -> str:
        """Covariate group of a condition."""
        return self.duplicate.group_of(name)

    def prediction(self, control: str) -> Pair:
        """A control, by its name, as prediction of the first halves."""
        if control == Control.DUPLICATE:
            return self.duplicate
        if control in (Control.OTHER_CELLS, Control.ALL_CELLS):
            rows = self._other_cells if control == Control.OTHER_CELLS else self._all_cells
            return self.duplicate.against(self.cells.restricted(rows))
        means = {
            Control.INTERPOLATED: self._interpolated,
            Control.OTHER_MEAN: self._other_mean,
            Control.ALL_MEAN: self._all_mean,
        }
        of_condition = means.get(control, self._control_mean)
        return self.duplicate.against_means({name: of_condition(name) for name in self.truth_rows})

    def name_of(self, control: str, condition: str) -> str:
        """Name of a control of one condition: without other perturbations control cells stand in their place."""
        is_alone = self.others[condition].are_controls
        return Control.CONTROL_CELLS if is_alone and control in (Control.OTHER_CELLS, Control.OTHER_MEAN) else control

    @cached_property
    def _other_cells(self) -> Rows:
        """As many cells as the duplicate has, of the other perturbations or, without them, of the controls."""
        rng = np.random.default_rng([self.seed, 1])
        return {name: _drawn(rng, self.rows_of_others(name), len(rows)) for name, rows in self.duplicate_rows.items()}

    @cached_property
    def _all_cells(self) -> Rows:
        """As many cells as the duplicate has, of the duplicates of all perturbations of the group."""
        rng = np.random.default_rng([self.seed, 2])
        drawn: Rows = {}
        for group in self.duplicate.groups:
            names = self.duplicate.names(group)
            pool = np.concatenate([self.duplicate_rows[name] for name in names])
            for name in names:
                drawn[name] = _drawn(rng, pool, len(self.duplicate_rows[name]))
        return drawn

    def rows_of_others(self, condition: str) -> np.ndarray:
        """Rows of the cells of the other perturbations of the group; of its control cells, if there are none."""
        group = self.group_of(condition)
        if self.others[condition].are_controls:
            return self.cells.controls[group]
        table = self.cells.table
        names = table.index[(table["_group"] == group) & (table.index != condition)]
        return np.sort(np.concatenate([self.cells.rows[name] for name in names]))

    def _interpolated(self, name: str) -> np.ndarray:
        certainty = 1.0 - self.tests[name].p_adj
        mean = self.duplicate.moments("pred", name)[0]
        return np.asarray(certainty * mean + (1.0 - certainty) * self.others[name].mean)

    def _other_mean(self, name: str) -> np.ndarray:
        if self.others[name].are_controls:
            return mean_of_genes(self.cells.read(self._other_cells[name]))
        return self.others[name].mean

    def _all_mean(self, name: str) -> np.ndarray:
        return self._means_of_groups[self.group_of(name)]

    @cached_property
    def _means_of_groups(self) -> dict[str, np.ndarray]:
        """Covariate group to the mean over its perturbations of their means."""
        found = {}
        for group in self.duplicate.groups:
            means = []
            for name in self.duplicate.names(group):
                mean, _, n = self.duplicate.moments("real", name)
                other_mean, _, m = self.duplicate.moments("pred", name)
                means.append((n * mean + m * other_mean) / (n + m))
            found[group] = np.mean(means, axis=0)
        return found

    def _control_mean(self, name: str) -> np.ndarray:
        return self.duplicate.control_moments("real", self.group_of(name))[0]


def halves(
    real: AnyCells,
    design: Design,
    *,
    seed: int,
    min_cells: int,
    test: Test = "t-test",
    n_pcs: int = 30,
    scale: Scale = "log1p",
    layer: Layer = None,
    counts: CountOptions | None = None,
) -> Halves:
    """Divide the real cells of every condition at random into the truth and its duplicate.

    Parameters
    ----------
    real, design, seed, min_cells, n_pcs, scale, layer
        As in :func:`invirtuo.metrics.calibration`.
    test
        Which test tells genes that set a perturbation apart: "t-test" (Welch) or "rank-sum", whose statistic is Cliff's
        delta.
    counts
        How metrics on counts see the cells.
    """
    min_cells = whole_number("min_cells", min_cells, least=2)
    if test not in ("t-test", "rank-sum"):
        raise ValueError(f"test must be 't-test' or 'rank-sum'; found {test!r}")
    if design.perturbation is None:
        raise ValueError("calibration sets perturbations against each other, and the design names no perturbation")
    cells = read_scaled(real, design, scale, layer)
    small = _too_small(cells, min_cells)

    # the order of the draws is that of scPertEval
    rng = np.random.default_rng(seed)
    truth: Rows = {}
    duplicate: Rows = {}
    for name in sorted(set(cells.rows) - set(small)):
        shuffled = cells.rows[name].copy()
        rng.shuffle(shuffled)
        n = len(shuffled) // 2
        truth[name] = np.sort(shuffled[:n])
        duplicate[name] = np.sort(shuffled[n:])

    # the duplicate predicts the truth; what is known of the others comes from all cells
    pred, rest = cells.restricted(duplicate), cells.restricted(truth)
    pair = Pair(pred, rest, design, n_pcs=n_pcs, counts=counts or CountOptions())
    whole = Pair(cells, cells, design)
    others = {name: others_of(whole, name, min_cells=min_cells) for name in truth}
    tests: dict[str, Tests] = {}
    divided = Halves(cells, pair, truth, duplicate, others, tests, small, seed, test)
    for name in truth:
        of_truth, tests[name] = _tests(divided, name)
        keep_others(pair, name, others[name], of_truth)
    return divided


def _too_small(cells: Cells, min_cells: int) -> dict[str, str]:
    """Conditions that are not divided, and why; an error if none is left."""
    sizes = {name: len(rows) for name, rows in cells.rows.items()}
    small = {name: f"{n} cells, fewer than {min_cells}" for name, n in sizes.items() if n < min_cells}
    if len(small) == len(sizes):
        largest = max(sizes.values(), default=0)
        raise ValueError(
            f"no condition has {min_cells} cells or more to divide; the largest has {largest}. Lower min_cells"
        )
    if small:
        text = "not divided into halves, for which %d cells are needed: %s"
        logger.warning(text, min_cells, preview(small))
    return small


def _tests(divided: Halves, name: str) -> tuple[Tests, Tests]:
    """Tests of both halves of a condition against the cells of the others."""
    pair, others = divided.duplicate, divided.others[name]
    if divided.test == "t-test":
        return welch(pair.moments("real", name), others.moments), welch(pair.moments("pred", name), others.moments)
    groups = [pair.stored("real", name), pair.stored("pred", name)]
    first, second = rank_sum_tests(groups, divided.cells.read(divided.rows_of_others(name)))
    return first, second


def rank_sum_tests(groups: Sequence[AnyMatrix], reference: AnyMatrix) -> list[Tests]:
    """Rank-sum tests of groups of cells (n, g) against the same (m, g); the statistic is Cliff's delta, -1 to 1."""
    p_values, statistics = rank_sum(groups, reference)
    found = []
    for group, p_value, statistic in zip(groups, p_values, statistics, strict=True):
        delta = 2 * statistic / (group.shape[0] * reference.shape[0]) - 1
        found.append(Tests(delta, stats.false_discovery_control(p_value)))
    return found


def _drawn(rng: np.random.Generator, pool: np.ndarray, n: int) -> np.ndarray:
    """A sample of n rows, sorted; with replacement if the pool is smaller."""
    return np.sort(rng.choice(pool, n, replace=len(pool) < n))

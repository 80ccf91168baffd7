"""How courses of cells are prepared for a fit: means of bins, or single cells as in the public code of PathReg."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from invirtuo.cells.courses import Course, binned, local_fit, reference, rescaled
from invirtuo.cells.transforms import Standardize

__all__ = ["PREPARATIONS", "Apart", "Bins", "Preparation", "Reference", "Start"]


class Start(NamedTuple):
    """A first state: standardised values (g,), scaled time, labels."""

    x0: np.ndarray
    time: float
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Preparation(ABC):
    """What is fitted of a course of cells.

    Parameters
    ----------
    n_bins, min_cells
        As of :func:`invirtuo.cells.courses.binned`.
    """

    n_bins: int
    min_cells: int

    keeps_cells: ClassVar[bool]  # whether what is fitted are the cells; such courses are solved whole
    preset: ClassVar[str]  # that fits courses like these

    @abstractmethod
    def scale(self, values: np.ndarray) -> Standardize:
        """The scale of values, from those of the training cells (n, g)."""

    @abstractmethod
    def course(self, course: Course, low: float, high: float, *, beyond: bool) -> Course:
        """A course of scaled values with scaled time; for `low`, `high` and `beyond` see `rescaled`."""

    @abstractmethod
    def rows(self, course: Course) -> Course:
        """What is fitted of a course."""

    @abstractmethod
    def curve(self, rows: Course, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
        """Values and slopes (n, g) of a smooth curve; the bandwidth is a share of the range of time."""

    @abstractmethod
    def first(self, rows: Course) -> Start:
        """First state of the rows of a course."""

    @abstractmethod
    def start(self, course: Course, own: Course | None) -> Start:
        """First state of a course of cells; `own` are the rows of the training course of this name, if there is one."""


class Bins(Preparation):
    """Means of bins; values are standardised by training cells, times are shares of the range of a course."""

    keeps_cells = False
    preset = "default"

    def scale(self, values: np.ndarray) -> Standardize:
        return Standardize().fit(values)

    def course(self, course: Course, low: float, high: float, *, beyond: bool) -> Course:
        return rescaled(course, low, high, beyond=beyond)

    def rows(self, course: Course) -> Course:
        return binned(course, self.n_bins, self.min_cells)

    def curve(self, rows: Course, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
        span = max(rows.time[-1] - rows.time[0], 1e-12)
        return local_fit(rows.time, rows.values, bandwidth * span, weights=rows.n_cells)[:2]

    def first(self, rows: Course) -> Start:
        return Start(rows.values[0], float(rows.time[0]), rows.labels)

    def start(self, course: Course, own: Course | None) -> Start:
        """Cells that come after the end of their training course go on from there."""
        if own is not None and course.time[0] > own.time[-1]:
            return Start(own.values[-1], float(own.time[-1]), course.labels)
        return self.first(self.rows(course))


class Apart(Bins):
    """Means of bins, every gene moved along time by itself: each keeps its own dynamics, and none goes with another.

    What lies before a course comes after its end. Edges that are found in such courses are found by chance.
    """

    def rows(self, course: Course) -> Course:
        bins = super().rows(course)
        order = self._order(bins)
        error = None if bins.error is None else np.take_along_axis(bins.error, order, axis=0)
        return bins._replace(values=np.take_along_axis(bins.values, order, axis=0), error=error)

    def curve(self, rows: Course, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
        """Of the genes where they were: the seam between end and beginning has no slope."""
        order = self._order(rows)
        values = np.empty_like(rows.values)
        np.put_along_axis(values, order, rows.values, axis=0)
        smooth, slope = super().curve(rows._replace(values=values), bandwidth)
        return np.take_along_axis(smooth, order, axis=0), np.take_along_axis(slope, order, axis=0)

    def _order(self, rows: Course) -> np.ndarray:
        """(n, g), row that stands at each place, for every gene; the same for a course whenever it is asked for."""
        n_rows, n_genes = rows.values.shape
        rng = np.random.default_rng(zlib.crc32(rows.name.encode()))
        shift = rng.integers(n_rows, size=n_genes)
        order: np.ndarray = (np.arange(n_rows)[:, None] + shift) % n_rows
        return order


class Reference(Preparation):
    """Single cells, scaled to [0, 1] within each course; the mean of the first 5 is the first state.

    References
    ----------
    theislab/PathReg, notebook of hematopoiesis.
    """

    keeps_cells = True
    preset = "pathreg-paper"

    def scale(self, values: np.ndarray) -> Standardize:
        scale = Standardize()
        scale.mean, scale.sd = np.zeros(values.shape[1]), np.ones(values.shape[1])
        return scale

    def course(self, course: Course, low: float, high: float, *, beyond: bool) -> Course:
        return reference(course)

    def rows(self, course: Course) -> Course:
        return course

    def curve(self, rows: Course, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
        return rows.values, rows.values

    def first(self, rows: Course) -> Start:
        return Start(rows.values[:5].mean(axis=0), float(rows.time[0]), rows.labels)

    def start(self, course: Course, own: Course | None) -> Start:
        return self.first(course)


PREPARATIONS: dict[str, type[Preparation]] = {"bins": Bins, "reference": Reference, "apart": Apart}

"""Time courses: the cells of one lineage of one donor in the order of time, their bins, smooth curves and slopes.

Single cells are static measurements, no repeated ones of a trajectory: dynamics are fitted to means of bins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from invirtuo.design import Design

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Course",
    "anchors",
    "best_bandwidth",
    "binned",
    "courses",
    "kernel_bandwidth",
    "local_fit",
    "reference",
    "rescaled",
    "smoothed",
]

BANDWIDTHS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3)  # that smoothers choose from, as shares of the range of time
MOST_LEFT_OUT = 500  # points that are left out to choose one


class Course(NamedTuple):
    """Measurements in the order of time.

    Parameters
    ----------
    name
        Covariate values joined by ``|``.
    labels
        Covariate to its value.
    time
        (n,), rising; equal times are allowed.
    values
        (n, g).
    rows
        (n,), rows of the AnnData (of bins: of their first cell).
    error
        (n, g), standard error of means of bins; None for single cells.
    n_cells
        (n,), cells behind each row.
    """

    name: str
    labels: Mapping[str, str]
    time: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    error: np.ndarray | None = None
    n_cells: np.ndarray | None = None


def courses(values: np.ndarray, obs: pd.DataFrame, design: Design, rows: np.ndarray | None = None) -> list[Course]:
    """Divide cells into time courses: one for every combination of covariates, sorted by name and time.

    Parameters
    ----------
    values
        (n, g), of all cells of `obs`.
    rows
        Cells to take; None takes all.

    Raises
    ------
    ValueError
        If the Design names no time.
    """
    if design.time is None:
        raise ValueError("time courses need a Design with time=; name the column of obs with time or pseudotime")
    rows = np.arange(len(obs)) if rows is None else np.asarray(rows)
    values = np.asarray(values)
    table = design.tidy(obs.iloc[rows])
    time = table[design.time].to_numpy()
    groups = design.groups(table).to_numpy()
    found = []
    for name in sorted(set(groups)):
        # cells of the course in the order of time
        members = np.flatnonzero(groups == name)
        members = members[np.argsort(time[members], kind="stable")]
        labels = {column: str(table[column].iloc[members[0]]) for column in design.covariates}
        found.append(Course(str(name), labels, time[members], values[rows[members]], rows[members]))
    return found


def reference(course: Course, *, head: int = 10, tail: int = 20, unique: Collection[str] = ("s2d1", "s2d4")) -> Course:
    """A course as the public code of PathReg prepares it.

    The first `head` and last `tail` cells are dropped, every gene is scaled to [0, 1] by its extremes **within the
    course** (constant genes to 0), and so is time. Courses of the donors `unique` lose repeated times first.

    References
    ----------
    theislab/PathReg, notebook of hematopoiesis.
    """
    time = course.time
    values = course.values.astype(np.float64)
    rows = course.rows
    # courses in which cells of one time are dropped
    if set(course.labels.values()) & set(unique):
        keep = np.r_[True, np.diff(time) > 0]
        time = time[keep]
        values = values[keep]
        rows = rows[keep]
    if len(time) <= head + tail + 5:
        raise ValueError(
            f"{course.name}: {len(time)} cells; the reference preparation needs more than {head + tail + 5}"
        )
    # the ends of pseudotime are sparse
    cut = slice(head, len(time) - tail)
    time = time[cut]
    values = values[cut]
    rows = rows[cut]
    # values and time from 0 to 1
    low = values.min(axis=0)
    span = np.ptp(values, axis=0)
    values = np.divide(values - low, span, out=np.zeros_like(values), where=span > 0)
    duration = max(time[-1] - time[0], 1e-12)
    return course._replace(time=(time - time[0]) / duration, values=values, rows=rows)


def anchors(time: np.ndarray) -> tuple[float, float]:
    """Begin and end of a course: the 1st and 99th percentile of its cells, or its ends if it has fewer than 100.

    Pseudotime has no unit, and its range depends on the other cells of the donor; only times are used, no expression.
    """
    low, high = np.quantile(time, [0.01, 0.99]) if len(time) >= 100 else (time.min(), time.max())
    return float(low), float(max(high, low + 1e-9))


def rescaled(course: Course, low: float, high: float, *, beyond: bool = False) -> Course:
    """Time as a share of the range between two anchors; earlier cells move to 0, later ones to 1 or stay beyond."""
    return course._replace(time=np.clip((course.time - low) / (high - low), 0.0, None if beyond else 1.0))


def binned(course: Course, n_bins: int = 30, min_cells: int = 10) -> Course:
    """Means and errors in bins of equal width, joined until each has `min_cells`; 0 bins: one for each time."""
    time = course.time
    if n_bins:
        edges = np.linspace(time[0], time[-1], n_bins + 1)[1:-1]
        bins = np.searchsorted(edges, time, side="right")
    else:
        bins, min_cells = np.unique(time, return_inverse=True)[1], 1
    # cells are sorted by time, so a bin is a run of rows
    starts = _starts(bins, min_cells)
    counts = np.diff(np.r_[starts, len(time)])[:, None]
    mean = np.add.reduceat(course.values, starts, axis=0) / counts
    deviation = course.values - np.repeat(mean, counts[:, 0], axis=0)
    square = np.add.reduceat(deviation**2, starts, axis=0)
    error = np.sqrt(square / np.maximum(counts - 1, 1) / counts)  # of the mean
    mean_time = np.add.reduceat(time, starts) / counts[:, 0]
    return course._replace(time=mean_time, values=mean, rows=course.rows[starts], error=error, n_cells=counts[:, 0])


def _starts(bins: np.ndarray, min_cells: int) -> np.ndarray:
    """First cell of each bin; bins that are too small are joined with the next, the last with the one before."""
    changes = np.flatnonzero(np.r_[True, np.diff(bins) > 0])
    starts = [0]
    for change in changes[1:]:
        if change - starts[-1] >= min_cells:
            starts.append(int(change))
    if len(starts) > 1 and len(bins) - starts[-1] < min_cells:
        starts.pop()
    return np.array(starts)


def smoothed(
    time: np.ndarray, values: np.ndarray, at: np.ndarray, bandwidth: float = 0.05, weights: np.ndarray | None = None
) -> np.ndarray:
    """Kernel mean (Nadaraya-Watson) with a Gaussian kernel at other times, (b, g); `weights` (n,) of the points."""
    gap = np.asarray(at)[:, None] - time[None]
    weight = np.exp(-0.5 * (gap / bandwidth) ** 2)
    if weights is not None:
        weight = weight * weights
    total = weight.sum(axis=1, keepdims=True)
    # further from all points than a double can tell, the nearest one counts alone
    nearest = np.eye(len(time))[np.abs(gap).argmin(axis=1)]
    means: np.ndarray = np.where(total > 1e-300, weight / np.maximum(total, 1e-300), nearest) @ values
    return means


def local_fit(
    time: np.ndarray, values: np.ndarray, bandwidth: float, *, degree: int = 2, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Local polynomial of a curve.

    Parameters
    ----------
    time, values
        (n,) and (n, g).
    bandwidth
        Of the Gaussian kernel; wider where fewer than degree + 2 points are near.
    degree
        Of the polynomials.
    weights
        (n,) of the points, for example numbers of cells.

    Returns
    -------
    Values (n, g) and slopes (n, g) at the given times, and the leverage (n,) of each point on its own value.
    """
    # a kernel around every point, wide enough to hold as many points as the polynomial needs
    gap = np.abs(time[:, None] - time[None])
    reach = np.sort(gap, axis=1)[:, min(degree + 1, len(time) - 1)]
    width = np.maximum(bandwidth, reach)
    kernel = np.exp(-0.5 * (gap / width[:, None]) ** 2)
    if weights is not None:
        kernel = kernel * weights[None]

    # weighted least squares at every point, with a ridge that keeps it solvable
    offset = (time[None] - time[:, None]) / width[:, None]
    design = offset[..., None] ** np.arange(degree + 1)  # (n, n, degree + 1)
    weighted = kernel[..., None] * design
    gram = np.einsum("nip,niq->npq", weighted, design)
    gram += 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(degree + 1)
    rows = np.linalg.solve(gram, weighted.transpose(0, 2, 1))  # (n, degree + 1, n)
    # row 0 gives the value, row 1 the slope in units of the width
    leverage = np.diagonal(rows[:, 0])
    return rows[:, 0] @ values, rows[:, 1] @ values / width[:, None], leverage


def kernel_bandwidth(time: np.ndarray, values: np.ndarray, weights: np.ndarray) -> float:
    """The bandwidth of :func:`smoothed` with the smallest error at points (n, g) that are left out one at a time."""
    left_out = np.unique(np.linspace(0, len(time) - 1, min(len(time), MOST_LEFT_OUT)).astype(int))
    gap = time[left_out, None] - time[None]
    errors = []
    for choice in BANDWIDTHS:
        kernel = np.exp(-0.5 * (gap / choice) ** 2) * weights
        kernel[np.arange(len(left_out)), left_out] = 0.0
        # a point without neighbours is forecast by all others alike
        kernel += 1e-12 * (gap != 0)
        mean = kernel @ values / np.maximum(kernel.sum(axis=1, keepdims=True), 1e-300)
        square = ((mean - values[left_out]) ** 2).mean(axis=1)
        errors.append(np.average(square, weights=weights[left_out]))
    return BANDWIDTHS[int(np.argmin(errors))]


def best_bandwidth(parts: Sequence[Course], choices: Sequence[float] = BANDWIDTHS, *, degree: int = 2) -> float:
    """The bandwidth, as a share of the time range, with the smallest leave-one-out error over courses and genes."""
    errors = []
    for choice in choices:
        total = 0.0
        for part in parts:
            span = max(part.time[-1] - part.time[0], 1e-12)
            fit, _, leverage = local_fit(part.time, part.values, choice * span, degree=degree, weights=part.n_cells)
            # of a linear smoother the leave-one-out residuals follow from the leverage
            left_out = (part.values - fit) / np.maximum(1 - leverage, 0.05)[:, None]
            total += float(np.average(left_out**2, axis=0, weights=part.n_cells).mean())
        errors.append(total)
    return choices[int(np.argmin(errors))]

"""What a forecast must beat: constants, means, lines, smoothers and linear systems of the training courses.

All are functions of the training courses and of the first state of the course to forecast; the oracles, for scale, look
at the course itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from invirtuo.cells.courses import Course, kernel_bandwidth, local_fit, smoothed

__all__ = ["BASELINES", "LATER", "ORACLES", "baselines"]

Courses = Sequence[Course]
Forecast = Callable[[Courses, Courses, Course, np.ndarray], np.ndarray]
PULL = 5.0  # rate at which an offset from the training courses decays, per range of time


def baselines(
    train: Sequence[Course], test: Course, x0: np.ndarray, *, alike: str | None = None, pull: float = PULL
) -> dict[str, np.ndarray]:
    """Forecasts (n, g) of a course by every baseline and oracle; of later times of a training course, by two more.

    Parameters
    ----------
    train
        Training courses, cells or bins.
    test
        The course to forecast.
    x0
        (g,), its first state.
    alike
        Covariate (lineage) whose value training courses must share with the test course for the baselines of a
        lineage; None, or a value that no training course has: all courses.
    pull
        Rate at which the offset of the first state from the smoother decays, for "smoother_offset".
    """
    same = list(train)
    if alike is not None:
        value = test.labels.get(alike)
        same = [course for course in train if course.labels.get(alike) == value] or same

    # two rules need a training course that the test course goes on
    own = _own(train, test)
    is_later = own is not None and test.time[0] > own.time[-1]
    rules = {**BASELINES, **(LATER if is_later else {}), **ORACLES}
    rules["smoother_offset"] = partial(_smoother_offset, pull=pull)
    forecasts = {}
    for name, rule in rules.items():
        forecast = rule(same, train, test, x0)
        forecasts[name] = np.broadcast_to(forecast, test.values.shape)
    return forecasts


def _pooled(courses: Sequence[Course]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (n,), values (n, g) and numbers of cells (n,) of all points of courses."""
    time = np.concatenate([course.time for course in courses])
    values = np.concatenate([course.values for course in courses])
    cells = [np.ones(len(c.time)) if c.n_cells is None else c.n_cells for c in courses]
    return time, values, np.concatenate(cells)


def _mean(courses: Sequence[Course]) -> np.ndarray:
    _, values, cells = _pooled(courses)
    return np.average(values, axis=0, weights=cells)


def _line(same: Courses, train: Courses, test: Course, x0: np.ndarray) -> np.ndarray:
    """Least squares of each gene on time."""
    time, values, cells = _pooled(same)
    root = np.sqrt(cells)[:, None]
    solution = np.linalg.lstsq(_affine(time) * root, values * root, rcond=None)[0]
    line: np.ndarray = _affine(test.time) @ solution
    return line


def _affine(time: np.ndarray) -> np.ndarray:
    """(n, 2) ones and times."""
    return np.stack([np.ones_like(time), time], axis=1)


def _smoother(same: Courses, train: Courses, test: Course, x0: np.ndarray) -> np.ndarray:
    return _smooth(same, test.time)


def _smooth(same: Courses, at: np.ndarray) -> np.ndarray:
    """Kernel means with the bandwidth that the courses choose by leaving out single points."""
    time, values, cells = _pooled(same)
    return smoothed(time, values, at, kernel_bandwidth(time, values, cells), cells)


def _smoother_offset(same: Courses, train: Courses, test: Course, x0: np.ndarray, *, pull: float = PULL) -> np.ndarray:
    """The smoother, and the first state's offset from it, which decays: a course that is led back without a network."""
    own = _own(train, test)
    begin = test.time[0] if own is None else min(test.time[0], own.time[-1])
    offset = x0 - _smooth(same, np.array([begin]))[0]
    decay = np.exp(-pull * (test.time - begin).clip(0))
    forecast: np.ndarray = _smooth(same, test.time) + decay[:, None] * offset
    return forecast


def _last_value(same: Courses, train: Courses, test: Course, x0: np.ndarray) -> np.ndarray:
    """The last state of the same course."""
    own = _own(train, test) or same[0]
    last: np.ndarray = own.values[-1]
    return last


def _extrapolated(same: Courses, train: Courses, test: Course, x0: np.ndarray) -> np.ndarray:
    """The line through the last third of the same course, and its last state."""
    own = _own(train, test) or same[0]
    first, last = own.time[0], own.time[-1]
    late = own.time >= last - (last - first) / 3
    slope = np.polyfit(own.time[late], own.values[late], 1)[0] if late.sum() > 1 else 0.0
    line: np.ndarray = own.values[-1] + (test.time - last)[:, None] * slope
    return line


def _own(train: Sequence[Course], test: Course) -> Course | None:
    """The training course of which the test course is a later part."""
    return next((course for course in train if course.name == test.name), None)


def linear_ode(
    same: Courses, train: Courses, test: Course, x0: np.ndarray, *, rank: int = 10, ridge: float = 1e-3
) -> np.ndarray:
    """dx/dt = A x + b on leading components, by ridge regression of the slopes of smooth curves."""
    from scipy.linalg import expm

    # states and slopes on leading components
    curves = [_curve(course) for course in same]
    states = np.concatenate([curve for curve, _ in curves])
    slopes = np.concatenate([slope for _, slope in curves])
    mean = states.mean(axis=0)
    components = np.linalg.svd(states - mean, full_matrices=False)[2][:rank]
    scores = (states - mean) @ components.T

    # [A b] by ridge regression
    z = np.c_[scores, np.ones(len(states))]
    n_columns = z.shape[1]
    gram = z.T @ z
    penalty = ridge * np.trace(gram) / n_columns
    targets = slopes @ components.T
    system = np.linalg.solve(gram + penalty * np.eye(n_columns), z.T @ targets).T

    # exact solution of the affine system, at every distinct time
    generator = np.zeros((len(system) + 1,) * 2)
    generator[:-1] = system
    start = np.r_[(x0 - mean) @ components.T, 1.0]
    times, row = np.unique(test.time, return_inverse=True)
    flows = [expm(generator * (t - test.time[0])) for t in times]
    path = np.stack([(flow @ start)[:-1] for flow in flows])
    path = np.clip(path, *_range(scores))  # an unstable system diverges
    values: np.ndarray = path @ components + mean
    return values[row]


def _curve(course: Course, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Values and slopes of a smooth curve on a grid of times."""
    first, last = course.time[0], course.time[-1]
    if course.error is None and len(course.time) > n:
        grid = np.linspace(first, last, n)
        course = course._replace(time=grid, values=smoothed(course.time, course.values, grid))
    bandwidth = 0.05 * max(last - first, 1e-12)
    return local_fit(course.time, course.values, bandwidth)[:2]


def _range(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of every component, one span beyond what was seen."""
    span = np.ptp(z, axis=0)
    return z.min(axis=0) - span, z.max(axis=0) + span


BASELINES: dict[str, Forecast] = {
    "zero": lambda same, train, test, x0: np.zeros(test.values.shape[1]),
    "initial_state": lambda same, train, test, x0: x0,
    "training_mean": lambda same, train, test, x0: _mean(same),
    "pooled_mean": lambda same, train, test, x0: _mean(train),
    "linear_in_time": _line,
    "smoother": _smoother,
    "smoother_offset": _smoother_offset,
    "linear_ode": linear_ode,
}
LATER: dict[str, Forecast] = {"last_value": _last_value, "linear_extrapolation": _extrapolated}  # later times alone
ORACLES: dict[str, Forecast] = {
    "own_mean": lambda same, train, test, x0: test.values.mean(axis=0),
    "own_smoother": lambda same, train, test, x0: smoothed(test.time, test.values, test.time),
}

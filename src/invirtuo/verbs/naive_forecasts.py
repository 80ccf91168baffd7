"""What a forecast must beat: constants, means, lines, smoothers and linear systems of the training courses.

All are functions of the training courses and of the first state of the course to forecast; the oracles, for scale, look
at the course itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from invirtuo.cells.courses import Course, local_fit, smoothed

__all__ = ["BASELINES", "LATER", "ORACLES", "baselines"]

Forecast = Callable[[Sequence[Course], Sequence[Course], Course, np.ndarray], np.ndarray]


def baselines(
    train: Sequence[Course], test: Course, x0: np.ndarray, *, alike: str | None = None
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
    """
    same = [c for c in train if alike is None or c.labels.get(alike) == test.labels.get(alike)] or list(train)
    own = _own(train, test)
    later = own is not None and test.time[0] > own.time[-1]
    every = {**BASELINES, **(LATER if later else {}), **ORACLES}
    return {name: np.broadcast_to(rule(same, train, test, x0), test.values.shape) for name, rule in every.items()}


def _joined(parts: Sequence[Course]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, values, and how many cells are behind each."""
    cells = [np.ones(len(c.time)) if c.n_cells is None else c.n_cells for c in parts]
    return np.concatenate([c.time for c in parts]), np.concatenate([c.values for c in parts]), np.concatenate(cells)


def _mean(parts: Sequence[Course]) -> np.ndarray:
    _, values, cells = _joined(parts)
    return np.average(values, axis=0, weights=cells)


def _line(same, train, test, x0):
    """Least squares of each gene on time."""
    time, values, cells = _joined(same)
    root = np.sqrt(cells)[:, None]
    basis = np.stack([np.ones_like(time), time], axis=1)
    solution = np.linalg.lstsq(basis * root, values * root, rcond=None)[0]
    return np.stack([np.ones_like(test.time), test.time], axis=1) @ solution


def _smoother(same, train, test, x0):
    time, values, cells = _joined(same)
    return smoothed(time, values, test.time, weights=cells)


def _last_value(same, train, test, x0):
    """The last state of the same course."""
    return (_own(train, test) or same[0]).values[-1]


def _extrapolated(same, train, test, x0):
    """The line through the last third of the same course, and its last state."""
    own = _own(train, test) or same[0]
    late = own.time >= own.time[-1] - (own.time[-1] - own.time[0]) / 3
    slope = np.polyfit(own.time[late], own.values[late], 1)[0] if late.sum() > 1 else 0.0
    return own.values[-1] + (test.time - own.time[-1])[:, None] * slope


def _own(train: Sequence[Course], test: Course) -> Course | None:
    return next((course for course in train if course.name == test.name), None)


def linear_ode(same, train, test, x0, *, rank: int = 10, ridge: float = 1e-3):
    """dx/dt = A x + b on leading components, by ridge regression of the slopes of smooth curves."""
    from scipy.linalg import expm

    curves = [_curve(part) for part in same]
    states = np.concatenate([curve for curve, _ in curves])
    slopes = np.concatenate([slope for _, slope in curves])
    mean = states.mean(axis=0)
    components = np.linalg.svd(states - mean, full_matrices=False)[2][:rank]
    z = np.c_[(states - mean) @ components.T, np.ones(len(states))]
    scale = ridge * np.trace(z.T @ z) / z.shape[1]
    system = np.linalg.solve(z.T @ z + scale * np.eye(z.shape[1]), z.T @ (slopes @ components.T)).T
    full = np.zeros((len(system) + 1,) * 2)
    full[:-1] = system
    start = np.r_[(x0 - mean) @ components.T, 1.0]
    path = np.stack([(expm(full * (t - test.time[0])) @ start)[:-1] for t in np.unique(test.time)])
    path = np.clip(path, *_range((states - mean) @ components.T))  # an unstable system may leave everything behind
    return (path @ components + mean)[np.unique(test.time, return_inverse=True)[1]]


def _curve(part: Course, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Values and slopes of a smooth curve on a grid of times."""
    if part.error is None and len(part.time) > n:
        at = np.linspace(part.time[0], part.time[-1], n)
        part = part._replace(time=at, values=smoothed(part.time, part.values, at))
    return local_fit(part.time, part.values, 0.05 * max(part.time[-1] - part.time[0], 1e-12))[:2]


def _range(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    span = np.ptp(z, axis=0)
    return z.min(axis=0) - span, z.max(axis=0) + span


BASELINES: dict[str, Forecast] = {
    "zero": lambda same, train, test, x0: np.zeros(test.values.shape[1]),
    "initial_state": lambda same, train, test, x0: x0,
    "training_mean": lambda same, train, test, x0: _mean(same),
    "pooled_mean": lambda same, train, test, x0: _mean(train),
    "linear_in_time": _line,
    "smoother": _smoother,
    "linear_ode": linear_ode,
}
LATER: dict[str, Forecast] = {"last_value": _last_value, "linear_extrapolation": _extrapolated}  # later times alone
ORACLES: dict[str, Forecast] = {
    "own_mean": lambda same, train, test, x0: test.values.mean(axis=0),
    "own_smoother": lambda same, train, test, x0: smoothed(test.time, test.values, test.time),
}

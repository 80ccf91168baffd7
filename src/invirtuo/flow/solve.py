"""Fixed-step solvers for dx/dt = velocity(x, t) on any time grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["EVALUATIONS", "SOLVERS", "solve", "time_grid"]

Velocity = Callable[[Tensor, Tensor], Tensor]


def time_grid(steps: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """(steps + 1,), uniform times from 0 to 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    return torch.linspace(0.0, 1.0, steps + 1, dtype=dtype)


def solve(velocity: Velocity, x0: Tensor, grid: Tensor | int, solver: str = "euler") -> Tensor:
    """Integrate dx/dt = velocity(x, t) along a time grid.

    Parameters
    ----------
    velocity
        Takes x (n, g) and t (0-dim tensor), gives (n, g).
    x0
        (n, g), the state at the first time of the grid.
    grid
        (k + 1,), rising times; a number means that many uniform steps from 0 to 1.
    solver
        One of ``SOLVERS``. Order and evaluations per step: euler 1/1, midpoint 2/2, heun 2/2, ab2 2/1, rk4 4/4.

    Returns
    -------
    (n, g), the state at the last time of the grid.

    Examples
    --------
    >>> import torch
    >>> float(solve(lambda x, t: x, torch.ones(1), 20, "rk4"))  # e
    2.71828...
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    times = time_grid(grid) if isinstance(grid, int) else torch.as_tensor(grid, dtype=torch.float64).cpu()
    if times.ndim != 1 or len(times) < 2 or (times.diff() <= 0).any():
        raise ValueError(f"a time grid must hold at least two rising times, found {times.tolist()}")
    step = SOLVERS[solver]()
    x = x0
    for k in range(len(times) - 1):
        x = step(velocity, x, times[k], times[k + 1] - times[k])
    return x


def _euler():
    return lambda velocity, x, t, h: x + float(h) * velocity(x, t)


def _midpoint():
    def step(velocity, x, t, h):
        middle = x + float(h / 2) * velocity(x, t)
        return x + float(h) * velocity(middle, t + h / 2)

    return step


def _heun():
    def step(velocity, x, t, h):
        first = velocity(x, t)
        return x + float(h / 2) * (first + velocity(x + float(h) * first, t + h))

    return step


def _ab2():
    """Adams-Bashforth of order 2 with variable steps; the first step is Euler's."""
    previous = None

    def step(velocity, x, t, h):
        nonlocal previous
        v = velocity(x, t)
        if previous is None:
            x = x + float(h) * v
        else:
            v_before, h_before = previous
            r = float(h / h_before) / 2
            x = x + float(h) * ((1 + r) * v - r * v_before)
        previous = (v, h)
        return x

    return step


def _rk4():
    def step(velocity, x, t, h):
        k1 = velocity(x, t)
        k2 = velocity(x + float(h / 2) * k1, t + h / 2)
        k3 = velocity(x + float(h / 2) * k2, t + h / 2)
        k4 = velocity(x + float(h) * k3, t + h)
        return x + float(h / 6) * (k1 + 2 * k2 + 2 * k3 + k4)

    return step


SOLVERS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "ab2": _ab2, "rk4": _rk4}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1, "rk4": 4}

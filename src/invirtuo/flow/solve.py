"""Solvers for dx/dt = velocity(x, t) on any time grid: fixed steps, and Dormand-Prince with steps of its own.

`solve` gives the last state, `trajectory` a solution that can be asked for any time between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EVALUATIONS", "SOLVERS", "SOLVER_NAMES", "Trajectory", "reversed_time", "solve", "time_grid", "trajectory"]

Velocity = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]  # of (velocity, x, t, h): x at t + h


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
        "dopri5" chooses its steps by itself; the grid then only names times that it does not step over.

    Returns
    -------
    (n, g), the state at the last time of the grid.

    Examples
    --------
    >>> import torch
    >>> float(solve(lambda x, t: x, torch.ones(1), 20, "rk4"))  # e
    2.71828...
    """
    times = _times(grid, solver)
    step = _dopri5() if solver == "dopri5" else SOLVERS[solver]()
    x = x0
    for k in range(len(times) - 1):
        x = step(velocity, x, times[k], times[k + 1] - times[k])
    return x


def _times(grid: Tensor | int, solver: str) -> Tensor:
    """The time grid, checked; only its ends if the solver finds steps of its own."""
    if solver not in SOLVER_NAMES:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVER_NAMES)}")
    times = time_grid(grid) if isinstance(grid, int) else torch.as_tensor(grid, dtype=torch.float64).cpu()
    if times.ndim != 1 or len(times) < 2 or (times.diff() <= 0).any():
        raise ValueError(f"a time grid must hold at least two rising times, found {times.tolist()}")
    return times[[0, -1]] if solver == "dopri5" and isinstance(grid, int) else times


@dataclass(frozen=True)
class Trajectory:
    """A solution at the nodes of its steps, and between them.

    Parameters
    ----------
    times
        (k + 1,), float64.
    states, slopes
        (k + 1, ...), states and velocities at the nodes.
    bend
        (k, ...), middle of each step beside that of the cubic polynomial; None: zero.
    """

    times: Tensor
    states: Tensor
    slopes: Tensor
    bend: Tensor | None = None

    def at(self, times: Tensor) -> Tensor:
        """States at other times: Hermite's cubic, for dopri5 with a term of order 4 (Shampine 1986).

        Parameters
        ----------
        times
            (b,), within the nodes: gives (b, ...). Or (n, b), other times for each row (next to last axis) of the
            states: gives (b, ..., n, g).
        """
        times = torch.as_tensor(times, dtype=torch.float64).cpu()
        # the step k that holds each time, and the share s of it that has passed
        last = len(self.times) - 2
        k = (torch.searchsorted(self.times, times.contiguous(), right=True) - 1).clamp(0, last)
        h = self.times[k + 1] - self.times[k]
        s = (times - self.times[k]) / h

        # Hermite's cubic through states and slopes at both ends of the step
        x = self._weighted(self.states, k, (1 + 2 * s) * (1 - s) ** 2)
        x = x + self._weighted(self.slopes, k, s * (1 - s) ** 2 * h)
        x = x + self._weighted(self.states, k + 1, s**2 * (3 - 2 * s))
        x = x + self._weighted(self.slopes, k + 1, s**2 * (s - 1) * h)
        if self.bend is None:
            return x
        return x + self._weighted(self.bend, k, 16 * (s * (1 - s)) ** 2)

    @staticmethod
    def _weighted(values: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """Values at nodes times weights; `rows` (b,) are common to all cells, or (n, b) of each cell its own."""
        weight = weight.to(values)
        if rows.ndim == 1:
            return values[rows] * weight.view(-1, *[1] * (values.ndim - 1))
        cell = torch.arange(len(rows))[:, None]
        picked = values.movedim(-2, 0)[cell, rows]  # (n, b, ..., g)
        weight = weight.view(*rows.shape, *[1] * (values.ndim - 2))
        return (picked * weight).movedim(0, -2)


def trajectory(
    velocity: Velocity, x0: Tensor, grid: Tensor | int, solver: str = "rk4", *, tolerance: float = 1e-5
) -> Trajectory:
    """Integrate dx/dt = velocity(x, t) and keep the way.

    The number of times at which a solution is asked for costs no evaluations, and the backward pass is linear in it.

    Parameters
    ----------
    velocity, x0, grid, solver
        As for :func:`solve`; x0 may have any number of axes in front of (n, g).
    tolerance
        Of dopri5, relative and absolute; the first axis of x0 is held to it row by row.

    Examples
    --------
    >>> import torch
    >>> way = trajectory(lambda x, t: -x, torch.ones(1, 1), 8, "rk4")
    >>> way.at(torch.tensor([0.0, 0.3, 1.0])).flatten()  # exp(-t)
    tensor([1.0000, 0.7408, 0.3679])
    """
    times = _times(grid, solver)
    if solver == "dopri5":
        return _adaptive(velocity, x0, times, tolerance)
    step = SOLVERS[solver]()
    states: list[Tensor] = [x0]
    slopes: list[Tensor] = []
    for k in range(len(times) - 1):
        # slopes at the nodes cost no evaluation
        first: list[Tensor] = []

        def noted(x: Tensor, t: Tensor, first: list[Tensor] = first) -> Tensor:
            v = velocity(x, t)
            if not first:  # every solver begins a step with the velocity at its node
                first.append(v)
            return v

        h = times[k + 1] - times[k]
        states.append(step(noted, states[-1], times[k], h))
        slopes.append(first[0])
    slopes.append(velocity(states[-1], times[-1]))
    return Trajectory(times, torch.stack(states), torch.stack(slopes))


def _adaptive(velocity: Velocity, x0: Tensor, times: Tensor, tolerance: float) -> Trajectory:
    """The trajectory of dopri5, with a node at every step that it took."""
    steps: list[_Step] = []
    step = _dopri5(tolerance, steps)
    x = x0
    for k in range(len(times) - 1):
        x = step(velocity, x, times[k], times[k + 1] - times[k])
    nodes = torch.tensor([float(times[0]), *(s.end for s in steps)], dtype=torch.float64)
    states = torch.stack([x0, *(s.state for s in steps)])
    slopes = torch.stack([steps[0].slopes[0], *(s.slopes[-1] for s in steps)])

    # by how much the middle of a step, to order 4, differs from that of Hermite's cubic
    h = nodes.diff().to(x0).view(-1, *[1] * x0.ndim)
    weights = torch.tensor(_MIDDLE).to(x0)
    mean_slope = torch.stack([torch.stack(s.slopes, -1) @ weights for s in steps])
    middle = states[:-1] + h * mean_slope
    chord = (states[:-1] + states[1:]) / 2
    cubic = chord + h / 8 * (slopes[:-1] - slopes[1:])
    return Trajectory(nodes, states, slopes, middle - cubic)


def reversed_time(velocity: Velocity) -> Velocity:
    """The field that leads from the state at t = 1 back to t = 0: -velocity(x, 1 - t)."""
    return lambda x, t: -velocity(x, 1 - t)


def _euler() -> Step:
    return lambda velocity, x, t, h: x + float(h) * velocity(x, t)


def _midpoint() -> Step:
    def step(velocity: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        middle = x + float(h / 2) * velocity(x, t)
        return x + float(h) * velocity(middle, t + h / 2)

    return step


def _heun() -> Step:
    def step(velocity: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        first = velocity(x, t)
        last = velocity(x + float(h) * first, t + h)
        return x + float(h / 2) * (first + last)

    return step


def _ab2() -> Step:
    """Adams-Bashforth of order 2 with variable steps; the first step is Euler's."""
    previous: tuple[Tensor, Tensor] | None = None

    def step(velocity: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        nonlocal previous
        v = velocity(x, t)
        if previous is None:
            x = x + float(h) * v
        else:
            # extrapolate the slope linearly over the step
            v_before, h_before = previous
            r = float(h / h_before) / 2
            x = x + float(h) * ((1 + r) * v - r * v_before)
        previous = (v, h)
        return x

    return step


def _rk4() -> Step:
    def step(velocity: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        k1 = velocity(x, t)
        k2 = velocity(x + float(h / 2) * k1, t + h / 2)
        k3 = velocity(x + float(h / 2) * k2, t + h / 2)
        k4 = velocity(x + float(h) * k3, t + h)
        return x + float(h / 6) * (k1 + 2 * k2 + 2 * k3 + k4)

    return step


# Dormand and Prince 1980, doi:10.1016/0771-050X(80)90013-3: nodes, stages, and fifth minus fourth order
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
# weights of the slopes for the middle of a step, to order 4; Shampine 1986, doi:10.1090/S0025-5718-1986-0815836-3
_MIDDLE = (
    6025192743 / 60171106304,
    0.0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)


@dataclass(frozen=True)
class _Step:
    """A step of dopri5 that was taken."""

    end: float
    state: Tensor
    slopes: list[Tensor]


def _dopri5(tolerance: float = 1e-5, taken: list[_Step] | None = None) -> Step:
    """Steps of order 5 whose estimated error (root mean square of a row) stays below `tolerance` in every row."""
    size = 0.05  # of the next step

    def step(velocity: Velocity, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        nonlocal size
        now = float(t)
        end = float(t + h)
        first = velocity(x, t)
        while now < end:
            # try a step, no further than the end
            small = min(size, end - now)
            new, slopes = _dopri5_stages(velocity, x, now, small, first)
            error = small * sum(c * k for c, k in zip(_ERROR, slopes, strict=True) if c)
            scale = tolerance * (1 + torch.maximum(x.abs(), new.abs()))
            squares = (error / scale).detach().square().reshape(len(x), -1)
            ratio = float(squares.mean(dim=1).max().sqrt())  # of the worst row
            if not math.isfinite(ratio) or small < 1e-7:
                raise FloatingPointError(f"dopri5 cannot follow the velocity at t = {now:.4g}; try a fixed-step solver")
            # accept the step where its error is small enough
            if ratio <= 1:
                x, first = new, slopes[-1]
                now = end if small == end - now else now + small
                if taken is not None:
                    taken.append(_Step(now, new, slopes))
            if ratio > 1 or small == size:  # a step cut short by the end of the grid says little about the next one
                size = small * min(5.0, max(0.2, 0.9 * (ratio + 1e-10) ** -0.2))
        return x

    return step


def _dopri5_stages(velocity: Velocity, x: Tensor, t: float, h: float, first: Tensor) -> tuple[Tensor, list[Tensor]]:
    """State after a step, and the seven slopes; the last one is the first of the next step."""
    slopes, point = [first], x
    for node, row in zip(_NODES[1:], _STAGES[1:], strict=True):
        point = x + h * sum(c * k for c, k in zip(row, slopes, strict=True) if c)
        slopes.append(velocity(point, torch.tensor(t + node * h, dtype=torch.float64)))
    return point, slopes


SOLVERS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "ab2": _ab2, "rk4": _rk4}
SOLVER_NAMES = (*SOLVERS, "dopri5")  # the last finds its own steps
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1, "rk4": 4}

"""Synthetic systems with a known graph: simulated time courses with noise, irregular times and interventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["SYSTEMS", "simulate"]

Velocity = Callable[[np.ndarray], np.ndarray]  # (n, d) -> (n, d)
Made = tuple[Velocity, np.ndarray, Callable[[int, np.random.Generator], np.ndarray]]  # with graph [in, out] and starts


def lorenz96(d: int, rng: np.random.Generator, forcing: float = 8.0) -> Made:
    """dx_i/dt = (x_(i+1) - x_(i-2)) x_(i-1) - x_i + F (Lorenz 1996); parents of i: i-2, i-1, i, i+1."""

    def velocity(x: np.ndarray) -> np.ndarray:
        before = np.roll(x, 1, -1)
        difference = np.roll(x, -1, -1) - np.roll(x, 2, -1)
        return difference * before - x + forcing

    graph = np.zeros((d, d), dtype=int)
    i = np.arange(d)
    for offset in (1, -2, -1):
        graph[(i + offset) % d, i] = 1
    graph[i, i] = -1
    return velocity, graph, lambda n, g: forcing * 0.5 + g.normal(0, 3.0, (n, d))


def linear_grn(d: int, rng: np.random.Generator, in_degree: int = 2) -> Made:
    """dx/dt = A x - delta x + b with `in_degree` regulators of each gene, stable."""
    graph = _random_graph(d, rng, in_degree)
    weight = graph * rng.uniform(0.8, 1.6, (d, d))
    delta = rng.uniform(0.5, 1.0, d)
    # decay is raised until all eigenvalues are negative
    shift = np.linalg.eigvals((weight - np.diag(delta)).T).real.max()
    delta = delta + max(shift + 0.15, 0.0)
    b = rng.uniform(0.2, 1.0, d)
    signed = graph - np.eye(d, dtype=int)
    return (lambda x: x @ weight - delta * x + b), signed, _uniform(d, -3, 3)


def hill_grn(d: int, rng: np.random.Generator, in_degree: int = 2, power: int = 2) -> Made:
    """Production by activators, x^n / (K^n + x^n), and repressors, K^n / (K^n + x^n); n = 1 is Michaelis-Menten."""
    graph = _random_graph(d, rng, in_degree)
    strength = np.abs(graph) * rng.uniform(1.0, 2.5, (d, d))
    half = rng.uniform(0.5, 1.5, (d, d)) ** power
    delta, basal = rng.uniform(0.6, 1.2, d), rng.uniform(0.05, 0.3, d)

    def velocity(x: np.ndarray) -> np.ndarray:
        p = np.clip(x, 0, None)[..., :, None] ** power
        effect = np.where(graph > 0, p, half) / (half + p)
        return basal + (strength * effect).sum(-2) - delta * x

    return velocity, graph - np.eye(d, dtype=int), _uniform(d, 0, 4)


def oscillators(d: int, rng: np.random.Generator) -> Made:
    """Two damped oscillators without a connection, and a chain behind the first."""
    if d < 5:
        raise ValueError(f"oscillators with {d} variables; expected at least 5")
    weight = np.zeros((d, d))
    for a, b, speed in ((0, 1, 2.0), (2, 3, 3.0)):
        weight[a, b], weight[b, a] = speed, -speed
    chain = [0, *range(4, d)]
    for i, following in pairwise(chain):
        weight[i, following] = 1.5
    graph = np.sign(weight).astype(int) - np.eye(d, dtype=int)
    delta = np.r_[np.full(4, 0.1), np.full(d - 4, 1.0)]
    return (lambda x: x @ weight - delta * x), graph, _uniform(d, -2, 2)


SYSTEMS: dict[str, Callable[..., Made]] = {
    "lorenz96": lorenz96,
    "linear_grn": linear_grn,
    "hill_grn": hill_grn,
    "oscillators": oscillators,
}


def simulate(
    system: str,
    n_genes: int = 10,
    n_courses: int = 8,
    n_times: int = 40,
    *,
    duration: float = 4.0,
    noise: float = 0.0,
    drop: float = 0.0,
    clamp: Mapping[str, float] | None = None,
    spread: float = 1.0,
    seed: int = 0,
    draw: int = 0,
    **options: float,
) -> AnnData:
    """Time courses of a synthetic system from random starts.

    Parameters
    ----------
    system
        One of ``SYSTEMS``.
    n_genes, n_courses, n_times, duration
        Size; times are evenly spaced from 0 to `duration`.
    noise
        Standard deviation of the noise of observation, as a share of that of each variable.
    drop
        Share of the times after the first that is missing, different ones in each course.
    clamp
        Variable (``x0``, ``x1``, ...) to the value at which it is held from the beginning: an intervention.
    spread
        Scale of the random starts about their mean; above 1 they lie outside of what spread=1 gives.
    seed
        Of the system: graph and constants.
    draw
        Of starts, noise and missing times: another draw is a test set of the same system.
    options
        Handed to the system, for example ``in_degree=3`` or ``forcing=10``.

    Returns
    -------
    AnnData with observations in X (float32), noiseless ones in ``layers["clean"]``, obs ``time`` and ``course``, and
    the graph in ``varp["regulates"]``: [i, j] is the sign of the effect of i on j.

    Raises
    ------
    ValueError
        If the system or a clamped variable is unknown.

    Examples
    --------
    >>> simulate("linear_grn", n_genes=5, n_courses=2, n_times=10).shape
    (20, 5)
    """
    from anndata import AnnData
    from scipy.integrate import solve_ivp

    if system not in SYSTEMS:
        raise ValueError(f"there is no system {system!r}; known: {', '.join(SYSTEMS)}")
    velocity, graph, start = SYSTEMS[system](n_genes, np.random.default_rng([seed, 0]), **options)
    names = [f"x{i}" for i in range(n_genes)]
    clamp = clamp or {}
    if unknown := sorted(set(clamp) - set(names)):
        raise ValueError(f"cannot clamp {', '.join(unknown)}; variables are x0 to x{n_genes - 1}")

    # starts; variables that are clamped do not move
    rng = np.random.default_rng([seed, 1, draw])
    x0, is_free = start(n_courses, rng), np.ones(n_genes)
    centre = start(10_000, np.random.default_rng(0)).mean(axis=0)
    x0 = centre + spread * (x0 - centre)
    for name, value in clamp.items():
        x0[:, names.index(name)] = value
        is_free[names.index(name)] = 0.0

    # all courses as one system
    def velocities(_: float, y: np.ndarray) -> np.ndarray:
        return (velocity(y.reshape(n_courses, n_genes)) * is_free).ravel()

    times = np.linspace(0, duration, n_times)
    path = solve_ivp(velocities, (0, duration), x0.ravel(), t_eval=times, rtol=1e-7, atol=1e-9).y
    clean = path.reshape(n_courses, n_genes, n_times).transpose(0, 2, 1)

    # observations
    observed = clean + noise * clean.std(axis=(0, 1)) * rng.normal(size=clean.shape)
    keep = rng.random((n_courses, n_times)) >= drop
    keep[:, 0] = True
    course = np.repeat(np.arange(n_courses), n_times).reshape(n_courses, n_times)[keep]
    obs = pd.DataFrame({"time": np.broadcast_to(times, keep.shape)[keep], "course": course.astype(str)})
    obs.index = [f"c{c}_{i}" for i, c in enumerate(course)]
    adata = AnnData(observed[keep].astype(np.float32), obs=obs, var=pd.DataFrame(index=names))
    adata.layers["clean"] = clean[keep]
    adata.varp["regulates"] = graph
    return adata


def _random_graph(d: int, rng: np.random.Generator, in_degree: int) -> np.ndarray:
    """(d, d) signs [in, out], `in_degree` other genes for each."""
    graph = np.zeros((d, d), dtype=int)
    for j in range(d):
        others = [i for i in range(d) if i != j]
        parents = rng.choice(others, min(in_degree, d - 1), replace=False)
        graph[parents, j] = rng.choice([-1, 1], len(parents))
    return graph


def _uniform(d: int, low: float, high: float) -> Callable[[int, np.random.Generator], np.ndarray]:
    return lambda n, rng: rng.uniform(low, high, (n, d))

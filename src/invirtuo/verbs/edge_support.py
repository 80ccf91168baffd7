"""What speaks for edges of a field: that connections forecast better than none, and that chance finds weaker ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Evidence", "false_discovery_rate", "gain_interval", "strengths_by_chance", "words"]

TAIL = np.concatenate([np.linspace(1.0, 0.011, 300), np.logspace(-2, -6, 200)])  # shares of edges by chance, falling
MOST_FALSE = 0.1  # largest false discovery rate of an edge that is supported


class Evidence(NamedTuple):
    """What was measured beside a fit.

    Parameters
    ----------
    gain
        (c, g), mean squared error of each gene in each held-out course without connections, minus that with them.
    null
        Strengths that the shares `TAIL` of edges reach by chance.
    """

    gain: np.ndarray = np.zeros((0, 0))
    null: np.ndarray = np.zeros(0)

    @property
    def by_course(self) -> np.ndarray:
        """(c,), gain of each held-out course, mean over genes."""
        gain: np.ndarray = self.gain.mean(axis=1) if self.gain.size else np.zeros(0)
        return gain


def strengths_by_chance(size: np.ndarray) -> np.ndarray:
    """Strengths that the shares `TAIL` of edges reach, from the matrix (g, g) of a field fitted to unrelated genes."""
    between_genes = size[~np.eye(len(size), dtype=bool)]
    strengths: np.ndarray = np.quantile(between_genes, 1 - TAIL)
    return strengths


def false_discovery_rate(null: np.ndarray, sizes: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Edges by chance that are as strong as an edge, over the edges that are.

    Parameters
    ----------
    null
        What :func:`strengths_by_chance` gave.
    sizes
        (m, g, g), strengths of all pairs in every member of the ensemble.
    edges
        Regulators and targets, strongest first.
    """
    by_chance, found = np.zeros(len(edges[0])), np.zeros(len(edges[0]))
    for size in sizes:
        strength = size[edges]
        between_genes = np.sort(size[~np.eye(len(size), dtype=bool)])
        weaker = np.searchsorted(between_genes, strength)
        by_chance += np.interp(strength, null, TAIL)
        found += 1 - weaker / len(between_genes)
    rate = np.minimum(by_chance / found, 1.0)
    # an edge is as good as the best list that holds it
    best: np.ndarray = np.minimum.accumulate(rate[::-1])[::-1]
    return best


def gain_interval(gain: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over courses (c, ...) and the ends of its interval (Student's t); NaN of fewer than two courses."""
    from scipy.stats import t

    n_courses = len(gain)
    if n_courses < 2:
        unknown = np.full(gain.shape[1:], np.nan)
        return (gain[0] if n_courses else unknown), unknown, unknown
    mean = gain.mean(axis=0)
    error = gain.std(axis=0, ddof=1) / np.sqrt(n_courses)
    half = t.ppf((1 + level) / 2, n_courses - 1) * error
    return mean, mean - half, mean + half


def words(beats: bool | None, lower: np.ndarray, false: np.ndarray | None = None) -> np.ndarray:
    """In words, what speaks for edges.

    Parameters
    ----------
    beats
        Whether held-out courses were forecast better than by simple forecasts; None: there were none.
    lower
        Lower end of the gain of connections, of the target of each edge; NaN: not measured.
    false
        False discovery rate of each edge; None: not measured.
    """
    if beats is None:
        return np.full(lower.shape, "not checked", dtype=object)
    if not beats:
        return np.full(lower.shape, "not supported by forecasting", dtype=object)
    found = np.full(lower.shape, "connections forecast the target better", dtype=object)
    if false is not None:
        found[false > MOST_FALSE] = "no stronger than edges by chance"
    found[lower <= 0] = "connections forecast the target no better"
    found[np.isnan(lower)] = "forecasts beat simple ones; edges not tested"
    return found

"""Ranks: how many other predictions lie closer to a real condition than its own does."""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["ranks"]

TIE = 1e-9  # relative difference below which two values are the same number up to rounding


def ranks(
    matrix: np.ndarray,
    direction: Literal["lower", "higher"],
    *,
    ties: Literal["mid", "random", "worst"] = "mid",
    by: Literal["real", "pred"] = "real",
    seed: int = 0,
) -> np.ndarray:
    """Place of each condition's own pair among the P candidates, from 0 (closest) to 1 (farthest).

    The zero-based position is divided by P - 1, so that a guess gets 0.5 on average; a single condition has no place
    and gets NaN. Among several NaN comes last.

    Parameters
    ----------
    matrix
        (P, P), metric of prediction i (row) against real condition j (column).
    direction
        Whether "lower" or "higher" values of the metric are better.
    ties
        Place within a block of equal values: the middle, a random one, or the last. The published code takes a
        random one (unseeded); the middle is its expectation.
    by
        "real": for each real condition, all predictions compete (published). "pred": for each prediction, all real
        conditions compete.
    seed
        For random ties.

    Returns
    -------
    np.ndarray
        (P,)

    References
    ----------
    Wu et al. 2024, PerturBench, arXiv:2408.10609, rank metrics.

    Examples
    --------
    >>> ranks(np.array([[0.1, 0.9, 0.3], [0.2, 0.8, 0.1], [0.3, 0.7, 0.2]]), "lower")
    array([0. , 0.5, 0.5])
    """
    if ties not in ("mid", "random", "worst") or direction not in ("lower", "higher") or by not in ("real", "pred"):
        raise ValueError(
            "expected direction 'lower' or 'higher', ties 'mid', 'random' or 'worst', by 'real' or 'pred'; "
            f"found {direction!r}, {ties!r}, {by!r}"
        )
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a (P, P) matrix of predictions by real conditions; found shape {matrix.shape}")
    if len(matrix) == 1:
        return np.full(1, np.nan)

    # small is good, not finite is worst
    candidates = matrix.T if by == "real" else matrix  # row j: what competes for j
    badness = candidates if direction == "lower" else -candidates
    badness = np.where(np.isfinite(badness), badness, np.finfo(float).max / 4)

    # how many are better, and how many equal up to rounding
    own = np.diagonal(badness)[:, None]
    tied = np.abs(badness - own) <= TIE * np.abs(own)
    better = ((badness < own) & ~tied).sum(axis=1)
    others = tied.sum(axis=1) - 1

    # the rank among equals
    if ties == "mid":
        within = others / 2
    elif ties == "worst":
        within = others
    else:
        within = np.random.default_rng(seed).integers(0, others + 1)
    places: np.ndarray = (better + within) / (len(matrix) - 1)
    return places

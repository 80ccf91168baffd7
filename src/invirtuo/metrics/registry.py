"""The registry of metrics: what compares predicted with real views, and what a reader of the numbers must know.

A metric is a plain function with a decorator::

    @metric("rmse_mean", on="mean", ranked=True, ...)   # compares two views of a condition
    def rmse(pred, real): ...

A metric over all conditions of a covariate group at once leaves `on` out and takes ``(pair, group)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from invirtuo.metrics.numerics.rank import ranks
from invirtuo.metrics.pair import OF_MEANS, Pair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["CORRELATION", "DESCRIPTION", "ERROR", "METRICS", "SHARE", "Metric", "each_condition", "metric"]

Function = TypeVar("Function", bound=Callable[..., Any])
Compare: TypeAlias = Callable[[Any, Any], Any]  # two such views to a number
CompareAll: TypeAlias = "Callable[[Sequence[Any], Sequence[Any]], ArrayLike]"  # P and P views to (P, P)


@dataclass(frozen=True)
class Metric:
    """A metric and what a reader of its numbers must know.

    Parameters
    ----------
    name
        Column value in the tidy table.
    label
        Name for tables and figures.
    direction
        "lower" or "higher": which values are better. None for what describes the data and judges nothing.
    range
        Smallest and largest possible value.
    best
        Value of a perfect prediction; NaN where there is none.
    definition
        One line.
    reference
        Paper or code that published the definition.
    values
        Takes (pair, group), returns (P,): one value for each condition of the covariate group.
    default
        Whether `evaluate` computes it when no metrics are named.
    relative
        Whether it ranks a prediction among those of other perturbations; NaN in groups with one perturbation.
    of_means
        Whether it sees nothing of a prediction but the mean over cells of each condition.
    of_mistakes
        Whether it counts mistakes alone, so that a prediction without any effect is perfect: read it beside others.
    """

    name: str
    label: str
    direction: Literal["lower", "higher"] | None
    range: tuple[float, float]
    best: float
    definition: str
    reference: str
    values: Callable[[Pair, str], np.ndarray]
    default: bool = True
    relative: bool = False
    of_means: bool = False
    of_mistakes: bool = False


METRICS: dict[str, Metric] = {}

# kinds of values that many metrics have, to hand to :func:`metric`
SHARE: dict[str, Any] = {"direction": "higher", "range": (0.0, 1.0), "best": 1.0}
CORRELATION: dict[str, Any] = {"direction": "higher", "range": (-1.0, 1.0), "best": 1.0}
ERROR: dict[str, Any] = {"direction": "lower", "range": (0.0, np.inf), "best": 0.0}
DESCRIPTION: dict[str, Any] = {"direction": None, "range": (0.0, np.inf), "best": np.nan}


def metric(
    name: str,
    *,
    label: str,
    direction: Literal["lower", "higher"] | None,
    range: tuple[float, float],
    best: float,
    definition: str,
    reference: str,
    on: str | None = None,
    pairwise: CompareAll | None = None,
    ranked: bool = False,
    default: bool = True,
    relative: bool = False,
    of_means: bool | None = None,
    of_mistakes: bool = False,
) -> Callable[[Function], Function]:
    """Register a plain function as a metric; the function itself is returned unchanged.

    Parameters
    ----------
    name, label, direction, range, best, definition, reference, default, relative, of_mistakes
        See :class:`Metric`.
    of_means
        Likewise; None: as the view that it compares.
    on
        The view that the function compares: it takes (pred, real) and returns a float. None: the function takes
        (pair, group) and returns one value for each condition of the group.
    pairwise
        Takes two sequences of P views, returns (P, P): predictions in rows, real data in columns. A faster way to what
        the function gives for each pair; a value off the diagonal may be rough where it cannot change the rank of the
        real condition.
    ranked
        Also register ``<name>_rank``: the rank of a prediction among those of its group, see `invirtuo.metrics.rank`.
    """

    def register(function: Function) -> Function:
        if ranked and (on is None or direction is None):
            raise ValueError(f"metric {name!r}: ranked=True needs a view to compare and a direction; name both")

        # values condition by condition; a rank needs those of all pairs
        compare = _Comparison(name, on or "", function, pairwise or _each_pair(function))
        values = function if on is None else compare.values
        sees_means = on in OF_MEANS if of_means is None else of_means
        facts = (name, label, direction, range, best, definition, reference)
        METRICS[name] = Metric(*facts, values, default, relative, sees_means, of_mistakes)
        if ranked and direction is not None:

            def rank_values(pair: Pair, group: str) -> np.ndarray:
                return ranks(compare.matrix(pair, group), direction)

            meaning = f"Share of the other predictions of the group closer to the real condition by {label}"
            facts = (f"{name}_rank", f"{label} rank", "lower", (0.0, 1.0), 0.0, meaning, reference)
            METRICS[f"{name}_rank"] = Metric(*facts, rank_values, default, relative=True, of_means=sees_means)
        return function

    return register


@dataclass(frozen=True)
class _Comparison:
    """Values of a function on a view: for each condition, or for all pairs of a group."""

    name: str
    on: str
    function: Compare
    pairwise: CompareAll

    def matrix(self, pair: Pair, group: str) -> np.ndarray:
        views = pair.view(self.on, "pred", group), pair.view(self.on, "real", group)
        key = ("matrix", self.name, group)
        return pair.once("pred", key, lambda: np.asarray(self.pairwise(*views), dtype=float))

    def values(self, pair: Pair, group: str) -> np.ndarray:
        if pair.has("pred", ("matrix", self.name, group)):
            return np.diagonal(self.matrix(pair, group))
        views = zip(pair.view(self.on, "pred", group), pair.view(self.on, "real", group), strict=True)
        return np.array([float(self.function(pred, real)) for pred, real in views])


def _each_pair(function: Compare) -> CompareAll:
    """The function on all pairs, one by one."""

    def matrix(preds: Sequence[Any], reals: Sequence[Any]) -> list[list[float]]:
        rows = []
        for pred in preds:
            rows.append([float(function(pred, real)) for real in reals])
        return rows

    return matrix


def each_condition(function: Callable[[Pair, str], float]) -> Callable[[Pair, str], np.ndarray]:
    """Make a metric of a group, (P,), from a function of (pair, condition)."""

    @wraps(function)
    def values(pair: Pair, group: str) -> np.ndarray:
        return np.array([function(pair, name) for name in pair.names(group)], dtype=float)

    return values

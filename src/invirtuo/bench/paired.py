"""Paired comparison of models over conditions, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import permutations

import numpy as np
import pandas as pd

__all__ = ["paired_differences"]


def paired_differences(
    scores: pd.DataFrame, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Mean difference between every two models on the same conditions, with a percentile bootstrap interval.

    Conditions are drawn with replacement, the same for both models, and so are the seeds of each model: the interval
    holds what another choice of conditions and another training would change. Conditions in which either model has no
    value with some seed are left out. One condition has no interval.

    Parameters
    ----------
    scores
        Columns task, model, seed, condition, metric, value.
    level
        Share of the resamples between `low` and `high`.
    n_resamples, seed
        Of the bootstrap.

    Returns
    -------
    pd.DataFrame
        task, metric, model, against, difference (model minus against), low, high, n_conditions, n_seeds.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    Examples
    --------
    >>> rows = [("t", m, 0, c, "rmse_mean", v) for m, v in (("a", 1.0), ("b", 3.0)) for c in "xyz"]
    >>> scores = pd.DataFrame(rows, columns=["task", "model", "seed", "condition", "metric", "value"])
    >>> table = paired_differences(scores)
    >>> table[["model", "against", "difference", "low", "high"]].values.tolist()
    [['a', 'b', -2.0, -2.0, -2.0], ['b', 'a', 2.0, 2.0, 2.0]]
    """
    rows = []
    for (task, metric), own in scores.groupby(["task", "metric"], sort=False):
        wide = own.pivot_table(index=["model", "seed"], columns="condition", values="value", dropna=False)
        values = {model: wide.loc[model].dropna(how="all").to_numpy(float) for model in dict.fromkeys(own["model"])}
        resampled = cache(partial(_resampled, values, n_resamples=n_resamples, seed=seed))
        for model, against in permutations(values, 2):
            facts = _difference(values, model, against, level, resampled)
            rows.append({"task": task, "metric": metric, "model": model, "against": against, **facts})
    columns = ["task", "metric", "model", "against", "difference", "low", "high", "n_conditions", "n_seeds"]
    return pd.DataFrame(rows, columns=columns)


def _difference(
    values: Mapping[str, np.ndarray],
    model: str,
    against: str,
    level: float,
    resampled: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> dict[str, float]:
    """Difference of the means of two models, each (seeds, conditions), with an interval, over complete conditions."""
    a, b = values[model], values[against]
    complete = np.flatnonzero(np.isfinite(a).all(axis=0) & np.isfinite(b).all(axis=0))
    n = len(complete) if len(a) and len(b) else 0
    facts = {"difference": np.nan, "low": np.nan, "high": np.nan, "n_conditions": n, "n_seeds": min(len(a), len(b))}
    if n:
        facts["difference"] = float(a[:, complete].mean() - b[:, complete].mean())
    if n > 1:
        tail = 100 * (1 - level) / 2
        first, second = resampled(model, tuple(complete))[0], resampled(against, tuple(complete))[1]
        low, high = np.percentile(first - second, [tail, 100 - tail])
        facts["low"], facts["high"] = float(low), float(high)
    return facts


def _resampled(
    values: Mapping[str, np.ndarray], model: str, conditions: tuple[int, ...], *, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means of a model over conditions drawn with replacement, the same for every model, and over seeds drawn anew.

    Twice, with other draws of seeds, so that two models differ in theirs: for the first and the second of a pair.
    """
    rng, n = np.random.default_rng(seed), len(conditions)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
    means = weights @ values[model][:, conditions].T  # (resamples, seeds)
    return _mean_over_drawn(means, rng), _mean_over_drawn(means, rng)


def _mean_over_drawn(means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(resamples, seeds) -> (resamples,), over seeds drawn with replacement."""
    n_resamples, n_seeds = means.shape
    weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples) / n_seeds
    averages: np.ndarray = (means * weights).sum(axis=1)
    return averages

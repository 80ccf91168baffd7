"""Scores of a model against those of a baseline: 0 as good as the baseline, 1 perfect."""

from __future__ import annotations

import numpy as np
import pandas as pd

from invirtuo.errors import preview
from invirtuo.metrics.registry import METRICS

__all__ = ["relative", "score_against"]


def score_against(user: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """How far a model comes from a baseline to a perfect prediction, metric by metric.

    Parameters
    ----------
    user, base
        Tables from :func:`invirtuo.metrics.evaluate` of the model and of the baseline: the same conditions, metrics
        with a finite best value. Means leave NaN out. Metrics without a direction, such as numbers of genes, are left
        out.

    Returns
    -------
    pd.DataFrame
        As from :func:`relative`, with columns `n_user` and `n_base`: conditions in each mean. The last row, "average",
        is the plain mean over metrics. Clipped, on the profile "vcc2025", it is the score of that challenge.

    Raises
    ------
    ValueError
        If the tables do not hold the same conditions and metrics once each.
    """
    wide = {"user": _wide("user", user), "base": _wide("base", base)}
    # means over other conditions would not compare
    for kind, axis in (("conditions", 0), ("metrics", 1)):
        different = wide["user"].axes[axis].symmetric_difference(wide["base"].axes[axis])
        if len(different):
            raise ValueError(f"user and base must have the same {kind}; in one of them only: {preview(different)}")
    # descriptions without a direction are left out
    names = [name for name in dict.fromkeys(user["metric"]) if name not in METRICS or METRICS[name].direction]
    unbounded = [name for name in names if name not in METRICS or not np.isfinite(METRICS[name].best)]
    if unbounded:
        raise ValueError(f"metrics without a known finite best value: {preview(unbounded)}; leave them out")
    best = pd.Series({name: METRICS[name].best for name in names})
    table = relative(wide["user"].mean(), wide["base"].mean(), best)
    counts = pd.DataFrame({f"n_{side}": wide[side][names].count() for side in wide})
    return table.join(counts.astype("Int64"))


def relative(user: pd.Series, base: pd.Series, best: pd.Series) -> pd.DataFrame:
    """``(user - base) / (best - base)``: published as ``1 - u/v`` for best 0 and ``(u - v) / (1 - v)`` for best 1.

    Parameters
    ----------
    user, base, best
        (metrics,) mean of the model, mean of the baseline, value of a perfect prediction; `best` gives the order.

    Returns
    -------
    pd.DataFrame
        Index `metric` with a last row "average"; columns `user`, `base`, `score`, `clipped`. `clipped` is the published
        score: not below 0, and 0 where it is not defined. Being worse than the baseline costs nothing there, which is
        why `score` stands beside it; its average leaves undefined scores out.

    References
    ----------
    Virtual Cell Challenge 2025, doi:10.1016/j.cell.2025.06.008; cell-eval 0.8.
    """
    table = pd.DataFrame({"user": user, "base": base}).loc[best.index]
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.true_divide(table["user"] - table["base"], best - table["base"])
    table["score"] = score.where(np.isfinite(score))
    table["clipped"] = table["score"].fillna(0.0).clip(lower=0.0)
    table.loc["average", ["score", "clipped"]] = table[["score", "clipped"]].mean()
    return table.rename_axis("metric")


def _wide(name: str, scores: pd.DataFrame) -> pd.DataFrame:
    repeated = scores.duplicated(["condition", "metric"])
    if repeated.any():
        raise ValueError(
            f"{name}: {int(repeated.sum())} pairs of condition and metric stand in the table more than once; "
            "pass the scores of one model and one seed"
        )
    return scores.pivot(index="condition", columns="metric", values="value")

"""Judging: predicted cells against real cells, from any source.

`METRICS` maps the name of a metric to its record; :func:`evaluate` and :func:`noise_floor` give tidy tables.
"""

from invirtuo.metrics import de, distribution, mean, rank
from invirtuo.metrics.core import METRICS, Metric, Pair, evaluate, metric, noise_floor, score, view

__all__ = [
    "METRICS",
    "Metric",
    "Pair",
    "de",
    "distribution",
    "evaluate",
    "mean",
    "metric",
    "noise_floor",
    "rank",
    "score",
    "view",
]

"""Registered metrics, one file for each kind of view; importing this package fills `METRICS`, in a fixed order."""

from invirtuo.metrics.measures import de, discrimination, distribution, generation, mean, others, population, wilcoxon

# isort: split
from invirtuo.metrics.measures import counts, false_calls, vcc2026

__all__ = [
    "counts",
    "de",
    "discrimination",
    "distribution",
    "false_calls",
    "generation",
    "mean",
    "others",
    "population",
    "vcc2026",
    "wilcoxon",
]

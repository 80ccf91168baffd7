"""Judging: predicted cells against real cells, from any source.

`METRICS` maps the name of a metric to its record; :func:`evaluate` and :func:`noise_floor` give tidy tables,
:func:`ceiling` what the cells at hand allow. A metric is added by writing one function under :func:`metric` in one of
the modules that are imported here.
"""

from __future__ import annotations

from invirtuo.metrics import de, discrimination, distribution, generation, mean, others, population, rank, wilcoxon
from invirtuo.metrics.anchors import anchored, challenge_score, mean_response, replicates
from invirtuo.metrics.baseline import score_against
from invirtuo.metrics.calibration import calibration
from invirtuo.metrics.copies import copying
from invirtuo.metrics.core import METRICS, VIEWS, Metric, Pair, metric, view
from invirtuo.metrics.embedding import label_scores
from invirtuo.metrics.false_calls import false_discoveries
from invirtuo.metrics.flags import flags
from invirtuo.metrics.hits import hit_recall, hits_from_effects, retrieval
from invirtuo.metrics.phenotypes import phenotype
from invirtuo.metrics.scores import PROFILES, ceiling, choose, evaluate, noise_floor, score, summarize
from invirtuo.metrics.scperteval import scperteval
from invirtuo.metrics.vcc2026 import vcc2026

__all__ = [
    "METRICS",
    "PROFILES",
    "VIEWS",
    "Metric",
    "Pair",
    "anchored",
    "calibration",
    "ceiling",
    "challenge_score",
    "choose",
    "copying",
    "de",
    "discrimination",
    "distribution",
    "evaluate",
    "false_discoveries",
    "flags",
    "generation",
    "hit_recall",
    "hits_from_effects",
    "label_scores",
    "mean",
    "mean_response",
    "metric",
    "noise_floor",
    "others",
    "phenotype",
    "population",
    "rank",
    "replicates",
    "retrieval",
    "score",
    "score_against",
    "scperteval",
    "summarize",
    "vcc2026",
    "view",
    "wilcoxon",
]

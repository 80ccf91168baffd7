"""Judging: predicted cells against real cells, from any source.

`METRICS` maps the name of a metric to its record; :func:`evaluate` and :func:`noise_floor` give tidy tables,
:func:`ceiling` what the cells at hand allow. A metric is added by writing one function under :func:`metric` in
`metrics/measures`.
"""

from __future__ import annotations

from invirtuo.metrics.applications.copies import copying, resemblance
from invirtuo.metrics.applications.embedding import label_scores
from invirtuo.metrics.applications.hits import hit_recall, hits_from_effects, retrieval
from invirtuo.metrics.applications.phenotypes import phenotype
from invirtuo.metrics.applications.responses import responses
from invirtuo.metrics.challenge.anchors import mean_response, replicates
from invirtuo.metrics.challenge.baseline import score_against
from invirtuo.metrics.challenge.panel import vcc2026
from invirtuo.metrics.challenge.score import anchored, challenge_score
from invirtuo.metrics.challenge.submission import (
    Contract,
    Submission,
    check_submission,
    pack_submission,
    read_contract,
)
from invirtuo.metrics.measures import de, discrimination, distribution, generation, mean, others, population, wilcoxon
from invirtuo.metrics.measures.false_calls import false_discoveries
from invirtuo.metrics.numerics import rank
from invirtuo.metrics.pair import VIEWS, Pair, view
from invirtuo.metrics.registry import METRICS, Metric, metric
from invirtuo.metrics.scores import PROFILES, ceiling, choose, evaluate, noise_floor, score, summarize
from invirtuo.metrics.trust.calibration import calibration
from invirtuo.metrics.trust.copied import copied
from invirtuo.metrics.trust.flags import flags
from invirtuo.metrics.trust.scperteval import scperteval

__all__ = [
    "METRICS",
    "PROFILES",
    "VIEWS",
    "Contract",
    "Metric",
    "Pair",
    "Submission",
    "anchored",
    "calibration",
    "ceiling",
    "challenge_score",
    "check_submission",
    "choose",
    "copied",
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
    "pack_submission",
    "phenotype",
    "population",
    "rank",
    "read_contract",
    "replicates",
    "resemblance",
    "responses",
    "retrieval",
    "score",
    "score_against",
    "scperteval",
    "summarize",
    "vcc2026",
    "view",
    "wilcoxon",
]

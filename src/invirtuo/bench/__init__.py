"""Running models against each other under one protocol."""

from invirtuo.bench.arena import ask, merge
from invirtuo.bench.challenge import predict_submission
from invirtuo.bench.classify import label_probability, oversampled, rare_recall
from invirtuo.bench.compare import compare
from invirtuo.bench.demo import demo
from invirtuo.bench.effects import effects
from invirtuo.bench.entry import Entry
from invirtuo.bench.imputation import imputation_scores, trivial_answers
from invirtuo.bench.integration import integration_scores
from invirtuo.bench.interactions import interactions
from invirtuo.bench.paired import paired_differences
from invirtuo.bench.populations import judge, marker_correlation
from invirtuo.bench.run import benchmark
from invirtuo.bench.screen import screen
from invirtuo.bench.task import Task
from invirtuo.bench.tasks import TASKS
from invirtuo.bench.tune import tune

__all__ = [
    "TASKS",
    "Entry",
    "Task",
    "ask",
    "benchmark",
    "compare",
    "demo",
    "effects",
    "imputation_scores",
    "integration_scores",
    "interactions",
    "judge",
    "label_probability",
    "marker_correlation",
    "merge",
    "oversampled",
    "paired_differences",
    "predict_submission",
    "rare_recall",
    "screen",
    "trivial_answers",
    "tune",
]

"""Running models against each other under one protocol."""

from invirtuo.bench.compare import compare
from invirtuo.bench.demo import demo
from invirtuo.bench.entry import Entry
from invirtuo.bench.paired import paired_differences
from invirtuo.bench.populations import judge
from invirtuo.bench.run import benchmark
from invirtuo.bench.task import Task
from invirtuo.bench.tasks import TASKS
from invirtuo.bench.tune import tune

__all__ = ["TASKS", "Entry", "Task", "benchmark", "compare", "demo", "judge", "paired_differences", "tune"]

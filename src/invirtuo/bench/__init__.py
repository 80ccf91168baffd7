"""Running models against each other under one protocol."""

from invirtuo.bench.compare import Entry, compare
from invirtuo.bench.demo import demo

__all__ = ["Entry", "compare", "demo"]

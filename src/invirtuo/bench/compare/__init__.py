"""From cells to an answer: rows that are fitted and drawn, tables, and the page."""

from invirtuo.bench.compare.compare import compare

__all__ = ["compare"]

"""Models that generate counts: CFGen, cellFlow, and independent negative binomials."""

from invirtuo.models.counts.cellflow_counts import CellFlowCounts
from invirtuo.models.counts.cfgen import CFGen
from invirtuo.models.counts.independent_nb import IndependentNB

__all__ = ["CFGen", "CellFlowCounts", "IndependentNB"]

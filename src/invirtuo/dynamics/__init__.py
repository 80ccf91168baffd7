"""Time courses of cells, what is predicted of them without a model, and synthetic systems with a known graph."""

from invirtuo.dynamics.baselines import BASELINES, ORACLES, baselines
from invirtuo.dynamics.courses import Course, binned, courses, local_fit, reference, rescaled, smoothed
from invirtuo.dynamics.systems import SYSTEMS, simulate

__all__ = [
    "BASELINES",
    "ORACLES",
    "SYSTEMS",
    "Course",
    "baselines",
    "binned",
    "courses",
    "local_fit",
    "reference",
    "rescaled",
    "simulate",
    "smoothed",
]

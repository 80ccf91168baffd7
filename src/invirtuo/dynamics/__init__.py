"""Time courses of cells, what is predicted of them without a model, and synthetic systems with a known graph."""

from invirtuo.dynamics.base import Forecaster
from invirtuo.dynamics.baselines import BASELINES, LATER, ORACLES, baselines
from invirtuo.dynamics.courses import (
    Course,
    anchors,
    best_bandwidth,
    binned,
    courses,
    local_fit,
    reference,
    rescaled,
    smoothed,
)
from invirtuo.dynamics.mocap import motion_capture
from invirtuo.dynamics.network import GeneNetwork
from invirtuo.dynamics.systems import SYSTEMS, simulate
from invirtuo.dynamics.tradeoff import tradeoff

__all__ = [
    "BASELINES",
    "LATER",
    "ORACLES",
    "SYSTEMS",
    "Course",
    "Forecaster",
    "GeneNetwork",
    "anchors",
    "baselines",
    "best_bandwidth",
    "binned",
    "courses",
    "local_fit",
    "motion_capture",
    "reference",
    "rescaled",
    "simulate",
    "smoothed",
    "tradeoff",
]

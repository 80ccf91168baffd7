"""Flow matching as functions on tensors: path, solver and guidance know neither networks nor cells."""

from invirtuo.flow.coupling import exact_coupling, plan_pairs, sinkhorn
from invirtuo.flow.guidance import composed, guided, nested
from invirtuo.flow.path import PATHS, PathSample, gaussian_velocity, linear_path, trigonometric_path
from invirtuo.flow.solve import (
    EVALUATIONS,
    SOLVER_NAMES,
    SOLVERS,
    Trajectory,
    reversed_time,
    solve,
    time_grid,
    trajectory,
)

__all__ = [
    "EVALUATIONS",
    "PATHS",
    "SOLVERS",
    "SOLVER_NAMES",
    "PathSample",
    "Trajectory",
    "composed",
    "exact_coupling",
    "gaussian_velocity",
    "guided",
    "linear_path",
    "nested",
    "plan_pairs",
    "reversed_time",
    "sinkhorn",
    "solve",
    "time_grid",
    "trajectory",
    "trigonometric_path",
]

"""Sparse neural ODEs (PathReg), and the systems and data that they are judged by."""

from invirtuo.models.sparse_ode.mocap import motion_capture
from invirtuo.models.sparse_ode.model import Config, SparseODE
from invirtuo.models.sparse_ode.systems import SYSTEMS, simulate
from invirtuo.models.sparse_ode.tradeoff import tradeoff

__all__ = ["SYSTEMS", "Config", "SparseODE", "motion_capture", "simulate", "tradeoff"]

"""Models: what all share (`Model`), and those that predict cells under perturbations (`PerturbationModel`)."""

from invirtuo.model.base import Model, Preset, track
from invirtuo.model.drawing import in_batches
from invirtuo.model.predict import PerturbationModel
from invirtuo.model.sampling import FlowSampling, NoSampling, SampleConfig
from invirtuo.model.saving import config_from

__all__ = [
    "FlowSampling",
    "Model",
    "NoSampling",
    "PerturbationModel",
    "Preset",
    "SampleConfig",
    "config_from",
    "in_batches",
    "track",
]

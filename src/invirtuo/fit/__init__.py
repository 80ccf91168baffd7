"""Fitting: FitConfig, and the one place where the Lightning Trainer lives.

A step is a function of (seed, number of the step) alone, and a checkpoint holds weights, averaged weights, optimiser
state and history as safetensors + JSON: a killed fit that resumes ends with the weights of an uninterrupted one.
"""

from invirtuo.fit.checkpoint import LAST, remove
from invirtuo.fit.config import FitConfig, learning_rate
from invirtuo.fit.devices import is_main
from invirtuo.fit.loop import run
from invirtuo.fit.machine import bf16_pays, keep_freed_memory, use_bf16
from invirtuo.fit.stream import GENERATOR_LOCK, Stream, noise_seed, seeded
from invirtuo.fit.trainable import ParameterGroup, Trainable
from invirtuo.fit.validation import validation_losses

__all__ = [
    "GENERATOR_LOCK",
    "LAST",
    "FitConfig",
    "ParameterGroup",
    "Stream",
    "Trainable",
    "bf16_pays",
    "is_main",
    "keep_freed_memory",
    "learning_rate",
    "noise_seed",
    "remove",
    "run",
    "seeded",
    "use_bf16",
    "validation_losses",
]

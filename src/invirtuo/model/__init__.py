"""Model: a Config, `loss(batch)` and `sample(batch, generator)`; the rest of a model's life is written here once."""

from invirtuo.model.base import Model, Preset, track
from invirtuo.model.drawing import in_batches
from invirtuo.model.sampling import FlowSampling, NoSampling, SampleConfig
from invirtuo.model.saving import config_from

__all__ = ["FlowSampling", "Model", "NoSampling", "Preset", "SampleConfig", "config_from", "in_batches", "track"]

"""Model: a Config, `loss(batch)` and `sample(batch, generator)`; the rest of a model's life is written here once."""

from invirtuo.model.base import Model, Preset, track
from invirtuo.model.drawing import SampleConfig
from invirtuo.model.saving import config_from

__all__ = ["Model", "Preset", "SampleConfig", "config_from", "track"]

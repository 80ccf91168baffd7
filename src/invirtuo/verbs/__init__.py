"""What a model can be asked: a class for every verb, and all that a model's life needs beside its network."""

from invirtuo.verbs.draw import in_batches
from invirtuo.verbs.forecast import Forecaster
from invirtuo.verbs.generate import CountGenerator, Guidance, check_depths
from invirtuo.verbs.latent_flow import ConditionalFlow, LatentFlow
from invirtuo.verbs.masking import mask_entries
from invirtuo.verbs.model import Model, Preset
from invirtuo.verbs.network import GeneNetwork
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.sampling import FlowSampling, NoSampling, SampleConfig
from invirtuo.verbs.saving import config_from

__all__ = [
    "ConditionalFlow",
    "CountGenerator",
    "FlowSampling",
    "Forecaster",
    "GeneNetwork",
    "Guidance",
    "LatentFlow",
    "Model",
    "NoSampling",
    "PerturbationModel",
    "Preset",
    "SampleConfig",
    "check_depths",
    "config_from",
    "in_batches",
    "mask_entries",
]

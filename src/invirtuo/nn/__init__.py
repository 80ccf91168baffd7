"""Layers that two papers share."""

from invirtuo.nn.counts import CountLikelihood, Dispersion, SizeFactor, nb_log_prob, nb_sample
from invirtuo.nn.embed import ConditionEncoder, one_hots, sinusoids
from invirtuo.nn.gaussian import gaussian_kl, gaussian_sample
from invirtuo.nn.linear import Linear
from invirtuo.nn.mlp import MLP, BatchNormMLP, ModulatedBlock, NormMLP
from invirtuo.nn.residual import LabelEmbedding, ResidualVelocity

__all__ = [
    "MLP",
    "BatchNormMLP",
    "ConditionEncoder",
    "CountLikelihood",
    "Dispersion",
    "LabelEmbedding",
    "Linear",
    "ModulatedBlock",
    "NormMLP",
    "ResidualVelocity",
    "SizeFactor",
    "gaussian_kl",
    "gaussian_sample",
    "nb_log_prob",
    "nb_sample",
    "one_hots",
    "sinusoids",
]

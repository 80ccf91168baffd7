"""Layers used by two models, or too long for one."""

from invirtuo.nn.anchor import PseudobulkAnchor
from invirtuo.nn.embed import ConditionEncoder, one_hots, sinusoids
from invirtuo.nn.gaussian import gaussian_kl, gaussian_sample
from invirtuo.nn.genewise import GenewiseVelocity
from invirtuo.nn.mlp import MLP, ModulatedBlock, NormMLP
from invirtuo.nn.unet1d import UNet1d

__all__ = [
    "MLP",
    "ConditionEncoder",
    "GenewiseVelocity",
    "ModulatedBlock",
    "NormMLP",
    "PseudobulkAnchor",
    "UNet1d",
    "gaussian_kl",
    "gaussian_sample",
    "one_hots",
    "sinusoids",
]

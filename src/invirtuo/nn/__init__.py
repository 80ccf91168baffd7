"""Layers used by two models, or too long for one."""

from invirtuo.nn.anchor import PseudobulkAnchor
from invirtuo.nn.embed import ConditionEncoder, sinusoids
from invirtuo.nn.genewise import GenewiseVelocity
from invirtuo.nn.mlp import MLP, ModulatedBlock
from invirtuo.nn.unet1d import UNet1d

__all__ = [
    "MLP",
    "ConditionEncoder",
    "GenewiseVelocity",
    "ModulatedBlock",
    "PseudobulkAnchor",
    "UNet1d",
    "sinusoids",
]

"""Layers used by two models, or too long for one."""

from invirtuo.nn.anchor import PseudobulkAnchor
from invirtuo.nn.attention import SetTransformer
from invirtuo.nn.calibrate import with_mean
from invirtuo.nn.counts import CountLikelihood, Dispersion, SizeFactor, nb_log_prob, nb_sample
from invirtuo.nn.embed import ConditionEncoder, one_hots, sinusoids
from invirtuo.nn.energy import energy_loss
from invirtuo.nn.gaussian import gaussian_kl, gaussian_sample
from invirtuo.nn.genewise import GenewiseVelocity
from invirtuo.nn.mlp import MLP, BatchNormMLP, ModulatedBlock, NormMLP
from invirtuo.nn.residual import LabelEmbedding, ResidualVelocity
from invirtuo.nn.sparse_field import SharedField, TargetField
from invirtuo.nn.sparsity import PENALTIES
from invirtuo.nn.unet1d import UNet1d

__all__ = [
    "MLP",
    "PENALTIES",
    "BatchNormMLP",
    "ConditionEncoder",
    "CountLikelihood",
    "Dispersion",
    "GenewiseVelocity",
    "LabelEmbedding",
    "ModulatedBlock",
    "NormMLP",
    "PseudobulkAnchor",
    "ResidualVelocity",
    "SetTransformer",
    "SharedField",
    "SizeFactor",
    "TargetField",
    "UNet1d",
    "energy_loss",
    "gaussian_kl",
    "gaussian_sample",
    "nb_log_prob",
    "nb_sample",
    "one_hots",
    "sinusoids",
    "with_mean",
]

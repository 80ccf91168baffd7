"""Velocity networks of PRiMeFlow taken apart: U-Nets without one of their parts, and what the networks are told.

Every name of :data:`ABLATIONS` stands in `VELOCITIES` of PRiMeFlow once this module is imported, so that
``PRiMeFlow.Config(velocity="unet, FiLM")`` is that network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.flow.path import COEFFICIENTS
from invirtuo.models.primeflow.unet import Conv, Down, GroupNormAct, ResBlock, UNet1d, Up
from invirtuo.models.primeflow.velocity import VELOCITIES, GenewiseField, MLPVelocity, Point, Sizes, UNetVelocity

NEAREST = 0.05  # share of noise below which an expected end of the path is not turned into a velocity
ORDERED_BY = 2000  # most cells whose correlations order the genes


class FilmBlock(ResBlock):
    """A residual block in which the embedding scales and shifts what the second norm gives."""

    def __init__(self, like: ResBlock):
        c_in, c_out = like.conv_in.in_channels, like.conv_in.out_channels
        super().__init__(c_in, c_out, like.embed.in_features, like.dropout.p)
        self.embed = nn.Linear(like.embed.in_features, 2 * c_out)
        self.norm_out = GroupNormAct(c_out, activation=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(self.norm_in(x))
        scale, shift = self.embed(embedding).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm_out(h) * (1 + scale) + shift)
        kept = x if isinstance(self.skip, nn.Identity) else self.skip(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return kept + self.conv_out(self.dropout(h))


class Patched(nn.Module):
    """A U-Net whose positions are patches of neighbouring genes.

    Parameters
    ----------
    unet
        From `width` channels to one for each gene of a patch.
    width
        Channels of a gene.
    patch
        Genes of a position.
    """

    def __init__(self, unet: UNet1d, width: int, patch: int):
        super().__init__()
        self.unet, self.patch = unet, patch
        self.multiple = unet.multiple * patch
        self.join = nn.Linear(patch * width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, g, width), embedding (n, d_embedding) -> (n, g, 1)."""
        h = self.join(x.reshape(len(x), x.shape[1] // self.patch, -1))
        return self.unet(h, embedding).reshape(len(x), -1, 1)


class AblatedUNet(UNetVelocity):
    """The U-Net with one part changed.

    Parameters
    ----------
    kernel
        Width of the convolutions of stem, blocks and head; 1 leaves mixing to resampling and attention.
    skips
        Hand the features of every level on the way down to the way up; otherwise zeros take their place.
    film
        Scale and shift after the second norm instead of adding the embedding.
    patch
        Neighbouring genes that share one position.
    identity
        Tell the network which gene is which.
    """

    def __init__(
        self,
        config: Any,
        sizes: Sizes,
        *,
        kernel: int = 3,
        skips: bool = True,
        film: bool = False,
        patch: int = 1,
        identity: bool = True,
    ):
        super().__init__(config, sizes)
        if kernel != self.unet.stem.kernel_size[1]:
            _set_kernel(self.unet, kernel)
        if film:
            _set_film(self.unet)
        if not skips:
            _cut_skips(self.unet)
        if patch > 1:
            self.unet.head = _like(self.unet.head, Conv(self.unet.head.in_channels, patch))
            self.unet = Patched(self.unet, config.hidden_dim, patch)
            self.length = -(-sizes.n_genes // self.unet.multiple) * self.unet.multiple
        if not identity:
            nn.init.zeros_(self.genes.weight).requires_grad_(False)


class AnonymousGenes(GenewiseField):
    """The gene-wise network with one embedding and one read-out for all genes."""

    def __init__(self, config: Any, sizes: Sizes):
        super().__init__(config, sizes)
        for name in ("genes", "read_out", "bias_out"):
            rows = getattr(self.field, name)
            setattr(self.field, name, nn.Parameter(rows[:1].detach().clone()))


class EndOfPath(nn.Module):
    """A network that gives the expected end of the path x1, from which the velocity follows."""

    def __init__(self, config: Any, sizes: Sizes, *, network: type[nn.Module]):
        super().__init__()
        self.network, self.path = network(config, sizes), config.interpl_type

    def forward(self, at: Point) -> Tensor:
        x = at.x if at.genes is None else at.x.index_select(1, at.genes)
        a, b, da, db = COEFFICIENTS[self.path](at.t[:, None])
        a = a.clamp_min(NEAREST)
        return da / a * x + (db - da * b / a) * self.network(at)


ABLATIONS = {
    "unet, kernel 1": partial(AblatedUNet, kernel=1),
    "unet, no long skips": partial(AblatedUNet, skips=False),
    "unet, no gene identity": partial(AblatedUNet, identity=False),
    "unet, patches of 4": partial(AblatedUNet, patch=4),
    "unet, FiLM": partial(AblatedUNet, film=True),
    "unet, x1-prediction": partial(EndOfPath, network=UNetVelocity),
    "mlp, x1-prediction": partial(EndOfPath, network=MLPVelocity),
    "genewise, no gene identity": AnonymousGenes,
}
VELOCITIES.update(ABLATIONS)


def random_order(x: np.ndarray) -> np.ndarray:
    """(g,), numbers of the genes of cells (n, g) in random order."""
    return np.random.default_rng(0).permutation(x.shape[1])


def correlated_order(x: np.ndarray) -> np.ndarray:
    """(g,), numbers of the genes of cells (n, g) in an order in which genes that vary alike are neighbours."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(x))[:ORDERED_BY])
    x = x[chosen]
    standard = (x - x.mean(0)) / (x.std(0) + 1e-3)
    return leaves_list(linkage(standard.T, "average"))


def _set_kernel(unet: UNet1d, kernel: int) -> None:
    """Give all convolutions but those that resample another width."""
    for parent in list(unet.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv) and not isinstance(parent, Up | Down):
                setattr(parent, name, _like(layer, Conv(layer.in_channels, layer.out_channels, kernel)))


def _set_film(unet: UNet1d) -> None:
    for stage in (*unet.encoder, unet.middle, *unet.decoder):
        for i, block in enumerate(stage):
            if isinstance(block, ResBlock):
                stage[i] = FilmBlock(block)


def _cut_skips(unet: UNet1d) -> None:
    """Put zeros in the place of the features that come from the way down."""
    channels = unet.middle[-1].conv_out.out_channels
    for stage in unet.decoder:
        stage[0].register_forward_pre_hook(partial(_without_skip, channels))
        channels = stage[0].conv_out.out_channels


def _without_skip(channels: int, _: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The inputs of a block, with zeros in all but its first channels."""
    x, embedding = inputs
    return torch.cat([x[:, :channels], torch.zeros_like(x[:, channels:])], dim=1), embedding


def _like(layer: Conv, other: Conv) -> Conv:
    """The other convolution, at zero if this one is."""
    if not layer.weight.any():
        nn.init.zeros_(other.weight)
        nn.init.zeros_(other.bias)
    return other

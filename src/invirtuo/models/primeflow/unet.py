"""The U-Net of guided diffusion over a line of positions, laid out for speed.

Tensors are (n, channels, 1, length) in channels-last memory, so that a 1 x 3 convolution is one dense matrix product
per tap and a 1 x 1 convolution is a Linear. Inside, widths are multiples of 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.models.primeflow.norm import group_norm_silu

__all__ = ["UNet1d"]


class UNet1d(nn.Module):
    """U-Net over a line of positions with additive embedding and attention at chosen resolutions.

    Parameters
    ----------
    in_channels, out_channels
        Channels of input and output.
    width
        Base width D; level i has width D * mult[i].
    mult
        Width multiplier of each level; every level but the last halves the length.
    n_res
        Residual blocks per level on the way down (one more on the way up).
    attention
        Downsampling factors at which residual blocks are followed by attention; the middle always has it.
    heads, dropout
        Attention heads; dropout in the residual blocks.
    d_embedding
        Width of the embedding that modulates the blocks.
    resample
        Learned convolutions for down- and upsampling, instead of average pooling and plain repetition.

    References
    ----------
    Dhariwal and Nichol 2021, arXiv:2105.05233, appendix; PRiMeFlow, section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        *,
        width: int = 256,
        mult: Sequence[int] = (1, 2, 2, 4, 4),
        n_res: int = 2,
        attention: Sequence[int] = (16,),
        heads: int = 8,
        dropout: float = 0.1,
        d_embedding: int = 1024,
        resample: bool = True,
    ):
        super().__init__()
        self.n_levels = len(mult)

        def res(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, d_embedding, dropout)

        # down: residual blocks at every level, attention at some, then half the length
        channels = width * mult[0]
        self.stem = Conv(in_channels, channels)
        skipped = [channels]  # channels of the skip connections
        factor = 1
        self.encoder = nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(n_res):
                stage = [res(channels, width * m)]
                channels = width * m
                if factor in attention:
                    stage.append(Attention(channels, heads))
                self.encoder.append(nn.ModuleList(stage))
                skipped.append(channels)
            if level < len(mult) - 1:
                self.encoder.append(nn.ModuleList([Down(channels, resample)]))
                skipped.append(channels)
                factor *= 2

        self.middle = nn.ModuleList([res(channels, channels), Attention(channels, heads), res(channels, channels)])

        # up: one block more at every level, each on the skip connection of its length
        self.decoder = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(n_res + 1):
                stage = [res(channels + skipped.pop(), width * m)]
                channels = width * m
                if factor in attention:
                    stage.append(Attention(channels, heads))
                if level > 0 and i == n_res:
                    stage.append(Up(channels, resample))
                    factor //= 2
                self.decoder.append(nn.ModuleList(stage))
        self.norm = GroupNormAct(channels)
        self.head = _zero(Conv(channels, out_channels))

    @property
    def multiple(self) -> int:
        """The length must be a multiple of this."""
        return 2 ** (self.n_levels - 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, length, in_channels), embedding (n, d_embedding) -> (n, length, out_channels)."""
        if x.shape[1] % self.multiple:
            raise ValueError(f"length {x.shape[1]} is not a multiple of {self.multiple}; pad the positions first")
        h = self.stem(x.transpose(1, 2).unsqueeze(2))  # (n, channels, 1, length)
        embedding = F.silu(embedding)
        skips = [h]
        for stage in self.encoder:
            h = self._run(stage, h, embedding)
            skips.append(h)
        h = self._run(self.middle, h, embedding)
        for stage in self.decoder:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), embedding)
        return self.head(self.norm(h)).squeeze(2).transpose(1, 2)

    @staticmethod
    def _run(stage: nn.ModuleList, h: Tensor, embedding: Tensor) -> Tensor:
        for block in stage:
            h = block(h, embedding)
        return h


class Conv(nn.Conv2d):
    """Convolution with an odd kernel along the line, as 1 x kernel in channels-last memory."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1):
        super().__init__(c_in, c_out, (1, kernel), stride=(1, stride), padding=(0, kernel // 2))
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)


class GroupNormAct(nn.GroupNorm):
    """GroupNorm with 32 groups, fewer below 256 channels, of x + shift, then SiLU."""

    def __init__(self, channels: int, *, activation: bool = True):
        # 8 channels a group, as at the paper's widths: with one, the norm takes off the shift that it was given
        most = max(min(32, channels // 8), 1)
        groups = next(n for n in range(most, 0, -1) if channels % n == 0)
        super().__init__(groups, channels, eps=1e-5)
        self.activation = activation

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """x (n, c, 1, m), shift (n, c) -> (n, c, 1, m)."""
        if x.device.type == "cpu":
            positions = x.squeeze(2).transpose(1, 2)  # (n, m, c), contiguous in channels-last memory
            h = group_norm_silu(
                positions, self.weight, self.bias, self.num_groups, shift, eps=self.eps, silu=self.activation
            )
            return h.transpose(1, 2).unsqueeze(2)
        x = x if shift is None else x + shift.to(x.dtype)[:, :, None, None]
        h = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return F.silu(h) if self.activation else h


class ResBlock(nn.Module):
    """Two convolutions with the embedding added in between; starts as its skip path."""

    def __init__(self, c_in: int, c_out: int, d_embedding: int, dropout: float):
        super().__init__()
        self.norm_in = GroupNormAct(c_in)
        self.conv_in = Conv(c_in, c_out)
        self.embed = nn.Linear(d_embedding, c_out)
        self.norm_out = GroupNormAct(c_out)
        self.dropout = Dropout(dropout)
        self.conv_out = _zero(Conv(c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else nn.Linear(c_in, c_out)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(self.norm_in(x))
        h = self.norm_out(h, self.embed(embedding))
        return _pointwise(self.skip, x) + self.conv_out(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over the positions; starts as the identity."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads if channels % heads == 0 else 1
        self.norm = GroupNormAct(channels, activation=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        n, c, _, m = x.shape
        h = self.norm(x).squeeze(2).transpose(1, 2)
        qkv = self.qkv(h).view(n, m, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = _attend(q, k, v).transpose(1, 2).reshape(n, m, c)
        return x + self.out(h).transpose(1, 2).unsqueeze(2)


class Down(nn.Module):
    """Halve the length."""

    def __init__(self, channels: int, resample: bool):
        super().__init__()
        self.op = Conv(channels, channels, stride=2) if resample else nn.AvgPool2d((1, 2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    """Double the length by repetition."""

    def __init__(self, channels: int, resample: bool):
        super().__init__()
        self.op = Conv(channels, channels) if resample else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        n, c, _, m = x.shape
        positions = x.squeeze(2).transpose(1, 2)  # (n, m, c), contiguous
        doubled = positions[:, :, None].expand(n, m, 2, c).reshape(n, 2 * m, c)
        return self.op(doubled.transpose(1, 2).unsqueeze(2))


class Dropout(nn.Dropout):
    """Dropout with 16 random bits per value: drawing a float for each is a tenth of a training step on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        if not self.training or self.p == 0 or x.device.type != "cpu" or not dense:
            return super().forward(x)
        n_words = -(-x.numel() // 4)  # of 64 bits
        bits = torch.empty(n_words, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = bits[: x.numel()] >= round(self.p * 2**16) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p)).as_strided(x.shape, x.stride())


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention (n, heads, m, d). On a CPU two plain products beat the fused kernel while scores fit caches."""
    if q.device.type != "cpu" or q.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1) @ v


def _pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a Linear at every position."""
    if isinstance(layer, nn.Identity):
        return x
    positions = x.squeeze(2).transpose(1, 2)
    return layer(positions).transpose(1, 2).unsqueeze(2)


def _zero(layer: nn.Module) -> nn.Module:
    """The layer with all parameters 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer

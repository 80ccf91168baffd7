"""Training-step and sampling throughput of our U-Net against the same network in fp32 conv1d, channels first.

Both networks hold the same weights and are timed in turn in one process; the table gives medians, the ratio, and the
fraction of the matrix-product peak measured just before (bf16 for ours, fp32 for the plain form). Time is compared in
one run only: absolute numbers of shared machines mean little.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from invirtuo.fit import bf16_pays, keep_freed_memory
from invirtuo.models.primeflow.unet import Attention, ResBlock, UNet1d, Up
from studies.harness import Tables, filled, in_turn, study


@study(quick={"width": 16, "mult": [1, 2], "genes": 64, "batch": 2, "repeats": 1})
def unet(
    *,
    out: Path,
    width: int = 64,
    mult: Sequence[int] = (1, 2, 2),
    genes: int = 1024,
    batch: int = 32,
    repeats: int = 7,
    threads: int = 0,
) -> Tables:
    """Seconds of a training step and of an evaluation of the U-Net, beside plain fp32 convolutions.

    Parameters
    ----------
    width
        Channels of the U-Net.
    mult
        Multipliers of its levels.
    genes
        Genes, the length of what it reads.
    batch
        Cells of a batch.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    bottom = 2 ** (len(mult) - 1)
    ours = UNet1d(width, width=width, mult=mult, attention=(bottom,), d_embedding=4 * width, heads=4)
    for parameter in ours.parameters():  # zero-initialised layers would make the comparison of outputs empty
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    plain, half = PlainUNet(copy.deepcopy(ours)), copy.deepcopy(ours).bfloat16().eval()
    x, e = torch.randn(batch, genes, width), torch.randn(batch, 4 * width)
    check(ours.eval(), plain.eval(), half, x, e)
    flop = flop_of_forward(plain, x, e)
    peak = {dtype: matmul_peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(f"threads {torch.get_num_threads()}, bf16 pays: {bf16_pays()}, "
          f"matmul peak GFLOP/s: fp32 {peak[torch.float32] / 1e9:.0f}, bf16 {peak[torch.bfloat16] / 1e9:.0f}; "
          f"forward {flop / batch / 1e9:.2f} GFLOP per cell")  # fmt: skip

    def one(levels: str, what: str) -> dict:
        if what == "train":
            forms = {"plain": training(plain.train(), x, e, False), "ours": training(ours.train(), x, e, True)}
        else:
            forms = {"plain": sampling(plain.eval(), x, e), "ours": sampling(half, x.bfloat16(), e.bfloat16())}
        seconds = in_turn(forms, repeats, time.perf_counter)
        plain_s, ours_s = seconds.median()
        needed = 3 * flop if what == "train" else flop
        return {
            "plain fp32, s": plain_s,
            "ours bf16, s": ours_s,
            "ratio": (seconds["plain"] / seconds["ours"]).median(),
            "of fp32 peak": needed / plain_s / peak[torch.float32],
            "of bf16 peak": needed / ours_s / peak[torch.bfloat16],
        }

    return {"unet": filled(out / "rows.csv", one, levels=["-".join(map(str, mult))], what=("train", "sample"))}


def check(ours: nn.Module, plain: nn.Module, half: nn.Module, x: Tensor, e: Tensor) -> None:
    """Print how far the outputs of the networks are from each other."""
    with torch.no_grad():
        reference = plain(x, e)
        in_fp32 = float((ours(x, e) - reference).abs().max())
        in_bf16 = float((half(x.bfloat16(), e.bfloat16()) - reference).abs().max())
    largest = float(reference.abs().max())
    print(f"largest difference in fp32: {in_fp32:.2e}, in bf16: {in_bf16:.2e}, largest output: {largest:.2e}")


def flop_of_forward(net: nn.Module, x: Tensor, e: Tensor) -> int:
    """Floating-point operations of an evaluation."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, e)
    return counter.get_total_flops()


def training(net: nn.Module, x: Tensor, e: Tensor, bf16: bool) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = net(x, e)
        out.float().square().mean().backward()

    return step


def sampling(net: nn.Module, x: Tensor, e: Tensor) -> Callable[[], None]:
    """Forward without gradients."""
    return torch.no_grad()(lambda: net(x, e))


class PlainUNet(nn.Module):
    """The same network as conv1d on (n, c, m), every norm, activation and shift an operation of its own."""

    def __init__(self, unet: UNet1d):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, m, c_in), embedding (n, d) -> (n, m, 1)."""
        net, e = self.unet, F.silu(embedding)
        h = conv(net.stem, x.transpose(1, 2))
        skips = [h]
        for stage in net.encoder:
            h = self.run(stage, h, e)
            skips.append(h)
        h = self.run(net.middle, h, e)
        for stage in net.decoder:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), e)
        return conv(net.head, F.silu(norm(net.norm, h))).transpose(1, 2)

    def run(self, stage: nn.ModuleList, h: Tensor, e: Tensor) -> Tensor:
        for block in stage:
            if isinstance(block, ResBlock):
                inner = conv(block.conv_in, F.silu(norm(block.norm_in, h))) + block.embed(e)[:, :, None]
                inner = F.dropout(F.silu(norm(block.norm_out, inner)), block.dropout.p, self.training)
                inner = conv(block.conv_out, inner)
                h = (h if isinstance(block.skip, nn.Identity) else pointwise(block.skip, h)) + inner
            elif isinstance(block, Attention):
                n, c, m = h.shape
                qkv = pointwise(block.qkv, norm(block.norm, h)).view(n, 3, block.heads, c // block.heads, m)
                q, k, v = qkv.transpose(-1, -2).unbind(1)
                inner = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, m)
                h = h + pointwise(block.out, inner)
            elif isinstance(block, Up):
                h = conv(block.op, F.interpolate(h, scale_factor=2.0))
            else:
                h = conv(block.op, h)
        return h


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The 1 x 3 convolution as conv1d."""
    return F.conv1d(x, layer.weight.squeeze(2).contiguous(), layer.bias, stride=layer.stride[1], padding=1)


def pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    """A Linear over channels as conv1d."""
    return F.conv1d(x, layer.weight[:, :, None], layer.bias)


def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm, channels first."""
    return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def matmul_peak(dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of a large matrix product: the best of several."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    seconds = in_turn({"product": lambda: a @ b}, 7, time.perf_counter)
    return 2 * n**3 / seconds["product"].min()

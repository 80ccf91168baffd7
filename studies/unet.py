"""Training-step and sampling throughput of our U-Net against the same network in fp32 conv1d, channels first.

    python benchmarks/unet.py --width 64 --genes 1024 --batch 32

Both networks hold the same weights and are timed in turn in one process; the table gives medians, the ratio, and the
fraction of the matrix-product peak measured just before (bf16 for ours, fp32 for the plain form). Time is compared in
one run only: absolute numbers of shared machines mean little.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from invirtuo.fit import bf16_pays, keep_freed_memory
from invirtuo.nn import UNet1d
from invirtuo.nn.unet1d import Attention, ResBlock, Up


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
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def main() -> None:
    """Time both networks in turn and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--mult", type=int, nargs="+", default=[1, 2, 2])
    parser.add_argument("--genes", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    width, bottom = args.width, 2 ** (len(args.mult) - 1)
    ours = UNet1d(width, width=width, mult=args.mult, attention=(bottom,), d_embedding=4 * width, heads=4)
    for parameter in ours.parameters():  # zero-initialised layers would make the comparison of outputs empty
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    plain, half = PlainUNet(copy.deepcopy(ours)), copy.deepcopy(ours).bfloat16().eval()
    x, e = torch.randn(args.batch, args.genes, args.width), torch.randn(args.batch, 4 * args.width)
    ours.eval(), plain.eval()
    with torch.no_grad():
        reference = plain(x, e)
        print(f"largest difference in fp32: {float((ours(x, e) - reference).abs().max()):.2e}, "
              f"in bf16: {float((half(x.bfloat16(), e.bfloat16()) - reference).abs().max()):.2e}, "
              f"largest output: {float(reference.abs().max()):.2e}")  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            plain(x, e)
    forward_flop = counter.get_total_flops()
    ours.train(), plain.train()

    def train(net: nn.Module, bf16: bool):
        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = net(x, e)
            out.float().square().mean().backward()

        return step

    def sample(net: nn.Module, dtype: torch.dtype):
        def step() -> None:
            with torch.no_grad():
                net(x.to(dtype), e.to(dtype))

        return step

    peak = {dtype: matmul_peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(f"threads {torch.get_num_threads()}, bf16 pays: {bf16_pays()}, "
          f"matmul peak GFLOP/s: fp32 {peak[torch.float32] / 1e9:.0f}, bf16 {peak[torch.bfloat16] / 1e9:.0f}; "
          f"forward {forward_flop / args.batch / 1e9:.2f} GFLOP per cell")  # fmt: skip
    rows = {
        "train": (train(plain, False), train(ours, True), 3 * forward_flop),
        "sample": (sample(plain.eval(), torch.float32), sample(half, torch.bfloat16), forward_flop),
    }
    print(f"{'':8s}{'plain fp32 s':>14s}{'ours bf16 s':>14s}{'ratio':>8s}{'of fp32 peak':>14s}{'of bf16 peak':>14s}")
    for name, (slow, fast, flop) in rows.items():
        (plain.train(), ours.train()) if name == "train" else (plain.eval(), ours.eval())
        seconds: dict[str, list[float]] = {"slow": [], "fast": []}
        for repeat in range(args.repeats + 1):
            for key, step in (("slow", slow), ("fast", fast)):
                start = time.perf_counter()
                step()
                if repeat:
                    seconds[key].append(time.perf_counter() - start)
        a, b = (statistics.median(seconds[key]) for key in ("slow", "fast"))
        ratio = statistics.median(p / q for p, q in zip(seconds["slow"], seconds["fast"], strict=True))
        print(f"{name:8s}{a:14.3f}{b:14.3f}{ratio:8.2f}{flop / a / peak[torch.float32]:14.2f}"
              f"{flop / b / peak[torch.bfloat16]:14.2f}")  # fmt: skip


if __name__ == "__main__":
    main()

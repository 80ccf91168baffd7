"""Transformers over sets of cells: every cell attends to every other, and their order means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

__all__ = ["SetTransformer", "pad", "windows"]


class SetAttention(nn.Module):
    """How the cells of a set learn of each other: multi-head self-attention, or what replaces it in ablations.

    Parameters
    ----------
    width, n_heads
        Width of the cells, divided among the heads.
    bias
        Whether the linear maps have one.
    mixing
        "attention"; "mean" gives all cells of a set the same weight; "none" lets each cell attend to itself alone.
    """

    def __init__(self, width: int, n_heads: int, *, bias: bool, mixing: str):
        super().__init__()
        self.n_heads, self.mixing = n_heads, mixing
        self.read = nn.Linear(width, 3 * width if mixing == "attention" else width, bias=bias)  # queries, keys, values
        self.write = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
        """x (b, s, d), present (b, s) or None -> (b, s, d)."""
        read = self.read(x)
        if self.mixing == "attention":
            q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in read.chunk(3, dim=-1))
            mask = None if present is None else present[:, None, None, :]
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        elif self.mixing == "mean":
            weight = read.new_ones(x.shape[:2]) if present is None else present.to(read.dtype)
            weight = weight / weight.sum(dim=1, keepdim=True)
            read = (weight[:, None] @ read).expand_as(read)
        return self.write(read)


class LlamaBlock(nn.Module):
    """RMS norms, gated SiLU, no biases (Touvron et al. 2023, arXiv:2302.13971), without rotary positions."""

    norm = partial(nn.RMSNorm, eps=1e-6)

    def __init__(self, width: int, n_heads: int, d_hidden: int, mixing: str):
        super().__init__()
        self.norm_1, self.norm_2 = self.norm(width), self.norm(width)
        self.attention = SetAttention(width, n_heads, bias=False, mixing=mixing)
        self.gate_up = nn.Linear(width, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, width, bias=False)

    def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
        """x (b, s, d) -> (b, s, d)."""
        x = x + self.attention(self.norm_1(x), present)
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class GPT2Block(nn.Module):
    """Layer norms, GELU in its tanh form, biases (Radford et al. 2019), without causal mask and positions."""

    norm = partial(nn.LayerNorm, eps=1e-5)

    def __init__(self, width: int, n_heads: int, d_hidden: int, mixing: str):
        super().__init__()
        self.norm_1, self.norm_2 = self.norm(width), self.norm(width)
        self.attention = SetAttention(width, n_heads, bias=True, mixing=mixing)
        self.up = nn.Linear(width, d_hidden)
        self.down = nn.Linear(d_hidden, width)

    def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
        """x (b, s, d) -> (b, s, d)."""
        x = x + self.attention(self.norm_1(x), present)
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


BLOCKS: dict[str, Any] = {"llama": LlamaBlock, "gpt2": GPT2Block}


class SetTransformer(nn.Module):
    """Pre-norm transformer blocks and a last norm; permuting the cells of a set permutes what comes out.

    Weights start as N(0, 0.02^2), biases at 0. There is no dropout, no position and no causal mask.

    Parameters
    ----------
    width
        Width of the cells.
    n_layers, n_heads
        Number of blocks, and of heads in each; the heads divide the width.
    d_hidden
        Width inside the feed-forward part.
    backbone
        "llama" or "gpt2": the kind of the blocks.
    mixing
        "attention", or an ablation of it: "mean" or "none".

    Examples
    --------
    >>> import torch
    >>> sets, order = torch.randn(2, 5, 8), torch.tensor([3, 1, 4, 0, 2])
    >>> transformer = SetTransformer(8, n_layers=2, n_heads=2, d_hidden=32)
    >>> torch.allclose(transformer(sets)[:, order], transformer(sets[:, order]), atol=1e-5)
    True
    """

    def __init__(
        self,
        width: int,
        n_layers: int,
        n_heads: int,
        d_hidden: int,
        *,
        backbone: str = "llama",
        mixing: str = "attention",
    ):
        super().__init__()
        if width % n_heads:
            raise ValueError(f"{n_heads} heads do not divide the width {width}; change one of them")
        block = BLOCKS[backbone]
        self.blocks = nn.ModuleList(block(width, n_heads, d_hidden, mixing) for _ in range(n_layers))
        self.norm = block.norm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Transform sets of cells.

        Parameters
        ----------
        x
            (b, s, d), b sets of s cells.
        present
            (b, s) bool, False for padding, which no cell attends to; None if all are cells.

        Returns
        -------
        (b, s, d); rows of padding mean nothing.
        """
        x = x.to(self.norm.weight.dtype)  # what the blocks add up stays in full precision under autocast
        for block in self.blocks:
            x = block(x, present)
        return self.norm(x)


def windows(n: int, set_size: int) -> list[int]:
    """Sizes of the fewest windows of at most `set_size` cells that hold n cells; they differ by one at most."""
    n_windows = -(-n // set_size)
    return [n * (i + 1) // n_windows - n * i // n_windows for i in range(n_windows)]


def pad(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Cells (n, d) as sets (b, s, d), and which rows are cells (b, s); None if all are."""
    if len(set(sizes)) == 1:
        return x.unflatten(0, (len(sizes), sizes[0])), None
    padded = pad_sequence(list(x.split(list(sizes))), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=x.device) < torch.tensor(sizes, device=x.device)[:, None]

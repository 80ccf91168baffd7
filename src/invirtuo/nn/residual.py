"""The residual velocity network of CFGen and cellFlow, and the embeddings of labels that it adds up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.batch import Condition
from invirtuo.nn.linear import Linear

__all__ = ["LabelEmbedding", "ResidualVelocity"]


class LabelEmbedding(nn.Module):
    """A vector for every attribute of a cell: a table for each covariate, a linear map for the perturbation.

    Parameters
    ----------
    levels
        k of every covariate, in order.
    n_code
        Width of `Condition.code`, or None without a perturbation. A control cell is embedded as the bias of the map.
    width
        Width of the vectors.
    width_out
        Width that a Linear maps the sum to; None leaves it.
    """

    def __init__(self, levels: Sequence[int], n_code: int | None, width: int, width_out: int | None = None):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(k, width) for k in levels])
        self.perturbation = None if n_code is None else Linear(n_code, width)
        self.out = None if width_out in (None, width) else Linear(width, width_out, bias=False)
        self.width = width

    @property
    def n_attributes(self) -> int:
        """Number of covariates, and the perturbation."""
        return len(self.tables) + (self.perturbation is not None)

    def known(self, condition: Condition) -> Tensor:
        """(n, number of attributes) bool, which labels of n cells are known."""
        known = condition.groups >= 0
        return (
            known
            if self.perturbation is None
            else torch.cat([known, torch.ones_like(condition.is_control)[:, None]], 1)
        )

    def forward(self, condition: Condition, active: Tensor) -> Tensor:
        """Sum of the vectors of the active attributes (n, number of attributes; bool) that are known; (n, d)."""
        active = active & self.known(condition)
        vectors = [
            table(codes.clamp(min=0)) for table, codes in zip(self.tables, condition.covariates.values(), strict=True)
        ]
        if self.perturbation is not None:
            vectors.append(self.perturbation(condition.code))
        total = torch.zeros(len(condition), self.width, device=active.device)
        for i, vector in enumerate(vectors):
            total = total + active[:, i, None] * vector
        return total if self.out is None else self.out(total)


class _Block(nn.Module):
    """h + W2 SiLU(W1 SiLU(h) + b1 + Wc SiLU(e) + bc) + b2; a new block is the identity."""

    def __init__(self, width: int, d_embedding: int):
        super().__init__()
        self.first = Linear(width, width)
        self.embedding = Linear(d_embedding, width)
        self.second = Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        inner = self.first(F.silu(h)) + self.embedding(F.silu(embedding))
        return h + self.second(F.silu(inner))


class ResidualVelocity(nn.Module):
    """Velocity of a latent vector: residual blocks that see the sum of the embeddings of time, depth and labels.

    Parameters
    ----------
    n_latent, width, d_embedding, n_blocks
        Widths of the latent vector, the residual stream and the embeddings; number of blocks.
    sized
        Whether the depth of the cell is an input of the network.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix C.2; cellFlow, appendix.
    """

    def __init__(self, n_latent: int, width: int, d_embedding: int, n_blocks: int, *, sized: bool = True):
        super().__init__()
        if d_embedding < 4 or d_embedding % 2:
            raise ValueError(f"the embedding has width {d_embedding}; expected an even number of at least 4")
        self.d_embedding = d_embedding
        self.time = self._embedder(d_embedding)
        self.size = self._embedder(d_embedding) if sized else None
        self.input = Linear(n_latent, width)
        self.blocks = nn.ModuleList([_Block(width, d_embedding) for _ in range(n_blocks)])
        self.output = Linear(width, n_latent)

    @staticmethod
    def _embedder(width: int) -> nn.Sequential:
        return nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))

    def forward(self, z: Tensor, t: Tensor, size: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """z (n, d), t (n,), scaled log depth (n,) and label embedding (n, d_embedding) -> (n, d)."""
        embedding = self.time(scalar_features(t, self.d_embedding))
        if self.size is not None:
            embedding = embedding + self.size(scalar_features(size, self.d_embedding))
        if labels is not None:
            embedding = embedding + labels
        h = self.input(z)
        for block in self.blocks:
            h = block(h, embedding)
        return self.output(F.silu(h)).float()


def scalar_features(a: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of 1000 a f_i with f_i = 10^(-4 i / (width / 2 - 1)); (n,) to (n, width), in fp32."""
    half = width // 2
    exponent = torch.arange(half, device=a.device, dtype=torch.float32) * (-4 * math.log(10) / (half - 1))
    frequency = torch.exp(exponent)
    angle = 1000 * a.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)

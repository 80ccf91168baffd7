"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.nn.linear import Linear

__all__ = ["MLP", "BatchNormMLP", "ModulatedBlock", "NormMLP"]


class MLP(nn.Sequential):
    """`n_layers` times Linear, SiLU and dropout, then, if `n_out` is given, one Linear more.

    Parameters
    ----------
    n_in, width, n_layers
        Input width, hidden width and number of hidden layers.
    n_out
        Width of a last Linear without activation, or None to end with the activation.
    dropout
        Dropout after every activation.
    """

    def __init__(self, n_in: int, width: int, n_layers: int, n_out: int | None = None, dropout: float = 0.0):
        layers: list[nn.Module] = []
        for i in range(n_layers):
            layers += [Linear(n_in if i == 0 else width, width), nn.SiLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        if n_out is not None:
            layers.append(Linear(width if n_layers else n_in, n_out))
        super().__init__(*layers)


class NormMLP(nn.Sequential):
    """Linear, `n_layers` times [Linear, LayerNorm without affine, ReLU, dropout], Linear: the MLP of PerturBench.

    There is no activation after the first Linear, so that it and the next one are together one linear map.

    Parameters
    ----------
    n_in, width, n_out
        Widths of input, hidden layers and output.
    n_layers
        Number of hidden blocks.
    dropout
        Dropout after every activation.

    References
    ----------
    Wu et al. 2024, arXiv:2408.10609.
    """

    def __init__(self, n_in: int, width: int, n_out: int, n_layers: int, dropout: float = 0.0):
        layers: list[nn.Module] = [Linear(n_in, width)]
        for _ in range(n_layers):
            layers += [Linear(width, width), nn.LayerNorm(width, elementwise_affine=False), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers, Linear(width, n_out))


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm that takes the running statistics for a batch of one cell, which has no spread of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1 or not self.training:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class BatchNormMLP(nn.Sequential):
    """Linear, batch norm and ELU for each width, then, if `n_out` is given, one Linear more.

    Parameters
    ----------
    n_in, widths, n_out
        Input width, hidden widths, and width of a last Linear without norm and activation, or None.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix C.1.
    """

    def __init__(self, n_in: int, widths: Sequence[int], n_out: int | None = None):
        layers: list[nn.Module] = []
        for before, width in zip([n_in, *widths], widths, strict=False):
            layers += [Linear(before, width), _BatchNorm(width), nn.ELU()]
        if n_out is not None:
            layers.append(Linear(widths[-1] if widths else n_in, n_out))
        super().__init__(*layers)


class ModulatedBlock(nn.Module):
    """Residual block whose normalised input is scaled and shifted by an embedding; a new block is the identity.

    Parameters
    ----------
    width
        Width of the residual stream.
    d_embedding
        Width of the modulating embedding.

    References
    ----------
    Perez et al. 2017, arXiv:1709.07871 (FiLM); zero initialisation: Peebles and Xie 2022, arXiv:2212.09748.
    """

    def __init__(self, width: int, d_embedding: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = Linear(d_embedding, 2 * width)
        self.up = Linear(width, 2 * width)
        self.down = Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (n, width), embedding (n, d_embedding) -> (n, width)."""
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        hidden = self.norm(x) * (1 + scale) + shift
        return x + self.down(self.dropout(F.silu(self.up(hidden))))

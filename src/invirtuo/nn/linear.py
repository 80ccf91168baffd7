"""Products of matrices in float32 by the fastest library at hand, and the linear layer that takes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Linear", "products"]


def products(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ y.T + bias`` of (n, d), (m, d) and (m,), without a gradient, in float32 by oneDNN.

    Its kernels use the widest vectors of every processor; those behind ``@`` only half of them on some.
    """
    if x.dtype is torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, y, bias)


class Linear(nn.Linear):
    """The linear layer of PyTorch, whose products without a gradient are those of :func:`products`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_in) -> (..., n_out)."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return products(x, self.weight, self.bias)

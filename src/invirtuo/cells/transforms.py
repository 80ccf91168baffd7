"""Array maps with an inverse, fitted on training cells and saved with the model."""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["PCA", "TRANSFORMS", "Standardize", "Transform"]


class Transform(Protocol):
    """What every transform can do; `state` holds all that :meth:`load` needs."""

    def fit(self, x: np.ndarray) -> Self:
        """Learn from training cells, (n, g)."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, g) to (n, d)."""
        ...

    def inverse(self, z: Tensor) -> Tensor:
        """Map (n, d) back to (n, g)."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Arrays to save."""
        ...

    @classmethod
    def load(cls, state: dict[str, np.ndarray]) -> Self:
        """Make the transform from saved arrays."""
        ...


class _Fitted:
    """A transform that is nothing but its arrays."""

    names: tuple[str, ...] = ()

    def state(self) -> dict[str, np.ndarray]:
        missing = [name for name in self.names if not hasattr(self, name)]
        if missing:
            raise ValueError(f"{type(self).__name__} is not fitted yet; call fit first")
        return {name: np.asarray(getattr(self, name)) for name in self.names}

    @classmethod
    def load(cls, state: dict[str, np.ndarray]) -> Self:
        transform = cls()
        for name in cls.names:
            setattr(transform, name, np.asarray(state[name]))
        return transform

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        return torch.as_tensor(self.state()[name], dtype=like.dtype, device=like.device)


class Standardize(_Fitted):
    """Subtract the mean and divide by the standard deviation of each gene (1 where it is 0)."""

    names = ("mean", "sd")

    def fit(self, x: np.ndarray) -> Self:
        x = np.asarray(x, dtype=np.float64)
        self.mean = x.mean(axis=0)
        sd = x.std(axis=0)
        self.sd = np.where(sd > 0, sd, 1.0)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x - self._tensor("mean", x)) / self._tensor("sd", x)

    def inverse(self, z: Tensor) -> Tensor:
        return z * self._tensor("sd", z) + self._tensor("mean", z)


class PCA(_Fitted):
    """Centred projection on the leading principal components of the training cells."""

    names = ("mean", "components")

    def __init__(self, n_components: int = 50):
        self.n_components = n_components

    def fit(self, x: np.ndarray) -> Self:
        x = np.asarray(x, dtype=np.float64)
        self.mean = x.mean(axis=0)
        centred = x - self.mean
        limit = min(self.n_components, *x.shape)
        if x.shape[0] >= x.shape[1]:
            _, vectors = np.linalg.eigh(centred.T @ centred)
            components = vectors[:, ::-1][:, :limit].T
        else:
            components = np.linalg.svd(centred, full_matrices=False)[2][:limit]
        largest = components[np.arange(limit), np.abs(components).argmax(axis=1)]
        self.components = components * np.sign(largest)[:, None]  # a fixed sign: same data, same scores
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x - self._tensor("mean", x)) @ self._tensor("components", x).T

    def inverse(self, z: Tensor) -> Tensor:
        return z @ self._tensor("components", z) + self._tensor("mean", z)


TRANSFORMS = {cls.__name__: cls for cls in (Standardize, PCA)}

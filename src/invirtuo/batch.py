"""The tensor records that flow from data to models, and the legend of axis names.

Axis legend, used in every shape of the library:
n cells, g genes, p single perturbations, k levels of a covariate, d latent or feature width, s cells of a set,
t time in [0, 1] (0 noise or source, 1 data), x0 source, x1 target, xt point on the path, ut velocity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Batch", "Condition"]


class _Record:
    """Maps a function over all tensors of a frozen record."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, _Record):
                return value._map(function)
            if isinstance(value, Mapping):
                return {key: apply(item) for key, item in value.items()}
            return value

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return type(self)(**{f.name: apply(getattr(self, f.name)) for f in fields})

    def __getitem__(self, rows: slice | Tensor | np.ndarray) -> Self:
        """Take rows (a slice, numbers or a mask) of every tensor."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Condition(_Record):
    """What was done to n cells, and to which cells.

    Parameters
    ----------
    perturbation
        (n, p), multi-hot over the single perturbations of the Design, times the scaled dose if the Design has one.
        A control cell is a row of zeros.
    covariates
        Column name to (n,) level number (int64).
    continuous
        Column name to (n,) value (float32), for example time.
    features
        (n, f), sum of the feature vectors of the perturbations, times the dose; None if the Design has no features.
    """

    perturbation: Tensor
    covariates: Mapping[str, Tensor] = field(default_factory=dict)
    continuous: Mapping[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.perturbation)

    @property
    def code(self) -> Tensor:
        """(n, f) or (n, p), what a network is told of the perturbations: their features, or else the multi-hot."""
        return self.perturbation if self.features is None else self.features

    def unperturbed(self, rows: Tensor | None = None) -> Self:
        """The same cells without perturbation, in what a network is told of it too; only those of a mask (n,)."""
        keep = torch.zeros_like(self.is_control) if rows is None else ~rows
        perturbation = torch.where(keep[:, None], self.perturbation, 0.0)
        features = None if self.features is None else torch.where(keep[:, None], self.features, 0.0)
        return dataclasses.replace(self, perturbation=perturbation, features=features)

    @property
    def groups(self) -> Tensor:
        """(n, number of covariates), level of every covariate; equal rows are one covariate group."""
        columns = [codes[:, None] for codes in self.covariates.values()]
        empty = torch.zeros(len(self), 0, dtype=torch.int64, device=self.perturbation.device)
        return torch.cat([empty, *columns], dim=1)

    @property
    def is_control(self) -> Tensor:
        """(n,) bool, True where no perturbation acts."""
        return (self.perturbation == 0).all(dim=1)


@dataclass(frozen=True)
class Batch(_Record):
    """n cells for one step of training or sampling.

    Parameters
    ----------
    condition
        The condition of the target cells.
    target
        (n, g), the cells to learn from, in the data space of the model; None when sampling.
    source
        (n, g), control cells (or the earlier time point) paired with the targets; None for models without source.
    embedding, source_embedding
        (n, d), of the target and the source cells, for models that read an entry of obsm beside expression.
    size_factor
        (n,), depth of each target cell relative to the median of the training cells.
    index
        (n,), row of each target cell in the AnnData.
    set_size
        Cells of one set lie next to each other, `set_size` at a time; 1 for independent cells.
    """

    condition: Condition
    target: Tensor | None = None
    source: Tensor | None = None
    embedding: Tensor | None = None
    source_embedding: Tensor | None = None
    size_factor: Tensor | None = None
    index: Tensor | None = None
    set_size: int = 1

    def __len__(self) -> int:
        return len(self.condition)

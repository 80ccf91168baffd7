"""Trainable: the interface of a model to its fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from invirtuo.batch import Batch
    from invirtuo.cells.samplers import Sampler

__all__ = ["ParameterGroup", "Trainable"]


class ParameterGroup(NamedTuple):
    """Parameters that are trained alike.

    Parameters
    ----------
    parameters
        Those of the group.
    speed
        Times the learning rate of the fit.
    decays
        Whether weight decay acts on them.
    """

    parameters: Iterable[nn.Parameter]
    speed: float = 1.0
    decays: bool = True


class Trainable(nn.Module):
    """A module with losses, a name, and a way of drawing its batches.

    Its parameters that require a gradient are trained; the others, and its buffers, are kept.
    """

    name: ClassVar[str]
    cpu_only: ClassVar[bool] = False  # whether it computes on CPUs alone
    spreads_work: bool = False  # whether its work on a CPU is shared by threads that it asks for itself
    has_unused_parameters: ClassVar[bool] = False  # whether a step may use parameters of a block without calling it
    has_proximal_step: ClassVar[bool] = False  # whether `proximal_step` does anything
    sampler: str | Sampler = "cells"  # forms training batches: a name in SAMPLERS, or a sampler; `build` may choose
    set_size: int = 64  # cells of a set, for the sampler "sets"; `build` may choose

    def __init_subclass__(cls, **options: Any) -> None:
        """Set the flags of a class that writes `update` or `proximal_step`, unless it sets them itself."""
        super().__init_subclass__(**options)
        for method, flag in {"update": "has_unused_parameters", "proximal_step": "has_proximal_step"}.items():
            if method in vars(cls) and flag not in vars(cls):
                setattr(cls, flag, True)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch, among them "total", which is minimised."""
        raise NotImplementedError

    def update(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of an optimiser step (counted from 0), among them "total".

        Models with two objectives override it. Parameters that get no gradient in a
        step keep their values and the state of their optimiser.
        """
        return self.loss(batch)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Its parameters by how they are trained; all alike, unless a model says otherwise."""
        return [ParameterGroup(self.parameters())]

    def proximal_step(self, lr: float, size: Callable[[nn.Parameter], Tensor]) -> None:
        """Bring parameters to where they may be, after an optimiser step of this learning rate.

        `size` gives the running size of the gradient of every element of a parameter, by which the step was divided.
        """

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to belong to this model, as JSON."""
        return {"name": self.name}

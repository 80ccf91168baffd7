"""Weights sharded over devices: PyTorch's `fully_shard` (FSDP2), every parameter a DTensor split along its rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from invirtuo.fit.devices import rank_and_size
from invirtuo.fit.trainable import Trainable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from invirtuo.batch import Batch

__all__ = ["Losses", "gathered", "is_sharded", "local", "own_rows", "reshard", "sharded", "units"]

logger = logging.getLogger(__name__)

UNIT = 1 << 20  # parameters that make a block a unit: gathered for its own forward and backward pass alone


class Losses(nn.Module):
    """Losses of a model as a forward pass, around which sharded weights are gathered and let go."""

    def __init__(self, model: Trainable, *, compiled: bool = False):
        super().__init__()
        self.model = model
        self._compiled: list[nn.Module] = []
        for block in model.children() if compiled else ():
            if next(block.parameters(), None) is not None:
                block.compile()
                self._compiled.append(block)

    def forward(self, batch: Batch, step: int | None = None) -> dict[str, Tensor]:
        """Losses of the optimiser step of that number; without one, those of validation."""
        if step is None:
            return self.model.loss(batch)
        if not self._compiled:
            return self.model.update(batch, step)
        from torch._dynamo.exc import BackendCompilerFailed

        # without the compiler the step is done again, with the same noise
        state = torch.get_rng_state()
        try:
            return self.model.update(batch, step)
        except BackendCompilerFailed as error:
            logger.warning("the network is not compiled: %s", str(error).split("\n", 1)[0])
            self.plain()
            torch.set_rng_state(state)
            return self.model.update(batch, step)

    def plain(self) -> None:
        """Undo the compilation."""
        for block in self._compiled:
            block._compiled_call_impl = None
        self._compiled = []


def sharded(losses: Losses, mesh: DeviceMesh) -> Losses:
    """Shard the weights of the model of `losses`, in place.

    Sharded weights are fp32 and used under autocast, as others are: the numbers are those of DDP.
    """
    from torch.distributed.fsdp import fully_shard

    model = losses.model
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # shards are rows; convolutions may store weights otherwise
    if not model.has_unused_parameters:
        for block in units(model):
            fully_shard(block, mesh=mesh)
    fully_shard(losses, mesh=mesh)
    return losses


def units(module: nn.Module) -> Iterator[nn.Module]:
    """Large blocks that are gathered by themselves: members of lists and sequences, which are called by `forward`.

    All other parameters are gathered once for the whole step. Models with `has_unused_parameters` have no units.
    """
    for child in module.children():
        is_large = sum(p.numel() for p in child.parameters()) >= UNIT
        is_member = isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, nn.ModuleList)
        if is_member and is_large:
            yield child
        else:
            yield from units(child)


def reshard(losses: Losses) -> None:
    """Drop gathered weights after a forward pass without a backward pass, which would do it."""
    cast("FSDPModule", losses).reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether the rows of a tensor are spread over devices."""
    return hasattr(tensor, "to_local")  # a DTensor, without importing what one device does not need


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that lie on this device; other tensors as they are."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, and what the first device has of others; every device must ask."""
    if is_sharded(tensor):
        return cast("DTensor", tensor).full_tensor()
    if rank_and_size()[1] > 1:
        tensor = tensor.clone()
        torch.distributed.broadcast(tensor, 0)
    return tensor


def own_rows(n_rows: int, rank: int, n_devices: int) -> slice:
    """Rows of a sharded tensor that lie on a device: equal pieces, of which the last may be shorter or empty."""
    size = -(-n_rows // n_devices)
    return slice(min(rank * size, n_rows), min((rank + 1) * size, n_rows))

"""Several devices that train one model: how Lightning joins them, and how they exchange values."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invirtuo.fit.config import FitConfig
from invirtuo.fit.trainable import Trainable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


__all__ = [
    "accelerator",
    "barrier",
    "broadcast",
    "devices_of",
    "is_main",
    "mean_over_devices",
    "rank_and_size",
    "several",
    "strategy",
]

logger = logging.getLogger(__name__)


def strategy(model: Trainable, config: FitConfig) -> Any:
    """How Lightning trains on several devices.

    Under DDP, parameters without gradient are looked for where there may be some.

    Raises
    ------
    ValueError
        If this is one of several processes of torchrun and the FitConfig asks for one device; if weights are to be
        sharded and the model takes proximal steps.
    """
    # on one device, other processes would be other fits

    # processes of a launcher that the config does not count on would each fit alone
    started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if not several(config):
        if started > 1:
            raise ValueError(
                f"torchrun started {started} processes, and FitConfig.devices is 1: each would fit alone. Set devices "
                "to the processes of a machine, and nodes to the machines"
            )
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        if tasks > 1:
            logger.warning(
                "this Slurm job has %d tasks, and FitConfig.devices is 1: every process fits by itself; to fit as one, "
                "set devices to the tasks of a machine, and nodes to the machines",
                tasks,
            )
        return "auto"

    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if config.strategy == "fsdp":
        if model.has_proximal_step:
            raise ValueError(
                f"{model.name} takes proximal steps on whole parameters, which FitConfig.strategy 'fsdp' spreads over "
                "devices; use 'ddp'"
            )
        return ModelParallelStrategy()
    return DDPStrategy(find_unused_parameters=model.has_unused_parameters)


def accelerator(model: Trainable, config: FitConfig) -> str:
    """What Lightning trains on; models that compute on CPUs alone stay there.

    Raises
    ------
    ValueError
        If such a model is asked to be fitted on anything else.
    """
    if model.cpu_only and config.accelerator not in ("auto", "cpu"):
        raise ValueError(
            f'FitConfig.accelerator is {config.accelerator!r}; {model.name} computes on the CPU alone. Leave it "auto"'
        )
    return "cpu" if model.cpu_only else config.accelerator


def devices_of(strategy: Any) -> DeviceMesh:
    """All devices that Lightning joined, in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(strategy.root_device.type, (strategy.world_size,))


def several(config: FitConfig) -> bool:
    """Whether a fit asks for more than one device."""
    return config.devices not in (1, "1") or config.nodes > 1


def is_main() -> bool:
    """Whether this process is the one that writes: the only one, or the first of those that fit together."""
    return rank_and_size()[0] == 0


def mean_over_devices(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means of losses over all devices."""
    if rank_and_size()[1] == 1:
        return losses
    values = torch.stack([value.detach().float() for value in losses.values()])
    torch.distributed.all_reduce(values)
    return dict(zip(losses, values / rank_and_size()[1], strict=True))


def broadcast(value: Any) -> Any:
    """The value of the first device, on all of them."""
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all devices."""
    if rank_and_size()[1] > 1:
        torch.distributed.barrier()


def rank_and_size() -> tuple[int, int]:
    """Number of this device, and of how many."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()

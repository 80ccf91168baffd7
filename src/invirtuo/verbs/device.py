"""The device on which a fitted model computes: the one that is asked for, or that of its fit."""

from __future__ import annotations

import torch

__all__ = ["chosen"]


def chosen(name: str | None, accelerator: str, *, model: str, cpu_only: bool = False) -> torch.device:
    """The device of a name.

    Parameters
    ----------
    name
        "cpu", "cuda", "cuda:1"; None or "auto": a GPU if there is one and the fit was not kept from it.
    accelerator
        `FitConfig.accelerator` of the fit; "auto", "gpu" and "cuda" allow a GPU.
    model
        Name of the model, for messages.
    cpu_only
        Whether the model computes on CPUs alone.

    Raises
    ------
    ValueError
        If the device is not there, or the model does not compute on it.
    """
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]

    # not asked for: that of the fit, if there is one like it
    if name in (None, "auto"):
        on_gpu = len(available) > 1 and accelerator in ("auto", "gpu", "cuda") and not cpu_only
        return torch.device("cuda" if on_gpu else "cpu")

    # asked for by name
    if str(name).split(":")[0] == "mps":
        raise ValueError(
            f'device is {name!r}; fitted models are not used on Apple GPUs, which have no float64. Pass device="cpu"'
        )
    if name not in available:
        raise ValueError(f"device is {name!r}; this machine has {', '.join(available)}")
    if cpu_only and name != "cpu":
        raise ValueError(f'device is {name!r}; {model} computes on the CPU alone. Pass device="cpu", or leave it out')
    return torch.device(name)

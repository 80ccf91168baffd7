"""FitConfig: how a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from invirtuo.settings import Settings, setting

__all__ = ["FitConfig", "learning_rate"]


@dataclass(frozen=True)
class FitConfig(Settings):
    """How a model is trained; its architecture is in its own Config."""

    PREFIX: ClassVar[str] = "FitConfig."

    steps: int = setting(2000, "optimiser steps", ge=1)
    batch_size: int = setting(256, "cells per step and device, before accumulation", ge=1)
    accumulate: int = setting(1, "batches per optimiser step", ge=1)
    optimizer: Literal["adam", "adamw"] = setting("adam", "Adam with weight decay as L2, or AdamW")
    lr: float = setting(1e-3, "highest learning rate", gt=0)
    weight_decay: float = setting(0.0, "decay of the weights", ge=0)
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "decay of the averages of gradients and of their squares", ge=0, lt=1
    )
    schedule: Literal["cosine", "constant", "plateau", "val_plateau"] = setting(
        "cosine",
        'course of the learning rate: "cosine" falls to 0 at the last step, "plateau" halves after 20 steps without a '
        'lower loss, "val_plateau" falls to a fifth after 15 validations without a lower one',
    )
    warmup: int = setting(100, "steps of linear warm-up", ge=0)
    clip: float = setting(5.0, "largest global gradient norm; 0 leaves gradients alone", ge=0)
    ema: float = setting(
        0.999, "decay of the averaged weights, which are the ones kept; 0 keeps the plain ones", ge=0, lt=1
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", 'precision of the arithmetic; "auto" is bf16 where it is measured to be faster'
    )
    val_every: int = setting(200, "steps between validations; 0 never", ge=0)
    val_batches: int = setting(8, "most batches of one validation", ge=1)
    patience: int = setting(0, "validations without improvement until an early stop; 0 never stops early", ge=0)
    keep: Literal["last", "best"] = setting("last", 'weights kept at the end: "last", or "best" by validation loss')
    checkpoint_every: int = setting(500, "steps between checkpoints, where a folder is given", ge=1)
    keep_checkpoints: bool = setting(False, "leave the checkpoints there when the fit has ended well")
    compile: bool = setting(False, "torch.compile the networks, where there is a compiler; pays in long fits")
    accelerator: str = setting("auto", "kind of device, as in lightning.Trainer")
    devices: int | str = setting(
        1, "number of devices, as in lightning.Trainer; several train in step, each with batches of its own"
    )
    nodes: int = setting(1, "machines, each with that many devices", ge=1)
    strategy: Literal["ddp", "fsdp"] = setting(
        "ddp", 'how several devices share a model: "ddp" holds all weights on each, "fsdp" a part of them'
    )
    seed: int = setting(0, "seed of weights, batches and noise")
    progress: bool = setting(True, "show a progress bar")


def learning_rate(config: FitConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or a half cosine to 0."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate

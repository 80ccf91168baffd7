"""FitConfig: how a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from invirtuo.settings import Settings

__all__ = ["FitConfig", "learning_rate"]


@dataclass(frozen=True)
class FitConfig(Settings):
    """How a model is trained; what it is stands in its own Config."""

    steps: int = 2000  # optimiser steps
    batch_size: int = 256  # cells per step and device, before accumulation
    accumulate: int = 1  # batches per optimiser step
    optimizer: str = "adam"  # "adam" (weight decay as L2) or "adamw"
    lr: float = 1e-3  # highest learning rate
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"  # "cosine" falls to 0 at the last step; "constant"; "plateau" halves if the loss stalls
    warmup: int = 100  # steps of linear warm-up
    clip: float = 5.0  # largest global gradient norm; 0 leaves gradients alone
    ema: float = 0.999  # decay of the averaged weights, which are the ones kept; 0 keeps the plain ones
    precision: str = "auto"  # "fp32", "bf16", or "auto": bf16 where it is measured to be faster
    val_every: int = 200  # steps between validations; 0 never
    val_batches: int = 8  # most batches of one validation
    patience: int = 0  # validations without improvement until an early stop; 0 never stops early
    keep: str = "last"  # weights kept at the end: "last", or "best" by validation loss
    checkpoint_every: int = 500  # steps between checkpoints, where a folder is given
    keep_checkpoints: bool = False  # leave the checkpoints there when the fit has ended well
    compile: bool = False  # torch.compile the networks, where there is a compiler; pays in long fits
    accelerator: str = "auto"  # as in lightning.Trainer
    devices: int | str = 1  # as in lightning.Trainer; several train in step, each with batches of its own
    nodes: int = 1  # machines, each with that many devices
    strategy: str = "ddp"  # of several devices: "ddp" holds all weights on each, "fsdp" a part of them
    seed: int = 0
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        super().__post_init__()
        choices = {
            "optimizer": ("adam", "adamw"),
            "schedule": ("cosine", "constant", "plateau"),
            "precision": ("auto", "fp32", "bf16"),
            "keep": ("last", "best"),
            "strategy": ("ddp", "fsdp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name in ("steps", "batch_size", "accumulate", "val_batches", "checkpoint_every", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("weight_decay", "warmup", "clip", "val_every", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)}; expected at least 0")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"FitConfig.lr is {self.lr}; expected a number above 0")
        for name, values in {"ema": [self.ema], "betas": self.betas}.items():
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"FitConfig.{name} is {getattr(self, name)}; expected at least 0 and below 1")


def learning_rate(config: FitConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or a half cosine to 0."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate

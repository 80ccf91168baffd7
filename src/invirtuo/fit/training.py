"""One model in training: optimiser, averaged weights, validation, history, checkpoints."""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from invirtuo.cells.files import writing
from invirtuo.fit.checkpoint import BEST, Checkpoint, check_same, data_hash, write, write_tensors
from invirtuo.fit.config import FitConfig, learning_rate
from invirtuo.fit.devices import broadcast, mean_over_devices, rank_and_size
from invirtuo.fit.machine import use_bf16
from invirtuo.fit.sharding import Losses, gathered, local, reshard, sharded
from invirtuo.fit.stream import noise_seed, seeded
from invirtuo.fit.trainable import Trainable
from invirtuo.fit.validation import validation_losses

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from invirtuo.batch import Batch
    from invirtuo.cells.dataset import CellDataset

__all__ = ["Training"]

logger = logging.getLogger(__name__)


class Training:
    """One model in training: optimiser, averaged weights, validation, history, checkpoints."""

    def __init__(self, model: Trainable, dataset: CellDataset, config: FitConfig, folder: Path | None):
        self.given, self.dataset, self.config, self.folder = model, dataset, config, folder
        self.bf16 = use_bf16(config, "cpu" if model.cpu_only else None)
        self.data_hash = data_hash(dataset)
        self.step, self.lr = 0, config.lr
        self.history: list[dict[str, float]] = []
        self.best, self.waited, self.stopped = math.inf, 0, False
        self.best_weights: dict[str, Tensor] | None = None
        self.began, self.elapsed = time.perf_counter(), 0.0
        self._checkpoint: Checkpoint | None = None
        self._collected: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}

        # settings that nothing will act on
        idle = {"patience": config.patience > 0, "schedule='val_plateau'": config.schedule == "val_plateau"}
        named = [name for name, is_set in idle.items() if is_set]
        if named and not (config.val_every and len(dataset.rows("val"))):
            logger.warning("FitConfig has %s, and there are no validations: it will do nothing", " and ".join(named))

    def begin(self, mesh: DeviceMesh | None = None) -> None:
        """Make averaged weights and optimiser, in the state of the checkpoint; with a mesh, sharded over its devices.

        What is sharded is a copy: the model that was given gets its weights at the end.
        """
        config = self.config
        self.is_sharded = mesh is not None
        self.averaged = Losses(copy.deepcopy(self.given).requires_grad_(False)) if config.ema else None
        model = copy.deepcopy(self.given) if self.is_sharded else self.given
        self.trained = Losses(model, compiled=config.compile)
        if mesh is not None:
            self.trained = sharded(self.trained, mesh)
            self.averaged = self.averaged and sharded(self.averaged, mesh)
        self.optimizer = _optimizer(self.model, config)
        self.plateau = _plateau(self.optimizer, config.schedule)
        if self._checkpoint is not None:
            self._load(self._checkpoint)
            self._checkpoint = None

    @property
    def model(self) -> Trainable:
        """The model whose weights are trained."""
        return self.trained.model

    @property
    def average(self) -> Trainable | None:
        """The model of averaged weights, if they are wanted."""
        return None if self.averaged is None else self.averaged.model

    @property
    def kept(self) -> Losses:
        """Losses of the model whose weights are validated and kept: the averaged one, if there is one."""
        return self.averaged or self.trained

    def loss(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """Losses of one batch, with the noise of its number among the batches of all devices."""
        if self.plateau is None or self.step < self.config.warmup:
            for group in self.optimizer.param_groups:
                group["lr"] = group["speed"] * learning_rate(self.config, self.step)

        # turn: which of the batches of an optimiser step it is
        n_turns = self.config.accumulate
        turn = batch_index % n_turns
        rank, n_devices = rank_and_size()
        number = (self.step * n_turns + turn) * n_devices + rank
        with seeded(noise_seed(self.config.seed, number, 0)):
            losses: dict[str, Tensor] = self.trained(batch, self.step)

        # mean over the batches of the step, for the history
        shares = {k: v.detach() / n_turns for k, v in losses.items()}
        self._losses = {k: v + self._losses[k] for k, v in shares.items()} if turn else shares
        total = float(losses["total"].detach())
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss of {type(self.model).__name__} is {total} at step {self.step}; "
                "lower FitConfig.lr or check the scale of the data"
            )
        return losses

    def after_step(self, device: torch.device | str, main: bool) -> dict[str, float]:
        """Count a step, average weights, validate, record and save when it is time; gives validation losses."""
        config, folder = self.config, self.folder
        self.step += 1
        first = self.optimizer.param_groups[0]
        self.lr = first["lr"] / first["speed"]
        self.model.proximal_step(self.lr, self._gradient_size)
        if self.plateau is not None and config.schedule == "plateau":
            mean_losses = mean_over_devices(self._losses)
            self.plateau.step(float(mean_losses["total"]))
        if self.average is not None:
            decay = min(config.ema, (1 + self.step) / (10 + self.step))  # shorter averages in the first steps
            _move_average(self.average, self.model, decay)

        # the first device validates for all, unless each holds only its rows of the weights
        last = self.step == config.steps
        validates = bool(config.val_every) and (self.step % config.val_every == 0 or last)
        losses = {}
        if validates:
            losses = broadcast(self._validate(device) if main or self.is_sharded else {})
            if losses and self.plateau is not None and config.schedule == "val_plateau":
                self.plateau.step(losses["total"])
            if losses and self._improves(losses["total"]) and folder is not None:
                self._save_best(folder / BEST, main)

        # the history has the first step, the last, and some between
        if validates or last or self.step % 20 == 0 or self.step == 1:
            self._record(losses)

        saves = last or self.stopped or self.step % config.checkpoint_every == 0
        if saves and folder is not None:
            self._save_all(folder, main)
        return losses

    def _gradient_size(self, parameter: Tensor) -> Tensor:
        """Root mean square of the gradients so far, as Adam divides by it; 1 before there were any."""
        state = self.optimizer.state.get(parameter)
        if not state:
            return torch.ones_like(parameter)
        unbiased = 1 - self.config.betas[1] ** float(state["step"])
        size: Tensor = (state["exp_avg_sq"] / unbiased).sqrt() + 1e-8
        return size

    def _save_all(self, folder: Path, main: bool) -> None:
        """Write checkpoint and history; `main` says whether this is the first device."""
        if main or self.is_sharded:
            self.save(folder)
        if main:
            with writing(folder / "history.csv") as path:
                pd.DataFrame(self.history).to_csv(path, index=False)

    def _validate(self, device: torch.device | str) -> dict[str, float]:
        config, kept = self.config, self.kept
        losses = validation_losses(kept.model, self.dataset, config, device, bf16=self.bf16, losses_of=kept)
        if self.is_sharded:
            reshard(kept)
        return losses

    def _save_best(self, path: Path, main: bool) -> None:
        if main or self.is_sharded:
            weights = self.kept.model.state_dict()
            weights = {k: gathered(v).cpu() if self.is_sharded else v.cpu() for k, v in weights.items()}
        if main:
            write_tensors(path, weights)

    def _record(self, validation: dict[str, float]) -> None:
        """Append a row to the history."""
        seconds = self.elapsed + time.perf_counter() - self.began
        row = {"step": self.step, "seconds": round(seconds, 3), "lr": self.lr}
        row |= {f"train_{k}": float(v) for k, v in mean_over_devices(self._losses).items()}
        self.history.append(row | {f"val_{k}": v for k, v in validation.items()})

    def _improves(self, value: float) -> bool:
        """Whether a validation loss is the lowest so far; keeps its weights, or counts towards `patience`."""
        if value < self.best:
            self.best, self.waited = value, 0
            if self.config.keep == "best":
                self.best_weights = {k: v.clone() for k, v in self.kept.model.state_dict().items()}
            return True
        self.waited += 1
        self.stopped = bool(self.config.patience) and self.waited >= self.config.patience
        return False

    def save(self, folder: Path) -> None:
        """Write everything that :meth:`restore` needs; if weights are sharded, every device writes its own."""
        # tensors: the model, its average, the optimizer, the best weights
        optimizer = self.optimizer.state_dict()
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for number, state in optimizer["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        tensors |= {f"best.{k}": v for k, v in (self.best_weights or {}).items()}

        # numbers, and what the checkpoint must agree with to go on from it
        plateau = None if self.plateau is None else self.plateau.state_dict()
        facts = {
            "config": asdict(self.config),
            "model": self.given.identity(),
            "data": self.data_hash,
            "bf16": self.bf16,
            "step": self.step,
            "best": self.best,
            "waited": self.waited,
            "stopped": self.stopped,
            "seconds": self.elapsed + time.perf_counter() - self.began,
            "history": self.history,
            "optimizer": optimizer["param_groups"],
            "plateau": plateau,
        }
        write(folder, facts, tensors)

    def restore(self, path: Path) -> None:
        """Take up a checkpoint, after checking that it belongs to this fit; :meth:`begin` reads its tensors."""
        checkpoint = self._checkpoint = Checkpoint(path)
        facts = checkpoint.facts
        check_same(facts["config"], self.config, path)
        if facts["model"] != self.given.identity():
            raise ValueError(f"the checkpoint {path} belongs to another model; fit this one into a new folder")
        if facts["data"] != self.data_hash:
            raise ValueError(
                f"the checkpoint {path} was made with other data, another split or another way of reading; "
                "fit into a new folder"
            )
        self.bf16 = facts["bf16"]  # as measured when the fit began
        self.step, self.best, self.waited = facts["step"], facts["best"], facts["waited"]
        self.stopped, self.history, self.elapsed = facts["stopped"], facts["history"], facts["seconds"]
        logger.info("resumed from %s at step %d", path, self.step)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Weights, averages and state of the optimiser, of this device."""
        for name, value in self.model.state_dict().items():
            checkpoint.fill(value, f"model.{name}")
        if self.average is not None:
            for name, value in self.average.state_dict().items():
                checkpoint.fill(value, f"average.{name}")
        if checkpoint.keys("best"):
            like = self.kept.model.state_dict().items()
            self.best_weights = {k: checkpoint.fill(torch.empty_like(v), f"best.{k}") for k, v in like}

        # state of the optimiser, parameter by parameter
        self.optimizer.load_state_dict({"state": {}, "param_groups": checkpoint.facts["optimizer"]})
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for key in checkpoint.keys("optimizer"):
            number, name = key.split(".", 1)
            parameter = parameters[int(number)]
            value = torch.zeros((), device=parameter.device) if name == "step" else torch.empty_like(parameter).detach()
            self.optimizer.state[parameter][name] = checkpoint.fill(value, f"optimizer.{key}")
        if self.plateau is not None:
            self.plateau.load_state_dict(checkpoint.facts["plateau"])

    def collect(self) -> None:
        """Take the kept weights, with the buffers of the first device, to the CPU of every device; all take part."""
        if self.best_weights is not None:
            self.kept.model.load_state_dict(self.best_weights)
        self._collected = {k: gathered(v).cpu() for k, v in self.kept.model.state_dict().items()}

    def finish(self) -> None:
        """Leave the kept weights in the model that was given, on the CPU."""
        weights = self._collected or self.best_weights or self.kept.model.state_dict()
        self.trained.plain()
        self.given.to("cpu")
        self.given.load_state_dict({k: v.cpu() for k, v in weights.items()})


def _optimizer(model: Trainable, config: FitConfig) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    groups = []
    for group in model.parameter_groups():
        parameters = [p for p in group.parameters if p.requires_grad]
        decay = config.weight_decay if group.decays else 0.0
        settings = {"lr": group.speed * config.lr, "speed": group.speed, "weight_decay": decay}
        if parameters:
            groups.append({"params": parameters} | settings)
    optimizer: torch.optim.Optimizer = kind(groups, betas=config.betas, fused=True)
    return optimizer


def _plateau(optimizer: torch.optim.Optimizer, schedule: str) -> torch.optim.lr_scheduler.ReduceLROnPlateau | None:
    """Lowers the learning rate where the loss of a step ("plateau") or of a validation ("val_plateau") stalls."""
    if not schedule.endswith("plateau"):
        return None
    kind = torch.optim.lr_scheduler.ReduceLROnPlateau
    if schedule == "val_plateau":  # as PerturBench
        return kind(optimizer, factor=0.2, patience=15)
    return kind(optimizer, factor=0.5, patience=20, threshold=1e-6, min_lr=1e-16, eps=0.0)  # as PathReg's public code


@torch.no_grad()
def _move_average(average: Trainable, model: Trainable, decay: float) -> None:
    """Move averaged weights towards those of a model; those of other stages of a fit stay."""
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    averages, current = [], []
    for old, (name, new) in zip(average.state_dict().values(), model.state_dict().items(), strict=True):
        if old.is_floating_point() and name not in fixed:
            averages.append(local(old))
            current.append(local(new))
    torch._foreach_lerp_(averages, current, 1 - decay)

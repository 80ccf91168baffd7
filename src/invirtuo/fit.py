"""Fitting: FitConfig, and the one place where the Lightning Trainer lives.

A step is a function of (seed, number of the step) alone, and a checkpoint holds weights, averaged weights, optimiser
state and history as safetensors + JSON: a killed fit that resumes ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from invirtuo import samplers
from invirtuo.files import writing

if TYPE_CHECKING:
    from invirtuo.batch import Batch
    from invirtuo.dataset import CellDataset
    from invirtuo.model import Model, SampleConfig

__all__ = ["FitConfig", "bf16_pays", "run"]

logger = logging.getLogger(__name__)

LAST = "last.safetensors"  # everything that a resumed fit needs
BEST = "best.safetensors"  # weights with the lowest validation loss so far


@dataclass(frozen=True)
class FitConfig:
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
    compile: bool = False  # torch.compile the network (GPU)
    accelerator: str = "auto"  # as in lightning.Trainer
    devices: int | str = 1  # as in lightning.Trainer; several train in step (DDP), each with batches of its own
    nodes: int = 1  # machines, each with that many devices
    seed: int = 0
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        choices = {
            "optimizer": ("adam", "adamw"),
            "schedule": ("cosine", "constant", "plateau"),
            "precision": ("auto", "fp32", "bf16"),
            "keep": ("last", "best"),
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


def run(
    model: Model,
    dataset: CellDataset,
    config: FitConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[Any] = (),
) -> pd.DataFrame:
    """Train a model on a dataset and leave the kept weights in it.

    Parameters
    ----------
    folder
        Where checkpoints and history.csv go; None writes nothing.
    resume
        Go on from the last checkpoint in `folder`, if there is one.
    callbacks, loggers
        Handed to the Lightning Trainer.

    Returns
    -------
    The history: one row per record, with step, seconds, lr, losses, and validation losses.

    Raises
    ------
    ValueError
        If `resume` is asked for without a folder, or the checkpoint belongs to another model or configuration.
    FloatingPointError
        If the loss is not finite.
    """
    if resume and folder is None:
        raise ValueError("resume=True needs the folder of the earlier fit; pass folder=")
    folder = None if folder is None else Path(folder)
    for left_over in [] if folder is None else folder.glob(".*.part.*"):  # of a write that was killed
        left_over.unlink(missing_ok=True)
    keep_freed_memory()
    with torch.random.fork_rng():
        return _train(model, dataset, config, folder, resume, list(callbacks), list(loggers))


def _train(model, dataset, config: FitConfig, folder: Path | None, resume: bool, callbacks, loggers) -> pd.DataFrame:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it only runs the loop here
    training = _Training(model, dataset, config, folder)
    if resume and folder is not None and (folder / LAST).exists():
        training.restore(folder / LAST)
    if training.step < config.steps and not training.stopped:
        trainer = lightning.Trainer(
            max_steps=config.steps - training.step,
            max_epochs=-1,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=_strategy(model, config),
            precision="bf16-mixed" if training.bf16 else "32-true",
            accumulate_grad_batches=config.accumulate,
            callbacks=[*callbacks, *([_bar(config, training.step)] if config.progress else [])],
            logger=loggers or False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=10,
        )
        stream = _Stream(dataset, model, config, training.step * config.accumulate)
        trainer.fit(_lightning_module(training), train_dataloaders=stream)
    training.finish()
    return pd.DataFrame(training.history)


def _strategy(model: Model, config: FitConfig) -> Any:
    """How Lightning trains on several devices: DDP; parameters without gradient are looked for where there may be some.

    Raises
    ------
    ValueError
        If this is one of several processes of torchrun and the FitConfig asks for one device.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if not _several(config):
        if started > 1:
            raise ValueError(
                f"torchrun started {started} processes, and FitConfig.devices is 1: each would fit alone. Set devices "
                "to the processes of a machine, and nodes to the machines"
            )
        return "auto"
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(find_unused_parameters=type(model).update.__qualname__ != "Model.update")


def _several(config: FitConfig) -> bool:
    return config.devices not in (1, "1") or config.nodes > 1


def use_bf16(config: FitConfig | SampleConfig) -> bool:
    """Whether a fit, or sampling, computes in bf16; several processes on CPUs might disagree and do not measure."""
    if config.precision == "auto" and isinstance(config, FitConfig) and _several(config):
        return torch.cuda.is_available() and bf16_pays()
    return bf16_pays() if config.precision == "auto" else config.precision == "bf16"


@cache
def bf16_pays() -> bool:
    """Whether matrix products in bf16 are at least 1.3 times faster than in fp32 on this machine, measured once."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return sorted(times)[3]

    return seconds(torch.float32) > 1.3 * seconds(torch.bfloat16)


@cache
def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory instead of handing every large tensor back to the system.

    Otherwise each large activation is mapped and zeroed page by page anew: a fifth of a U-Net's training step on a CPU.
    Done once, when work begins, and only where the C library is glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, 1 << 30)
    mallopt(m_top_pad, 1 << 26)


class _Stream:
    """Batches of the training cells without end; of several devices each takes its share, after the first `start`."""

    def __init__(self, dataset: CellDataset, model: Model, config: FitConfig, start: int):
        self.dataset, self.model, self.config, self.start = dataset, model, config, start

    def __iter__(self) -> Iterator[Batch]:
        rank, n_devices = _rank()
        sampler, number = samplers.named(self.model.sampler, self.model.set_size), 0
        shares = 1 if self.dataset.on_disk else n_devices  # cells in memory are dealt batch by batch, files by blocks
        seeds = ([self.config.seed, epoch] for epoch in count())
        for epoch, layout, rng, dense in self.dataset.windows(sampler, seeds, rank=rank, n_ranks=n_devices):
            if epoch and not number:
                raise ValueError(f"the sampler {self.model.sampler!r} found no cells to train on")
            for rows in sampler(layout, self.config.batch_size, rng):
                number += 1
                if number > self.start * shares and (shares == 1 or (number - 1) % shares == rank):
                    yield self.dataset.take(rows, dense)


def is_main() -> bool:
    """Whether this process is the one that writes: the only one, or the first of those that fit together."""
    return _rank()[0] == 0


def _shared(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means of losses over all devices."""
    if _rank()[1] == 1:
        return losses
    values = torch.stack([value.detach().float() for value in losses.values()])
    torch.distributed.all_reduce(values)
    return dict(zip(losses, values / _rank()[1], strict=True))


def _agreed(value: Any) -> Any:
    """What the first device says."""
    if _rank()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _rank() -> tuple[int, int]:
    """Number of this device, and of how many."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


class _Training:
    """One model in training: optimiser, averaged weights, validation, history, checkpoints."""

    def __init__(self, model: Model, dataset: CellDataset, config: FitConfig, folder: Path | None):
        self.model, self.dataset, self.config, self.folder = model, dataset, config, folder
        self.average = copy.deepcopy(model).requires_grad_(False) if config.ema else None
        self.optimizer = _optimizer(model, config)
        self.plateau = _plateau(self.optimizer) if config.schedule == "plateau" else None
        self.bf16 = use_bf16(config)
        self.data_hash = _data_hash(dataset)
        self.losses_of = torch.compile(model.update) if config.compile else model.update
        self.step, self.lr = 0, config.lr
        self.history: list[dict[str, float]] = []
        self.best, self.waited, self.stopped = math.inf, 0, False
        self.best_weights: dict[str, Tensor] | None = None
        self.began, self.elapsed = time.perf_counter(), 0.0
        self._losses: dict[str, Tensor] = {}

    @property
    def kept(self) -> Model:
        """The model whose weights are validated and kept: the averaged one, if there is one."""
        return self.model if self.average is None else self.average

    def loss(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """Losses of one batch, with the noise of its number among the batches of all devices."""
        for group in self.optimizer.param_groups if self.plateau is None else []:
            group["lr"] = learning_rate(self.config, self.step)
        place, (rank, n_devices) = batch_index % self.config.accumulate, _rank()
        number = (self.step * self.config.accumulate + place) * n_devices + rank
        torch.manual_seed(_seed(self.config.seed, number, 0))
        losses = self.losses_of(batch, self.step)
        told = {k: v.detach() / self.config.accumulate for k, v in losses.items()}
        self._losses = {k: v + self._losses[k] for k, v in told.items()} if place else told
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
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.model.proximal_step(self.lr)
        if self.plateau is not None:
            self.plateau.step(float(_shared(self._losses)["total"]))
        if self.average is not None:
            _move_average(self.average, self.model, min(config.ema, (1 + self.step) / (10 + self.step)))
        last = self.step == config.steps
        validates = bool(config.val_every) and (self.step % config.val_every == 0 or last)
        losses = {}
        if validates:
            if main:
                losses = validation_losses(self.kept, self.dataset, config, device, bf16=self.bf16)
            losses = _agreed(losses)
            if losses and self._improves(losses["total"]) and folder is not None and main:
                with writing(folder / BEST) as path:
                    save_file({k: v.cpu().contiguous().clone() for k, v in self.kept.state_dict().items()}, path)
        if validates or last or self.step % 20 == 0 or self.step == 1:
            self._record(losses)
        if folder is not None and main and (last or self.stopped or self.step % config.checkpoint_every == 0):
            self.save(folder / LAST)
            with writing(folder / "history.csv") as path:
                pd.DataFrame(self.history).to_csv(path, index=False)
        return losses

    def _record(self, validation: dict[str, float]) -> None:
        seconds = self.elapsed + time.perf_counter() - self.began
        row = {"step": self.step, "seconds": round(seconds, 3), "lr": self.lr}
        row |= {f"train_{k}": float(v) for k, v in _shared(self._losses).items()}
        self.history.append(row | {f"val_{k}": v for k, v in validation.items()})

    def _improves(self, value: float) -> bool:
        if value < self.best:
            self.best, self.waited = value, 0
            if self.config.keep == "best":
                self.best_weights = {k: v.clone() for k, v in self.kept.state_dict().items()}
            return True
        self.waited += 1
        self.stopped = bool(self.config.patience) and self.waited >= self.config.patience
        return False

    def save(self, path: Path) -> None:
        """Write everything that :meth:`restore` needs into one safetensors file."""
        optimizer = self.optimizer.state_dict()
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for number, state in optimizer["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        tensors |= {f"best.{k}": v for k, v in (self.best_weights or {}).items()}
        facts = {
            "config": asdict(self.config),
            "model": _identity(self.model),
            "data": self.data_hash,
            "bf16": self.bf16,
            "step": self.step,
            "best": self.best,
            "waited": self.waited,
            "stopped": self.stopped,
            "seconds": self.elapsed + time.perf_counter() - self.began,
            "history": self.history,
            "optimizer": optimizer["param_groups"],
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
        }
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        with writing(path) as partial:
            save_file(tensors, partial, metadata={"invirtuo": json.dumps(facts)})

    def restore(self, path: Path) -> None:
        """Take up the state of a checkpoint, after checking that it belongs to this fit."""
        facts, tensors = _read(path)
        _check_same(facts["config"], self.config, path)
        if facts["model"] != _identity(self.model):
            raise ValueError(f"the checkpoint {path} belongs to another model; fit this one into a new folder")
        if facts["data"] != self.data_hash:
            raise ValueError(
                f"the checkpoint {path} was made with other data, another split or another way of reading; "
                "fit into a new folder"
            )

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}

        self.model.load_state_dict(part("model"))
        if self.average is not None:
            self.average.load_state_dict(part("average"))
        state: dict[int, dict[str, Tensor]] = {}
        for k, value in part("optimizer").items():
            number, name = k.split(".", 1)
            state.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": facts["optimizer"]})
        for parameter, values in self.optimizer.state.items():  # the fused step needs the memory layout of the weights
            values |= {k: torch.empty_like(parameter).copy_(v) for k, v in values.items() if v.ndim}
        if self.plateau is not None:
            self.plateau.load_state_dict(facts["plateau"])
        self.best_weights = part("best") or None
        self.bf16 = facts["bf16"]  # as measured when the fit began
        self.step, self.best, self.waited = facts["step"], facts["best"], facts["waited"]
        self.stopped, self.history, self.elapsed = facts["stopped"], facts["history"], facts["seconds"]
        logger.info("resumed from %s at step %d", path, self.step)

    def finish(self) -> None:
        """Leave the kept weights in the model, on the CPU."""
        weights = self.best_weights or self.kept.state_dict()
        self.model.to("cpu")
        self.model.load_state_dict({k: v.cpu() for k, v in weights.items()})


def _optimizer(model: Model, config: FitConfig) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    parameters = [p for p in model.parameters() if p.requires_grad]
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, fused=True)


def _plateau(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Halves the learning rate after 20 steps without a new lowest loss, as the public code of PathReg does."""
    kind = torch.optim.lr_scheduler.ReduceLROnPlateau
    return kind(optimizer, factor=0.5, patience=20, threshold=1e-6, min_lr=1e-16, eps=0.0)


@torch.no_grad()
def _move_average(average: Model, model: Model, decay: float) -> None:
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}  # of other stages
    pairs = zip(average.state_dict().values(), model.state_dict().items(), strict=True)
    floating = [(old, new) for old, (name, new) in pairs if old.is_floating_point() and name not in still]
    torch._foreach_lerp_([old for old, _ in floating], [new for _, new in floating], 1 - decay)


def _lightning_module(training: _Training):
    """The shell that Lightning drives; made in a function so that importing this file does not import lightning."""
    import lightning

    config = training.config

    class Shell(lightning.LightningModule):
        """Hands batches and steps on to the training."""

        def __init__(self):
            super().__init__()
            self.model, self.average = training.model, training.average  # moved to the device together

        def configure_optimizers(self):
            return training.optimizer

        def training_step(self, batch, batch_index):
            losses = training.loss(batch, batch_index)
            self.log_dict({f"train_{k}": v.detach() for k, v in losses.items()})
            return losses["total"]

        def on_before_optimizer_step(self, optimizer):
            if config.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)

        def on_train_batch_end(self, outputs, batch, batch_index):
            if (batch_index + 1) % config.accumulate == 0:
                losses = training.after_step(self.device, self.trainer.is_global_zero)
                self.log_dict({f"val_{k}": v for k, v in losses.items()})
                self.trainer.should_stop |= training.stopped

    return Shell()


def _bar(config: FitConfig, start: int):
    """A progress bar over optimiser steps, with the loss; it knows the steps of an earlier, resumed fit."""
    import lightning
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("fitting"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )

    class Bar(lightning.Callback):
        """Shows steps done, time left and the loss."""

        def on_train_start(self, trainer, module):
            self.progress = Progress(*columns, disable=not trainer.is_global_zero)
            self.task = self.progress.add_task("fitting", total=config.steps, completed=start, loss=float("nan"))
            self.progress.start()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
            loss = float(outputs["loss"].detach()) * config.accumulate
            self.progress.update(self.task, completed=start + trainer.global_step, loss=loss)

        def on_train_end(self, trainer, module):
            self.progress.stop()

        def on_exception(self, trainer, module, exception):
            self.progress.stop()

    return Bar()


@torch.no_grad()
def validation_losses(
    model: Model, dataset: CellDataset, config: FitConfig, device="cpu", *, bf16: bool | None = None
) -> dict[str, float]:
    """Mean losses on validation cells, with the same cells and noise at every call; {} without validation cells."""
    if not len(dataset.rows("val")):
        return {}
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {}
    n_cells: dict[str, int] = {}
    bf16 = use_bf16(config) if bf16 is None else bf16
    with torch.random.fork_rng(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        torch.manual_seed(_seed(config.seed, 2**31, 0))
        sampler = samplers.named(model.sampler, model.set_size)
        for batch in dataset.first_batches(
            sampler, config.batch_size, config.val_batches, part="val", seed=config.seed
        ):
            for name, value in model.loss(batch.to(device)).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(batch)
                n_cells[name] = n_cells.get(name, 0) + len(batch)
    model.train(was_training)
    return {name: value / n_cells[name] for name, value in totals.items()}


def learning_rate(config: FitConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or a half cosine to 0."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _identity(model: Model) -> dict[str, Any]:
    """What a checkpoint must agree with to belong to a model."""
    facts = {"name": model.name, "config": asdict(model.config), "design": model.design.to_json(), "genes": model.genes}
    if model.stage:
        facts["stage"] = model.stage
    return json.loads(json.dumps(facts))


def _data_hash(dataset: CellDataset) -> str:
    """Hash of cells and split."""
    digest = hashlib.blake2b(dataset.fingerprint().encode(), digest_size=8)
    digest.update("|".join(map(str, dataset.split)).encode())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["invirtuo"]), {k: file.get_tensor(k) for k in file.keys()}
    except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}); remove it and fit again") from error


def _check_same(saved: dict[str, Any], config: FitConfig, path: Path) -> None:
    """Refuse to resume with settings that would change the result."""
    free = {"progress", "checkpoint_every", "accelerator", "devices", "nodes", "compile"}
    now = json.loads(json.dumps(asdict(config)))
    changed = [f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in now.items() if k not in free and saved.get(k) != v]
    if changed:
        raise ValueError(
            f"the checkpoint {path} was made with another FitConfig ({'; '.join(changed)}); "
            "resume with the same settings or fit into a new folder"
        )

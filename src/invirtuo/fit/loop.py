"""The one place where the Lightning Trainer lives."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from invirtuo.fit.checkpoint import LAST
from invirtuo.fit.config import FitConfig
from invirtuo.fit.devices import accelerator, devices_of, several, strategy
from invirtuo.fit.machine import keep_freed_memory
from invirtuo.fit.stream import Stream
from invirtuo.fit.trainable import Trainable
from invirtuo.fit.training import Training
from invirtuo.threads import operations_on_one_thread

if TYPE_CHECKING:
    import lightning
    from torch import Tensor

    from invirtuo.batch import Batch
    from invirtuo.cells.dataset import CellDataset

__all__ = ["run"]


def run(
    model: Trainable,
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
    if folder is not None:
        for unfinished in folder.glob(".*.part.*"):  # of a process that was killed while it wrote
            unfinished.unlink(missing_ok=True)
    keep_freed_memory()
    with _interruptible(folder), operations_on_one_thread() if model.spreads_work else nullcontext():
        return _train(model, dataset, config, folder, resume, list(callbacks), list(loggers))


@contextmanager
def _interruptible(folder: Path | None) -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt and SIGTERM an exit code, with a note on how to go on.

    Lightning makes a SystemExit of both: with code 1, and with the 0 of a fit that ended well.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # the signal itself is what Lightning keeps as the context
        ended: BaseException = stop
        if isinstance(stop, SIGTERMException):
            ended = SystemExit(128 + signal.SIGTERM)
        elif isinstance(stop, SystemExit) and isinstance(stop.__context__, KeyboardInterrupt):
            ended = KeyboardInterrupt()
        if folder is not None and (folder / LAST).exists():
            ended.add_note(f"resume=True, or --resume, goes on from the checkpoint in {folder}")
        raise ended from None


def _train(
    model: Trainable,
    dataset: CellDataset,
    config: FitConfig,
    folder: Path | None,
    resume: bool,
    callbacks: list[Any],
    loggers: list[Any],
) -> pd.DataFrame:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it only runs the loop here
    training = Training(model, dataset, config, folder)
    if resume and folder is not None and (folder / LAST).exists():
        training.restore(folder / LAST)

    # weights are sharded once Lightning has joined the devices
    goes_on = training.step < config.steps and not training.stopped
    shards = goes_on and several(config) and config.strategy == "fsdp"
    if not shards:
        training.begin()

    if goes_on:
        trainer = _trainer(training, callbacks, loggers)
        stream = Stream(dataset, model, config, training.step * config.accumulate)
        with warnings.catch_warnings():
            # what Lightning 2.6 asks of torch 2.13, and no user can change
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)
            trainer.fit(_shell(training, shards=shards), train_dataloaders=stream)
    training.finish()
    return pd.DataFrame(training.history)


def _trainer(training: Training, callbacks: list[Any], loggers: list[Any]) -> lightning.Trainer:
    """The Trainer of the steps that are left; it validates and saves nothing by itself."""
    import lightning
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    model, config = training.given, training.config
    if config.progress:
        callbacks = [*callbacks, _bar(config, training.step)]
    # a fit on one device ignores the tasks of a cluster's job
    environment: Any = None if several(config) else [LightningEnvironment()]
    return lightning.Trainer(
        max_steps=config.steps - training.step,
        max_epochs=-1,
        accelerator=accelerator(model, config),
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=strategy(model, config),
        plugins=environment,
        precision="bf16-mixed" if training.bf16 else "32-true",
        accumulate_grad_batches=config.accumulate,
        callbacks=callbacks,
        logger=loggers or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )


def _shell(training: Training, *, shards: bool) -> lightning.LightningModule:
    """The shell that Lightning drives; made in a function so that importing this file does not import lightning."""
    import lightning

    config = training.config

    class Shell(lightning.LightningModule):
        """Passes batches and steps to the training."""

        def __init__(self) -> None:
            super().__init__()
            if not shards:
                self.model, self.average = training.model, training.average  # moved to the device together

        def configure_model(self) -> None:
            if shards:
                training.begin(devices_of(self.trainer.strategy))
                self.model, self.average = training.model, training.average

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

        def training_step(self, batch: Batch, batch_index: int) -> Tensor:
            losses = training.loss(batch, batch_index)
            self.log_dict({f"train_{k}": v.detach() for k, v in losses.items()})
            return losses["total"]

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if config.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)

        def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
            if (batch_index + 1) % config.accumulate == 0:
                losses = training.after_step(self.device, self.trainer.is_global_zero)
                self.log_dict({f"val_{k}": v for k, v in losses.items()})
                self.trainer.should_stop |= training.stopped

        def on_train_end(self) -> None:  # while the devices still hold the weights and hear each other
            training.collect()

    return Shell()


def _bar(config: FitConfig, start: int) -> lightning.Callback:
    """A progress bar over optimiser steps, with the loss; steps before a resumed fit are counted."""
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

        def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.progress = Progress(*columns, disable=not trainer.is_global_zero)
            self.task = self.progress.add_task("fitting", total=config.steps, completed=start, loss=float("nan"))
            self.progress.start()

        def on_train_batch_end(
            self,
            trainer: lightning.Trainer,
            module: lightning.LightningModule,
            outputs: Any,
            batch: Batch,
            batch_index: int,
        ) -> None:
            loss = float(outputs["loss"].detach()) * config.accumulate
            self.progress.update(self.task, completed=start + trainer.global_step, loss=loss)

        def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.progress.stop()

        def on_exception(
            self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
        ) -> None:
            self.progress.stop()

    return Bar()

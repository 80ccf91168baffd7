"""Losses on validation cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invirtuo.cells import samplers
from invirtuo.fit.config import FitConfig
from invirtuo.fit.machine import use_bf16
from invirtuo.fit.stream import noise_seed, seeded
from invirtuo.fit.trainable import Trainable

if TYPE_CHECKING:
    from invirtuo.batch import Batch
    from invirtuo.cells.dataset import CellDataset

__all__ = ["validation_losses"]


@torch.no_grad()
def validation_losses(
    model: Trainable,
    dataset: CellDataset,
    config: FitConfig,
    device: torch.device | str = "cpu",
    *,
    bf16: bool | None = None,
    losses_of: Callable[[Batch], dict[str, Tensor]] | None = None,
) -> dict[str, float]:
    """Mean losses on validation cells, with the same cells and noise at every call; {} without validation cells.

    `losses_of` is called in place of ``model.loss``.
    """
    if not len(dataset.rows("val")):
        return {}

    # sums over cells; batches may differ in size, and models in which losses they give
    was_training = model.training
    model.eval()
    losses_of = losses_of or model.loss
    totals: dict[str, float] = {}
    n_cells: dict[str, int] = {}
    bf16 = use_bf16(config) if bf16 is None else bf16
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
    with seeded(noise_seed(config.seed, 2**31, 0)), autocast:
        sampler = samplers.named(model.sampler, model.set_size)
        batches = dataset.first_batches(sampler, config.batch_size, config.val_batches, part="val", seed=config.seed)
        for batch in batches:
            for name, value in losses_of(batch.to(device)).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(batch)
                n_cells[name] = n_cells.get(name, 0) + len(batch)
    model.train(was_training)
    return {name: value / n_cells[name] for name, value in totals.items()}

"""The gene-wise velocity network on a CPU: a training step, and an evaluation in tiles beside the plain form.

The plain form computes sinusoids for every value and all activations of a batch at once, as an accelerator does.
With a C++ compiler a step is also taken with the network compiled (`FitConfig(compile=True)`).
CPU seconds, bf16, one thread, medians; forms that are compared take turns.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.models import PRiMeFlow
from studies.harness import Tables, filled, in_turn, study


@study(quick={"genes": [100], "cells": 32, "repeats": 1})
def genewise(*, out: Path, genes: Sequence[int] = (500, 2000, 5575), cells: int = 256, repeats: int = 5) -> Tables:
    """Milliseconds of a training step and of an evaluation of the gene-wise network.

    Parameters
    ----------
    genes
        Numbers of genes.
    cells
        Cells of a batch.
    """

    def one(n_genes: int) -> dict:
        ms = 1000 * measured(n_genes, cells, repeats)
        if "compiled" in ms:
            ms["compiled, times faster"] = ms["step"] / ms["compiled"]
        ms["tiles, times faster"] = ms["plain"] / ms["in tiles"]
        return ms.to_dict()

    return {"genewise": filled(out / "rows.csv", one, n_genes=genes)}


def measured(n_genes: int, n_cells: int, repeats: int) -> pd.Series:
    """Median CPU seconds of a step, plain and compiled, and of an evaluation, plain and in tiles."""
    adata = iv.preprocess.normalize(iv.datasets.toy(n_cells=2 * n_cells, n_genes=n_genes))
    design = iv.Design.from_adata(adata, perturbation="perturbation", control="control", covariates=["cell_type"])
    model, dataset = PRiMeFlow(design, adata.var_names), iv.CellDataset(adata, design)
    model.prepare(dataset)
    batch = dataset.take(np.arange(n_cells))
    steps = {"step": training(model, batch)}
    if shutil.which("g++"):
        compiled = copy.deepcopy(model)
        compiled.velocity.compile()
        steps["compiled"] = training(compiled, batch)
    network = copy.deepcopy(model.velocity).to(torch.bfloat16)
    x, t = torch.randn(n_cells, n_genes), torch.full((n_cells,), 0.5)

    def evaluation(x: torch.Tensor) -> None:
        model.eval().evaluate(x, t, batch.condition, network=network)

    forms = {
        "plain": partial(evaluation, x.clone().requires_grad_()),  # values with a derivative are not tiled
        "in tiles": partial(torch.no_grad()(evaluation), x),
    }
    with torch.autocast("cpu", torch.bfloat16):
        medians = [in_turn(functions, repeats).median() for functions in (steps, forms)]
    return pd.concat(medians)


def training(model: PRiMeFlow, batch) -> Callable[[], None]:
    """A step of an optimiser of its own."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model.train().loss(batch)["total"].backward()
        optimizer.step()

    return step

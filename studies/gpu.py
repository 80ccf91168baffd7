"""The flagship on a GPU: how near its steps come to what the device can do, and what equal time makes of two networks.

For a device that is there for minutes; without one everything runs on the CPU, at toy size as a test. Rows that are
there are not computed again, and a form that fails, for want of memory or of a compiler, is left out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.bench import TASKS, Entry
from invirtuo.metrics import Pair
from studies.floors import COPIES, Products
from studies.genewise import training
from studies.harness import Failed, Tables, filled, fit, in_turn, mean_scores, part, study
from studies.recipe import METRICS, PACE

NETWORKS = {"U-Net": "srivatsan20", "small U-Net": "small", "gene-wise": None}  # a setting of primeflow each
FORMS = {"eager": None, "compiled": "default", "compiled, CUDA graphs": "reduce-overhead"}  # modes of torch.compile
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@study(quick={"networks": ["gene-wise"], "genes": [50], "forms": ["eager"], "batch": 4, "repeats": 1, "side": 64})
def speed(
    *,
    out: Path,
    networks: Sequence[str] = ("U-Net", "gene-wise"),
    genes: Sequence[int] = (2000, 5575, 8640),
    forms: Sequence[str] = tuple(FORMS),
    batch: int = 64,
    repeats: int = 10,
    side: int = 8192,
) -> Tables:
    """Milliseconds of a training step and of an evaluation in bf16, beside the floor of products and of bytes.

    Parameters
    ----------
    networks
        U-Net (138 million parameters, as published), small U-Net, gene-wise.
    genes
        Numbers of genes.
    forms
        eager, compiled, compiled with CUDA graphs.
    batch
        Cells of a step.
    side
        Rows and columns of the matrices by whose product the peak is measured.
    """
    x = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    peak = 2 * side**3 / seconds(lambda: x @ x, repeats)
    bandwidth = 2 * x.nbytes / seconds(x.clone, repeats)
    print(f"{DEVICE.type}: {peak / 1e12:.3g} TFLOP/s in bf16, {bandwidth / 1e12:.3g} TB/s copied")

    def one(network: str, n_genes: int, form: str) -> list[dict]:
        rows = []
        try:
            for what, call, weights, copies in calls(network, n_genes, form, batch):
                call()  # compiles
                with Products() as counted:
                    call()
                taken = seconds(call, repeats)
                row = {"what": what, "ms": 1e3 * taken, "million parameters": weights / 1e6}
                row["of bf16 peak"] = sum(counted.work.values()) / taken / peak
                rows.append(row | {"of bandwidth": 4 * copies * weights / taken / bandwidth})
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            raise Failed(str(error).splitlines()[0]) from error
        return rows

    return {"speed": filled(out / "speed.csv", one, network=networks, n_genes=genes, form=forms)}


def calls(network: str, genes: int, form: str, n: int):
    """A training step and an evaluation: a name, a function, parameters, and how often it must move each."""
    adata = iv.preprocess.normalize(iv.datasets.toy(n_cells=max(2 * n, 42), n_genes=genes))
    design = iv.Design.from_adata(adata, perturbation="perturbation", control="control", covariates=["cell_type"])
    model = iv.models.PRiMeFlow(design, adata.var_names, NETWORKS[network])
    dataset = iv.CellDataset(adata, design)
    model.prepare(dataset)
    model.to(DEVICE)
    batch = dataset.take(np.arange(n)).to(DEVICE)
    half = copy.deepcopy(model.velocity).to(torch.bfloat16)
    if FORMS[form]:
        for part_of in (model.velocity, half):
            part_of.compile(mode=FORMS[form])
    weights = sum(weight.numel() for weight in half.parameters())
    x, t = torch.randn(n, genes, device=DEVICE), torch.full((n,), 0.5, device=DEVICE)

    def in_bf16(function: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                function()

        return call

    yield "training step", in_bf16(training(model, batch)), weights, COPIES - 2
    evaluate = partial(model.eval().evaluate, x, t, batch.condition, network=half)
    yield "evaluation", in_bf16(torch.no_grad()(evaluate)), weights, 0.5


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call to its end on the device."""

    def whole() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return float(in_turn({"call": whole}, repeats, time.perf_counter)["call"].median())


@study(quick={"networks": ["gene-wise"], "minutes": 0.01, "genes": 50, "cells": 5})
def equal_time(
    *,
    out: Path,
    data_dir: str | None = None,
    task: str = "kang-donor",
    networks: Sequence[str] = ("small U-Net", "U-Net", "gene-wise"),
    minutes: float = 2.0,
    genes: int = 512,
    cells: int = 200,
    seeds: int = 1,
) -> Tables:
    """Quality of networks that are fitted for the same time on the same device, each with its own settings.

    Parameters
    ----------
    task
        Task of `invirtuo list tasks`.
    networks
        U-Net (138 million parameters, as published), small U-Net, gene-wise.
    minutes
        Minutes that each is fitted for.
    """
    adata, design, split = replace(TASKS[task], n_genes=genes).load(0, data_dir=data_dir)
    real = part(adata, split, "test")

    def one(network: str, seed: int) -> dict:
        made, config = Entry(network, "primeflow", NETWORKS[network]).make(design, adata.var_names)
        pace = partial(fit, split=split, batch_size=config.batch_size, lr=config.lr, val_every=0, seed=seed)
        pace(copy.deepcopy(made), adata, steps=2)  # warms up
        started = time.perf_counter()
        pace(copy.deepcopy(made), adata, steps=PACE)
        steps = max(int(60 * minutes * PACE / (time.perf_counter() - started)), 1)
        started = time.perf_counter()
        pace(made, adata, steps=steps)
        fitted = time.perf_counter()
        predicted = made.predict("test", cells, seed=seed)
        costs = {"steps": steps, "fit_seconds": fitted - started, "sample_seconds": time.perf_counter() - fitted}
        wanted = design.names(pd.DataFrame(made.card["held_out"]["test"]))
        return costs | mean_scores(Pair(predicted, real, design, n_pcs=30), METRICS, wanted)

    return {"equal-time": filled(out / "equal-time.csv", one, network=networks, seed=range(seeds))}

"""Cost of judging: the PerturBench set against its published arrangement, the cell-eval set against the package itself.

The first compares one call of `evaluate`, ranks included, with one uncached pair after another: P^2 pairs for every
ranked metric, three float32 distance matrices a pair for the energy distances. A sample of the pairs is timed and
scaled up to all. Principal components, which both need once, are timed once and count for both. The second runs our
profile "cell_eval" and the package (in another environment, it is no dependency) on the same files in turn. CPU seconds
(user and system) of processes of their own are compared: they suffer least from other work on the machine.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

import invirtuo as iv
from invirtuo.cells.files import writing
from invirtuo.metrics import Pair, de, distribution, mean
from studies import rivals
from studies.harness import Tables, apart, cpu_seconds, filled, spent, study

SEED = 0
FEW = ["control", "P00", "P01", "P02"]


@study(quick={"perturbations": 3, "cells": 20, "controls": 20, "genes": 200, "sample": 1, "repeats": 1})
def perturbench(
    *,
    out: Path,
    perturbations: int = 60,
    cells: int = 500,
    controls: int = 1000,
    genes: int = 5000,
    sample: int = 20,
    repeats: int = 3,
    threads: int = 2,
) -> Tables:
    """CPU seconds of the PerturBench set with ranks, beside uncached pairs of the published arrangement.

    Parameters
    ----------
    perturbations, cells, controls, genes
        Size of the synthetic screen: perturbations, cells of each, control cells, genes.
    sample
        Pairs timed for each metric; what all would take is extrapolated.
    """
    paths = files(out, perturbations, cells, controls, genes)

    def one(repeat: int) -> dict:
        ours = apart(score, threads=threads, profile="perturbench", warm=False, **paths)
        pairs = apart(published, threads=threads, n_sample=sample, **paths)
        return {name: ours[name] for name in ("scoring_seconds", "scoring_wall_seconds", "peak_gib")} | pairs["seconds"]

    runs = filled(out / "runs.csv", one, repeat=range(repeats))
    once, ours = runs["principal components"], runs["scoring_seconds"]
    pairs = runs[list(METRICS)] * perturbations**2
    theirs = pairs.sum(axis=1) + once
    summary = {
        "published, extrapolated": theirs.median(),
        "ours": ours.median(),
        "ratio": (theirs / ours).median(),
        "ratio without principal components": ((theirs - once) / (ours - once)).median(),
        "ours, wall": runs["scoring_wall_seconds"].median(),
        "ours, peak GiB": runs["peak_gib"].max(),
    }
    by_metric = pd.DataFrame({"ms a pair": runs[list(METRICS)].median() * 1e3, "all pairs, s": pairs.median()})
    return {"by-metric": by_metric.rename_axis("metric"), "summary": pd.DataFrame([summary])}


@study(quick={"perturbations": 4, "cells": 20, "controls": 40, "genes": 300, "repeats": 1})
def cell_eval(
    *,
    out: Path,
    cell_eval_python: str,
    perturbations: int = 50,
    cells: int = 100,
    controls: int = 2000,
    genes: int = 5000,
    repeats: int = 3,
    threads: int = 2,
) -> Tables:
    """CPU seconds of the profile cell_eval, beside the package cell-eval.

    Parameters
    ----------
    cell_eval_python
        Interpreter of an environment with cell-eval.
    perturbations, cells, controls, genes
        Size of the synthetic screen: perturbations, cells of each, control cells, genes.
    """
    paths = files(out, perturbations, cells, controls, genes)

    def one(repeat: int, start: str) -> dict:
        warm = start == "warm"
        ours = apart(score, threads=threads, profile="cell_eval", warm=warm, **paths)
        theirs = apart(rivals.cell_eval, python=cell_eval_python, threads=threads, out=out, warm=warm, **paths)
        key = "scoring_seconds" if warm else "cpu_seconds"
        return {"cell-eval": theirs[key], "ours": ours[key], "ratio": theirs[key] / ours[key]}

    runs = filled(out / "runs.csv", one, repeat=range(repeats), start=("cold", "warm"))
    medians = runs.groupby("start")[["cell-eval", "ours", "ratio"]].median()
    names = {"cold": "whole process, imports and compilation", "warm": "scoring after a small warm-up"}
    return {"summary": medians.rename(names)}


@study(quick={"perturbations": 4, "cells": 200, "controls": 300, "genes": 600, "repeats": 1})
def challenge(
    *,
    out: Path,
    cell_eval_python: str,
    perturbations: int = 50,
    cells: int = 200,
    controls: int = 2000,
    genes: int = 5000,
    repeats: int = 3,
    threads: int = 1,
) -> Tables:
    """CPU seconds and memory of the six metrics of 2026, beside the package cell-eval2, and whether they agree.

    Parameters
    ----------
    cell_eval_python
        Interpreter of an environment with cell-eval2 and pdex.
    perturbations, cells, controls, genes
        Size of the synthetic screen: perturbations, cells of each, control cells, genes.
    """
    paths = files(out, perturbations, cells, controls, genes, counts=True)

    def one(repeat: int) -> dict:
        row = {}
        for name, function, python in (
            ("ours", six_metrics, sys.executable),
            ("cell-eval2", rivals.cell_eval2, cell_eval_python),
        ):
            cost = apart(function, python=python, threads=threads, **paths)
            row |= {f"{name}, whole process": cost["cpu_seconds"], f"{name}, scoring": cost["scoring_seconds"]}
            row |= {f"{name}, peak GiB": cost["peak_gib"], f"{name}, mean": cost["mean"]}
        return row

    runs = filled(out / "runs.csv", one, repeat=range(repeats))
    medians = runs.drop(columns="repeat").median()
    for what in ("whole process", "scoring"):
        medians[f"ratio, {what}"] = (runs[f"cell-eval2, {what}"] / runs[f"ours, {what}"]).median()
    return {"summary": medians.to_frame().T}


# ---- a synthetic screen --------------------------------------------------------------------------------------------


def files(
    out: Path, n_perturbations: int, n_cells: int, n_controls: int, n_genes: int, *, counts: bool = False
) -> dict[str, Path]:
    """Paths of both sides, written unless they are there; log1p values, or counts."""
    paths = {"pred": out / "pred.h5ad", "real": out / "real.h5ad"}
    for seed, path in enumerate(paths.values(), start=1):
        if not path.exists():
            adata = screen(seed, n_perturbations, n_cells, n_controls, n_genes, counts=counts)
            with writing(path) as unfinished:
                adata.write_h5ad(unfinished)
            print(f"{path.name}: {adata.n_obs} cells, {adata.X.nnz / np.prod(adata.shape):.0%} non-zero")
    return paths


def screen(seed: int, n_perturbations: int, n_cells: int, n_controls: int, n_genes: int, *, counts: bool = False):
    """Log1p of counts per 10 000 of a synthetic screen, or the counts, CSR float32; two seeds share the effects."""
    truth, rng = np.random.default_rng(99), np.random.default_rng(seed)
    base = truth.lognormal(-2.2, 1.4, n_genes)
    blocks, labels = [], []
    for i in range(-1, n_perturbations):
        changed = truth.random(n_genes) < (0.05 if i >= 0 else 0)
        rate = base * np.exp(np.where(changed, truth.normal(0, 0.7, n_genes), 0))
        n = n_cells if i >= 0 else n_controls
        depth = rng.lognormal(0, 0.3, (n, 1))
        drawn = sparse.csr_matrix(rng.poisson(rate * depth), dtype=np.float32)
        totals = np.asarray(drawn.sum(axis=1)).ravel()
        blocks.append(drawn if counts else sparse.diags_array((1e4 / totals).astype(np.float32)) @ drawn)
        labels += [f"P{i:02d}" if i >= 0 else "control"] * n
    values = sparse.csr_matrix(sparse.vstack(blocks, format="csr"), dtype=np.float32)
    values = values if counts else values.log1p()
    obs = pd.DataFrame({"gene": pd.Categorical(labels)}, index=[f"c{i}" for i in range(len(labels))])
    return anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=[f"G{i:05d}" for i in range(n_genes)]))


# ---- what is measured, each in a process of its own -----------------------------------------------------------------


def six_metrics(pred: str, real: str) -> dict[str, float]:
    """The six metrics of two files of counts: CPU seconds of reading and scoring, and the mean of all values."""
    before = cpu_seconds()
    sides = [anndata.read_h5ad(path) for path in (pred, real)]
    design = iv.Design.from_adata(sides[1], perturbation="gene", control="control")
    table = iv.metrics.vcc2026(*sides, design, target_genes={"*": None}, bulk_target_sum=1000)
    return {"scoring_seconds": cpu_seconds() - before, "mean": float(np.mean(list(table.attrs["panel"].values())))}


def score(pred: str, real: str, profile: str, warm: bool) -> dict[str, float]:
    """Score two files once: CPU and wall seconds of that alone."""
    sides = [anndata.read_h5ad(path) for path in (pred, real)]
    design = iv.Design.from_adata(sides[1], perturbation="gene", control="control")
    if warm:
        small = [adata[adata.obs["gene"].isin(FEW).to_numpy()][:, :200].copy() for adata in sides]
        iv.evaluate(*small, design, profile, controls="pred")
    with spent() as cost:
        iv.evaluate(*sides, design, profile, controls="pred" if profile == "cell_eval" else "real")
    return {"scoring_seconds": cost["cpu_seconds"], "scoring_wall_seconds": cost["wall_seconds"]}


def published(pred: str, real: str, n_sample: int) -> dict[str, dict[str, float]]:
    """Median CPU seconds of one uncached pair of conditions by metric, and those of the principal components."""
    sides = [anndata.read_h5ad(path) for path in (pred, real)]
    pair = Pair(*sides, iv.Design.from_adata(sides[1], perturbation="gene", control="control"))
    before = cpu_seconds()
    distribution.axes_of_all(pair)
    seconds = {"principal components": cpu_seconds() - before}
    rng = np.random.default_rng(SEED)
    for metric, (view, function) in METRICS.items():
        sampled = [seconds_of_a_pair(pair, view, function, rng) for _ in range(n_sample + 1)]
        seconds[metric] = statistics.median(sampled[1:])
    return {"seconds": seconds}


def seconds_of_a_pair(pair: Pair, view: str, function: Callable, rng: np.random.Generator) -> float:
    """CPU seconds of one metric of a predicted and a real condition, drawn with equal chance."""
    names = pair.conditions.index
    i, j = rng.choice(len(names), 2)
    views = [pair.see(view, side, names[k]) for side, k in (("pred", i), ("real", j))]
    times = 100
    if function is energy:
        views, times = [np.ascontiguousarray(cells, dtype=np.float32) for cells in views], 1
    before = cpu_seconds()
    for _ in range(times):
        function(*views)
    return (cpu_seconds() - before) / times


def energy(x: np.ndarray, y: np.ndarray) -> float:
    """Half the energy distance, from three distance matrices."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return float(distances(x, y) - distances(x, x) / 2 - distances(y, y) / 2)


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean distance between the rows of x and those of y."""
    squares = (x * x).sum(1)[:, None] - 2 * (x @ y.T) + (y * y).sum(1)[None]
    return squares.clamp_min(1e-8).sqrt().mean()


METRICS = {
    "mmd_gex": ("cells", energy),
    "mmd_pca": ("pca", energy),
    "deg_recall": ("scores", de.top_k_recall),
    "cosine_logfc": ("logfc", mean.cosine),
    "rmse_mean": ("mean", mean.rmse),
}

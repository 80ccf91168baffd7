"""Sparse neural ODEs: speed, claims on synthetic systems, held-out donors of hematopoiesis.

python benchmarks/dynamics.py speed
python benchmarks/dynamics.py synthetic --out docs/results/dynamics
python benchmarks/dynamics.py cells --data-dir DATA --out docs/results/dynamics

`speed` needs the extra [ode]. Rows are written as they come; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.dynamics import simulate
from invirtuo.dynamics.reading import OPEN, edge_matrices
from invirtuo.flow import trajectory
from invirtuo.metrics import network
from invirtuo.nn import SharedField

SparseODE = iv.models.SparseODE
SERIES = replace(SparseODE.PRESETS["series"].config, n_members=1, match_share=0.8, refit_share=0.2)
SHARED = replace(SERIES, field="shared", hidden=(64, 64), activation="elu", penalty="none")
MODELS = {
    "per-target, none": replace(SERIES, penalty="none"),
    "per-target, L0 gates": replace(SERIES, lam=0.2),
    "shared, none": SHARED,
    "shared, weight path (C-NODE)": replace(SHARED, penalty="cnode", lam=0.02, refit_share=0.0),
    "shared, PathReg": replace(SHARED, penalty="pathreg", lam=0.002),
}
MODERATE, HARD = {"noise": 0.05}, {"noise": 0.3, "drop": 0.5}
FEW = ("per-target, L0 gates", "shared, none", "shared, weight path (C-NODE)")
CASES = [  # system, data, models
    ("linear_grn", "moderate", tuple(MODELS)),
    ("hill_grn", "moderate", tuple(MODELS)),
    ("linear_grn", "hard", FEW),
    ("lorenz96", "moderate", ("per-target, none", "per-target, L0 gates")),
]
DATA = {"moderate": MODERATE, "hard": HARD}


def fit(model, adata, split, **settings):
    """Fit without the warning, which is in the table, and without a progress bar."""
    config = replace(model.fit_config, progress=False, accelerator="cpu", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(adata, split, config)


# ---- speed -------------------------------------------------------------------------------------------------------


def speed(repeats: int = 5) -> pd.DataFrame:
    """Milliseconds of a training step (forward and backward) of the reference network, three courses."""
    from torchdiffeq import odeint

    torch.manual_seed(0)
    field = SharedField(529, 0, (100, 100), 1, activate_all=False)
    x0 = 0.3 * torch.rand(1, 3, 529)
    weights = field.prepared(field.mode())

    def velocity(x, t):
        return field(x, None, weights)

    def step(solved: Callable[[], torch.Tensor]) -> float:
        nonlocal weights
        weights = field.prepared(field.mode())
        begin = time.perf_counter()
        solved().square().mean().backward()
        return 1e3 * (time.perf_counter() - begin)

    rows = []
    for n in (50, 280, 800):
        times = torch.linspace(0, 1, n)
        ways = {
            "torchdiffeq dopri5": lambda t=times: odeint(lambda s, x: velocity(x, s), x0, t, rtol=1e-3, atol=1e-3),
            "dopri5": lambda t=times: trajectory(velocity, x0, 1, "dopri5", tolerance=1e-3).at(t),
            "rk4, 20 steps": lambda t=times: trajectory(velocity, x0, 20).at(t),
        }
        seconds = {name: [] for name in ways}
        for _ in range(repeats + 1):
            for name, way in ways.items():
                seconds[name].append(step(way))
        for name, values in seconds.items():
            rows.append({"times": n, "solver": name, "ms": statistics.median(values[1:])})
    table = pd.DataFrame(rows)
    base = table[table["solver"] == "torchdiffeq dopri5"].set_index("times")["ms"]
    table["times_faster"] = table["times"].map(base) / table["ms"]
    return table.round(2)


# ---- synthetic systems ---------------------------------------------------------------------------------------------


def synthetic(out: Path, seeds: int, steps: int) -> pd.DataFrame:
    """Recovery of the graph, forecasts from new and from wider starts, and of an intervention."""
    path = out / "synthetic.csv"
    done = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["system", "data", "seed", "model"])
    for seed in range(seeds):
        for system, data, names in CASES:
            for name in names:
                key = {"system": system, "data": data, "seed": seed, "model": name}
                if (done[list(key)] == pd.Series(key)).all(axis=1).any():
                    continue
                row = key | one_system(system, DATA[data], seed, MODELS[name], steps)
                done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
                done.to_csv(path, index=False, float_format="%.4g")
                print(row, flush=True)
    return done


def claims(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds."""
    columns = ["auroc", "auprc", "tpr", "fpr", "mse_new", "mse_wide", "mse_clamped"]
    return table.groupby(["system", "data", "model"], sort=False)[columns].agg(["mean", "std"]).round(3)


def one_system(system: str, options: dict, seed: int, config, steps: int) -> dict[str, float]:
    """Fit on eight courses of a system and judge."""
    train = simulate(system, seed=seed, **options)
    tests = {
        "mse_new": simulate(system, seed=seed, draw=1),
        "mse_wide": simulate(system, seed=seed, draw=2, spread=1.5),
        "mse_clamped": simulate(system, seed=seed, draw=1, clamp={"x0": 1.0}),
    }
    for name, test in tests.items():
        test.obs["course"] = f"{name}-" + test.obs["course"]
    everything = anndata.concat([train, *tests.values()], index_unique="-")
    design = iv.Design.from_adata(everything, covariates=["course"], time="time")
    begin = time.process_time()
    model = fit(SparseODE(design, train.var_names, config), train, None, steps=steps)
    seconds = time.process_time() - begin
    scores = {}
    for name, test in tests.items():
        held = {"genes": ["x0"], "level": 1.0} if name == "mse_clamped" else None
        scores[name] = error(model, test, held)
    truth = train.varp["regulates"]
    size = edge_matrices(model)["size"].mean(axis=0)
    found = network.edge_recovery(size, truth)
    edges = network.edge_sets(size > OPEN, truth)
    later = np.concatenate([g.to_numpy()[1:] - g.to_numpy()[:-1] for g in frames(train)])
    lagged = network.correlation_scores(np.concatenate([g.to_numpy()[:-1] for g in frames(train)]), later=later)
    rng = np.random.default_rng(seed)
    chance = {
        "auroc_lagged_correlation": network.edge_recovery(lagged, truth)["auroc"],
        "auroc_correlation": network.edge_recovery(network.correlation_scores(train.X), truth)["auroc"],
        "auprc_random": float(np.mean([network.edge_recovery(network.random_scores(truth, rng), truth)["auprc"]
                                       for _ in range(20)])),
        "auprc_degree_matched": float(np.mean([network.edge_recovery(
            network.random_scores(truth, rng, degree_matched=True), truth)["auprc"] for _ in range(20)])),
    }  # fmt: skip
    return {
        **{k: found[k] for k in ("auroc", "auprc", "epr", "density")},
        **edges,
        **scores,
        **chance,
        "cpu_s": seconds,
    }


def frames(adata) -> list[pd.DataFrame]:
    """Observations of each course."""
    table = pd.DataFrame(adata.X, columns=adata.var_names)
    return [part for _, part in table.groupby(adata.obs["course"].to_numpy(), sort=False)]


def error(model, test, held: dict | None) -> float:
    """Mean squared error (in variances of training cells) of forecasts from the first states of other courses."""
    times = np.sort(test.obs["time"].unique())
    first = test[test.obs["time"].to_numpy() == 0]
    if held is None:
        found = model.forecast(pd.DataFrame(first.X, columns=first.var_names), times / times[-1] * end(model)).X
    else:
        found = model.overexpress(held["genes"], held["level"], test, times).layers["disturbed"]
    scale = model.transforms["scale"]
    order = np.lexsort([test.obs["time"], test.obs["course"]]) if held else np.arange(test.n_obs)
    return float((((found - test.layers["clean"][order]) / scale.sd) ** 2).mean())


def end(model) -> float:
    """The time that first states count as the end of a course, scaled: 1."""
    return next(iter(model.known.values()))["high"]


# ---- hematopoiesis -------------------------------------------------------------------------------------------------


def cells(out: Path, data_dir: str, steps: int) -> pd.DataFrame:
    """Fit on donor s1d2, judge on four other donors: our preparation, and that of the public code."""
    raw = iv.datasets.load("hematopoiesis", data_dir=data_dir)
    log = iv.preprocess.normalize(raw)
    reference = raw.copy()
    reference.X = raw.X.multiply(raw.obs["size_scale"].to_numpy()[:, None]).tocsr()
    design = iv.Design.from_adata(raw, covariates=["lineage", "donor"], time="dpt_pseudotime")
    split = iv.splits.courses(raw.obs, design, [{"donor": d} for d in ("s1d1", "s2d1", "s2d4", "s3d6")])
    default = SparseODE.Config()
    runs = {
        "ours": (default, log, steps, 0),
        "ours, seed 1": (replace(default, n_members=1), log, steps, 1),
        "lam 0": (replace(default, n_members=1, penalty="none"), log, steps // 2, 0),
        "lam 0.01": (replace(default, n_members=1, lam=0.01), log, steps // 2, 0),
        "lam 0.1": (replace(default, n_members=1, lam=0.1), log, steps // 2, 0),
        "jitter 0": (replace(default, n_members=1, jitter=0.0), log, steps // 2, 0),
        "pathreg-paper": ("pathreg-paper", reference, 300, 0),
    }
    path = out / "hematopoiesis.csv"
    done = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["run"])
    for name, (config, adata, n, seed) in runs.items():
        if name in set(done["run"]):
            continue
        begin = time.process_time()
        model = fit(SparseODE(design, raw.var_names, config), adata, split, steps=n, seed=seed)
        seconds = time.process_time() - begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = model.evaluate_forecast(adata, split)
        sizes = model.sparsity(3).loc["evaluation"]
        facts = {"run": name, "cpu_s": seconds, "open_inputs": sizes["open_inputs"], "features": sizes["features"]}
        table = table.assign(**facts)[["run", *table.columns, "open_inputs", "features", "cpu_s"]]
        done = pd.concat([done, table], ignore_index=True)
        done.to_csv(path, index=False, float_format="%.5g")
        print(by_donor(table).round(4).to_string(), "\n", facts, flush=True)
        if name == "ours":
            model.network(n_edges=500).to_csv(out / "edges.csv", index=False, float_format="%.4g")
    return done


def by_donor(table: pd.DataFrame) -> pd.DataFrame:
    """Sum over lineages of the mean squared errors, a row per method."""
    return table.pivot_table(index="model", columns="donor", values="mse", aggfunc="sum", sort=False)


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "synthetic", "cells"])
    parser.add_argument("--out", type=Path, default=Path("dynamics"))
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="600 for cells, 400 for synthetic systems")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "speed":
        table = speed()
        table.to_csv(options.out / "speed.csv", index=False)
    elif options.part == "synthetic":
        table = synthetic(options.out, options.seeds, options.steps or 400)
        print(claims(table).to_string())
    else:
        table = cells(options.out, options.data_dir, options.steps or 600)
    print(table.to_string() if options.part == "speed" else f"{len(table)} rows in {options.out}")


if __name__ == "__main__":
    main()

"""Sparse neural ODEs: speed, synthetic systems, hematopoiesis, other marrow, motion capture.

python benchmarks/dynamics.py speed
python benchmarks/dynamics.py synthetic --out docs/results/dynamics
python benchmarks/dynamics.py PART --data-dir DATA --out docs/results/dynamics

with PART `cells` (held-out donors), `later` (later pseudotime), `penalties` (sparsity against error), `progenitors`
(CD34+ marrow, Paul15) or `walking` (motion capture). `speed` needs torchdiffeq (pip install torchdiffeq).
`synthetic` and `cells` write rows as they come; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import base64
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
from invirtuo.report import dynamics as pictures

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


def evaluated(model, adata, split, part: str = "test") -> pd.DataFrame:
    """The table of errors without the warning, which is in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.evaluate_forecast(adata, split, part)


def hematopoiesis(data_dir: str):
    """Log-normalised cells of hematopoiesis, and the Design."""
    raw = iv.datasets.load("hematopoiesis", data_dir=data_dir)
    design = iv.Design.from_adata(raw, covariates=["lineage", "donor"], time="dpt_pseudotime")
    return iv.preprocess.normalize(raw), design


def later(out: Path, data_dir: str, steps: int) -> pd.DataFrame:
    """Fit on the first three quarters of pseudotime of donor s1d2, judge on the last quarter."""
    adata, design = hematopoiesis(data_dir)
    adata = adata[(adata.obs["donor"] == "s1d2").to_numpy()].copy()
    split = iv.splits.courses(adata.obs, design, later=0.25)
    model = fit(SparseODE(design, adata.var_names, SparseODE.Config()), adata, split, steps=steps)
    table = evaluated(model, adata, split)
    n_cells = adata.obs.loc[split == "test", "lineage"].value_counts()
    table["n_cells"] = table["lineage"].map(n_cells.to_dict())
    table.to_csv(out / "later.csv", index=False, float_format="%.5g")
    return table.pivot_table(index="model", columns="lineage", values="mse", sort=False).assign(
        sum=lambda t: t.sum(axis=1)
    )


def penalties(out: Path, data_dir: str, steps: int) -> pd.DataFrame:
    """Weights of the penalty against errors on held-out cells of donor s1d2 and on other donors, one member."""
    adata, design = hematopoiesis(data_dir)
    others = [{"donor": d} for d in ("s1d1", "s2d1", "s2d4", "s3d6")]
    split = iv.splits.courses(adata.obs, design, others, val_fraction=0.2)
    model = SparseODE(design, adata.var_names, replace(SparseODE.Config(), n_members=1))
    config = replace(model.fit_config, steps=steps, progress=False, accelerator="cpu")
    table = iv.dynamics.tradeoff(model, adata, split, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), config)
    table.to_csv(out / "penalties.csv", index=False, float_format="%.5g")
    picture = pictures.tradeoff(table)
    (out / "penalties.png").write_bytes(base64.b64decode(picture.partition(",")[2]))
    return table


# ---- other marrow --------------------------------------------------------------------------------------------------

MARKERS = {
    "stem": ("AVP", "HLF", "CRHBP", "CD34"),
    "erythroid": ("GATA1", "KLF1", "CA1", "HBB", "TFRC"),
    "myeloid": ("MPO", "ELANE", "AZU1", "LYZ", "IRF8"),
    "lymphoid": ("CD79A", "CD79B", "VPREB1", "DNTT", "IGLL1"),
}


def progenitors(out: Path, data_dir: str, steps: int) -> pd.DataFrame:
    """CD34+ marrow and Paul15: pseudotime, the 300 most variable genes, held-out cells and samples; one member."""
    tables = []
    for name, prepared in (("marrow", marrow), ("paul15", paul15)):
        adata, design, split = prepared(data_dir)
        config = replace(SparseODE.Config(), n_members=1)
        model = fit(SparseODE(design, adata.var_names, config), adata, split, steps=steps)
        for part in sorted(set(split) - {"train"}):
            tables.append(evaluated(model, adata, split, part).assign(data=name, part=part))
            tables[-1]["n_part"] = int((split == part).sum())
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(out / "progenitors.csv", index=False, float_format="%.5g")
    return table.pivot_table(index="model", columns=["data", "part"], values=["mse", "mse_bins"], sort=False)


def marrow(data_dir: str):
    """Lineages by markers, pseudotime of each sample from its stem cells; the second sample is test."""
    import scanpy

    raw = iv.datasets.load("marrow", data_dir=data_dir)
    log = iv.preprocess.normalize(raw)
    for name, genes in MARKERS.items():
        scanpy.tl.score_genes(log, [g for g in genes if g in log.var_names], score_name=name)
    lineages = [name for name in MARKERS if name != "stem"]
    log.obs["lineage"] = log.obs[lineages].idxmax(axis=1)
    log.obs["stage"] = np.where(log.obs["stem"] > log.obs["stem"].quantile(0.95), "stem", "later")
    log = iv.preprocess.pseudotime(log, {"stage": "stem"}, by="sample")
    design = iv.Design.from_adata(log, covariates=["lineage", "sample"], time="pseudotime")
    split = iv.splits.courses(log.obs, design, {"sample": "Run5"}, val_fraction=0.2)
    return variable_genes(raw, log, split), design, split


def paul15(data_dir: str):
    """Erythroid cells after MEP and monocytes after GMP, each with its own pseudotime; a fifth of cells is held out."""
    raw = iv.datasets.load("paul15", data_dir=data_dir)
    names = {"MEP": "erythroid", "Erythroid": "erythroid", "GMP": "monocyte", "Monocyte": "monocyte"}
    raw = raw[raw.obs["cell_type"].isin(list(names)).to_numpy()].copy()
    log = iv.preprocess.normalize(raw)
    log.obs["lineage"] = log.obs["cell_type"].astype(str).map(names)
    log.obs["stage"] = np.where(log.obs["cell_type"].isin(["MEP", "GMP"]), "early", "late")
    log = iv.preprocess.pseudotime(log, {"stage": "early"}, by="lineage")
    design = iv.Design.from_adata(log, covariates=["lineage"], time="pseudotime")
    split = iv.splits.courses(log.obs, design, val_fraction=0.2)
    return variable_genes(raw, log, split), design, split


def variable_genes(raw, ordered, split, n: int = 300):
    """The ordered cells again, with genes that vary among training cells."""
    counts = raw[ordered.obs_names].copy()
    counts.obs = ordered.obs.drop(columns="total_counts")
    return iv.preprocess.normalize(counts, n_genes=n, split=split)


# ---- motion capture --------------------------------------------------------------------------------------------------


def walking(out: Path, data_dir: str, steps: int) -> pd.DataFrame:
    """Forecasts of 300 frames of 50 channels from the first frame, or the first three; squared errors per element."""
    adata = iv.dynamics.motion_capture(Path(data_dir) / "cmu_mocap35.mat")
    part = adata.obs["split"].to_numpy()
    x = np.asarray(adata.X, dtype=float)
    _, _, components = np.linalg.svd(x[part == "train"], full_matrices=False)
    z = x @ components[:5].T
    moves = np.gradient(z.reshape(-1, 300, 5), axis=1)
    moves[:, 0] = moves[:, 1]
    states = {
        "50 channels": (x, np.eye(50)),
        "5 components": (z, components[:5]),
        "5 components and their changes": (np.c_[z, moves.reshape(-1, 5)], np.r_[components[:5], np.zeros((5, 50))]),
    }
    rows = []
    for seed in range(3):
        for name, (state, back) in states.items():
            varies = state[part == "train"].std(axis=0) > 1e-3
            found = walked(name, state[:, varies], back[varies], adata.obs, x, steps=steps, seed=seed)
            rows += [row | {"seed": seed} for row in found]
        table = pd.DataFrame(rows).drop_duplicates(["model", "part", "seed"])
        table.to_csv(out / "walking.csv", index=False, float_format="%.5g")
    return table.groupby(["part", "model"], sort=False)[["mse_50", "mse"]].agg(["mean", "std"])


def walked(name: str, state: np.ndarray, back: np.ndarray, obs, x: np.ndarray, **settings) -> list[dict]:
    """Fit to training sequences; errors in the 50 channels over the first 50 frames and over all, with baselines."""
    cells = anndata.AnnData(state.astype(np.float32), obs=obs.copy())
    cells.var_names = [f"s{i}" for i in range(cells.n_vars)]
    design = iv.Design.from_adata(cells, covariates=["sequence"], time="frame")
    config = replace(SERIES, lam=0.02, steps=75)
    model = fit(SparseODE(design, cells.var_names, config), cells, obs["split"], **settings)
    train = model.training_courses()
    rows = []
    for part in ("val", "test"):
        mine = (obs["split"] == part).to_numpy()
        truth, first = x[mine].reshape(-1, 300, 50), state[mine].reshape(-1, 300, state.shape[1])[:, 0]
        found = model.forecast(first, np.arange(300.0)).X @ back
        linear = [iv.dynamics.baselines(train, train[0], x0)["linear_ode"] for x0 in model.scaled(first)]
        forecasts = {
            f"sparse_ode, {name}": found.reshape(truth.shape),
            f"linear ODE, {name}": model.unscaled(np.stack(linear)) @ back,
            "zero": np.zeros_like(truth),
            "first frame": np.repeat(truth[:, :1], 300, axis=1),
            "training mean sequence": x[(obs["split"] == "train").to_numpy()].reshape(-1, 300, 50).mean(axis=0)[None],
        }
        for model_name, values in forecasts.items():
            square = (values - truth) ** 2
            rows.append({"model": model_name, "part": part, "mse_50": square[:, :50].mean(), "mse": square.mean()})
    return rows


PARTS = {  # steps, function
    "cells": (600, cells),
    "later": (600, later),
    "penalties": (300, penalties),
    "progenitors": (400, progenitors),
    "walking": (400, walking),
}


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "synthetic", *PARTS])
    parser.add_argument("--out", type=Path, default=Path("dynamics"))
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="of a fit; the default depends on the part")
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
        steps, function = PARTS[options.part]
        table = function(options.out, options.data_dir, options.steps or steps)
    whole = options.part not in ("synthetic", "cells")
    print(table.round(4).to_string() if whole else f"{len(table)} rows in {options.out}")


if __name__ == "__main__":
    main()

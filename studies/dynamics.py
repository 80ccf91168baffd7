"""Sparse neural ODEs: speed, synthetic systems, hematopoiesis, other marrow, motion capture.

dynamics-speed needs torchdiffeq (pip install torchdiffeq).
"""

from __future__ import annotations

import base64
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

import invirtuo as iv
from invirtuo.flow import trajectory
from invirtuo.metrics.applications import network
from invirtuo.models.sparse_ode.field import SharedField
from invirtuo.models.sparse_ode.systems import simulate
from invirtuo.reports import dynamics as pictures
from invirtuo.verbs.network import OPEN, edge_matrices
from studies import harness
from studies.harness import Rows, Tables, filled, in_turn, over_seeds, spent, study

SparseODE = iv.models.SparseODE
SERIES = replace(SparseODE.PRESETS["series"].config, n_members=1, match_share=0.8, refit_share=0.2, null=False)
SHARED = replace(SERIES, field="shared", hidden=(64, 64), activation="elu", penalty="none")
MODELS = {  # the same fit; penalties at their own weight
    "per-target, none": replace(SERIES, penalty="none"),
    "per-target, L0 gates": replace(SERIES, lam=0.2),
    "per-target, groups (NGM)": replace(SERIES, penalty="group_lasso", lam=None),
    "per-target, LassoNet": replace(SERIES, penalty="lassonet", lam=None),
    "shared, none": SHARED,
    "shared, weight path (C-NODE)": replace(SHARED, penalty="cnode", lam=None),
    "shared, PathReg": replace(SHARED, penalty="pathreg", lam=None),
    "shared, PathReg, lam of C-NODE": replace(SHARED, penalty="pathreg", lam=0.02),
}
MODERATE, HARD = {"noise": 0.05}, {"noise": 0.3, "drop": 0.5}
FEW = ("per-target, none", "per-target, L0 gates", "per-target, groups (NGM)", "shared, none",
       "shared, weight path (C-NODE)", "shared, PathReg")  # fmt: skip
CASES = [  # system, data, models
    ("linear_grn", "moderate", tuple(MODELS)),
    ("hill_grn", "moderate", tuple(MODELS)),
    ("linear_grn", "hard", FEW),
    ("lorenz96", "moderate", ("per-target, none", "per-target, L0 gates", "per-target, groups (NGM)")),
]
DATA = {"moderate": MODERATE, "hard": HARD}
RUNS = ("ours", "ours, seed 1", "lam 0", "lam 0.01", "lam 0.1", "jitter 0", "pathreg-paper")
DONORS = [{"donor": donor} for donor in ("s1d1", "s2d1", "s2d4", "s3d6")]


def fit(model, adata, split, **settings):
    """Fit on the CPU, without the warning, which is in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return harness.fit(model, adata, split, accelerator="cpu", **settings)


def evaluated(model, adata, split, part: str = "test") -> pd.DataFrame:
    """The table of errors without the warning, which is in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.evaluate_forecast(adata, split, part)


# ---- speed -------------------------------------------------------------------------------------------------------


@study(quick={"repeats": 1})
def speed(*, out: Path, repeats: int = 5) -> Tables:
    """Milliseconds of a training step of the reference network, three courses, beside torchdiffeq."""
    from torchdiffeq import odeint

    torch.manual_seed(0)
    field = SharedField(529, 0, (100, 100), 1, activate_all=False)
    x0 = 0.3 * torch.rand(1, 3, 529)
    weights = None

    def velocity(x, t):
        return field(x, None, weights)

    def step(solver: str, times: torch.Tensor) -> None:
        nonlocal weights
        weights = field.prepared(field.mode())
        if solver == "torchdiffeq dopri5":
            solved = odeint(lambda s, x: velocity(x, s), x0, times, rtol=1e-3, atol=1e-3)
        elif solver == "dopri5":
            solved = trajectory(velocity, x0, 1, "dopri5", tolerance=1e-3).at(times)
        else:
            solved = trajectory(velocity, x0, 20).at(times)
        solved.square().mean().backward()

    def one(times: int) -> pd.DataFrame:
        at = torch.linspace(0, 1, times)
        solvers = ("torchdiffeq dopri5", "dopri5", "rk4, 20 steps")
        steps = {solver: lambda solver=solver: step(solver, at) for solver in solvers}
        ms = 1e3 * in_turn(steps, repeats, time.perf_counter).median()
        return pd.DataFrame({"solver": ms.index, "ms": ms.to_numpy(), "times_faster": (ms.iloc[0] / ms).to_numpy()})

    return {"solvers": filled(out / "speed.csv", one, times=(50, 280, 800))}


# ---- synthetic systems ---------------------------------------------------------------------------------------------


@study(quick={"seeds": 1, "steps": 2})
def synthetic(*, out: Path, seeds: int = 5, steps: int = 400) -> Tables:
    """Recovery of the graph, forecasts from new and from wider starts, and of an intervention."""

    def one(system: str, data: str, seed: int, model: str) -> dict[str, float]:
        return one_system(system, DATA[data], seed, MODELS[model], steps)

    cases = [
        {"system": system, "data": data, "seed": seed, "model": model}
        for seed in range(seeds)
        for system, data, models in CASES
        for model in models
    ]
    table = Rows(out / "synthetic.csv").fill(cases, one)
    columns = ["auroc", "auprc", "tpr", "fpr", "mse_new", "mse_wide", "mse_clamped"]
    return {"synthetic-summary": over_seeds(table, ["system", "data", "model"], columns)}


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
    with spent() as cost:
        model = fit(SparseODE(design, train.var_names, config), train, None, steps=steps)
    scores = {}
    for name, test in tests.items():
        held = {"genes": ["x0"], "level": 1.0} if name == "mse_clamped" else None
        scores[name] = error(model, test, held)
    truth = train.varp["regulates"]
    size = edge_matrices(model)["size"].mean(axis=0)
    found = network.edge_recovery(size, truth)
    return {
        **{k: found[k] for k in ("auroc", "auprc", "epr", "density")},
        **network.edge_sets(size > OPEN, truth),
        **scores,
        **by_chance(train, truth, seed),
        "cpu_s": cost["cpu_seconds"],
    }


def by_chance(train, truth: np.ndarray, seed: int) -> dict[str, float]:
    """What correlations and random edges reach."""
    courses = [course.to_numpy() for course in frames(train)]
    before = np.concatenate([course[:-1] for course in courses])
    later = np.concatenate([course[1:] - course[:-1] for course in courses])
    lagged = network.correlation_scores(before, later=later)
    rng = np.random.default_rng(seed)

    def random(**options) -> float:
        draws = [network.random_scores(truth, rng, **options) for _ in range(20)]
        return float(np.mean([network.edge_recovery(draw, truth)["auprc"] for draw in draws]))

    return {
        "auroc_lagged_correlation": network.edge_recovery(lagged, truth)["auroc"],
        "auroc_correlation": network.edge_recovery(network.correlation_scores(train.X), truth)["auroc"],
        "auprc_random": random(),
        "auprc_degree_matched": random(degree_matched=True),
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


@study(quick={"steps": 2, "runs": ["lam 0"]})
def cells(*, out: Path, data_dir: str | None = None, steps: int = 600, runs: Sequence[str] = RUNS) -> Tables:
    """Fits on donor s1d2 judged on four other donors: our preparation, and that of the public code.

    Parameters
    ----------
    runs
        Settings that are fitted.
    """
    raw = iv.datasets.load("hematopoiesis", data_dir=data_dir)
    log = iv.preprocess.normalize(raw)
    reference = raw.copy()
    reference.X = raw.X.multiply(raw.obs["size_scale"].to_numpy()[:, None]).tocsr()
    design = iv.Design.from_adata(raw, covariates=["lineage", "donor"], time="dpt_pseudotime")
    split = iv.splits.courses(raw.obs, design, DONORS)
    ours = SparseODE.Config()
    single = replace(ours, n_members=1)
    settings = {
        "ours": (ours, log, steps, 0),
        "ours, seed 1": (single, log, steps, 1),
        "lam 0": (replace(single, penalty="none"), log, steps // 2, 0),
        "lam 0.01": (replace(single, lam=0.01), log, steps // 2, 0),
        "lam 0.1": (replace(single, lam=0.1), log, steps // 2, 0),
        "jitter 0": (replace(single, jitter=0.0), log, steps // 2, 0),
        "pathreg-paper": ("pathreg-paper", reference, 300, 0),
    }

    def one(run: str) -> pd.DataFrame:
        config, adata, n, seed = settings[run]
        with spent() as cost:
            model = fit(SparseODE(design, raw.var_names, config), adata, split, steps=n, seed=seed)
        if run == "ours":
            edges = model.network()
            edges.head(500).to_csv(out / "edges.csv", index=False, float_format="%.4g")
            of_targets = edges.drop_duplicates("target")
            found = {"edges": len(edges), "fdr_below_0.1": (edges["fdr"] <= 0.1).sum()}
            found |= {"targets": len(of_targets), "targets_that_gain": (of_targets["gain_lower"] > 0).sum()}
            found["targets_that_lose"] = (of_targets["gain_upper"] < 0).sum()
            pd.Series(found).to_csv(out / "support.csv", header=["n"])
        sizes = model.sparsity(3).loc["evaluation"]
        facts = {"open_inputs": sizes["open_inputs"], "features": sizes["features"], "cpu_s": cost["cpu_seconds"]}
        for name, value in (model.card["gain_of_connections"] or {}).items():
            facts[f"gain_{name}"] = value
        return evaluated(model, adata, split).assign(**facts)

    table = filled(out / "hematopoiesis.csv", one, run=runs)
    by_donor = table.pivot_table(index=["run", "model"], columns="donor", values="mse", aggfunc="sum", sort=False)
    gains = table.groupby("run", sort=False)[["gain_mean", "gain_lower", "gain_upper"]].first()
    return {"cells-by-donor": by_donor, "gain-of-connections": gains}


def hematopoiesis(data_dir: str | None):
    """Log-normalised cells of hematopoiesis, and the Design."""
    raw = iv.datasets.load("hematopoiesis", data_dir=data_dir)
    design = iv.Design.from_adata(raw, covariates=["lineage", "donor"], time="dpt_pseudotime")
    return iv.preprocess.normalize(raw), design


@study(quick={"steps": 2})
def later(*, out: Path, data_dir: str | None = None, steps: int = 600, seeds: int = 1) -> Tables:
    """A fit on the first three quarters of pseudotime of donor s1d2, judged on the last quarter."""
    adata, design = hematopoiesis(data_dir)
    adata = adata[(adata.obs["donor"] == "s1d2").to_numpy()].copy()
    split = iv.splits.courses(adata.obs, design, later=0.25)
    n_cells = adata.obs.loc[split == "test", "lineage"].value_counts()

    def one(seed: int) -> pd.DataFrame:
        model = fit(SparseODE(design, adata.var_names, SparseODE.Config()), adata, split, steps=steps, seed=seed)
        table = evaluated(model, adata, split)
        return table.assign(n_cells=table["lineage"].map(n_cells.to_dict()))

    table = filled(out / "later.csv", one, seed=range(seeds))
    wide = table.pivot_table(index="model", columns="lineage", values="mse", sort=False)
    return {"later-summary": wide.assign(sum=wide.sum(axis=1))}


@study(quick={"steps": 2})
def penalties(*, out: Path, data_dir: str | None = None, steps: int = 300) -> Tables:
    """Weights of the penalty against errors on held-out cells of donor s1d2 and on other donors, one member."""
    adata, design = hematopoiesis(data_dir)
    split = iv.splits.courses(adata.obs, design, DONORS, val_fraction=0.2)
    model = SparseODE(design, adata.var_names, replace(SparseODE.Config(), n_members=1))
    config = replace(model.fit_config, steps=steps, progress=False, accelerator="cpu")
    table = iv.models.sparse_ode.tradeoff(model, adata, split, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), config)
    picture = pictures.tradeoff(table)
    (out / "penalties.png").write_bytes(base64.b64decode(picture.partition(",")[2]))
    return {"penalties": table}


# ---- other marrow --------------------------------------------------------------------------------------------------

MARKERS = {
    "stem": ("AVP", "HLF", "CRHBP", "CD34"),
    "erythroid": ("GATA1", "KLF1", "CA1", "HBB", "TFRC"),
    "myeloid": ("MPO", "ELANE", "AZU1", "LYZ", "IRF8"),
    "lymphoid": ("CD79A", "CD79B", "VPREB1", "DNTT", "IGLL1"),
}


@study(quick={"steps": 2})
def progenitors(*, out: Path, data_dir: str | None = None, steps: int = 400) -> Tables:
    """CD34+ marrow and Paul15: pseudotime, the 300 most variable genes, held-out cells and samples; one member."""
    prepared = {"marrow": marrow, "paul15": paul15}

    def one(data: str) -> pd.DataFrame:
        adata, design, split = prepared[data](data_dir)
        config = replace(SparseODE.Config(), n_members=1)
        model = fit(SparseODE(design, adata.var_names, config), adata, split, steps=steps)
        tables = []
        for name in sorted(set(split) - {"train"}):
            table = evaluated(model, adata, split, name)
            tables.append(table.assign(part=name, n_part=int((split == name).sum())))
        return pd.concat(tables)

    table = filled(out / "progenitors.csv", one, data=prepared)
    wide = table.pivot_table(index="model", columns=["data", "part"], values=["mse", "mse_bins"], sort=False)
    return {"progenitors-summary": wide}


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


@study(quick={"steps": 2, "seeds": 1})
def walking(*, out: Path, data_dir: Path, steps: int = 400, seeds: int = 3) -> Tables:
    """Forecasts of 300 frames of 50 channels from the first frame, or the first three; squared errors per element."""
    adata = iv.models.sparse_ode.motion_capture(data_dir / "cmu_mocap35.mat")
    train = (adata.obs["split"] == "train").to_numpy()
    x = np.asarray(adata.X, dtype=float)
    _, _, components = np.linalg.svd(x[train], full_matrices=False)
    z = x @ components[:5].T
    moves = np.gradient(z.reshape(-1, 300, 5), axis=1)
    moves[:, 0] = moves[:, 1]
    states = {
        "50 channels": (x, np.eye(50)),
        "5 components": (z, components[:5]),
        "5 components and their changes": (np.c_[z, moves.reshape(-1, 5)], np.r_[components[:5], np.zeros((5, 50))]),
    }

    def one(state: str, seed: int) -> list[dict]:
        values, back = states[state]
        varies = values[train].std(axis=0) > 1e-3
        return walked(state, values[:, varies], back[varies], adata.obs, x, steps=steps, seed=seed)

    table = filled(out / "walking.csv", one, seed=range(seeds), state=states)
    table = table.drop_duplicates(["model", "part", "seed"])
    return {"walking-summary": over_seeds(table, ["part", "model"], ["mse_50", "mse"])}


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
        linear = [iv.verbs.naive_forecasts.baselines(train, train[0], x0)["linear_ode"] for x0 in model.scaled(first)]
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

"""Formula tests of FM-PCA and FM-PCA-OT: projection, coupling, parameters, loss, and a planted map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from sklearn.decomposition import PCA

import invirtuo as iv
from invirtuo.fit import FitConfig
from invirtuo.verbs.sampling import FlowSampling

Config = iv.models.FMPCA.Config
N_GENES = 6
TINY = Config(n_pcs=2, hidden_dim=32, n_layers_decoding=1, prob_unconditional=0.0, scale=False)
FIT = FitConfig(steps=400, batch_size=128, lr=5e-3, warmup=0, ema=0.0, clip=1.0, precision="fp32", accelerator="cpu",
                progress=False, val_every=0)  # fmt: skip


def make(n: int = 300) -> AnnData:
    """Two clouds of control cells; A moves the left one up and the right one down, along known directions."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(N_GENES, 2)))[0]
    side = np.repeat([-1.0, 1.0], n // 2)
    control = np.stack([2 * side, np.zeros(n)], 1) + 0.2 * rng.normal(size=(n, 2))
    treated = control[rng.permutation(n)]
    treated = treated + np.stack([np.zeros(n), -1.5 * np.sign(treated[:, 0])], 1)
    x = np.concatenate([control, treated]) @ axes.T + 5
    obs = pd.DataFrame({"p": np.repeat(["control", "A"], n), "context": "x"}, index=[f"c{i}" for i in range(2 * n)])
    return AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))


@pytest.fixture(scope="module")
def cells():
    return make()


@pytest.fixture(scope="module")
def plan(cells):
    return iv.Design.from_adata(cells, perturbation="p", control="control", covariates=["context"])


def planted(control: np.ndarray, cells: AnnData) -> np.ndarray:
    """Where A takes control cells, from the cells themselves: the shift of the mean on each side."""
    a, c = (cells.X[(cells.obs["p"] == label).to_numpy()] for label in ("A", "control"))
    axis = (c - c.mean(0)) @ np.linalg.svd(c - c.mean(0), full_matrices=False)[2][0]
    direction = np.linalg.svd(c - c.mean(0), full_matrices=False)[2][0]
    side_a, side = (a - c.mean(0)) @ direction > 0, axis > 0
    shift = {s: a[side_a == s].mean(0) - c[side == s].mean(0) for s in (True, False)}
    return control + np.stack([shift[bool(s)] for s in (control - c.mean(0)) @ direction > 0])


# ---- projection ------------------------------------------------------------------------------------------------------


def test_projection_is_that_of_the_training_cells(cells, plan):
    split = pd.Series(np.where(np.arange(600) % 3 == 0, "test", "train"), index=cells.obs_names)
    model = iv.models.FMPCA(plan, cells.var_names, replace(TINY, n_pcs=3, scale=True))
    model.fit(cells, split, config=replace(FIT, steps=1))
    train = cells.X[(split == "train").to_numpy()]
    oracle = PCA(3).fit(train)
    scores = oracle.transform(cells.X)
    scale = np.sqrt((oracle.transform(train) ** 2).mean())
    found = model.project(torch.from_numpy(cells.X)).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(scores / scale), atol=1e-4)
    rebuilt = oracle.inverse_transform(scores)
    np.testing.assert_allclose(model.ceiling(cells).X, rebuilt, atol=1e-4)
    assert model.ceiling(cells).obs.equals(cells.obs)
    paper = iv.models.FMPCA(plan, cells.var_names, replace(TINY, n_pcs=3)).fit(cells, config=replace(FIT, steps=1))
    assert float(paper.score_scale) == 1
    with pytest.raises(ValueError, match="not fitted yet"):
        iv.models.FMPCA(plan, cells.var_names, TINY).ceiling(cells)


def test_projection_of_a_part_of_many_cells(cells, plan):
    model = iv.models.FMPCA(plan, cells.var_names, replace(TINY, n_pca_cells=50)).fit(
        cells, config=replace(FIT, steps=1)
    )
    chosen = np.random.default_rng(0).permutation(600)[:50]
    np.testing.assert_allclose(model.transforms["pca"].mean, cells.X[chosen].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="6 principal components need as many training cells, found 3"):
        iv.models.FMPCA(plan, cells.var_names).fit(cells[[0, 1, 400]].copy(), config=FIT)


# ---- network, loss ---------------------------------------------------------------------------------------------------


def test_parameters_and_loss_by_hand(cells, plan):
    config = Config(n_pcs=3, hidden_dim=8, n_layers_gene_expression=2, n_layers_conditions=3, n_layers_time=1,
                    n_layers_decoding=2, prob_unconditional=0.5, scale=False)  # fmt: skip
    model = iv.models.FMPCA(plan, cells.var_names, config)
    point, condition, time = (3 + 1) * 8 + 9 * 8, (2 + 1) * 8 + 2 * 9 * 8 + 8, 9 * 8  # condition: + the null vector
    assert sum(p.numel() for p in model.parameters()) == point + condition + time + 25 * 8 + 9 * 8 + 9 * 3
    dataset = iv.CellDataset(cells, plan)
    model.prepare(dataset)
    batch = next(dataset.batches(iv.samplers.cells, 16))
    torch.manual_seed(3)
    found = model.loss(batch)["total"]
    torch.manual_seed(3)
    x1 = model.project(batch.target)
    x0, t, null = torch.randn(16, 3), torch.rand(16), torch.rand(16) < 0.5
    assert null.any() and not null.all()
    v = model.velocity((1 - t[:, None]) * x0 + t[:, None] * x1, t, batch.condition, null)
    torch.testing.assert_close(found, ((v - (x1 - x0)) ** 2).mean())


def test_gaussian_target_is_matched(plan):
    """From noise, the mean and spread of cells in the space of components."""
    rng = np.random.default_rng(1)
    x = 5 + rng.normal(size=(600, 2)) @ np.array([[1.0, 0.5, 0, 0, 0, 0], [0, 0, 0.7, -0.2, 0, 0]])
    cells = make()
    cells.X = x.astype(np.float32)
    model = iv.models.FMPCA(plan, cells.var_names, replace(TINY, scale=True)).fit(cells, config=FIT)
    predicted = model.predict(pd.DataFrame({"p": ["A"], "context": "x"}), 1000, precision="fp32").X
    np.testing.assert_allclose(predicted.mean(0), x.mean(0), atol=0.15)
    np.testing.assert_allclose(np.cov(predicted.T), np.cov(x.T), atol=0.25)


# ---- coupling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["random", "exact", "sinkhorn"])
def test_coupling_stays_inside_the_condition(cells, plan, coupling):
    model = iv.models.FMPCA(plan, cells.var_names, replace(TINY, source="control", coupling=coupling))
    assert model.needs_source and model.sampler == "sets"
    x0, x1 = torch.randn(2, 40, 2)
    rows, columns = model.couple(x0, x1, 8)
    assert len(rows) == len(columns) == 40
    block = torch.arange(40) // 8
    assert torch.equal(rows // 8, block) and torch.equal(columns // 8, block)
    if coupling == "exact":
        assert sorted(columns.tolist()) == list(range(40))
    far = torch.cat([x1[:, :1] + 1000.0 * block[:, None], x1[:, 1:]], 1)
    assert torch.equal(model.couple(x0, far, 8)[1] // 8, block)


def test_coupling_lowers_the_cost(cells, plan):
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 64, 2)
    costs = {}
    for coupling, epsilon in (("exact", 1.0), ("sinkhorn", 0.05), ("sinkhorn", 1.0), ("random", 1.0)):
        config = replace(TINY, source="control", coupling=coupling, epsilon=epsilon)
        rows, columns = iv.models.FMPCA(plan, cells.var_names, config).couple(x0, x1, 64)
        costs[coupling, epsilon] = float((x0[rows] - x1[columns]).square().sum(1).mean())
    assert costs["exact", 1.0] < costs["sinkhorn", 0.05] < costs["sinkhorn", 1.0] < costs["random", 1.0]


@pytest.mark.slow
def test_a_planted_map_is_found(cells, plan):
    """Cells of each side arrive where A takes that side; with random pairs they come anywhere."""
    control = torch.from_numpy(cells.X[:300])
    truth = planted(cells.X[:300], cells)
    condition = plan.encode(pd.DataFrame({"p": "A", "context": "x"}, index=range(300)))
    errors = {}
    for coupling in ("sinkhorn", "random"):
        config = replace(TINY, source="control", coupling=coupling, num_samples_per_condition=32)
        model = iv.models.FMPCA(plan, cells.var_names, config).fit(cells, config=replace(FIT, steps=200))
        with torch.no_grad():
            moved = model.sample(iv.Batch(condition, source=control), torch.Generator(), FlowSampling()).numpy()
        errors[coupling] = float(np.sqrt(((moved - truth) ** 2).sum(1).mean()))
    assert errors["sinkhorn"] < 0.5 < 3 * errors["sinkhorn"] < errors["random"], errors


def test_bad_settings():
    for field, value in (("source", "cells"), ("coupling", "none"), ("interpl_type", "cubic")):
        with pytest.raises(ValueError, match=f"{field} is '{value}'; expected one of"):
            Config(**{field: value})


# ---- presets ---------------------------------------------------------------------------------------------------------

ROWS = {  # tables 14 and 15
    "srivatsan20": (3072, 0.2, 2, 3, 4, 4, 0.4, "trigonometric", 0.1, 8.18e-5, 1.28e-10, 1024),
    "norman19": (1792, 0.2, 4, 2, 2, 4, 0.4, "trigonometric", 0.01, 1.73e-4, 6.75e-6, 2048),
}


@pytest.mark.parametrize("data", ROWS)
def test_published_presets(data):
    presets = iv.models.FMPCA.PRESETS
    for name in (data, f"ot-{data}"):
        c, f = presets[name].config, presets[name].fit
        layers = (c.n_layers_gene_expression, c.n_layers_conditions, c.n_layers_time, c.n_layers_decoding)
        path = (c.prob_unconditional, c.interpl_type, c.sigma)
        assert (c.hidden_dim, c.dropout, *layers, *path, f.lr, f.weight_decay, f.batch_size) == ROWS[data]
        assert f.clip == 5 and f.accumulate == 1
        assert (c.solver, c.steps, c.n_pcs, c.scale) == ("euler", 100, 50, False)
    ot = presets[f"ot-{data}"].config
    assert (ot.source, ot.coupling, ot.tau_a, ot.tau_b, ot.epsilon) == ("control", "sinkhorn", 1, 1, 1)
    assert ot.num_samples_per_condition == {"srivatsan20": 128, "norman19": 256}[data]

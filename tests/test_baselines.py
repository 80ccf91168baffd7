"""Formula tests of the baselines: known answers on generated cells, and the published formulas by hand."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch.nn import functional as F

import invirtuo as iv
from invirtuo.fit import FitConfig

GENES = [f"g{i}" for i in range(6)]
EFFECT = {
    "control": np.zeros(6),
    "A": np.array([1.0, 0, 0.5, 0, 0, 0]),
    "B": np.array([0, 0.8, 0, -0.6, 0, 0]),
    "A+B": np.array([1.0, 0.8, 0.5, -0.6, 0, 2.0]),  # more than the sum of its parts
}
BASE = {"x": np.full(6, 2.0), "y": np.array([3.0, 2.5, 2.0, 1.8, 1.6, 1.4])}
SIZES = {  # cells of each condition; contexts of unequal size, A+B only in x, B only in x
    ("x", "control"): 20,
    ("x", "A"): 30,
    ("x", "B"): 10,
    ("x", "A+B"): 8,
    ("y", "control"): 15,
    ("y", "A"): 5,
}
FIT = FitConfig(steps=400, batch_size=64, lr=0.02, schedule="cosine", warmup=0, ema=0.0, clip=0.0, precision="fp32",
                accelerator="cpu", progress=False, val_every=0)  # fmt: skip


def make(sizes=SIZES, noise: float = 0.1, strength=None) -> AnnData:
    """Base of the context plus the effect, times the strength of the context, plus noise."""
    rng = np.random.default_rng(0)
    strength = strength or {"x": 1.0, "y": 0.5}
    rows, labels = [], []
    for (context, label), n in sizes.items():
        mean = BASE[context] + EFFECT[label] * strength[context]
        rows.append(np.clip(mean + noise * rng.normal(size=(n, 6)), 0.01, None))
        labels += [(context, label)] * n
    obs = pd.DataFrame(labels, columns=["context", "p"], index=[f"c{i}" for i in range(len(labels))])
    return AnnData(np.concatenate(rows).astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def cells():
    return make()


def plan_of(adata) -> iv.Design:
    return iv.Design.from_adata(adata, perturbation="p", control="control", covariates=["context"])


def ask(*conditions) -> pd.DataFrame:
    return pd.DataFrame(conditions, columns=["context", "p"])


def of(adata, context: str, label: str) -> np.ndarray:
    return adata.X[((adata.obs["context"] == context) & (adata.obs["p"] == label)).to_numpy()]


def delta(adata, context: str, label: str) -> np.ndarray:
    return of(adata, context, label).mean(0) - of(adata, context, "control").mean(0)


def fitted(model, adata, split=None):
    return model(plan_of(adata), adata.var_names).fit(adata, split)


# ---- no change -------------------------------------------------------------------------------------------------------


def test_no_change_gives_training_controls_of_the_context(cells):
    split = pd.Series("train", index=cells.obs_names)
    split.iloc[np.flatnonzero((cells.obs["p"] == "control") & (cells.obs["context"] == "x"))[:5]] = "test"
    model = fitted(iv.models.NoChange, cells, split)
    known = of(cells[(split == "train").to_numpy()], "x", "control")
    rows = {row.tobytes() for row in known}
    predicted = model.predict(ask(("x", "A")), 15).X
    assert {row.tobytes() for row in predicted} == rows  # each once before any is used again
    predicted = model.predict(ask(("x", "A")), 40).X
    _, counts = np.unique(predicted, axis=0, return_counts=True)
    assert len(counts) == 15 and set(counts) == {2, 3}


def test_no_change_shuffles(cells):
    model = fitted(iv.models.NoChange, cells)
    first, second = (model.predict(ask(("x", "A")), 20, seed=seed).X for seed in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(second, axis=0))


# ---- perturbation mean -----------------------------------------------------------------------------------------------


def test_perturbation_mean(cells):
    """Control mean of the context plus the plain mean, over contexts, of the effects."""
    model = fitted(iv.models.PerturbationMean, cells)
    predicted = model.predict(ask(("y", "A"), ("y", "B"), ("y", "A+B"), ("y", "control")), 3)
    control = of(cells, "y", "control").mean(0)
    expected = {
        "A": control + (delta(cells, "x", "A") + delta(cells, "y", "A")) / 2,
        "B": control + delta(cells, "x", "B"),
        "A+B": control + delta(cells, "x", "A+B"),  # seen as a combination elsewhere
        "control": control,
    }
    for label, profile in expected.items():
        np.testing.assert_allclose(of(predicted, "y", label), np.tile(profile, (3, 1)), atol=1e-5)
    np.testing.assert_allclose(expected["A"] - control, 0.75 * EFFECT["A"], atol=0.1)


def test_perturbation_mean_of_an_unseen_combination_is_the_sum(cells, caplog):
    without = cells[(cells.obs["p"] != "A+B").to_numpy()].copy()
    model = fitted(iv.models.PerturbationMean, without)
    with caplog.at_level(logging.INFO):
        predicted = model.predict(ask(("y", "A+B")), 1).X[0]
    parts = (delta(cells, "x", "A") + delta(cells, "y", "A")) / 2 + delta(cells, "x", "B")
    np.testing.assert_allclose(predicted, of(cells, "y", "control").mean(0) + parts, atol=1e-5)
    assert "effects of its parts are added" in caplog.text


def test_perturbation_mean_does_not_count_spellings_twice(cells):
    """A+B and B+A are one perturbation of one context: their cells are pooled."""
    both = cells.copy()
    rows = np.flatnonzero(both.obs["p"] == "A+B")[:2]
    both.obs["p"] = both.obs["p"].astype(str)
    both.obs.iloc[rows, both.obs.columns.get_loc("p")] = "B+A"
    expected = fitted(iv.models.PerturbationMean, cells).predict(ask(("y", "A+B")), 1).X
    predicted = fitted(iv.models.PerturbationMean, both).predict(ask(("y", "A+B")), 1).X
    np.testing.assert_allclose(predicted, expected, atol=1e-5)


def test_perturbation_mean_without_the_part_alone(cells):
    only = cells[cells.obs["p"].isin(["control", "A", "A+B"]).to_numpy()].copy()
    with pytest.raises(ValueError, match="'B' never occurs alone"):
        fitted(iv.models.PerturbationMean, only).predict(ask(("x", "B")), 1)


def test_shifted_cells_keep_the_spread_of_the_controls(cells):
    model = iv.models.PerturbationMean(plan_of(cells), GENES, "shift-cells").fit(cells)
    predicted = model.predict(ask(("x", "B")), 20).X
    effect = delta(cells, "x", "B")
    controls = of(cells, "x", "control")
    expected = np.maximum(controls + effect, 0)
    np.testing.assert_allclose(np.sort(predicted, axis=0), np.sort(expected, axis=0), atol=1e-5)
    assert predicted.std(0).min() > 0.05


def test_shifted_cells_do_not_go_below_zero():
    adata = make(strength={"x": 5.0, "y": 1.0})
    predicted = iv.models.PerturbationMean(plan_of(adata), GENES, "shift-cells").fit(adata).predict(ask(("y", "B")), 15)
    assert predicted.X.min() == 0


# ---- context mean ----------------------------------------------------------------------------------------------------


def test_context_mean(cells):
    """Mean over all perturbed training cells of the context, each cell counted once; controls stay as they are."""
    model = fitted(iv.models.ContextMean, cells)
    predicted = model.predict(ask(("x", "A"), ("x", "B"), ("y", "A+B"), ("x", "control")), 20)
    for context, label in (("x", "A"), ("x", "B"), ("y", "A+B")):
        rows = ((cells.obs["context"] == context) & (cells.obs["p"] != "control")).to_numpy()
        np.testing.assert_allclose(of(predicted, context, label), np.tile(cells.X[rows].mean(0), (20, 1)), atol=1e-5)
    np.testing.assert_array_equal(np.sort(of(predicted, "x", "control"), 0), np.sort(of(cells, "x", "control"), 0))


def test_context_mean_without_perturbed_cells_is_the_control_mean(cells, caplog):
    split = pd.Series("train", index=cells.obs_names)
    split[((cells.obs["context"] == "y") & (cells.obs["p"] != "control")).to_numpy()] = "test"
    model = fitted(iv.models.ContextMean, cells, split)
    with caplog.at_level(logging.INFO):
        predicted = model.predict("test", 2).X
    np.testing.assert_allclose(predicted, np.tile(of(cells, "y", "control").mean(0), (2, 1)), atol=1e-5)
    assert "the context mean is their control mean" in caplog.text


# ---- linear additive -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("use_covariates", [True, False])
def test_linear_additive_by_hand(cells, use_covariates, softplus):
    """Softplus(control + W [perturbation, covariates] + b), and the mean squared error of it."""
    plan = plan_of(cells)
    config = iv.models.LinearAdditive.Config(use_covariates=use_covariates, softplus=softplus)
    model = iv.models.LinearAdditive(plan, GENES, config)
    dataset = iv.CellDataset(cells, plan)
    batch = next(dataset.batches(iv.samplers.pairs, 16))
    weight, bias = model.shift.weight, model.shift.bias
    assert weight.shape == (6, 4 if use_covariates else 2)
    rows = []
    for source, index in zip(batch.source, batch.index.tolist(), strict=True):
        label, context = cells.obs["p"].iloc[index], cells.obs["context"].iloc[index]
        shifted = source + bias + sum(weight[:, "AB".index(part)] for part in label.split("+"))
        if use_covariates:
            shifted = shifted + weight[:, 2 + "xy".index(context)]
        rows.append(F.softplus(shifted) if softplus else shifted)
    expected = torch.stack(rows)
    torch.testing.assert_close(model.sample(batch, torch.Generator(), iv.model.SampleConfig()), expected)
    torch.testing.assert_close(model.loss(batch)["total"], ((expected - batch.target) ** 2).mean())


def test_linear_additive_recovers_additive_effects():
    """Effects that are the same everywhere are found, and a combination that was never seen is their sum."""
    sizes = {key: 30 for key in SIZES if key[1] != "A+B"} | {("y", "B"): 30}
    adata = make(sizes, strength={"x": 1.0, "y": 1.0})
    config = iv.models.LinearAdditive.Config(use_covariates=False, softplus=False)
    plan = plan_of(adata)
    model = iv.models.LinearAdditive(plan, GENES, config).fit(adata, config=FIT)
    w, b = model.shift.weight.detach().numpy(), model.shift.bias.detach().numpy()
    np.testing.assert_allclose(w[:, 0] + b, EFFECT["A"], atol=0.06)
    np.testing.assert_allclose(w[:, 1] + b, EFFECT["B"], atol=0.06)
    predicted = model.predict(ask(("y", "A+B")), 30, precision="fp32").X.mean(0)
    control = of(adata, "y", "control").mean(0)
    np.testing.assert_allclose(predicted - control, w.sum(1) + b, atol=1e-4)


def test_linear_additive_as_published_recovers_means(cells):
    """With softplus and covariates, each trained condition comes out with its mean."""
    adata = make({key: 30 for key in SIZES if key[1] != "A+B"}, strength={"x": 1.0, "y": 1.0})
    model = iv.models.LinearAdditive(plan_of(adata), GENES).fit(adata, config=FIT)
    for context, label in (("x", "A"), ("x", "B"), ("y", "A")):
        predicted = model.predict(ask((context, label)), 30, precision="fp32").X.mean(0)
        np.testing.assert_allclose(predicted, of(adata, context, label).mean(0), atol=0.15)


def test_linear_additive_presets():
    """Best hyperparameters of PerturBench."""
    rows = {  # covariates, learning rate, weight decay, batch size
        "norman19": (False, 4.717e-3, 1.759e-8, 4000),
        "srivatsan20": (True, 7.788e-4, 1.063e-8, 4000),
        "jiang24": (True, 1.421e-3, 1.008e-8, 2000),
    }
    for name, row in rows.items():
        preset = iv.models.LinearAdditive.PRESETS[name]
        assert (preset.config.use_covariates, preset.fit.lr, preset.fit.weight_decay, preset.fit.batch_size) == row
        assert preset.config.softplus

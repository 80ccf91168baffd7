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


def sparse_cells() -> AnnData:
    """Log1p of counts of which many are zero; A doubles the first two genes, B halves the first."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for context, depth in (("x", 1.0), ("y", 1.5)):
        for label, change in (("control", 1.0), ("A", 2.0), ("B", 0.5)):
            rate = depth * np.array([0.4, 0.8, 2.0, 5.0, 0.2, 1.0])
            rate[: 2 if label == "A" else 1] *= change
            rows.append(np.log1p(rng.poisson(rate, (400, 6))))
            labels += [(context, label)] * 400
    obs = pd.DataFrame(labels, columns=["context", "p"], index=[f"c{i}" for i in range(len(labels))])
    return AnnData(np.concatenate(rows).astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.mark.parametrize("model", [iv.models.PerturbationMean, iv.models.Ridge])
def test_moved_cells_keep_their_zeros(model):
    """The mean is that of shifted cells, the share of zeros that of real ones."""
    adata = sparse_cells()
    wanted = ask(("y", "A"))
    moved, shifted = (model(plan_of(adata), GENES, f"{how}-cells").fit(adata).predict(wanted, 800).X
                      for how in ("move", "shift"))  # fmt: skip
    control = of(adata, "y", "control").mean(0)
    effect = shifted.mean(0) - control
    np.testing.assert_allclose(moved.mean(0)[effect > 0], shifted.mean(0)[effect > 0], atol=0.03)
    zeros = [(x == 0).mean(0) for x in (moved, of(adata, "y", "A"), shifted)]
    np.testing.assert_allclose(zeros[0], zeros[1], atol=0.1)
    assert (zeros[2][:2] == 0).all()


def test_fold_change_multiplies_expression_and_keeps_zeros():
    adata = sparse_cells()
    model = fitted(iv.models.FoldChange, adata)
    predicted = model.predict(ask(("y", "A"), ("y", "control")), 400)
    control, changed = of(adata, "y", "control"), of(predicted, "y", "A")
    np.testing.assert_allclose(np.sort(of(predicted, "y", "control"), axis=0), np.sort(control, axis=0), atol=1e-5)
    linear = {name: np.expm1(of(adata, *name)).mean(0) + 0.01 for name in
              [(context, label) for context in "xy" for label in ("control", "A")]}  # fmt: skip
    ratio = np.sqrt(linear["x", "A"] / linear["x", "control"] * linear["y", "A"] / linear["y", "control"])
    np.testing.assert_allclose(np.expm1(changed).mean(0), np.expm1(control).mean(0) * ratio, rtol=1e-4)
    assert np.array_equal((changed == 0).sum(0), (control == 0).sum(0))


def test_magnitude_only_gives_everybody_the_mean_response(cells):
    model, means = (fitted(model, cells) for model in (iv.models.MagnitudeOnly, iv.models.PerturbationMean))
    control = of(cells, "y", "control").mean(0)
    own, predicted = ([x.predict(ask(("y", label)), 1).X[0] - control for label in ("A", "B", "A+B")]
                      for x in (means, model))  # fmt: skip
    direction = np.mean(own, axis=0)
    strength = [effect @ direction / (direction @ direction) for effect in own]
    np.testing.assert_allclose(predicted, np.outer(strength, direction), atol=1e-5)
    assert strength[2] > strength[1] > 0


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


# ---- ridge -----------------------------------------------------------------------------------------------------------

Ridge = iv.models.Ridge


def effects_by_hand(adata, plan):
    """Y: mean over all cells of a perturbation of cell minus control mean of its context; columns A, A+B, B."""
    columns = []
    for label in ("A", "A+B", "B"):
        rows = [(of(adata, c, label), of(adata, c, "control").mean(0)) for c in ("x", "y") if len(of(adata, c, label))]
        columns.append(np.concatenate([cells - control for cells, control in rows]).mean(0))
    return np.stack(columns, 1).astype(float), np.array([[1.0, 0], [1, 1], [0, 1]])


def directions_by_hand(adata, n):
    means = adata.to_df().groupby([adata.obs["context"], adata.obs["p"]]).mean().to_numpy(float)
    return np.linalg.svd(means - means.mean(0), full_matrices=False)[2][:n].T


@pytest.mark.parametrize("own_vectors", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("solver", ["two-sided", "exact"])
def test_ridge_by_hand(cells, solver, center, own_vectors):
    """Equation 43, with and without centring; the exact solver satisfies the normal equation of equation 42."""
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    config = Ridge.Config(penalty=0.3, n_components=3, center=center, solver=solver,
                          gene_vectors=tuple(map(tuple, vectors)) if own_vectors else ())  # fmt: skip
    model = Ridge(plan_of(cells), GENES, config).fit(cells)
    y, e = effects_by_hand(cells, plan_of(cells))
    genes = vectors if own_vectors else directions_by_hand(cells, 3)
    b = y.mean(1) * center
    rest = y - b[:, None]
    left, right = genes.T @ genes, e.T @ e
    slopes = model.slopes.numpy().astype(float)
    if solver == "two-sided":
        k = np.linalg.inv(left + 0.3 * np.eye(len(left))) @ genes.T @ rest @ e @ np.linalg.inv(right + 0.3 * np.eye(2))
        np.testing.assert_allclose(slopes, genes @ k, atol=1e-5)
    else:
        k = np.linalg.lstsq(genes, slopes, rcond=None)[0]
        np.testing.assert_allclose(genes @ k, slopes, atol=1e-5)
        np.testing.assert_allclose(left @ k @ right + 0.3 * k, genes.T @ rest @ e, atol=1e-4)
    predicted = model.predict(ask(("y", "B"), ("y", "A+B"), ("x", "control")), 2)
    for label, code in (("B", [0, 1]), ("A+B", [1, 1])):
        expected = of(cells, "y", "control").mean(0) + genes @ k @ np.array(code) + b
        np.testing.assert_allclose(of(predicted, "y", label), np.tile(expected, (2, 1)), atol=1e-4)
    np.testing.assert_allclose(of(predicted, "x", "control")[0], of(cells, "x", "control").mean(0), atol=1e-5)


def test_exact_ridge_is_the_minimum(cells):
    """Of the squared error of equation 42 plus lambda times the squared K; the two-sided one is not."""
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    y, e = effects_by_hand(cells, plan_of(cells))
    y = y - y.mean(1, keepdims=True)
    objective = {}
    for solver in ("exact", "two-sided"):
        config = Ridge.Config(penalty=0.3, solver=solver, gene_vectors=tuple(map(tuple, vectors)))
        k = np.linalg.lstsq(vectors, Ridge(plan_of(cells), GENES, config).fit(cells).slopes.numpy(), rcond=None)[0]
        objective[solver] = ((y - vectors @ k @ e.T) ** 2).sum() + 0.3 * (k**2).sum()
        for _ in range(20):
            moved = k + 1e-2 * np.random.default_rng(_).normal(size=k.shape)
            assert (
                solver != "exact"
                or ((y - vectors @ moved @ e.T) ** 2).sum() + 0.3 * (moved**2).sum() > objective[solver]
            )
    assert objective["exact"] < objective["two-sided"] - 1e-3


@pytest.mark.parametrize("kernel", ["rbf", "additive"])
def test_kernel_ridge_by_hand(cells, kernel):
    config = Ridge.Config(penalty=0.2, kernel=kernel, center=kernel == "rbf")
    model = Ridge(plan_of(cells), GENES, config).fit(cells)
    seen = [("x", "A", [1, 0]), ("x", "A+B", [1, 1]), ("x", "B", [0, 1]), ("y", "A", [1, 0])]
    y = np.stack([delta(cells, context, label) for context, label, _ in seen])
    control = {context: of(cells, context, "control").mean(0) for context in "xy"}
    s = ((control["x"] - control["y"]) ** 2).sum()

    def k(one, other):
        e, f = np.array(one[2], float), np.array(other[2], float)
        own = e @ f if kernel == "additive" else np.exp(-((e - f) ** 2).sum() / 2)
        return own * np.exp(-((control[one[0]] - control[other[0]]) ** 2).sum() / (2 * s))

    gram = np.array([[k(a, b) for b in seen] for a in seen])
    b = y.mean(0) * (kernel == "rbf")
    dual = np.linalg.solve(gram + 0.2 * np.eye(4), y - b)
    expected = control["y"] + b + np.array([k(("y", "B", [0, 1]), other) for other in seen]) @ dual
    np.testing.assert_allclose(model.predict(ask(("y", "B")), 1).X[0], expected, atol=1e-4)


def test_ridge_recovers_additive_effects():
    """With all directions and next to no penalty, an unseen combination is the sum of its parts (center=False)."""
    adata = make({key: 30 for key in SIZES if key[1] != "A+B"} | {("y", "B"): 30}, strength={"x": 1.0, "y": 1.0})
    for options in ({"n_components": 6}, {"kernel": "additive"}):
        model = Ridge(plan_of(adata), GENES, Ridge.Config(penalty=1e-6, center=False, **options)).fit(adata)
        predicted = model.predict(ask(("y", "A+B")), 1).X[0] - of(adata, "y", "control").mean(0)
        np.testing.assert_allclose(predicted, EFFECT["A"] + EFFECT["B"], atol=0.12)


def test_ridge_shifts_cells(cells):
    profile = fitted(Ridge, cells).predict(ask(("x", "B")), 1).X[0] - of(cells, "x", "control").mean(0)
    predicted = Ridge(plan_of(cells), GENES, "shift-cells").fit(cells).predict(ask(("x", "B")), 20).X
    expected = np.maximum(of(cells, "x", "control") + profile, 0)
    np.testing.assert_allclose(np.sort(predicted, axis=0), np.sort(expected, axis=0), atol=1e-4)


def test_literal_ridge_is_equations_43_and_44(cells):
    """Effects are regressed with their mean b in them, b is added, and every control cell is shifted."""
    y, e = effects_by_hand(cells, plan_of(cells))
    genes = directions_by_hand(cells, 10)
    left, right = (np.linalg.inv(x.T @ x + 0.1 * np.eye(x.shape[1])) for x in (genes, e))
    shift = genes @ left @ genes.T @ y @ e @ right @ np.array([0, 1]) + y.mean(1)
    predicted = Ridge(plan_of(cells), GENES, "literal").fit(cells).predict(ask(("x", "B")), 20).X
    expected = np.maximum(of(cells, "x", "control") + shift, 0)
    np.testing.assert_allclose(np.sort(predicted, axis=0), np.sort(expected, axis=0), atol=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "additive"])
def test_ridge_of_what_was_never_trained_on(cells, kernel):
    plan = plan_of(cells)
    only = cells[cells.obs["p"].isin(["control", "A"]).to_numpy()].copy()
    control = of(cells, "x", "control").mean(0)
    with pytest.raises(ValueError, match=r"perturbation\(s\) B do not occur"):
        Ridge(plan, GENES, Ridge.Config(kernel=kernel)).fit(only).predict(ask(("x", "B")), 1)
    for unseen in ("zero", "mean"):
        model = Ridge(plan, GENES, Ridge.Config(kernel=kernel, unseen=unseen, center=False)).fit(only)
        predicted = model.predict(ask(("x", "B"), ("x", "A"), ("x", "A+B")), 1)
        rows = of(cells, "x", "A"), of(cells, "y", "A")
        shift = [rows[0] - control, rows[1] - of(cells, "y", "control").mean(0)]
        average = np.concatenate(shift).mean(0) if kernel == "linear" else (shift[0].mean(0) + shift[1].mean(0)) / 2
        np.testing.assert_allclose(of(predicted, "x", "B")[0], control + average * (unseen == "mean"), atol=1e-5)
        assert np.abs(of(predicted, "x", "A+B") - control).max() > 0.2  # the part that is known
    vectors = pd.DataFrame({"u": [1.0, 0.8], "v": [0.0, 0.2]}, index=["A", "B"])
    told = iv.Design.from_adata(cells, perturbation="p", control="control", covariates=["context"], features=vectors)
    near = Ridge(told, GENES, Ridge.Config(kernel=kernel, center=False)).fit(only).predict(ask(("x", "B")), 1).X[0]
    assert np.corrcoef(near - control, EFFECT["A"])[0, 1] > 0.95


def test_ridge_messages(cells):
    for field in ("solver", "kernel", "mode", "unseen"):
        with pytest.raises(ValueError, match=f"{field} is 'x'"):
            Ridge.Config(**{field: "x"})
    with pytest.raises(ValueError, match="penalty is 0"):
        Ridge.Config(penalty=0)
    with pytest.raises(ValueError, match="gene_vectors has 2 rows; expected one for each of the 6 genes"):
        Ridge(plan_of(cells), GENES, Ridge.Config(gene_vectors=((1.0,), (2.0,))))
    alone = cells[((cells.obs["p"] == "control") == (cells.obs["context"] == "x")).to_numpy()].copy()
    with pytest.raises(ValueError, match="no perturbed training cells beside control cells"):
        fitted(Ridge, alone)


def test_ridge_with_gene_vectors_can_be_saved(cells, tmp_path):
    config = Ridge.Config(gene_vectors=tuple((float(i), 1.0) for i in range(6)), kernel="linear")
    Ridge(plan_of(cells), GENES, config).fit(cells).save(tmp_path)
    assert iv.load(tmp_path).config == config


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
    torch.testing.assert_close(model.sample(batch, torch.Generator(), iv.verbs.SampleConfig()), expected)
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

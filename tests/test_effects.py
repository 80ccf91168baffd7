"""Predicted effects with intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import invirtuo as iv
from invirtuo.bench import effects
from invirtuo.cli import app
from invirtuo.reports.effects import plot_effects
from invirtuo.verbs.effects import _factor, bounds
from invirtuo.verbs.observed import ObservedMeans


@pytest.fixture(scope="module")
def adata():
    return iv.preprocess.normalize(iv.datasets.toy(n_cells=1200, n_genes=40))


@pytest.fixture(scope="module")
def design(adata):
    return iv.Design.from_adata(adata, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture(scope="module")
def split(adata, design):
    names = design.names(adata.obs)
    return pd.Series("train", adata.obs.index).mask(names == "t_cell|A", "test").mask(names == "b_cell|B", "val")


@pytest.fixture(scope="module")
def model(adata, design, split):
    return iv.models.PerturbationMean(design, adata.var_names, "shift-cells").fit(adata, split)


def test_effects_are_differences_to_the_control_cells(adata, design, model):
    table = effects(model, adata, n_cells=400)
    assert list(table["condition"].unique()) == ["t_cell|A"] and len(table) == 40
    names, x = design.names(adata.obs).to_numpy(), adata.X.toarray()
    control, seen = (x[names == name].mean(0) for name in ("t_cell|control", "t_cell|A"))
    np.testing.assert_allclose(table["control"], control, atol=1e-5)
    np.testing.assert_allclose(table["real"], seen - control, atol=1e-5)
    predicted = model.predict("test", 400).X
    np.testing.assert_allclose(table["effect"], np.asarray(predicted.mean(0)).ravel() - control, atol=1e-5)


def test_intervals_cover_the_calibration_conditions_as_often_as_asked(adata, model):
    for level in (0.5, 0.9):
        table = effects(model, adata, "val", level=level, calibration="val", n_cells=400)
        inside = (table["real"] >= table["low"] - 1e-9) & (table["real"] <= table["high"] + 1e-9)
        assert level - 0.03 <= inside.mean() <= level + 0.06
    wide, narrow = (effects(model, adata, level=level, n_cells=400) for level in (0.9, 0.5))
    assert ((wide["high"] - wide["low"]) >= (narrow["high"] - narrow["low"])).all()


def test_several_models_are_averaged_and_their_spread_widens_intervals(adata, design, split, model):
    other = iv.models.ContextMean(design, adata.var_names).fit(adata, split)
    one, two = effects(model, adata, n_cells=400), effects([model, other], adata, n_cells=400)
    alone = effects(other, adata, n_cells=400)
    np.testing.assert_allclose(two["effect"], (one["effect"] + alone["effect"]) / 2, atol=1e-6)
    agree = (one["effect"] - alone["effect"]).abs().rank()
    width = (two["high"] - two["low"]).rank()
    assert np.corrcoef(agree, width)[0, 1] > 0.5


def test_predict_gives_the_same_intervals_beside_its_cells(adata, model, tmp_path):
    table = effects(model, adata, n_cells=400)
    plain, made = model.predict("test", 400), model.predict("test", 400, effect_level=0.9)
    model.save(tmp_path / "run")
    again = iv.load(tmp_path / "run").predict("test", 400, effect_level=0.9, out=tmp_path / "predicted.h5ad")
    np.testing.assert_array_equal(plain.X, made.X)
    assert "effect" not in plain.varm and list(made.uns["invirtuo"]["conditions"]) == ["t_cell|A"]
    for name, column in (("effect", "effect"), ("effect_low", "low"), ("effect_high", "high")):
        np.testing.assert_allclose(made.varm[name][:, 0], table[column], atol=1e-5)
        np.testing.assert_array_equal(again.varm[name], made.varm[name])


def test_predict_gives_intervals_of_unseen_groups(adata, design):
    known = adata[(adata.obs["cell_type"] != "t_cell").to_numpy()].copy()
    known.obs["cell_type"] = known.obs["cell_type"].cat.remove_unused_categories()
    plan = iv.Design.from_adata(known, perturbation="perturbation", control="control", covariates=["cell_type"])
    split = pd.Series("train", known.obs_names).mask(plan.names(known.obs) == "b_cell|B", "val")
    fit = iv.FitConfig(steps=2, batch_size=16, progress=False)
    config = iv.models.PRiMeFlow.Config(hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=1)
    new = iv.models.PRiMeFlow(plan, known.var_names, config).fit(known, split, fit)
    wanted = pd.DataFrame({"perturbation": ["A"], "cell_type": ["t_cell"]})
    made = new.predict(wanted, 20, controls=adata, effect_level=0.5)
    names = design.names(adata.obs)
    control = adata[(names == "t_cell|control").to_numpy()].X.toarray().mean(0)
    np.testing.assert_allclose(made.varm["effect"][:, 0], made.X.mean(0) - control, atol=1e-5)
    assert (made.varm["effect_low"] <= made.varm["effect_high"]).all()


def test_predict_without_validation_conditions_says_so(adata, design, model):
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        model.predict("test", 5, effect_level=90)
    bare = iv.models.PerturbationMean(design, adata.var_names).fit(adata)
    with pytest.raises(ValueError, match="held out for validation, and there are none"):
        bare.predict(design.conditions(adata.obs), 5, effect_level=0.9)


def test_intervals_are_as_wide_as_errors_are_large():
    """Errors that grow with the effect, half of the genes nearly known: coverage holds for large effects, too."""
    rng, g = np.random.default_rng(0), 4000
    effect = rng.normal(size=(40, g)) * (np.arange(g) % 20 == 0) * 3
    error = rng.normal(size=(40, g)) * (0.02 + 0.3 * np.abs(effect))
    table = pd.DataFrame({"perturbation": [f"p{i}" for i in range(40)], "cell_type": "x"})
    plan = iv.Design.from_adata(
        pd.concat([table, pd.DataFrame({"perturbation": ["control"], "cell_type": ["x"]})]),
        perturbation="perturbation", control="control", covariates=["cell_type"],
    )  # fmt: skip
    seen = ObservedMeans(("x",), np.ones((1, g)), np.ones((1, g)), tuple(plan.names(table)), 1 + effect + error)
    known, new = table.iloc[:20], table.iloc[20:].reset_index(drop=True)
    guess, half = bounds(seen, plan, new, 1 + effect[None, 20:], known, 1 + effect[None, :20], 0.9)
    np.testing.assert_allclose(guess, effect[20:], atol=1e-9)
    inside = np.abs(error[20:]) <= half
    large = np.abs(effect[20:]) > 1
    assert abs(inside.mean() - 0.9) < 0.01 and abs(inside[large].mean() - 0.9) < 0.03
    assert half[large].mean() > 10 * half[effect[20:] == 0].mean()


def test_factor():
    error, scale = np.array([1.0, 2.0, 3.0, 9.0, 5.0]), np.array([1.0, 1.0, 1.0, 1.0, 0.0])
    assert _factor(error, scale, 0.5) == 3.0  # ceil(.5 * 5) = third smallest; the gene that cannot vary is left out
    assert _factor(error, scale, 0.99) == 9.0


def test_without_intervals_and_what_cannot_be(adata, design, split, model):
    assert effects(model, adata, level=None, n_cells=50)["low"].isna().all()
    with pytest.raises(ValueError, match="no calibration conditions have cells"):
        effects(model, adata[(split != "val").to_numpy()], n_cells=50)
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        effects(model, adata, level=90)
    control = design.is_control(adata.obs) & (adata.obs["cell_type"] == "t_cell").to_numpy()
    with pytest.raises(ValueError, match="no control cells of t_cell"):
        effects(model, adata[~control], n_cells=50)
    other = iv.models.ContextMean(design, adata.var_names[:20]).fit(adata, split)
    with pytest.raises(ValueError, match="different genes"):
        effects([model, other], adata)


def test_command_line(adata, model, tmp_path):
    model.save(tmp_path / "run")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out, picture = tmp_path / "effects.csv", tmp_path / "effects.png"
    command = ["effects", str(tmp_path / "cells.h5ad"), "--run", str(tmp_path / "run"), "--out", str(out), "-n", "400"]
    result = CliRunner().invoke(app, [*command, "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out)
    pd.testing.assert_frame_equal(table, effects(model, adata, n_cells=400), check_exact=False, atol=1e-6)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no column real"):
        plot_effects(table.drop(columns="real"), picture)

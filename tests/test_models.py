"""Contract tests of all models, over the registry: a new model is tested by being registered."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import invirtuo as iv
from invirtuo.cells.files import read_h5ad
from invirtuo.cells.samplers import SAMPLERS
from invirtuo.fit import FitConfig, Trainable, validation_losses
from invirtuo.settings import described

pytestmark = pytest.mark.usefixtures("few_pilots")

# those with other verbs: test_count_verbs.py, test_sparse_ode.py
MODELS = {name: kind for name, kind in iv.models.MODELS.items() if kind.verb == "predict"}
SMALL = {  # settings that are small enough to train in seconds; other models are tested with their defaults
    "primeflow": iv.models.PRiMeFlow.Config(
        hidden_dim=32, gene_width=16, n_context=4, cell_width=32, n_blocks=1, n_sinusoids=8, loss_genes=10, steps=6
    ),
    "cpa": iv.models.CPA.Config(width=32, n_latent=8, warmup_steps=2, adversary_width=16, dropout=0.0),
    "sams_vae": iv.models.SAMSVAE.Config(width=32, n_latent=8, dropout=0.0),
    "biolord": iv.models.Biolord.Config(width=32, n_latent=8, dropout=0.0),
    "fm_pca": iv.models.FMPCA.Config(n_pcs=8, hidden_dim=64, steps=4),
    "state_transition": iv.models.StateTransition.Config(set_size=16, hidden_dim=32, n_layers=2, n_heads=4),
    "state_transition pca": iv.models.StateTransition.Config(
        set_size=16, hidden_dim=32, n_layers=2, n_heads=4, space="pca", n_embedding=6, backbone="gpt2", confidence=True,
        decoder_widths=(32, 32), decoder_dropout=0.0
    ),
    "fm_pca ot": iv.models.FMPCA.Config(n_pcs=8, hidden_dim=64, steps=4, source="control"),
    "primeflow unet": iv.models.PRiMeFlow.Config(
        velocity="unet", precondition=False, anchor=False, covariate_scale=1.0, hidden_dim=16, channel_mult=(1, 1, 2),
        num_res_blocks=1, num_heads=2, attention_resolutions=(4,), dropout=0.0, loss_genes=0, steps=4
    ),
    "primeflow mlp": iv.models.PRiMeFlow.Config(
        velocity="mlp", precondition=False, anchor=False, covariate_scale=1.0, hidden_dim=64, loss_genes=0, steps=6
    ),
}  # fmt: skip
CASES = [*MODELS, "primeflow unet", "primeflow mlp", "fm_pca ot", "state_transition pca"]
N_GENES = 14  # needs padding in a U-Net of three levels
FIT = FitConfig(steps=6, batch_size=64, warmup=0, precision="fp32", accelerator="cpu", progress=False, val_every=3)


def experiment():
    """Cells in log space, their design, and a split that holds out A in t cells and A+B in monocytes."""
    cells = iv.preprocess.normalize(iv.datasets.toy(n_cells=360, n_genes=N_GENES))
    design = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    split = iv.splits.hold_out(cells.obs, design, ["t_cell|A", "monocyte|A+B"])
    return cells, design, split


@pytest.fixture(scope="module")
def cells():
    return experiment()[0]


@pytest.fixture(scope="module")
def design():
    return experiment()[1]


@pytest.fixture(scope="module")
def split():
    return experiment()[2]


def new(case: str, design, genes, config=None):
    return MODELS[case.split(maxsplit=1)[0]](design, genes, config if config is not None else SMALL.get(case))


@pytest.fixture(scope="module")
def fitted(cells, design, split):
    """Give fitted models by name; each is fitted once."""
    known = {}

    def find(case: str):
        if case not in known:
            known[case] = new(case, design, cells.var_names).fit(cells, split, config=FIT)
        return known[case]

    return find


def made() -> dict:
    cells, design, _ = experiment()
    return {case: new(case, design, cells.var_names) for case in CASES}


TRAINABLE = [case for case, model in made().items() if any(p.requires_grad for p in model.parameters())]
SOURCED = [case for case, model in made().items() if model.needs_source]
ASKED = pd.DataFrame(
    {"cell_type": ["t_cell", "b_cell", "monocyte", "t_cell"], "perturbation": ["A", "B+C", "A+B", "control"]}
)


def predict(model, conditions=ASKED, n_cells=5, **options):
    return model.predict(conditions, n_cells, **({"precision": "fp32"} | options))


def x_of(adata, cell_type: str, perturbation: str) -> np.ndarray:
    return adata.X[((adata.obs["cell_type"] == cell_type) & (adata.obs["perturbation"] == perturbation)).to_numpy()]


def test_models_show_themselves(cells, design, split):
    model = new("ridge", design, cells.var_names, "kernel")
    assert "preset kernel" in repr(model) and "fitted         no" in str(model)
    assert "t_cell|A" in model.fit(cells, split)._repr_html_()


# ---- construction ----------------------------------------------------------------------------------------------------


def test_names():
    assert all(name == model.name for name, model in MODELS.items())
    assert all(model.__doc__ for model in MODELS.values())
    assert {model.sampler for model in MODELS.values()} <= set(SAMPLERS)


@pytest.mark.parametrize("name", MODELS)
def test_default_construction_and_presets(name, design, cells):
    with torch.device("meta"):
        model = MODELS[name](design, cells.var_names)
        assert isinstance(model.config, MODELS[name].Config)
        for preset, settings in MODELS[name].PRESETS.items():
            made = MODELS[name](design, cells.var_names, preset)
            assert made.config == settings.config and made.fit_config == settings.fit and made.preset == preset
            assert settings.source
    assert not model.training
    json.dumps(asdict(model.config))


@pytest.mark.parametrize("name", [name for name, kind in iv.models.MODELS.items() if name != "sparse_ode"])
def test_a_config_of_ones_own_is_fitted_as_the_default(name):
    """Another width, say, must not bring back another learning rate, or a fit that does not stop early."""
    kind = iv.models.MODELS[name]
    default = kind.preset_of(None)
    known = [preset.config for preset in kind.PRESETS.values()]
    numbers = [field.name for field in fields(kind.Config) if isinstance(getattr(default.config, field.name), float)]
    for field in numbers:
        changed = replace(default.config, **{field: 0.987 * getattr(default.config, field)})
        assert changed in known or kind.preset_of(changed).fit == default.fit


@pytest.mark.parametrize("name", MODELS)
def test_configs_are_frozen_and_described(name):
    config = MODELS[name].Config
    assert [each.name for each in described(config)] == [field.name for field in fields(config)]
    for field in fields(config):
        assert f"\n{field.name} : " in config.__doc__
        with pytest.raises(AttributeError):
            setattr(config(), field.name, None)


@pytest.mark.parametrize("name", MODELS)
def test_wrong_configs_are_refused(name, design, cells):
    with pytest.raises(ValueError, match="has no preset 'nonsense'; known"):
        MODELS[name](design, cells.var_names, "nonsense")
    with pytest.raises(ValueError, match="config is a dict"):
        MODELS[name](design, cells.var_names, {"width": 3})
    with pytest.raises(ValueError, match="not unique"):
        MODELS[name](design, ["g", "g"])


@pytest.mark.parametrize("case", CASES)
def test_construction_leaves_the_global_state_to_itself(case, design, cells):
    """Same global seed, same first weights."""
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(new(case, design, cells.var_names).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRAINABLE)
def test_loss_is_finite_and_every_parameter_gets_a_gradient(case, cells, design):
    """From the second step on: layers that begin at zero hide others in the first one."""
    torch.manual_seed(0)
    model = new(case, design, cells.var_names)
    dataset = iv.CellDataset(cells, design)
    model.prepare(dataset)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = dict.fromkeys(dict(model.named_parameters()), False)
    for epoch in range(2):
        for step, batch in enumerate(dataset.batches(SAMPLERS[model.sampler], 64, seed=epoch)):
            losses = model.update(batch, step)
            assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
            optimizer.zero_grad()
            losses["total"].backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    assert torch.isfinite(parameter.grad).all(), name
                    seen[name] |= bool(parameter.grad.any())
            optimizer.step()
    assert [name for name, reached in seen.items() if not reached] == []


@pytest.mark.parametrize("case", TRAINABLE)
def test_fit_lowers_the_loss(case, cells, design):
    """Of four cells, one for each condition, in 80 steps; judged with the same draws before and after."""
    groups = design.names(cells.obs).to_numpy()
    rows = [np.flatnonzero(groups == f"b_cell|{label}")[0] for label in ("control", "A", "B", "A+C")] * 8
    few = AnnData(cells.X[rows], obs=cells.obs.iloc[rows].reset_index(drop=True).rename(str), var=cells.var[[]])
    model = new(case, design, cells.var_names)
    dataset = iv.CellDataset(few, design)
    dataset.split[:] = "val"  # judge on the training cells themselves
    config = replace(FIT, steps=80, batch_size=32, lr=1e-2, ema=0.0, clip=1.0, val_every=0)
    model.prepare(iv.CellDataset(few, design))
    before = validation_losses(model, dataset, config)["total"]
    model.fit(few, config=config)
    after = validation_losses(model, dataset, config)["total"]
    assert after < 0.7 * before


@pytest.mark.parametrize("case", CASES)
def test_fit_returns_the_model_and_does_not_write_to_the_data(case, cells, design, split):
    adata = cells.copy()
    x = [part.tobytes() for part in (adata.X.data, adata.X.indices, adata.X.indptr)]
    obs, uns, labels = adata.obs.copy(deep=True), copy.deepcopy(dict(adata.uns)), split.copy(deep=True)
    model = new(case, design, adata.var_names)
    assert model.fit(adata, split, config=replace(FIT, steps=2)) is model
    predict(model)
    if model.needs_source:
        predict(model, controls=adata)
    assert [part.tobytes() for part in (adata.X.data, adata.X.indices, adata.X.indptr)] == x
    pd.testing.assert_frame_equal(adata.obs, obs)
    pd.testing.assert_series_equal(split, labels)
    assert dict(adata.uns) == uns
    assert isinstance(model.history, pd.DataFrame)
    assert not model.training


@pytest.mark.parametrize("case", CASES)
def test_without_covariates(case, cells):
    plain = iv.Design.from_adata(cells, perturbation="perturbation", control="control")
    model = new(case, plain, cells.var_names).fit(cells, config=replace(FIT, steps=2))
    assert predict(model, pd.DataFrame({"perturbation": ["A", "A+B"]})).shape == (10, N_GENES)


@pytest.mark.parametrize("case", CASES)
def test_dose_and_time(case, cells):
    timed = cells.copy()
    timed.obs["dose"] = np.where(timed.obs["perturbation"] == "control", 0.0, 1.0 + 9.0 * (np.arange(360) // 9 % 2))
    timed.obs["hours"] = np.arange(360) // 18 % 2
    design = iv.Design.from_adata(timed, perturbation="perturbation", control="control", covariates=["cell_type"],
                                  dose="dose", time="hours")  # fmt: skip
    model = new(case, design, cells.var_names).fit(timed, config=replace(FIT, steps=2))
    conditions = design.conditions(timed.obs).iloc[[0, 5]]
    predicted = predict(model, conditions)
    assert predicted.shape == (10, N_GENES) and np.isfinite(predicted.X).all()
    pd.testing.assert_frame_equal(
        predicted.obs[design.columns].drop_duplicates().reset_index(drop=True).astype(str),
        conditions.reset_index(drop=True).astype(str),
    )


@pytest.mark.parametrize("case", CASES)
def test_genes_in_another_order_are_sorted(case, cells, design, split, fitted):
    """The model keeps its order of genes whatever the order (or surplus) of the data."""
    wider = cells[:, ::-1].copy()
    model = new(case, design, cells.var_names).fit(wider, split, config=FIT)
    assert model.genes == list(cells.var_names)
    np.testing.assert_allclose(predict(model).X, predict(fitted(case)).X, atol=1e-5)


# ---- what a class declares is true -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", iv.models.MODELS)
def test_what_fitting_is_told_of_a_model(name):
    """By flags, not by looking which methods there are."""
    kind = iv.models.MODELS[name]
    assert kind.has_proximal_step == (kind.proximal_step is not Trainable.proximal_step)
    assert kind.has_unused_parameters or kind.update is Trainable.update


def test_a_class_that_samples_predicts():
    with pytest.raises(TypeError, match="Shift writes `sample`; derive it from invirtuo.PerturbationModel"):
        type("Shift", (iv.Model,), {"name": "shift", "sample": lambda *_: None})
    assert not hasattr(iv.Model, "predict") and not hasattr(iv.Model, "sample")


@pytest.mark.parametrize("case", [case for case in CASES if MODELS[case.split(maxsplit=1)[0]].takes_features])
def test_control_conditions_are_controls_in_their_features_too(case, cells, monkeypatch):
    """A network is told of perturbations by features, if there are some; a record in which they disagree lies."""
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(3, 4)), index=["A", "B", "C"])
    columns = {"perturbation": "perturbation", "control": "control", "covariates": ["cell_type"]}
    design = iv.Design.from_adata(cells, **columns, features=features)
    made = []
    monkeypatch.setattr(iv.Condition, "__init__", noting(iv.Condition.__init__, made))
    new(case, design, cells.var_names).fit(cells, config=FIT).predict(ASKED, 5)
    assert made
    assert all(not condition.code[condition.is_control].any() for condition in made)


def noting(method, made: list):
    """The constructor of a record, which notes what it makes."""

    def init(self, *arguments, **named):
        method(self, *arguments, **named)
        made.append(self)

    return init


# ---- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_predicted_cells(case, cells, design, fitted):
    predicted = predict(fitted(case))
    assert predicted.var_names.tolist() == cells.var_names.tolist()
    assert predicted.X.dtype == np.float32 and predicted.shape == (20, N_GENES)
    assert list(predicted.obs.columns) == design.columns == ["cell_type", "perturbation"]
    assert predicted.obs_names.is_unique
    assert all(isinstance(predicted.obs[column].dtype, pd.CategoricalDtype) for column in design.columns)
    expected = ASKED.loc[ASKED.index.repeat(5)].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        predicted.obs.astype(str).reset_index(drop=True), expected[design.columns].astype(str)
    )
    assert np.isfinite(predicted.X).all()
    facts = predicted.uns["invirtuo"]
    assert facts["model"] == case.split(maxsplit=1)[0] and facts["seed"] == 0 and facts["control"] == "control"
    assert {"config", "version", "data_hash", "sampling"} <= set(facts)


@pytest.mark.parametrize("case", CASES)
def test_predicted_cells_can_be_written_and_scored(case, cells, design, fitted, tmp_path):
    predicted = predict(fitted(case), "test")
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    again = read_h5ad(tmp_path / "predicted.h5ad")
    np.testing.assert_array_equal(again.X, predicted.X)
    scores = iv.evaluate(predicted, cells, design, metrics=["rmse_mean"])
    assert set(scores["condition"]) == {"t_cell|A", "monocyte|A+B"} and np.isfinite(scores["value"]).all()


@pytest.mark.parametrize("case", CASES)
def test_held_out_conditions_by_name(case, design, fitted):
    predicted = predict(fitted(case), "test", 3)
    assert design.names(predicted.obs).value_counts().to_dict() == {"t_cell|A": 3, "monocyte|A+B": 3}
    with pytest.raises(ValueError, match="held out no conditions for 'val'"):
        predict(fitted(case), "val")
    with pytest.raises(ValueError, match="'train'; expected a DataFrame or one of val, test"):
        predict(fitted(case), "train")


def test_validation_conditions_by_name(cells, design, split):
    split = split.replace({"test": "val"})
    model = new("no_change", design, cells.var_names).fit(cells, split)
    assert set(design.names(predict(model, "val").obs)) == {"t_cell|A", "monocyte|A+B"}


@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_cells(case, fitted):
    model = fitted(case)
    first = predict(model)
    torch.randn(3)
    np.testing.assert_array_equal(predict(model).X, first.X)
    other = predict(model, seed=1)
    generative = not np.array_equal(other.X, first.X)
    assert generative == (not model.deterministic)


@pytest.mark.parametrize("case", CASES)
def test_cells_do_not_depend_on_batches_or_company(case, fitted):
    """Not on how many cells are in the network at once, nor on which other conditions are asked for, in any order."""
    model = fitted(case)
    whole = predict(model)
    for size in (1, 3, 1000):
        np.testing.assert_allclose(predict(model, batch_size=size).X, whole.X, atol=2e-5, rtol=1e-5)
    for i, row in ASKED.iterrows():
        alone = predict(model, ASKED.iloc[[i]])
        np.testing.assert_allclose(alone.X, x_of(whole, row["cell_type"], row["perturbation"]), atol=2e-5, rtol=1e-5)
    backwards = predict(model, ASKED[::-1].assign(other=1))
    np.testing.assert_allclose(x_of(backwards, "t_cell", "A"), x_of(whole, "t_cell", "A"), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_condition_once_and_any_number_of_cells(case, fitted):
    assert predict(fitted(case), pd.concat([ASKED, ASKED]), 1).n_obs == 4
    assert predict(fitted(case), ASKED[:1], 200).n_obs == 200


@pytest.mark.parametrize("case", CASES)
def test_clamp(case, fitted):
    free = predict(fitted(case)).X
    middle = float(free.mean())
    np.testing.assert_array_equal(predict(fitted(case), clamp_min=middle).X, np.maximum(free, middle))
    assert (free < middle).any()


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_close_to_fp32(case, fitted):
    full, low = predict(fitted(case), n_cells=50), predict(fitted(case), n_cells=50, precision="bf16")
    assert low.X.dtype == np.float32
    np.testing.assert_allclose(low.X.mean(0), full.X.mean(0), atol=0.1)
    assert {v.dtype for v in fitted(case).state_dict().values() if v.is_floating_point()} <= {torch.float32}


@pytest.mark.parametrize("case", SOURCED)
def test_given_controls_are_used(case, cells, fitted):
    """The expression of the given control cells reaches the prediction."""
    model = fitted(case)
    given = cells[(cells.obs["perturbation"] == "control").to_numpy()].copy()
    given.X = np.full(given.shape, 3.3, np.float32)
    changed = predict(model, ASKED.iloc[[3]], controls=given)
    if case in ("perturbation_mean", "magnitude_only", "ridge"):  # the profile comes from the training means
        np.testing.assert_array_equal(changed.X, predict(model, ASKED.iloc[[3]]).X)
    else:
        assert not np.allclose(changed.X, predict(model, ASKED.iloc[[3]]).X)
    with pytest.raises(ValueError, match="no control cells for the covariates 't_cell'"):
        predict(model, ASKED[:1], controls=given[(given.obs["cell_type"] != "t_cell").to_numpy()])


@pytest.mark.parametrize("case", CASES)
def test_groups_that_are_known_by_their_controls(case, cells, fitted):
    """A cell type that no fit saw is predicted from its control cells by models that know no more of cell types."""
    model = fitted(case)
    old = cells[((cells.obs["perturbation"] == "control") & (cells.obs["cell_type"] == "t_cell")).to_numpy()]
    new = old.copy()
    new.obs["cell_type"] = "neuron"
    asked = ASKED[ASKED["cell_type"] == "t_cell"].iloc[[0]]
    if not model.groups_by_controls:
        with pytest.raises(ValueError, match="neuron|leave controls= out"):
            predict(model, asked.assign(cell_type="neuron"), controls=new)
        return
    found = predict(model, asked.assign(cell_type="neuron"), controls=new)
    assert set(found.obs["cell_type"]) == {"neuron"}
    alike = predict(model, asked, controls=old)
    np.testing.assert_allclose(found.X.mean(), alike.X.mean(), rtol=0.2)
    assert "neuron" not in model.design.covariates["cell_type"]


@pytest.mark.parametrize(
    ("name", "told_nothing"),
    [
        ("fm_pca", {"source": "control", "use_covariates": False, "n_pcs": 8, "steps": 4, "hidden_dim": 16}),
        ("cpa", {"use_covariates": False, "width": 16}),
        ("linear_additive", {"use_covariates": False}),
    ],
)
def test_networks_that_are_not_told_of_covariates_know_groups_by_controls(name, told_nothing, cells, design, split):
    config = MODELS[name].Config(**told_nothing)
    model = new(name, design, cells.var_names, config).fit(cells, split, config=replace(FIT, steps=2))
    test_groups_that_are_known_by_their_controls(name, cells, lambda _: model)
    assert model.groups_by_controls


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_predict_before_fit(case, cells, design):
    with pytest.raises(ValueError, match="is not fitted yet; call fit"):
        new(case, design, cells.var_names).predict(ASKED)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"perturbation": "Z"}, "'Z'.*known"),
        ({"perturbation": "A+Z"}, "'Z'.*known"),
        ({"cell_type": "neuron"}, "neuron"),
        ({"cell_type": None}, "missing"),
    ],
)
def test_unknown_conditions(case, change, words, fitted):
    with pytest.raises(ValueError, match=words):
        predict(fitted(case), ASKED.assign(**change))


@pytest.mark.parametrize("case", CASES)
def test_bad_requests(case, fitted):
    model = fitted(case)
    with pytest.raises(ValueError, match="empty"):
        predict(model, ASKED[:0])
    with pytest.raises(ValueError, match="'cell_type' is not in the table"):
        predict(model, ASKED[["perturbation"]])
    with pytest.raises(ValueError, match="n_cells is 0"):
        predict(model, n_cells=0)
    with pytest.raises(ValueError, match="precision is 'fp16'"):
        predict(model, precision="fp16")
    with pytest.raises(ValueError, match="batch_size is 0"):
        predict(model, batch_size=0)
    with pytest.raises(ValueError, match="conditions is a dict; expected a DataFrame"):
        predict(model, ASKED.to_dict("list"))


@pytest.mark.parametrize("case", CASES)
def test_labels_that_were_never_trained(case, cells, design):
    """Known to the Design, but not among the training cells."""
    without = iv.splits.hold_out(cells.obs, design, [{"perturbation": p} for p in ("C", "A+C", "B+C")])
    model = new(case, design, cells.var_names).fit(cells, without, config=replace(FIT, steps=1, val_every=0))
    with pytest.raises(ValueError, match=r"perturbation\(s\) C do not occur in the training cells"):
        predict(model, pd.DataFrame({"cell_type": ["t_cell"], "perturbation": ["C"]}))
    only = pd.Series(np.where(cells.obs["cell_type"] == "b_cell", "train", "test"), index=cells.obs_names)
    model = new(case, design, cells.var_names).fit(cells, only, config=replace(FIT, steps=1, val_every=0))
    with pytest.raises(ValueError, match="covariate 'cell_type': t_cell do not occur in the training cells"):
        predict(model, ASKED[:1])


@pytest.mark.parametrize("case", CASES)
def test_bad_data(case, cells, design):
    model = new(case, design, cells.var_names)
    with pytest.raises(ValueError, match=f"1 of the model's {N_GENES} genes are not in the data: gene_0"):
        model.fit(cells[:, 1:], config=FIT)
    counts = cells.copy()
    counts.X = counts.layers["counts"]
    with pytest.raises(ValueError, match="raw counts.*expected log1p"):
        model.fit(counts, config=FIT)
    with pytest.raises(ValueError, match="config is a str; expected a FitConfig"):
        model.fit(cells, config="default")
    with pytest.raises(ValueError, match="does not name every one"):
        model.fit(cells, pd.Series(["train"]), config=FIT)


# ---- saving ----------------------------------------------------------------------------------------------------------

FILES = ["card.json", "config.json", "design.json", "history.csv", "transforms.npz", "weights.safetensors"]


@pytest.mark.parametrize("case", CASES)
def test_save_and_load(case, fitted, tmp_path):
    model = fitted(case)
    model.save(tmp_path / "deep" / "run")
    again = iv.load(tmp_path / "deep" / "run")
    assert type(again) is type(model) and not again.training
    assert sorted(path.name for path in (tmp_path / "deep" / "run").iterdir()) == FILES
    assert again.config == model.config and again.design == model.design and again.genes == model.genes
    assert again.card == json.loads(json.dumps(model.card))
    first, second = predict(model), predict(again)
    np.testing.assert_array_equal(second.X, first.X)
    assert second.uns["invirtuo"] == first.uns["invirtuo"]
    np.testing.assert_array_equal(predict(again, "test").X, predict(model, "test").X)
    pd.testing.assert_frame_equal(again.history, model.history, check_dtype=False)
    again.save(tmp_path / "deep" / "run", overwrite=True)  # over itself
    np.testing.assert_array_equal(predict(iv.load(tmp_path / "deep" / "run")).X, first.X)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_pickled(case, fitted, tmp_path):
    fitted(case).save(tmp_path)
    with np.load(tmp_path / "transforms.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    for path in tmp_path.iterdir():
        start = path.read_bytes()[:2]
        assert start[:1] != b"\x80" or path.suffix == ".safetensors", path  # a pickle begins with 0x80
        assert start != b"PK" or path.suffix == ".npz", path


@pytest.mark.parametrize("case", CASES)
def test_unfitted_models_can_be_saved(case, cells, design, tmp_path):
    new(case, design, cells.var_names).save(tmp_path)
    with pytest.raises(ValueError, match="is not fitted yet"):
        iv.load(tmp_path).predict(ASKED)


@pytest.mark.parametrize("preset", ["small"])
def test_preset_names_are_kept(preset, cells, design, tmp_path):
    iv.models.PRiMeFlow(design, cells.var_names, preset).save(tmp_path)
    assert iv.load(tmp_path).preset == preset


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for case in ("linear_additive", "primeflow"):
        fitted(case).save(folder / case)
    return folder


@pytest.mark.parametrize("case", ["linear_additive", "primeflow"])
@pytest.mark.parametrize("file", [name for name in FILES if name != "history.csv"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_damaged_folders(case, file, damage, saved, tmp_path):
    folder = shutil.copytree(saved / case, tmp_path / "run")
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x00\xff" * 50}[damage])
    with pytest.raises(ValueError, match=file):
        iv.load(folder)


def rewrite(path, change) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda f: f.update(model="nobody"), "saved 'nobody'; this version knows"),
        ("config.json", lambda f: f.pop("genes"), "config.json"),
        ("config.json", lambda f: f["config"].update(colour="red"), "unknown field.*colour"),
        ("config.json", lambda f: f["genes"].append("one more"), "weights.safetensors"),
        ("design.json", lambda f: f.pop("perturbations"), "design.json"),
        ("design.json", lambda f: f.update(perturbations=["A", "B"]), "design.json is not the file that was saved"),
    ],
)
def test_folders_that_contradict_themselves(file, change, message, saved, tmp_path):
    folder = shutil.copytree(saved / "linear_additive", tmp_path / "run")
    rewrite(folder / file, change)
    with pytest.raises(ValueError, match=message):
        iv.load(folder)


def test_control_cells_with_indices_out_of_bounds(saved, tmp_path):
    """Such a matrix must not be used: it reads memory that is not its own."""
    folder = shutil.copytree(saved / "linear_additive", tmp_path / "run")
    with np.load(folder / "transforms.npz") as file:
        arrays = dict(file)
    name = next(name for name in arrays if name.endswith("indices"))
    arrays[name] = arrays[name] + 10_000
    np.savez(folder / "transforms.npz", **arrays)
    with pytest.raises(ValueError, match=r"transforms\.npz"):
        iv.load(folder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="holds no saved model"):
        iv.load(tmp_path)
    with pytest.raises(ValueError, match="holds no saved model"):
        iv.load(tmp_path / "nowhere")


def test_saving_over_a_file(fitted, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        fitted("no_change").save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("case", [case for case in CASES if MODELS[case.split()[0]].takes_features])
def test_features_predict_a_perturbation_that_was_never_trained_on(case, cells):
    vectors = pd.DataFrame({"x": [1.0, 0.0, 1.0, 0.9], "y": [0.0, 1.0, 1.0, 0.1]}, index=["A", "B", "C", "D"])
    design = iv.Design.from_adata(
        cells, perturbation="perturbation", control="control", covariates=["cell_type"], features=vectors
    )
    wanted = pd.DataFrame({"perturbation": ["D", "B"], "cell_type": "b_cell"})
    model = new(case, design, cells.var_names).fit(cells, config=replace(FIT, steps=20, lr=1e-2))
    d, b = (predict(model, wanted.iloc[[i]]).X.mean(0) for i in (0, 1))
    assert np.isfinite(d).all()
    assert not np.allclose(d, b, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_without_features_an_unseen_perturbation_is_an_error(case, cells, design):
    few = cells[cells.obs["perturbation"].isin(["control", "A"]).to_numpy()].copy()
    model = new(case, design, cells.var_names).fit(few, config=replace(FIT, steps=2))
    with pytest.raises(ValueError, match=r"do not occur in the training cells.*features= of Design.from_adata"):
        predict(model, pd.DataFrame({"perturbation": ["B"], "cell_type": ["b_cell"]}))


# ---- the model that comes with the package ---------------------------------------------------------------------------


def test_a_fitted_model_comes_along(tmp_path):
    """Small, by its name, with conditions that it never saw; better than leaving control cells as they are."""
    model = iv.load("kang-primeflow")
    folder = Path(iv.__file__).parent / "data" / "kang-primeflow"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    assert str(Path.home()) not in (folder / "card.json").read_text() + (folder / "config.json").read_text()
    cells = iv.preprocess.normalize(iv.datasets.load("kang"))[:, model.genes]
    predicted = model.predict("test", 50, effect_level=0.9)
    control = cells[model.design.is_control(cells.obs)]
    shown = {}
    for kind in ("B cell", "CD14 monocyte"):
        real = cells[((cells.obs["cell_type"] == kind) & (cells.obs["perturbation"] == "IFN-beta")).to_numpy()]
        own = predicted[(predicted.obs["cell_type"] == kind).to_numpy()]
        before = control[(control.obs["cell_type"] == kind).to_numpy()]
        shown[kind] = [float(np.linalg.norm(x.X.mean(0) - real.X.mean(0))) for x in (own, before)]
    assert all(found < 0.6 * unchanged for found, unchanged in shown.values()), shown
    assert predicted.varm["effect_low"].shape == (len(model.genes), 2)

    # another type, of which control cells are known alone
    other = control[(control.obs["cell_type"] == "B cell").to_numpy()].copy()
    other.obs["cell_type"] = "plasma cell"
    assert model.predict("plasma cell|IFN-beta", 10, controls=other, output="counts").n_obs == 10

    # a folder of that name comes first
    with pytest.raises(ValueError, match="holds no saved model .*kang-primeflow"):
        iv.load(tmp_path / "nothing")

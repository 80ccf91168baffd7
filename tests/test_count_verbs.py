"""Contract tests of all generators of counts, over the registry, and of their verbs, from Python and from the shell."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import anndata as ad
import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from scipy import sparse

import invirtuo as iv
from invirtuo.fit import FitConfig
from invirtuo.verbs.labels import rare_counts

GENERATORS = {name: kind for name, kind in iv.models.MODELS.items() if kind.verb == "generate"}
SMALL = {
    "cfgen": iv.models.CFGen.Config(hidden_rna=(32, 16), n_latent=6, hidden=32, embedding=16, n_blocks=2, steps=4),
    "cellflow_counts": iv.models.CellFlowCounts.Config(
        hidden_encoder=(32, 32), hidden=32, label_embedding=12, embedding=16, n_blocks=2, steps=4
    ),
}
FLOWS = ["cfgen", "cellflow_counts"]
FIT = FitConfig(steps=16, batch_size=64, warmup=0, optimizer="adamw", precision="fp32", accelerator="cpu",
                progress=False, val_every=4)  # fmt: skip
N_GENES = 20


def atlas(n: int = 300) -> ad.AnnData:
    """Counts of three cell types of two donors; one gene is never seen."""
    cells = iv.datasets.toy(n_cells=n, n_genes=N_GENES)
    x = cells.X.toarray()
    x[:, 3] = 0
    obs = cells.obs[["cell_type"]].assign(donor=np.where(np.arange(n) % 3, "d1", "d2"), other=np.arange(n))
    return ad.AnnData(sparse.csr_matrix(x), obs=obs, var=cells.var[[]])


def new(name: str, design, genes, config=None):
    return GENERATORS[name](design, genes, config if config is not None else SMALL.get(name))


@pytest.fixture(scope="module")
def cells():
    return atlas()


@pytest.fixture(scope="module")
def design(cells):
    return iv.Design.from_adata(cells, covariates=["cell_type", "donor"])


@pytest.fixture(scope="module")
def split(cells):
    part = np.where(
        np.arange(cells.n_obs) % 10 == 0, "test", np.where(np.arange(cells.n_obs) % 10 == 1, "val", "train")
    )
    return pd.Series(part, index=cells.obs_names)


@pytest.fixture(scope="module")
def fitted(cells, design, split):
    known = {}

    def find(name):
        if name not in known:
            known[name] = new(name, design, cells.var_names).fit(cells, split, FIT)
        return known[name]

    return find


def same(a: ad.AnnData, b: ad.AnnData) -> bool:
    return a.shape == b.shape and not (a.X != b.X).nnz and a.obs.equals(b.obs)


# ---- construction and training ---------------------------------------------------------------------------------------


def test_there_are_generators():
    assert {"cfgen", "cellflow_counts", "independent_nb"} <= set(GENERATORS)


@pytest.mark.parametrize("name", GENERATORS)
def test_default_construction_and_presets(name, design, cells):
    with torch.device("meta"):
        for preset, settings in GENERATORS[name].PRESETS.items():
            made = GENERATORS[name](design, cells.var_names, preset)
            assert made.config == settings.config and made.fit_config == settings.fit and settings.source
    config = GENERATORS[name].Config
    assert config.__doc__ and json.dumps(asdict(config()))
    for field in fields(config):
        with pytest.raises(AttributeError):
            setattr(config(), field.name, None)


@pytest.mark.parametrize("name", FLOWS)
def test_every_parameter_gets_a_gradient(name, cells, design):
    torch.manual_seed(0)
    model = new(name, design, cells.var_names)
    dataset = iv.CellDataset(cells, design)
    model.prepare(dataset)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = dict.fromkeys(dict(model.named_parameters()), False)
    for epoch in range(2):
        for step, batch in enumerate(dataset.batches(iv.samplers.cells, 64, seed=epoch)):
            losses = model.update(batch, step)
            assert all(torch.isfinite(value) and value.ndim == 0 for value in losses.values())
            optimizer.zero_grad()
            losses["total"].backward()
            for key, parameter in model.named_parameters():
                seen[key] |= parameter.grad is not None and bool(parameter.grad.any())
            optimizer.step()
    assert [key for key, reached in seen.items() if not reached] == []


@pytest.mark.parametrize("name", FLOWS)
def test_stages_train_their_own_parameters(name, cells, design, split):
    """The budget is divided; the flow leaves the autoencoder as it is; the history says which stage a row is of."""
    model = new(name, design, cells.var_names)
    plans = model.stages(FIT)
    assert list(plans) == ["autoencoder", "flow"] and sum(plan.steps for plan in plans.values()) == FIT.steps
    assert plans["autoencoder"].steps == round(FIT.steps * model.config.autoencoder_share)
    first = {k: v.clone() for k, v in new(name, design, cells.var_names).state_dict().items()}
    seen = {}

    class Spy(lightning.Callback):
        def on_train_end(self, trainer, module):
            seen[module.model.stage] = {k: v.clone() for k, v in module.model.state_dict().items()}

    model.fit(cells, split, replace(FIT, ema=0.0, keep="last"), callbacks=[Spy()])
    assert set(seen) == {"autoencoder", "flow"} and model.stage == ""
    for key, value in seen["autoencoder"].items():
        if key.startswith("autoencoder."):
            assert torch.equal(value, seen["flow"][key]), key
    moved = [k for k in first if k.startswith("flow.") and not torch.equal(seen["autoencoder"][k], seen["flow"][k])]
    assert moved
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.history.groupby("stage")["step"].max().to_dict() == {s: plan.steps for s, plan in plans.items()}


@pytest.mark.parametrize("name", FLOWS)
def test_latent_vectors_are_standardised_on_training_cells(name, fitted, cells, split):
    model = fitted(name)
    z = torch.from_numpy(model.embed(cells[(split == "train").to_numpy()]).X)
    torch.testing.assert_close(z.mean(dim=0), model.latent_mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z.std(dim=0, correction=0), model.latent_sd, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", GENERATORS)
def test_fit_does_not_write_to_the_data(name, cells, design, split):
    adata, labels = cells.copy(), split.copy(deep=True)
    before = copy.deepcopy(adata)
    model = new(name, design, adata.var_names)
    assert model.fit(adata, split, FIT) is model and not model.training
    model.generate(10)
    assert same(adata, before) and labels.equals(split) and not adata.layers and not adata.obsm


@pytest.mark.parametrize("name", GENERATORS)
def test_held_out_cells_have_no_influence(name, cells, design, split):
    spoiled = cells.copy()
    x = spoiled.X.toarray()
    test = (split == "test").to_numpy()
    x[test] = np.random.default_rng(0).poisson(30, x[test].shape)
    spoiled.X = sparse.csr_matrix(x)
    a, b = (new(name, design, cells.var_names).fit(data, split, FIT) for data in (cells, spoiled))
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())
    assert a.card["labels"] == b.card["labels"] and same(a.generate(20), b.generate(20))


@pytest.mark.parametrize("name", FLOWS)
def test_without_validation_cells_some_training_cells_are_set_aside(name, cells, design):
    model = new(name, design, cells.var_names).fit(cells, config=FIT)
    assert model.history["val_total"].notna().any()
    assert model.card["n_cells"] == {"train": 300, "val": 0, "test": 0}
    assert sum(row["n_cells"] for row in model.card["labels"]) == 300
    config = replace(SMALL[name], val_share=0.0)
    assert "val_total" not in new(name, design, cells.var_names, config).fit(cells, config=FIT).history


def resumable(name: str, folder, *, resume: bool, fail_at: int | None = None, steps: int = FIT.steps):
    cells = atlas()
    design = iv.Design.from_adata(cells, covariates=["cell_type", "donor"])

    class Stop(lightning.Callback):
        steps = 0

        def on_train_batch_end(self, *_):
            Stop.steps += 1
            if Stop.steps == fail_at:
                raise KeyError("killed")

    model = new(name, design, cells.var_names)
    config = replace(FIT, steps=steps, checkpoint_every=max(steps // 8, 2), val_every=steps // 4)
    return model.fit(cells, config=config, folder=folder, resume=resume, callbacks=[Stop()])


@pytest.mark.parametrize(("name", "fail_at"), [("cfgen", 3), ("cfgen", 12), ("cellflow_counts", 6)])
def test_resume_in_either_stage_equals_uninterrupted(name, fail_at, tmp_path):
    whole = resumable(name, None, resume=False)
    with pytest.raises(KeyError):
        resumable(name, tmp_path, resume=False, fail_at=fail_at)
    again = resumable(name, tmp_path, resume=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())
    assert same(whole.generate(30), again.generate(30))
    pd.testing.assert_frame_equal(whole.history.drop(columns="seconds"), again.history.drop(columns="seconds"))


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_count_verbs as t
from pathlib import Path
t.resumable("cfgen", Path({folder!r}), resume=False, steps=240)
"""


@pytest.mark.slow
def test_resume_after_sigkill(tmp_path):
    """A process that is killed in the second stage, and one that goes on."""
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint, deadline = tmp_path / "flow" / "last.safetensors", time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with safe_open(checkpoint, framework="pt") as file:
        facts = json.loads(file.metadata()["invirtuo"])
    assert 0 < facts["step"] < 144 and facts["model"]["stage"] == "flow"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = resumable("cfgen", None, resume=False, steps=240)
        again = resumable("cfgen", tmp_path, resume=True, steps=240)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_cells(name, fitted, cells):
    made = fitted(name).generate(50)
    assert made.shape == (50, N_GENES) and made.var_names.tolist() == cells.var_names.tolist()
    assert sparse.isspmatrix_csr(made.X) and made.X.dtype == np.int32 and made.X.min() >= 0
    made.X.check_format(full_check=True)
    assert made.obs.columns.tolist() == ["cell_type", "donor", "size_factor"]
    assert set(made.obs["cell_type"]) <= set(cells.obs["cell_type"]) and (made.obs["size_factor"] > 0).all()
    assert isinstance(made.obs["donor"].dtype, pd.CategoricalDtype) and made.obs_names.is_unique
    facts = made.uns["invirtuo"]
    assert facts["model"] == name and facts["seed"] == 0 and facts["prior"] == "joint"
    assert iv.preprocess.check(made, expect="counts")["level"].ne("error").all()


@pytest.mark.parametrize("name", GENERATORS)
def test_where_and_labels(name, fitted):
    model = fitted(name)
    assert set(model.generate(20, {"cell_type": "b_cell"}).obs["cell_type"]) == {"b_cell"}
    wanted = ["b_cell", "t_cell", "monocyte", "t_cell"]
    for given in (
        {"where": {"cell_type": wanted}},
        {"labels": pd.DataFrame({"cell_type": wanted}, index=list("abcd"))},
    ):
        made = model.generate(4, **given)
        assert made.obs["cell_type"].tolist() == wanted
    assert model.generate(labels=pd.DataFrame({"cell_type": wanted, "donor": "d1"})).obs["donor"].tolist() == ["d1"] * 4
    assert model.generate(1).n_obs == 1


@pytest.mark.parametrize("name", GENERATORS)
def test_priors(name, fitted, cells, split):
    model = fitted(name)
    train = cells.obs[(split == "train").to_numpy()]
    share = (train["donor"] == "d2").mean()
    assert (model.generate(2000).obs["donor"] == "d2").mean() == pytest.approx(share, abs=0.05)
    assert (model.generate(2000, prior="uniform").obs["donor"] == "d2").mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", GENERATORS)
def test_size_factors(name, fitted):
    model = fitted(name)
    assert model.generate(5, size_factor=100).obs["size_factor"].tolist() == [100] * 5
    sizes = [50.0, 100.0, 400.0] * 60
    made = model.generate(180, size_factor=sizes)
    assert made.obs["size_factor"].tolist() == sizes
    totals = np.asarray(made.X.sum(axis=1)).ravel()
    assert np.corrcoef(totals, sizes)[0, 1] > 0.9
    assert totals.mean() == pytest.approx(np.mean(sizes), rel=0.1)
    with pytest.raises(ValueError, match="not above 0"):
        model.generate(3, size_factor=[1, 0, 2])


@pytest.mark.parametrize("name", GENERATORS)
def test_means(name, fitted):
    model = fitted(name)
    counts = model.generate(300)
    both = model.generate(300, output="both")
    assert same(counts, both) and both.layers["mean"].dtype == np.float32
    mean = model.generate(300, output="mean")
    np.testing.assert_array_equal(mean.X, both.layers["mean"])
    np.testing.assert_allclose(mean.X.sum(axis=1), mean.obs["size_factor"], rtol=1e-3)
    assert np.abs(counts.X.toarray().mean(axis=0) - mean.X.mean(axis=0)).max() < 0.25 * mean.X.mean(axis=0).max() + 1


@pytest.mark.parametrize("name", GENERATORS)
def test_seeds_and_saving(name, fitted, tmp_path):
    model = fitted(name)
    first = model.generate(600, seed=3)
    torch.randn(3)
    np.random.default_rng(1)
    assert same(first, model.generate(600, seed=3)) and not same(first, model.generate(600, seed=4))
    model.save(tmp_path / "run")
    again = iv.load(tmp_path / "run")
    assert type(again) is type(model) and same(first, again.generate(600, seed=3))
    assert again.card == json.loads(json.dumps(model.card))
    for path in (tmp_path / "run").iterdir():
        assert path.suffix in (".json", ".npz", ".csv", ".safetensors")
    with np.load(tmp_path / "run" / "transforms.npz", allow_pickle=False) as arrays:
        assert all(arrays[key].dtype != object for key in arrays.files)


@pytest.mark.parametrize("chunk_size", [1, 513, 100_000])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_file_holds_the_same_cells_whatever_the_chunks(name, chunk_size, fitted, tmp_path):
    model = fitted(name)
    whole = model.generate(1200, seed=2, latent=name in FLOWS)
    backed = model.generate(1200, seed=2, latent=name in FLOWS, out=tmp_path / "g.h5ad", chunk_size=chunk_size)
    assert backed.isbacked
    read = backed.to_memory()
    backed.file.close()
    assert same(whole, read) and set(read.uns["invirtuo"]) == set(whole.uns["invirtuo"])
    assert ("z" in read.obsm) == (name in FLOWS)
    if name in FLOWS:
        np.testing.assert_array_equal(read.obsm["z"], whole.obsm["z"])
    assert [path.name for path in tmp_path.iterdir()] == ["g.h5ad"]


def test_a_failed_file_leaves_the_old_one(fitted, tmp_path, monkeypatch):
    model = fitted("cfgen")
    (tmp_path / "g.h5ad").write_text("mine")
    calls = []
    whole = type(model).likelihood

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("no space left")
        return whole(self, *arguments)

    monkeypatch.setattr(type(model), "likelihood", fail)
    with pytest.raises(OSError, match="no space"):
        model.generate(3000, out=tmp_path / "g.h5ad", chunk_size=500)
    assert (tmp_path / "g.h5ad").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", GENERATORS)
def test_predict_is_generate_for_conditions(name, fitted, cells):
    conditions = pd.DataFrame({"cell_type": ["b_cell", "t_cell"], "donor": ["d1", "d2"]})
    made = fitted(name).predict(conditions, 7)
    assert made.obs["cell_type"].tolist() == ["b_cell"] * 7 + ["t_cell"] * 7
    assert iv.preprocess.looks_like_counts(made.X)
    with pytest.raises(ValueError, match="has no option effect_level"):
        fitted(name).predict(conditions, 7, effect_level=0.9)


# ---- data of every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_without_labels(name, cells):
    model = new(name, iv.Design.from_adata(cells), cells.var_names).fit(cells, config=FIT)
    made = model.generate(20)
    assert made.obs.columns.tolist() == ["size_factor"] and made.X.sum() > 0


@pytest.mark.parametrize("name", GENERATORS)
def test_perturbations_are_attributes(name):
    cells = iv.datasets.toy(n_cells=300, n_genes=N_GENES)
    design = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    model = new(name, design, cells.var_names).fit(cells, config=FIT)
    made = model.generate(30, {"perturbation": "A+B"})
    assert made.obs.columns.tolist() == ["cell_type", "perturbation", "size_factor"]
    assert set(made.obs["perturbation"]) == {"A+B"}
    with pytest.raises(ValueError, match="perturbation: Z do not occur"):
        model.generate(3, {"perturbation": "Z"})


@pytest.mark.parametrize("name", GENERATORS)
def test_missing_labels(name, cells):
    gaps = cells.copy()
    gaps.obs["cell_type"] = gaps.obs["cell_type"].astype(object)
    gaps.obs.iloc[::5, 0] = np.nan
    gaps.obs.iloc[1::5, 0] = "?"
    with pytest.raises(ValueError, match="60 missing values"):
        iv.Design.from_adata(gaps, covariates=["cell_type", "donor"])
    design = iv.Design.from_adata(gaps, covariates=["cell_type", "donor"], unknown="?")
    assert design.covariates["cell_type"] == ("b_cell", "monocyte", "t_cell")
    model = new(name, design, gaps.var_names).fit(gaps, config=FIT)
    assert "?" not in set(model.generate(300).obs["cell_type"])
    assert set(model.generate(5, {"cell_type": "?"}).obs["cell_type"]) == {"?"}
    others = iv.preprocess.normalize(cells).copy()
    others.obs["perturbation"], others.obs["cell_type"] = (
        np.where(np.arange(300) % 2, "x", "control"),
        gaps.obs["cell_type"],
    )
    plan = iv.Design.from_adata(
        others, perturbation="perturbation", control="control", covariates=["cell_type"], unknown="?"
    )
    with pytest.raises(ValueError, match="needs the labels of all cells; cell_type is unknown"):
        iv.models.LinearAdditive(plan, others.var_names).fit(others)


@pytest.mark.parametrize("name", GENERATORS)
def test_empty_cells_are_left_out_and_counted(name, cells, design, split, caplog):
    empty = cells.copy()
    x = empty.X.toarray()
    x[[0, 7, 12]] = 0
    empty.X = sparse.csr_matrix(x)
    model = new(name, design, cells.var_names).fit(empty, split, FIT)
    assert "3 of 300 cells have no counts and are left out" in caplog.text
    assert sum(model.card["n_cells"].values()) == 297
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_moments_of_files_are_those_of_memory(cells, design, split, tmp_path, monkeypatch):
    """Read in pieces: equal to the bit, since sums of counts are whole numbers."""
    parts = [cells[i : i + 100].copy() for i in (0, 100, 200)]
    (tmp_path / "whole").mkdir()
    for i, part in enumerate(parts):
        part.write_h5ad(tmp_path / "whole" / f"{i}.h5ad")
    monkeypatch.setattr("invirtuo.cells.store.STREAM", 500)  # values
    store = iv.CellStore.open(tmp_path / "whole")
    assert len(list(iv.CellDataset(store, design, split).blocks("train"))) > 1
    disk, memory = (new("independent_nb", design, cells.var_names).fit(data, split) for data in (store, cells))
    for key, value in memory.state_dict().items():
        assert torch.equal(disk.state_dict()[key], value), key
    assert same(disk.generate(100), memory.generate(100))
    parts[0].X.data[parts[0].X.indptr[2] : parts[0].X.indptr[3]] = 0
    parts[0].write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(ValueError, match="1 training cells have no counts; remove them"):
        new("independent_nb", design, cells.var_names).fit(iv.CellStore.open(tmp_path / "empty.h5ad"), split[:100])


@pytest.mark.parametrize("name", GENERATORS)
def test_class_of_one_cell(name, cells):
    lonely = cells.copy()
    lonely.obs["cell_type"] = np.where(np.arange(300) == 5, "rare", lonely.obs["cell_type"].astype(str))
    design = iv.Design.from_adata(lonely, covariates=["cell_type"])
    config = replace(SMALL[name], size_factor="by:cell_type") if name in FLOWS else None
    model = new(name, design, cells.var_names, config).fit(lonely, config=FIT)
    made = model.generate(40, {"cell_type": "rare"})
    assert np.isfinite(made.obs["size_factor"]).all() and made.obs["size_factor"].std() > 0


@pytest.mark.parametrize("name", FLOWS)
def test_last_batch_of_one_cell(name, cells, design):
    few = cells[:65].copy()
    config = replace(SMALL[name], val_share=0.0)
    model = new(name, design, cells.var_names, config).fit(few, config=replace(FIT, batch_size=64))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert model.generate(1).n_obs == 1


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("kind", ["float", "int", "dense", "layer", "reordered"])
def test_counts_of_every_kind(name, kind, cells, design, split, fitted):
    given = cells.copy()
    if kind == "int":
        given.X = given.X.astype(np.int64)
    elif kind == "dense":
        given.X = given.X.toarray()
    elif kind == "layer":
        given = iv.preprocess.normalize(given)
    elif kind == "reordered":
        given = given[:, ::-1].copy()
    model = new(name, design, cells.var_names).fit(given, split, FIT)
    assert same(model.generate(30), fitted(name).generate(30))


@pytest.mark.parametrize("name", GENERATORS)
def test_wrong_values_are_refused(name, cells, design):
    log = iv.preprocess.normalize(cells)
    del log.layers["counts"]
    with pytest.raises(ValueError, match="looks like log1p values.*expected raw counts"):
        new(name, design, cells.var_names).fit(log, config=FIT)
    for value, words in ((0.5, "1 values that are not whole numbers"), (-1.0, "negative"), (np.nan, "NaN")):
        bad = cells.copy()
        bad.X = bad.X.toarray()
        bad.X[5, 5] = value
        with pytest.raises(ValueError, match=words):
            new(name, design, cells.var_names).fit(bad, config=FIT)


def test_numbers_are_no_attributes(cells):
    cells = cells.copy()
    cells.obs["hours"] = 1.0
    with pytest.raises(ValueError, match="conditioned on labels; the design has 'hours' as a number"):
        new("cfgen", iv.Design.from_adata(cells, covariates=["donor"], time="hours"), cells.var_names)


def test_predictors_need_a_perturbation(cells, design):
    with pytest.raises(ValueError, match="names no perturbation, and primeflow predicts"):
        iv.models.PRiMeFlow(design, cells.var_names)


# ---- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_cells": 0}, "n_cells is 0"),
        ({"n_cells": None}, "n_cells is None"),
        ({"where": {"cell_type": "neuron"}}, "cell_type: neuron do not occur in the training cells; known: .*b_cell"),
        ({"where": {"color": "red"}}, "'color' is not an attribute of this model; its attributes: cell_type, donor"),
        ({"where": {"donor": ["d1"]}}, "holds 1 labels for 5 cells"),
        ({"labels": {"donor": "d1"}}, "labels is a dict"),
        ({"labels": pd.DataFrame({"donor": ["d1"] * 5}), "where": {"donor": "d1"}}, "in both"),
        ({"output": "log"}, "output is 'log'"),
        ({"prior": "flat"}, "prior is 'flat'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"out": "x.h5ad", "output": "mean"}, "only for output='counts'"),
        ({"solver": "magic"}, "solver is 'magic'|no option solver"),
        ({"steps": 0}, "steps is 0|no option steps"),
    ],
)
def test_bad_requests(name, options, words, fitted):
    with pytest.raises(ValueError, match=words):
        fitted(name).generate(**({"n_cells": 5} | options))


@pytest.mark.parametrize("name", GENERATORS)
def test_before_fit(name, cells, design, tmp_path):
    model = new(name, design, cells.var_names)
    model.save(tmp_path)
    for made in (model, iv.load(tmp_path)):
        with pytest.raises(ValueError, match="is not fitted yet"):
            made.generate(5)
        with pytest.raises(ValueError, match="is not fitted yet"):
            made.augment(cells, "donor", 400)


# ---- augment, correct, impute, embed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_augment(name, fitted, cells, split, caplog):
    model, before = fitted(name), cells.copy()
    train = cells.obs[(split == "train").to_numpy()]
    sizes = train["donor"].value_counts()
    both = model.augment(cells, "donor", 500, split=split, min_cells=100)
    assert both.n_obs == 500 and same(cells, before)
    real = both[~both.obs["is_generated"]]
    assert real.obs_names.tolist() == train.index.tolist()
    assert (real.X != cells[train.index].X).nnz == 0 and "other" in both.obs
    made = both.obs[both.obs["is_generated"]]["donor"].value_counts().to_dict()
    assert made == rare_counts(sizes.to_dict(), 500 - len(train)) == json.loads(both.uns["invirtuo"]["augmented"])
    assert made["d2"] > made["d1"] and "d2: fewer than 100 real cells" in caplog.text
    even = model.augment(cells, "donor", 500, power=0.0).obs.query("is_generated")["donor"].value_counts()
    assert set(even) == {100}
    assert model.augment(cells, "donor", 500, max_fold=0.1).n_obs == 330
    with pytest.raises(ValueError, match="target_size is 300, and there are 300 cells"):
        model.augment(cells, "donor", 300)
    with pytest.raises(ValueError, match="by='color'"):
        model.augment(cells, "color", 400)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(("solver", "steps", "atol"), [("dopri5", None, 1e-3), ("midpoint", 50, 1e-2)])
def test_there_and_back(name, solver, steps, atol, fitted, cells):
    """Correction to the own batch leaves a cell where it was."""
    model = fitted(name)
    own = cells[(cells.obs["donor"] == "d1").to_numpy()]
    corrected = model.correct(own, "donor", reference="d1", solver=solver, steps=steps)
    scale = model.latent_sd.numpy()
    np.testing.assert_allclose(corrected.obsm["X_invirtuo"] / scale, model.embed(own).X / scale, atol=atol)
    assert corrected.uns["invirtuo"]["collapse"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", FLOWS)
def test_correct(name, fitted, cells):
    model = fitted(name)
    wider = cells[:, ::-1].copy()
    wider.X = wider.X.astype(np.int64)
    before = wider.copy()
    corrected = model.correct(wider, "donor", output="counts", steps=4)
    assert same(wider, before) and (corrected.X != wider.X).nnz == 0 and corrected.var_names.equals(wider.var_names)
    assert corrected.obsm["X_invirtuo"].shape == (300, model.n_latent)
    layer = corrected.layers["corrected"]
    assert layer.dtype == np.int64 and layer.shape == wider.shape and layer.min() >= 0
    assert corrected.uns["invirtuo"]["reference"] == "d1"  # the larger one
    means = model.correct(wider, "donor", output="mean", steps=4).layers["corrected"]
    np.testing.assert_allclose(means.sum(axis=1), np.asarray(wider.X.sum(axis=1)).ravel(), rtol=1e-3)
    genes = np.asarray(layer.mean(axis=0)).ravel()
    right, wrong = (np.corrcoef(order, means.mean(axis=0))[0, 1] for order in (genes, genes[::-1]))
    assert right > wrong + 0.3  # the genes in their places
    for options, words in (
        ({"batch": "color"}, "batch='color' is no covariate"),
        ({"batch": "donor", "reference": "d9"}, "reference='d9' does not occur"),
        ({"batch": "donor", "invert_with": "magic"}, "invert_with is 'magic'"),
        ({"batch": "donor", "invert_with": "unconditional", "invert_guidance": 1}, "give one of them"),
        ({"batch": "donor", "output": "log"}, "output is 'log'"),
    ):
        with pytest.raises(ValueError, match=words):
            model.correct(cells, **options)


def test_correct_with_strong_weights_warns(fitted, cells, caplog):
    fitted("cfgen").correct(cells[:50], "donor", guidance={"donor": 2.5, "cell_type": 1.0}, steps=2)
    assert "mix batches by making cells alike" in caplog.text
    caplog.clear()
    fitted("cfgen").correct(cells[:50], "donor", guidance=2.0, steps=2, invert_with="unconditional")
    assert "alike" not in caplog.text


@pytest.mark.parametrize("name", FLOWS)
def test_impute(name, fitted, cells):
    model = fitted(name)
    masked, mask = iv.mask_entries(cells, 0.2)
    assert mask.nnz == pytest.approx(0.2 * cells.X.nnz, rel=0.1) and (masked.X.multiply(mask)).nnz == 0
    assert ((masked.X + cells.X.multiply(mask)) != cells.X).nnz == 0
    filled = model.impute(masked, mask=mask, masked_fraction=0.2, flow=True, n_draws=2, steps=4)
    layer = filled.layers["imputed"]
    hidden = mask.toarray()
    assert (layer.toarray()[~hidden] == masked.X.toarray()[~hidden]).all() and (layer.toarray()[hidden] > 0).all()
    dense = model.impute(masked, masked_fraction=0.2, flow=True, n_draws=2, steps=4).layers["imputed"]
    np.testing.assert_allclose(dense[hidden], layer.toarray()[hidden], rtol=1e-6)
    np.testing.assert_allclose(dense.sum(axis=1), np.asarray(masked.X.sum(axis=1)).ravel() / 0.8, rtol=1e-3)
    plain = model.impute(masked).layers["imputed"]
    still = model.impute(masked, flow=True, noise=0.0, n_draws=1, steps=60).layers["imputed"]
    np.testing.assert_allclose(still, plain, rtol=0.02, atol=1e-3)
    with pytest.raises(ValueError, match="mask has shape"):
        model.impute(masked, mask=mask[:5])
    with pytest.raises(ValueError, match="masked_fraction=1"):
        model.impute(masked, masked_fraction=1)
    with pytest.raises(ValueError, match=r"act on the flow alone.*flow=True"):
        model.impute(masked, flow=False, n_draws=2)
    asked = model.impute(masked, masked_fraction=0.2, n_draws=2, steps=4).layers["imputed"]
    np.testing.assert_array_equal(asked, dense)  # an option of the flow asks for it


@pytest.mark.parametrize("name", FLOWS)
def test_embed(name, fitted, cells):
    model = fitted(name)
    latent = model.embed(cells)
    assert latent.shape == (300, model.n_latent) and latent.obs.equals(cells.obs)
    np.testing.assert_allclose(model.embed(cells[:, ::-1].copy()[10:11]).X, latent.X[10:11], atol=1e-5)
    empty = cells.copy()
    empty.X = sparse.csr_matrix(empty.X.toarray() * (np.arange(300) != 4)[:, None])
    with pytest.raises(ValueError, match="1 of 300 cells have no counts"):
        model.embed(empty)


@pytest.mark.parametrize("name", FLOWS)
def test_reconstruct(name, fitted, cells):
    """Counts around the means of the decoded cells, at the depths of the cells."""
    model, wider = fitted(name), cells[:, ::-1].copy()
    made = model.reconstruct(wider)
    assert made.X.dtype == np.int32 and made.obs.equals(cells.obs) and list(made.var_names) == model.genes
    assert same(made, model.reconstruct(wider)) and not same(made, model.reconstruct(wider, seed=1))
    mean = model.impute(cells).layers["imputed"]
    many = np.mean([model.reconstruct(cells, seed=seed).X.toarray() for seed in range(30)], axis=0)
    np.testing.assert_allclose(many.mean(axis=0), mean.mean(axis=0), rtol=0.1, atol=0.05)
    bare = cells.copy()
    bare.obs = bare.obs[[]]
    assert (model.reconstruct(bare).X != model.reconstruct(cells).X).nnz == 0  # one dispersion for all classes


@pytest.mark.parametrize("name", FLOWS)
def test_cells_without_labels_are_encoded(name, fitted, cells):
    model, bare = fitted(name), cells.copy()
    bare.obs = bare.obs[[]]
    np.testing.assert_array_equal(model.embed(bare).X, model.embed(cells).X)
    np.testing.assert_array_equal(model.impute(bare).layers["imputed"], model.impute(cells).layers["imputed"])
    with pytest.raises(ValueError, match="cell_type"):
        model.correct(bare, "donor")


def test_new_labels_and_batches_are_null(fitted, cells, caplog):
    """Cells of a batch that the model has not seen flow as cells of no known batch do."""
    model, new = fitted("cfgen"), cells.copy()
    new.obs = new.obs.assign(donor="d9")
    corrected = model.correct(new, "donor", reference="d1", steps=4)
    assert "donor: d9 do not occur in the training cells; 300 cells" in caplog.text
    noise = model.correct(cells, "donor", reference="d1", invert_guidance={"cell_type": 1.0}, steps=4)
    np.testing.assert_allclose(corrected.obsm["X_invirtuo"], noise.obsm["X_invirtuo"], atol=1e-4)
    free = {"flow": True, "conditional": False, "steps": 2, "n_draws": 1}
    caplog.clear()
    with_labels, without = (model.impute(known, **free).layers["imputed"] for known in (cells, new))
    np.testing.assert_array_equal(with_labels, without)
    model.embed(new)
    assert not caplog.text
    with pytest.raises(ValueError, match="labels that are not known to this design: d9"):
        fitted("cellflow_counts").correct(new, "donor", steps=4)


@pytest.mark.parametrize("name", FLOWS)
def test_check_solver(name, fitted):
    coarse, fine = (fitted(name).check_solver(40, steps=steps) for steps in (2, 40))
    assert set(fine) == {"max", "mean", "wasserstein2"}
    assert 0 < fine["mean"] < coarse["mean"] and fine["max"] < 0.05


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, fitted, cells, split):
    folder = tmp_path_factory.mktemp("generators")
    cells.write_h5ad(folder / "cells.h5ad")
    for name in GENERATORS:
        fitted(name).save(folder / name)
    split.to_csv(folder / "split.csv", header=False)
    return folder


@pytest.mark.parametrize("name", GENERATORS)
def test_generate_in_the_same_words(name, run, files, fitted, tmp_path):
    out = tmp_path / "g.h5ad"
    code, _, err = run(
        "generate", files / name, "-n", 600, "--where", "cell_type=b_cell", "--seed", 5, "--quiet", "--out", out
    )
    assert code == 0, err
    assert same(ad.read_h5ad(out), fitted(name).generate(600, {"cell_type": "b_cell"}, seed=5))
    pd.DataFrame({"cell_type": ["t_cell", "b_cell"]}).to_csv(tmp_path / "labels.csv", index=False)
    assert run("generate", files / name, "--labels", tmp_path / "labels.csv", "--quiet", "--out", out)[0] == 0
    assert ad.read_h5ad(out).obs["cell_type"].tolist() == ["t_cell", "b_cell"]


def test_other_verbs_in_the_same_words(run, files, fitted, cells, split, tmp_path):
    model, out = fitted("cfgen"), tmp_path / "x.h5ad"
    quiet = ["--quiet", "--out", out]
    data = files / "cells.h5ad"
    assert (
        run("generate", files / "cfgen", "-n", 9, "--guidance", "cell_type=2", "--guidance", "donor=1", *quiet)[0] == 0
    )
    assert same(ad.read_h5ad(out), model.generate(9, guidance={"cell_type": 2.0, "donor": 1.0}))
    words = ["--by", "donor", "--target-size", 400, "--split", files / "split.csv"]
    assert run("augment", files / "cfgen", data, *words, *quiet)[0] == 0
    assert same(ad.read_h5ad(out), model.augment(cells, "donor", 400, split=split))
    words = ["--guidance", 2, "--invert-guidance", "cell_type=1.5", "--invert-guidance", "donor=1"]
    words += ["--batch", "donor", "--steps", 3, "--output", "counts"]
    assert run("correct", files / "cfgen", data, *words, *quiet)[0] == 0
    inverse = {"cell_type": 1.5, "donor": 1.0}
    corrected = model.correct(cells, "donor", guidance=2.0, invert_guidance=inverse, steps=3, output="counts")
    np.testing.assert_array_equal(ad.read_h5ad(out).obsm["X_invirtuo"], corrected.obsm["X_invirtuo"])
    assert (ad.read_h5ad(out).layers["corrected"] != corrected.layers["corrected"]).nnz == 0
    assert run("impute", files / "cfgen", data, *quiet)[0] == 0
    np.testing.assert_array_equal(ad.read_h5ad(out).layers["imputed"], model.impute(cells).layers["imputed"])
    assert run("impute", files / "cfgen", data, "--flow", "--n-draws", 1, "--steps", 3, *quiet)[0] == 0
    by_noise = model.impute(cells, flow=True, n_draws=1, steps=3).layers["imputed"]
    np.testing.assert_array_equal(ad.read_h5ad(out).layers["imputed"], by_noise)
    assert run("embed", files / "cfgen", data, *quiet)[0] == 0
    np.testing.assert_array_equal(ad.read_h5ad(out).X, model.embed(cells).X)


def test_fit_of_an_atlas_from_the_shell(run, files, tmp_path):
    small = [
        part for field in ("n_latent=6", "hidden=32", "embedding=16", "hidden_rna=[16]") for part in ("--set", field)
    ]
    options = [
        "--covariate",
        "cell_type",
        "--covariate",
        "donor",
        "--fit-set",
        "steps=10",
        "--quiet",
        "--out",
        tmp_path / "run",
    ]
    code, _, err = run("fit", "cfgen", files / "cells.h5ad", *options, *small)
    assert code == 0, err
    assert iv.load(tmp_path / "run").config.hidden_rna == (16,)
    assert run("check", files / "cells.h5ad", "--covariate", "donor")[0] == 0
    assert run("generate", tmp_path / "run", "-n", 3, "--quiet", "--out", tmp_path / "g.h5ad")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "cfgen", "-n", "0"], "n_cells is 0"),
        (["generate", "cfgen"], "n_cells is None"),
        (["generate", "cfgen", "-n", "5", "--engine", "abacus"], "engine is 'abacus'; expected local or ray"),
        (["generate", "cfgen", "-n", "5", "--where", "cell_type"], "expected attribute=value"),
        (["generate", "cfgen", "-n", "5", "--where", "cell_type=neuron"], "neuron do not occur"),
        (["generate", "cfgen", "-n", "5", "--guidance", "cell_type=high"], "--guidance cell_type=high"),
        (["generate", "cfgen", "-n", "5", "--guidance", "color=1"], "color is not an attribute"),
        (
            ["generate", "independent_nb", "-n", "5", "--guidance", "2"],
            "independent_nb.generate has no option guidance",
        ),
        (["generate", "cfgen", "--labels", "nowhere.csv"], "--labels: nowhere.csv does not exist; expected a CSV file"),
        (["generate", "nowhere", "-n", "5"], "holds no saved model"),
        (["augment", "cfgen", "cells.h5ad", "--by", "donor", "--target-size", "10"], "target_size is 10"),
        (["correct", "cfgen", "cells.h5ad", "--batch", "color"], "batch='color'"),
        (["correct", "cfgen", "cells.h5ad", "--batch", "donor", "--invert-guidance", "x"], "--invert-guidance x: "),
        (["correct", "independent_nb", "cells.h5ad", "--batch", "donor"], "cannot correct; models that can: .*cfgen"),
        (["impute", "independent_nb", "cells.h5ad"], "cannot impute"),
        (["impute", "cfgen", "nowhere.h5ad"], "does not exist"),
        (["embed", "independent_nb", "cells.h5ad"], "which cannot embed; models that can: state_embedding, cfgen"),
    ],
)
def test_bad_input_is_one_message(run, files, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    (tmp_path / "out.h5ad").write_text("mine")
    code, _, err = run(*arguments, "--quiet", "--out", tmp_path / "out.h5ad")
    assert code == 2 and re.search(message, err) and "Traceback" not in err, err
    assert (tmp_path / "out.h5ad").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1

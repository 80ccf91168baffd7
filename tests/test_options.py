"""Contract tests of options, over the registry: an option acts, or is said not to change cells, or is an error."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from small_models import CASES, CFGEN, FIT, call, equal, experiment, fitted, kind_of, verbs

import invirtuo as iv
from invirtuo import fit as fitting
from invirtuo.bench.entry import as_entries
from invirtuo.fit import devices
from invirtuo.verbs.sampling import NoSampling

pytestmark = pytest.mark.usefixtures("few_pilots")

# An option to another value than its default, and what else is given beside it, with and without the option.
OTHER: dict[str, object] = {
    "seed": 1,
    "effect_level": 0.8,
    "n_jobs": 2,
    "device": "cpu",
    "progress": True,
    "precision": "bf16",
    "batch_size": 7,
    "clamp_min": 50.0,
    "zeros": "threshold",
    "steps": 3,
    "solver": "euler",
    "guidance": 2.0,
    "interval": (0.0, 0.5),
    "grid": (0.0, 0.2, 1.0),
    "prior": "uniform",
    "size_factor": 50.0,
    "output": "both",
    "latent": True,
    "chunk_size": 7,
    "where": {"cell_type": "t_cell"},
    "times": [0.2, 0.9],
    "level": 0.5,
    "engine": "nonsense",
}
BESIDE = {"interval": {"guidance": 2.0}}
SAME_CELLS = {"batch_size", "device", "progress", "chunk_size", "out"}  # they are documented not to change cells
NEARLY = {"precision"}  # rounds
ASKED = {"conditions", "n_cells", "cells", "labels", "controls"}  # what to draw, not how; controls: test_models.py


EVERY = sorted({name for kind in iv.models.MODELS.values() for verb in verbs(kind)
                for name in inspect.signature(getattr(kind, verb)).parameters} - {"self"})  # fmt: skip


# ---- every option acts, or is an error -------------------------------------------------------------------------------


def test_every_option_is_looked_at():
    assert set(EVERY) == set(OTHER) | ASKED | {"out"}


@pytest.mark.parametrize("case", CASES)
def test_an_option_acts_or_is_an_error(case):
    for verb in verbs(fitted(case)):
        known = set(inspect.signature(getattr(fitted(case), verb)).parameters)
        base = {}
        for option, value in OTHER.items():
            if option not in known:
                with pytest.raises(ValueError, match=rf"{verb} has no option {option}; its options: .*device") as error:
                    call(case, verb, **{option: value})
                assert all(name in str(error.value) for name in known)
                continue
            beside = BESIDE.get(option, {})
            try:
                changed = call(case, verb, **beside, **{option: value})
            except ValueError as error:
                assert option in str(error) or "guidance" in str(error), error
                continue
            key = str(beside)
            if key not in base:
                base[key] = call(case, verb, **beside)
            same = equal(changed, base[key], atol=2e-5 if option in SAME_CELLS else 0.0)
            keeps = option in SAME_CELLS or (
                option == "seed" and (getattr(fitted(case), "deterministic", False) or verb == "forecast")
            )
            assert option in NEARLY or same == keeps, (verb, option)


PREDICTING = [case for case in CASES if "zeros" in {f.name for f in fields(kind_of(case).Sampling)}]


@pytest.mark.parametrize("case", PREDICTING)
def test_zeros_are_those_of_cells(case, tmp_path):
    """Below half the smallest value there is nothing; moved control cells have the mean of what the model draws."""
    model = fitted(case)
    cells, design, split = experiment(kind_of(case))
    if model.keeps_zeros:
        with pytest.raises(
            ValueError, match=f"zeros is 'threshold', and {model.name} draws cells with zeros by itself"
        ):
            call(case, "predict", zeros="threshold")
        return
    train = cells[(split == "train").to_numpy()]
    limit = float(train.X[train.X > 0].min()) / 2
    drawn, cut = (call(case, "predict", zeros=zeros).X for zeros in (None, "threshold"))
    np.testing.assert_array_equal(cut, np.where(drawn < limit, 0.0, drawn).astype(np.float32))

    moved = call(case, "predict", zeros="moved")
    label = design.names(moved.obs)
    assert moved.X.min() >= 0 and not ((moved.X > 0) & (moved.X < limit / 5)).any()
    for name in label.unique():
        rows = (label == name).to_numpy()
        wanted, found = np.maximum(drawn[rows].mean(0), 0), moved.X[rows].mean(0)
        # where controls have no positive value there is nothing to move
        assert np.median(np.abs(found - wanted)) < 0.05

    # a model that was saved knows its smallest value, one from before does not
    model.save(tmp_path / "run")
    again = iv.load(tmp_path / "run")
    np.testing.assert_array_equal(call(case, "predict", model=again, zeros="moved").X, moved.X)
    del again.card["smallest"]
    with pytest.raises(ValueError, match="fitted before it could be asked for; fit it again"):
        call(case, "predict", model=again, zeros="moved")


@pytest.mark.parametrize("case", PREDICTING)
def test_counts_are_whole(case, tmp_path):
    """Of the cells that are drawn: as deep as control cells, alike in memory, in a file, and from a saved model."""
    model = fitted(case)
    counts = call(case, "predict", output="counts")
    assert counts.X.dtype == np.int32 and counts.X.min() == 0
    log = call(case, "predict", zeros=None if model.keeps_zeros else "moved")
    np.testing.assert_array_equal(counts.obs, log.obs)

    found = counts.X.toarray()
    assert not found[log.X <= 0].any()

    # the same from a file, and from a saved model; one from before does not know
    written = call(case, "predict", output="counts", out=tmp_path / "counts.h5ad").to_memory()
    np.testing.assert_array_equal(written.X.toarray(), found)
    model.save(tmp_path / "run")
    again = iv.load(tmp_path / "run")
    np.testing.assert_array_equal(call(case, "predict", model=again, output="counts").X.toarray(), found)
    again._depths = None
    with pytest.raises(ValueError, match="fitted before it could be asked for; fit it again"):
        call(case, "predict", model=again, output="counts")

    # what counts do not have
    with pytest.raises(ValueError, match="output is 'mean'; expected log or counts"):
        call(case, "predict", output="mean")
    with pytest.raises(ValueError, match="effects in log space, and output is 'counts'"):
        call(case, "predict", output="counts", effect_level=0.8)


@pytest.mark.parametrize("case", CASES)
def test_options_that_do_not_exist(case):
    for verb in verbs(fitted(case)):
        with pytest.raises(ValueError, match=r"has no option no_such_option; its options: "):
            call(case, verb, no_such_option=1)


@pytest.mark.parametrize("case", CASES)
def test_options_are_described(case):
    """By `help`, with their names and what they mean."""
    for verb in verbs(kind_of(case)):
        method = getattr(kind_of(case), verb)
        text = " " + inspect.getdoc(method).replace("\n", " ").replace(",", " ")
        assert "{options}" not in text
        assert [
            name for name in inspect.signature(method).parameters if name != "self" and f" {name} " not in text
        ] == []


@pytest.mark.parametrize("case", CASES)
def test_which_options_cannot_act(case):
    """Refused where they depend on the Config."""
    model = fitted(case)
    names = {f.name for f in fields(model.Sampling)}
    verb = verbs(model)[0] if verbs(model) else ""
    if {"grid", "steps"} <= names:
        with pytest.raises(ValueError, match="steps is 3 and grid has 2 times; give one of them"):
            call(case, verb, steps=3, grid=(0, 1))
        with pytest.raises(ValueError, match=r"interval is \(0.1, 0.5\) and guidance is 1"):
            call(case, verb, interval=(0.1, 0.5))
        for grid in ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0, 0.5), (0.0,), "often"):
            with pytest.raises(ValueError, match="grid is"):
                call(case, verb, grid=grid)
        with pytest.raises(ValueError, match="guidance is nan"):
            call(case, verb, guidance=float("nan"))
        with pytest.raises(ValueError, match="guidance is 'much'"):
            call(case, verb, guidance="much")
    if "steps" in names:
        for steps in (0, 1.5, "few"):
            with pytest.raises(ValueError, match=f"steps is {steps!r}; expected a whole number"):
                call(case, verb, steps=steps)
        with pytest.raises(ValueError, match="steps is 3 and the solver of .* is dopri5, which finds its steps"):
            call(case, verb, steps=3, solver="dopri5")
        with pytest.raises(ValueError, match="solver is 'magic'; expected one of euler"):
            call(case, verb, solver="magic")


def test_options_of_entries_are_checked_before_a_fit():
    entry = iv.bench.Entry("mine", "primeflow", {"prob_unconditional": 0.0}, variants={"guided": {"guidance": 2.0}})
    with pytest.raises(ValueError, match="entry 'mine': guidance is 2.0.*never saw the null condition"):
        as_entries(entry)
    with pytest.raises(ValueError, match="entry 'mine': cpa.predict has no option steps; its options: "):
        as_entries(iv.bench.Entry("mine", "cpa", predict={"steps": 3}))
    with pytest.raises(ValueError, match="entry 'sparse_ode': sparse_ode cannot predict"):
        as_entries("sparse_ode")
    assert as_entries(iv.bench.Entry("mine", "cpa", predict={"clamp_min": 0.0}))


def test_null_conditions_that_were_never_learned_are_refused():
    model = fitted("cellflow_counts")
    cells, _, _ = experiment(type(model))
    with pytest.raises(ValueError, match="was never trained on cells without labels"):
        model.impute(cells, flow=True, conditional=False)
    with pytest.raises(ValueError, match="was never trained on cells without labels"):
        model.correct(cells, "cell_type", invert_with="unconditional")
    for options in ({"steps": 2}, {"noise": 0.1}, {"n_draws": 2}, {"conditional": False}):
        with pytest.raises(ValueError, match=r"act on the flow alone.*or give flow=True"):
            model.impute(cells, flow=False, **options)
    with pytest.raises(ValueError, match="impute has no option guidance"):
        fitted("cfgen").impute(cells, guidance=2.0)


@pytest.mark.parametrize("case", ["decoder_only", "fm_pca", "sams_vae prior"])
def test_control_cells_that_mean_nothing_are_refused(case):
    cells, _, _ = experiment(kind_of(case))
    with pytest.raises(ValueError, match="neither starts from control cells nor learns of covariates by them"):
        call(case, "predict", controls=cells)


def test_labels_of_cells_are_theirs():
    with pytest.raises(ValueError, match="labels= are those of first states"):
        call("sparse_ode", "forecast", labels={"cell_type": "b_cell"})


@pytest.mark.parametrize("case", CASES)
def test_models_have_the_verbs_that_they_can(case):
    """What is there can be called; what a model is for is there."""
    model = fitted(case)
    assert hasattr(model, model.verb)
    assert hasattr(model, "predict") == (model.verb in ("predict", "generate"))
    for verb in ("predict", "generate", "embed", "forecast"):
        assert hasattr(type(model), verb) == hasattr(model, verb)
        if hasattr(model, verb) and verb not in verbs(model):
            assert getattr(model, verb)(experiment(type(model))[0]).n_obs > 0


def test_records_hold_options_alone():
    kinds = {kind.Sampling for kind in iv.models.MODELS.values()}
    assert all(issubclass(kind, NoSampling) for kind in kinds) and len(kinds) > 4


# ---- cells at once, random numbers and devices -----------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if kind_of(case).verb == "predict"])
def test_batch_size_bounds_the_cells_in_the_network(case):
    model, largest = fitted(case), []

    def see(module, arguments, named):
        first = next(iter((*arguments, *named.values())), None)
        x = first if isinstance(first, torch.Tensor) else getattr(first, "x", None)
        if isinstance(x, torch.Tensor) and x.ndim > 1:
            largest.append(len(x) * (x.shape[1] if module is getattr(model, "transformer", None) else 1))

    networks = [module for module in model.children() if module is not getattr(model, "effect", None)]  # not of cells
    hooks = [network.register_forward_pre_hook(see, with_kwargs=True) for network in networks]
    try:
        call(case, "predict", batch_size=16)
    finally:
        for hook in hooks:
            hook.remove()
    trained = any(p.requires_grad for p in model.parameters())
    assert bool(largest) == trained
    assert max(largest, default=0) <= 16


@pytest.mark.parametrize("case", CASES)
def test_random_numbers_are_drawn_on_the_cpu(case, monkeypatch):
    """So that the same seed gives the same cells on every device."""
    made = []

    class Spy(torch.Generator):
        def __new__(cls, *arguments, **named):
            made.append((arguments, named))
            return super().__new__(cls, *arguments, **named)

    monkeypatch.setattr(torch, "Generator", Spy)
    for verb in verbs(fitted(case)):
        call(case, verb)
    if hasattr(fitted(case), "impute"):
        fitted(case).impute(experiment(kind_of(case))[0][:20])
    assert all(given == ((), {}) for given in made)
    assert made or not hasattr(fitted(case), "predict")


@pytest.mark.parametrize("case", CASES)
def test_devices(case, monkeypatch):
    """A device that is not there is an error that names those that are; the fit says which one is the default."""
    model = fitted(case)
    method = getattr(model, model.verb)
    cells = experiment(type(model))[0]
    asked = {"predict": ("val", 5), "generate": (5,)}.get(model.verb, (cells,))
    with pytest.raises(ValueError, match="device is 'cuda:7'; this machine has cpu"):
        method(*asked, device="cuda:7")
    with pytest.raises(ValueError, match="device is 'mps'.*Pass device=\"cpu\""):
        method(*asked, device="mps")
    assert method(*asked, device="cpu").n_obs == method(*asked).n_obs == method(*asked, device="auto").n_obs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert model.accelerator == model.card["fit"]["accelerator"]
    for accelerator, expected in {"cpu": "cpu", "auto": "cuda", "gpu": "cuda", "mps": "cpu"}.items():
        card = model.card | {"fit": model.card["fit"] | {"accelerator": accelerator}}
        monkeypatch.setattr(model, "card", card)
        assert model.device_of(None).type == ("cpu" if model.cpu_only else expected)
    if model.cpu_only:
        with pytest.raises(ValueError, match="sparse_ode computes on the CPU alone"):
            model.device_of("cuda:1")
    else:
        assert model.device_of("cuda:1") == torch.device("cuda", 1)
        with pytest.raises(ValueError, match="this machine has cpu, cuda, cuda:0, cuda:1"):
            model.device_of("cuda:2")


def test_precision_is_that_of_the_device(monkeypatch):
    """A GPU that is there but not used does not decide."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    fitting.bf16_pays.cache_clear()
    asked = []
    monkeypatch.setattr(fitting.machine, "bf16_pays", lambda device=None: asked.append(device))
    fitting.use_bf16(iv.SampleConfig(), "cpu")
    fitting.use_bf16(iv.FitConfig(accelerator="cpu"))
    fitting.use_bf16(iv.FitConfig())
    assert asked == ["cpu", "cpu", None]


def test_models_for_cpus_are_fitted_there():
    kind = iv.models.SparseODE
    assert devices.accelerator(kind, iv.FitConfig()) == "cpu"
    assert devices.accelerator(iv.models.CPA, iv.FitConfig()) == "auto"
    with pytest.raises(ValueError, match="accelerator is 'gpu'; sparse_ode computes on the CPU alone"):
        devices.accelerator(kind, iv.FitConfig(accelerator="gpu"))


def test_cells_are_encoded_on_the_device_of_the_fit(monkeypatch):
    """Also between the stages of a fit, when there is no card yet."""
    cells, design, _ = experiment(iv.models.CFGen)
    seen = []
    monkeypatch.setattr("invirtuo.verbs.model.chosen", lambda name, kind, **_: seen.append(kind) or torch.device("cpu"))
    iv.models.CFGen(design, cells.var_names, CFGEN).fit(cells, config=FIT)
    assert seen and set(seen) == {"cpu"}

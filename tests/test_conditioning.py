"""Contract over the registry: the output of every network depends on all that the network is told.

With random weights throughout, each of time, depth, perturbation, every covariate and the null condition must change
what comes out by more than rounding. A network that takes time is found by an argument `t` (or a record with one); a
new model is tested by being registered.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import invirtuo as iv
from invirtuo.batch import Batch
from invirtuo.verbs.sampling import SampleConfig

MODELS = iv.models.MODELS
PRiMeFlow = iv.models.PRiMeFlow
VISIBLE = 1e-3  # least relative change of an output; rounding in fp32 leaves about 1e-6
N = 6  # cells
TOLD = {  # settings with which a model is told of covariates, where its defaults leave them to the control cells
    "latent_additive": iv.models.LatentAdditive.Config(encode_covariates=True, decode_covariates=True),
    "sams_vae": iv.models.SAMSVAE.Config(encode_covariates=True, decode_covariates=True),
    "state_transition": iv.models.StateTransition.Config(
        set_size=4, hidden_dim=32, n_layers=2, n_heads=4, batch_encoder=True, batch="batch"
    ),
    "sparse_ode": iv.models.SparseODE.Config(lineage="cell_type"),
}
UNTOLD = {"state_transition": {"cell_type"}}  # covariates that a model knows by the control cells alone
UNET_WIDTHS = (16, 32, 48, 64, 128, 256)


def shrunk(config):
    """Fewer levels and blocks of a U-Net, whose width decides its groups; narrower layers of other networks."""
    if getattr(config, "velocity", "") == "unet":
        return replace(config, channel_mult=config.channel_mult[:2], num_res_blocks=1, attention_resolutions=(2,))
    widths = [field.name for field in fields(config) if field.name in ("hidden_dim", "hidden")]
    narrow = {name: min(getattr(config, name), 64) for name in widths if isinstance(getattr(config, name), int)}
    return replace(config, **narrow)


def cases() -> dict:
    """Model and Config by name: settings in which covariates count, every preset of the flows, all U-Net widths."""
    found = {}
    for name, kind in MODELS.items():
        if kind.verb != "embed":
            found[name] = kind, TOLD.get(name, kind.Config())
        if takes_time(kind):
            found |= {f"{name}:{preset}": (kind, row.config) for preset, row in kind.PRESETS.items()}
    paper = PRiMeFlow.PRESETS["norman19"].config
    for width in UNET_WIDTHS:
        found[f"primeflow, U-Net of {width}"] = PRiMeFlow, replace(paper, hidden_dim=width)
    found["primeflow, U-Net, depth"] = PRiMeFlow, replace(paper, hidden_dim=16, depth=True)
    found["primeflow, U-Net, anchors"] = PRiMeFlow, replace(paper, hidden_dim=16, anchor=True)
    return {name: (kind, shrunk(config)) for name, (kind, config) in found.items()}


def takes_time(kind) -> bool:
    """Whether cells come from the solution of a differential equation whose velocity depends on time."""
    return hasattr(kind.Config(), "solver") and kind.verb != "forecast"


def stirred(model: nn.Module) -> nn.Module:
    """Random weights everywhere, also in layers that begin at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        scale = 0.3 if parameter.ndim < 2 else 1 / math.sqrt(parameter[0].numel())
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def toy(space: str, verb: str):
    """Cells, and the design that a model of this kind asks for."""
    cells = iv.datasets.toy(n_cells=240, n_genes=14)
    if space != "counts":
        cells = iv.preprocess.normalize(cells)
    columns = {"perturbation": "perturbation", "control": "control"}
    if verb == "forecast":
        cells.obs["time"] = np.arange(cells.n_obs) % 10 / 10
        columns = {"time": "time"}
    return cells, iv.Design.from_adata(cells, covariates=["cell_type", "batch"], **columns)


def asked(kind, config):
    """A model with random weights, cells of one condition for it, and a function that draws from it."""
    cells, design = toy(kind.space, kind.verb)
    dataset = iv.CellDataset(cells, design)
    model = kind(design, cells.var_names, config)
    model.prepare(dataset)
    stirred(model)
    is_one_condition = (cells.obs["perturbation"] == "A") & (cells.obs["cell_type"] == "b_cell")
    batch = dataset.take(np.flatnonzero(is_one_condition)[:N])
    batch = Batch(batch.condition, source=batch.target, size_factor=torch.ones(N))
    options = kind.Sampling(steps=1, solver="euler") if takes_time(kind) else SampleConfig(precision="fp32")

    def draw(batch: Batch):
        generator = torch.Generator().manual_seed(0)
        if kind.verb == "generate":
            return model.likelihood(batch, torch.ones(1, 3), generator, options)[0].log_mean
        if kind.verb == "forecast":
            return model.velocity(torch.eye(N, 3))(batch.source.expand(config.n_members, -1, -1), torch.tensor(0.5))
        return model.sample(batch, generator, options)

    return model, batch, draw


def network_of(model: nn.Module, draw):
    """The outermost network with an argument `t` or `labels` that `draw` asks, and its arguments; or None."""
    inside, calls = [], []

    def enter(module, args, kwargs):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        record = next((value for value in given.values() if hasattr(value, "_fields") and "t" in value._fields), None)
        told = given if record is None else record._asdict()
        if {"t", "labels"} & set(told) and not inside:
            calls.append((module, given, dict(told)))
        if calls:
            inside.append(module)

    def leave(module, args, output):
        if inside:
            inside.pop()

    hooks = []
    for module in model.modules():
        hooks += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    draw()
    for hook in hooks:
        hook.remove()
    return calls[0] if calls else None


def other_conditions(condition, *, covariates: bool) -> dict:
    """The condition with another perturbation, or another level of one covariate, by what differs."""
    changed = {}
    if condition.perturbation.shape[1]:
        changed["perturbation"] = replace(condition, perturbation=condition.perturbation.roll(1, dims=1))
    for name, codes in condition.covariates.items() if covariates else ():
        changed[name] = replace(condition, covariates=dict(condition.covariates) | {name: 1 - codes.clamp(max=1)})
    return changed


def changes(told: dict, config) -> dict[str, dict]:
    """For each thing that a network is told: its arguments with another value of that thing."""
    n = len(told["t"]) if "t" in told else N
    changed = {}
    if "t" in told:
        changed["time"] = {"t": told["t"] + 0.4}
    for name in ("size", "log_depth"):
        if told.get(name) is not None and getattr(config, "condition_on_size", True):
            changed["depth"] = {name: told[name] + 0.3}
    if torch.is_tensor(told.get("labels")):
        changed["labels"] = {"labels": told["labels"].roll(1, dims=1)}
    if "is_null" in told:
        changed["null condition"] = {"is_null": torch.ones(n, dtype=torch.bool)}
    if "active" in told:
        changed["null condition"] = {"active": torch.zeros_like(told["active"])}
    if "condition" in told:
        read = getattr(config, "covariate_scale", 1.0) != 0  # otherwise anchors tell of covariates
        others = other_conditions(told["condition"], covariates=read)
        changed |= {name: {"condition": condition} for name, condition in others.items()}
    return changed


def relative_change(first, second) -> float:
    return float((first - second).norm() / first.norm())


CASES = cases()
TRAINED = [name for name, (kind, _) in CASES.items() if kind.loss is not iv.Model.loss]  # not the closed forms


@pytest.mark.parametrize("case", TRAINED)
def test_the_network_sees_what_it_is_told(case):
    kind, config = CASES[case]
    model, batch, draw = asked(kind, config)
    call = network_of(model, lambda: draw(batch))
    if takes_time(kind):
        assert call is not None, "no network with an argument t was asked; name the time of a velocity network t"
    if call is None:
        base, seen = draw(batch), {}
        for name, condition in other_conditions(batch.condition, covariates=True).items():
            seen[name] = relative_change(base, draw(replace(batch, condition=condition)))
        assert seen.keys() == {"perturbation", "cell_type", "batch"}
    else:
        module, given, told = call
        if "active" in told:
            told["active"] = torch.ones_like(told["active"])

        def output(**changed):
            values = {name: changed.get(name, told[name]) for name in told}
            if set(given) != set(told):  # they come as one record
                return module(next(iter(given.values()))._replace(**values))
            return module(**values)

        base = output()
        seen = {name: relative_change(base, output(**changed)) for name, changed in changes(told, config).items()}
    blind = {name: change for name, change in seen.items() if change < VISIBLE}
    assert blind.keys() <= UNTOLD.get(kind.name, set()), blind

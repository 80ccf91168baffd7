"""Formula tests of PRiMeFlow: padding, loss by hand, guidance, conditions, presets."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import invirtuo as iv
from invirtuo.batch import Batch, Condition
from invirtuo.fit import FitConfig
from invirtuo.flow import EVALUATIONS
from invirtuo.models import PRiMeFlow
from invirtuo.models.primeflow.velocity import Point
from invirtuo.nn import sinusoids
from invirtuo.verbs.sampling import FlowSampling, PartsSampling

Config = PRiMeFlow.Config
GENEWISE = Config(hidden_dim=32, gene_width=16, n_context=4, cell_width=32, n_blocks=1, n_sinusoids=8, loss_genes=0,
                  calibrate=0.0)  # fmt: skip
PAPER = replace(PRiMeFlow.PRESETS["srivatsan20"].config, hidden_dim=32, channel_mult=(1, 1, 2), num_heads=2,
                num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip
ABLATION = replace(PAPER, velocity="mlp", hidden_dim=48)
CONFIGS = {"genewise": GENEWISE, "unet": PAPER, "mlp": ABLATION}
N_GENES = 14  # padded to 16 by three levels
FIT = FitConfig(steps=3, batch_size=64, warmup=0, precision="fp32", accelerator="cpu", progress=False, val_every=0)


@pytest.fixture(scope="module")
def cells():
    return iv.preprocess.normalize(iv.datasets.toy(n_cells=180, n_genes=N_GENES))


@pytest.fixture(scope="module")
def plan(cells):
    return iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture(scope="module")
def dataset(cells, plan):
    return iv.CellDataset(cells, plan)


@pytest.fixture
def batch(dataset):
    return dataset.take(np.arange(0, 20))


def filled(plan, cells, config, dataset=None, seed: int = 0) -> PRiMeFlow:
    """A model with random weights everywhere, so that no layer of zeros hides another."""
    model = PRiMeFlow(plan, cells.var_names, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    if dataset is not None:
        model.prepare(dataset)
    return model


def points(batch, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(batch), N_GENES, generator=generator), torch.rand(len(batch), generator=generator)


class Calls:
    """Counts what goes through the velocity network."""

    def __init__(self, model):
        self.rows, self.times, self.null = [], [], []
        model.velocity.register_forward_pre_hook(self.note)

    def note(self, module, arguments):
        (at,) = arguments
        self.rows.append(len(at.x))
        self.times.append(at.t.clone())
        self.null.append(0 if at.is_null is None else int(at.is_null.sum()))


# ---- 1. new models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["genewise", "unet"])
def test_a_new_network_gives_exactly_zero(kind, plan, cells, batch):
    model = PRiMeFlow(plan, cells.var_names, replace(CONFIGS[kind], precondition=False))
    x, t = points(batch)
    assert torch.equal(model.evaluate(x, t, batch.condition), torch.zeros(20, N_GENES))


@pytest.mark.parametrize(("preset", "count"), [("srivatsan20", 189_671_169), ("norman19", 135_568_641)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameter_counts(preset, count, plan):
    with torch.device("meta"):
        model = PRiMeFlow(plan, [f"g{i}" for i in range(2000)], preset)
    network = model.velocity
    parameters = [*network.unet.parameters(), *network.embed.time.parameters()]
    assert sum(parameter.numel() for parameter in parameters) == count


# ---- 2. padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("genes", "length"), [(8630, 8640), (5575, 5584), (15476, 15488), (16, 16)])
def test_padded_lengths(genes, length, plan):
    with torch.device("meta"):
        network = PRiMeFlow(plan, [f"g{i}" for i in range(genes)], "srivatsan20").velocity
    assert network.length == length
    assert len(network.genes.weight) == genes + 1  # one row is shared by all padded positions


def test_padded_positions_hold_zero_and_reach_neither_output_nor_loss(plan, cells, batch):
    model = filled(plan, cells, PAPER).train()
    seen = {}

    def note(name):
        def hook(module, arguments, output):
            output.retain_grad()
            seen[name] = arguments[0], output

        return hook

    model.velocity.values.register_forward_hook(note("values"))
    model.velocity.unet.register_forward_hook(note("unet"))
    model.loss(batch)["total"].backward()
    values, _ = seen["values"]
    assert values.shape[1] == 16
    zero = sinusoids(torch.zeros(20, 2), 32, model.config.value_scale)
    assert torch.equal(values[:, N_GENES:], zero)
    gradient = seen["unet"][1].grad.squeeze(-1)
    assert not gradient[:, N_GENES:].any()
    assert (gradient[:, :N_GENES] != 0).all()


def test_padding_by_hand(plan, cells, batch):
    """The field is the U-Net on values, gene rows and pad rows put together by hand."""
    model = filled(plan, cells, PAPER)
    x, t = points(batch)
    network = model.velocity
    wide = torch.cat([x, torch.zeros(20, 2)], dim=1)
    rows = torch.cat([network.genes.weight[:N_GENES], network.genes.weight[[N_GENES, N_GENES]]])
    embedding = network.embed.time(sinusoids(t, 32, 1000.0)) + network.embed.condition(batch.condition)
    out = network.unet(network.values(sinusoids(wide, 32, 10.0)) + rows, embedding)[:, :N_GENES, 0]
    torch.testing.assert_close(model.evaluate(x, t, batch.condition), out)


# ---- 3. guidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "ab2", "rk4"])
@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0])
@pytest.mark.parametrize("kind", CONFIGS)
def test_network_calls(kind, guidance, solver, plan, cells, batch, dataset):
    """One call per evaluation: no null rows at weight 1, none but these at 0, as many as others otherwise."""
    model = filled(plan, cells, CONFIGS[kind], dataset)
    calls = Calls(model)
    config = FlowSampling(guidance=guidance, steps=3, solver=solver, batch_size=8)
    with torch.no_grad():
        model.sample(batch, torch.Generator().manual_seed(0), config)
    sizes = [size for size in (8, 8, 4) for _ in range(3 * EVALUATIONS[solver])]
    assert calls.rows == [size * (2 if guidance == 3.0 else 1) for size in sizes]
    assert calls.null == [size * (guidance != 1.0) for size in sizes]


def test_guidance_by_parts(plan, cells, batch, dataset):
    """Weight on the perturbation alone leaves control cells as they are and never asks for the null condition."""
    model = filled(plan, cells, GENEWISE, dataset)
    calls, draw = Calls(model), lambda: torch.Generator().manual_seed(3)

    def sampled(guidance) -> torch.Tensor:
        with torch.no_grad():
            return model.sample(batch, draw(), PartsSampling(guidance=guidance, steps=4))

    strong = sampled({"perturbation": 3.0, "covariates": 1.0})
    assert set(calls.rows) == {40} and set(calls.null) == {0}
    control, plain = batch.condition.is_control, sampled(1.0)
    assert control.any() and not control.all()
    torch.testing.assert_close(strong[control], plain[control], atol=1e-4, rtol=1e-4)
    assert (strong[~control] - plain[~control]).abs().max() > 0.01
    both = sampled({"perturbation": 3.0, "covariates": 3.0})
    torch.testing.assert_close(both, sampled(3.0), atol=1e-4, rtol=1e-4)


def test_parts_of_guidance_that_do_not_exist(plan, cells):
    model = PRiMeFlow(plan, cells.var_names, GENEWISE).fit(cells, config=FIT)
    wanted = pd.DataFrame({"cell_type": ["t_cell"], "perturbation": ["A"]})
    with pytest.raises(ValueError, match="cell_type is no part of it; expected perturbation, covariates"):
        model.predict(wanted, 5, guidance={"cell_type": 2.0})
    with pytest.raises(ValueError, match="guidance is .*; expected a number"):
        FlowSampling(guidance={"perturbation": 2.0})


def test_interval(plan, cells, batch, dataset):
    model = filled(plan, cells, GENEWISE, dataset)
    calls = Calls(model)
    config = FlowSampling(guidance=2.0, interval=(0.0, 0.2), steps=10, solver="euler")
    with torch.no_grad():
        model.sample(batch, torch.Generator(), config)
    assert calls.rows == [40, 40] + [20] * 8


@pytest.mark.parametrize("kind", CONFIGS)
def test_guided_step_by_hand(kind, plan, cells, batch, dataset):
    """One Euler step from the noise: x0 + v_null + w (v_cond - v_null)."""
    model = filled(plan, cells, replace(CONFIGS[kind], hurdle=False), dataset)
    config = FlowSampling(guidance=2.5, steps=1, solver="euler", batch_size=7)
    with torch.no_grad():
        x = model.sample(batch, torch.Generator().manual_seed(3), config)
        noise = torch.randn(20, N_GENES, generator=torch.Generator().manual_seed(3))
        t, everywhere = torch.zeros(20), torch.ones(20, dtype=torch.bool)
        conditional = model.evaluate(noise, t, batch.condition)
        null = model.evaluate(noise, t, batch.condition, everywhere)
    torch.testing.assert_close(x, noise + null + 2.5 * (conditional - null), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(conditional, null, atol=1e-2)


def test_solver_steps_and_grid_of_a_request(plan, cells, batch):
    model = filled(plan, cells, replace(PAPER, steps=5))
    calls = Calls(model)
    with torch.no_grad():
        model.sample(batch, torch.Generator(), FlowSampling())  # the model's own: Euler, 5 steps
        model.sample(batch, torch.Generator(), FlowSampling(steps=2, solver="midpoint"))
        model.sample(batch, torch.Generator(), FlowSampling(grid=(0.0, 0.3, 1.0)))
    times = [round(float(t[0]), 6) for t in calls.times]
    assert times == [0.0, 0.2, 0.4, 0.6, 0.8, 0.0, 0.25, 0.5, 0.75, 0.0, 0.3]


# ---- 5. loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_by_hand(kind, interpolant, training, plan, cells, batch, dataset):
    """Algorithm 1: the mean over cells and genes of (v(xt, c, t) - ut)^2, with its draws repeated here."""
    config = replace(CONFIGS[kind], interpl_type=interpolant, sigma=0.2, prob_unconditional=0.4)
    model = filled(plan, cells, config, dataset).train(training)
    losses = model.loss(batch, torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    x1, x0 = batch.target, torch.randn(20, N_GENES, generator=draw)
    t = torch.rand(20, generator=draw)
    t = t if training else (torch.arange(20) + t) / 20
    is_null = torch.rand(20, generator=draw) < 0.4
    eps = torch.randn(20, N_GENES, generator=draw)
    assert 0 < is_null.sum() < 20
    s = t[:, None]
    if interpolant == "linear":
        xt, ut = (1 - s) * x0 + s * x1, x1 - x0
    else:
        cos, sin = torch.cos(math.pi * s / 2), torch.sin(math.pi * s / 2)
        xt, ut = cos * x0 + sin * x1, math.pi / 2 * (cos * x1 - sin * x0)
    v = model.evaluate(xt + 0.2 * eps, t, batch.condition, is_null)
    torch.testing.assert_close(losses["total"], ((v - ut) ** 2).mean())


@pytest.mark.parametrize("n", [20, 7, 3])
def test_losses_per_bin_of_time_average_to_the_total(n, plan, cells, batch, dataset):
    model = filled(plan, cells, GENEWISE, dataset)
    calls = Calls(model)
    losses = {
        name: float(value.detach()) for name, value in model.loss(batch[:n], torch.Generator().manual_seed(0)).items()
    }
    (t,) = calls.times
    bins = [[i for i in range(n) if k * n // 5 <= i < (k + 1) * n // 5] for k in range(5)]
    assert set(losses) == {"total", *(f"t{k}" for k in range(5) if bins[k])}
    total = sum(losses[f"t{k}"] * len(rows) for k, rows in enumerate(bins) if rows) / n
    assert losses["total"] == pytest.approx(total, rel=1e-5)
    if n == 20:
        assert all(((k <= 5 * t[rows]) & (5 * t[rows] <= k + 1)).all() for k, rows in enumerate(bins))
    assert set(model.train().loss(batch)) == {"total"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_chosen_genes(kind, plan, cells, batch, dataset):
    """The field of some genes is that of all genes, and the loss of a step draws that many."""
    model = filled(plan, cells, CONFIGS[kind], dataset)
    x, t = points(batch)
    genes = torch.tensor([11, 0, 5])
    torch.testing.assert_close(model.evaluate(x, t, batch.condition, genes=genes),
                               model.evaluate(x, t, batch.condition)[:, genes], atol=1e-5, rtol=1e-5)  # fmt: skip
    few = filled(plan, cells, replace(CONFIGS[kind], loss_genes=3, prob_unconditional=0.0), dataset).train()
    loss = few.loss(batch, torch.Generator().manual_seed(5))["total"]
    draw = torch.Generator().manual_seed(5)
    x0, t = torch.randn(20, N_GENES, generator=draw), torch.rand(20, generator=draw)
    torch.rand(20, generator=draw)  # who would be null
    genes = torch.randperm(N_GENES, generator=draw)[:3]
    xt = (1 - t[:, None]) * x0 + t[:, None] * batch.target
    expected = (few.evaluate(xt, t, batch.condition) - (batch.target - x0)).square()[:, genes].mean()
    torch.testing.assert_close(loss, expected)


# ---- 6. and 7. conditions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_null_learns_only_if_it_is_used(kind, plan, cells, batch, dataset):
    for probability in (0.0, 0.5):
        model = filled(plan, cells, replace(CONFIGS[kind], prob_unconditional=probability), dataset).train()
        torch.manual_seed(0)
        model.loss(batch)["total"].backward()
        (null,) = [p for name, p in model.named_parameters() if name.endswith("condition.null")]
        assert (null.grad is None) if probability == 0 else bool(null.grad.any())


def test_guidance_of_a_model_without_null_is_refused(plan, cells):
    """From the control cells towards the perturbation it needs none."""
    model = PRiMeFlow(plan, cells.var_names, replace(GENEWISE, prob_unconditional=0.0)).fit(cells, config=FIT)
    wanted = pd.DataFrame({"cell_type": ["t_cell"], "perturbation": ["A"]})
    for guidance in (2.0, {"covariates": 2.0}):
        with pytest.raises(ValueError, match="never saw the null condition.*prob_unconditional=0.1"):
            model.predict(wanted, 5, guidance=guidance)
    free, guided = (model.predict(wanted, 5, guidance={"perturbation": weight}).X for weight in (1.0, 2.0))
    assert not np.allclose(free, guided)


def test_null_does_not_depend_on_the_condition_it_replaces(plan, cells, batch, dataset):
    for config in CONFIGS.values():
        model = filled(plan, cells, config, dataset)
        x, t = points(batch)
        x, t = x[:1].expand(20, -1), t[:1].expand(20)
        out = model.evaluate(x, t, batch.condition, torch.ones(20, dtype=torch.bool))
        torch.testing.assert_close(out, out[:1].expand(20, -1), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model.evaluate(x, t, batch.condition), out, atol=1e-3)


@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_control_null_and_no_covariates_are_three_conditions(kind, plan, cells):
    encoder = filled(plan, cells, CONFIGS[kind]).velocity
    encoder = encoder.embed.condition if kind == "unet" else encoder.condition
    control = Condition(torch.zeros(1, 3), {"cell_type": torch.tensor([1])})
    vectors = [encoder(control), encoder(control, torch.tensor([True])), encoder.mlp(torch.zeros(1, 6))]
    for i in range(3):
        assert not torch.allclose(vectors[i], vectors[i - 1], atol=1e-3)


def test_condition_parts_reach_the_field(plan, cells, dataset):
    """Perturbation and cell type each change the velocity, for each kind of network."""
    condition = Condition(
        torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]), {"cell_type": torch.tensor([0, 0, 0, 1])}
    )
    for config in CONFIGS.values():
        model = filled(plan, cells, config, dataset)
        out = model.evaluate(torch.ones(4, N_GENES), torch.full((4,), 0.5), condition)
        for i in range(4):
            assert not torch.allclose(out[i], out[i - 1], atol=1e-4)


# ---- our additions ---------------------------------------------------------------------------------------------------


def test_statistics_of_the_genes(plan, cells):
    split = pd.Series(np.where(np.arange(180) < 120, "train", "test"), index=cells.obs_names)
    model = PRiMeFlow(plan, cells.var_names, GENEWISE).fit(cells, split, config=replace(FIT, steps=1))
    x = cells.X.toarray()[:120].astype(np.float64)
    np.testing.assert_allclose(model.gene_mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.gene_sd, x.std(0) + 1e-3, rtol=1e-4)


@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
def test_preconditioning_by_hand(interpolant, plan, cells, batch, dataset):
    """Gaussian velocity plus what is left of ut times the network, which reads the whole cell standardised."""
    config = replace(GENEWISE, interpl_type=interpolant, sigma=0.3)
    model = filled(plan, cells, config, dataset)
    x, t = points(batch)
    s, mean, sd = t[:, None].double(), model.gene_mean.double(), model.gene_sd.double()
    if interpolant == "linear":
        a, b, da, db = 1 - s, s, -torch.ones_like(s), torch.ones_like(s)
    else:
        angle = math.pi * s / 2
        a, b, da, db = angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()
    variance = a**2 + (b * sd) ** 2 + 0.3**2
    covariance = a * da + b * db * sd**2
    residual = x.double() - b * mean
    velocity = db * mean + covariance / variance * residual
    left = (da**2 + (db * sd) ** 2 - covariance**2 / variance).sqrt()
    cell = (residual / variance.sqrt()).float()
    network = model.velocity(Point(x, cell, t, batch.condition, None, partial(model.anchor, batch.condition)))
    expected = velocity.float() + left.float() * network
    torch.testing.assert_close(model.evaluate(x, t, batch.condition), expected, atol=1e-4, rtol=1e-3)
    assert float(network.detach().abs().mean()) > 0.05


@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
def test_a_new_preconditioned_model_samples_the_gaussian_of_every_gene(interpolant, plan, cells):
    config = replace(GENEWISE, hurdle=False, interpl_type=interpolant, steps=40)
    fit = replace(FIT, steps=1, lr=1e-12, ema=0.0)
    model = PRiMeFlow(plan, cells.var_names, config).fit(cells, config=fit)
    wanted = pd.DataFrame({"cell_type": ["t_cell"], "perturbation": ["A"]})
    x = model.predict(wanted, 4000, precision="fp32", batch_size=4000).X
    standard_error = model.gene_sd.numpy() / np.sqrt(4000)
    assert (np.abs(x.mean(0) - model.gene_mean.numpy()) < 4 * standard_error + 0.005).all()
    np.testing.assert_allclose(x.std(0) / model.gene_sd.numpy(), np.ones(N_GENES), atol=0.05)


def test_hurdle(plan, cells):
    """Values below half of the smallest positive training value become 0."""
    model = PRiMeFlow(plan, cells.var_names, GENEWISE).fit(cells, config=FIT)
    wanted = pd.DataFrame({"cell_type": ["t_cell"], "perturbation": ["A"]})
    with_hurdle = model.predict(wanted, 50, precision="fp32").X
    model.config = replace(model.config, hurdle=False)
    without = model.predict(wanted, 50, precision="fp32").X
    threshold = cells.X.data[cells.X.data > 0].min() / 2
    assert (without < threshold).any() and (without[without > 0] < threshold).any()
    np.testing.assert_array_equal(with_hurdle, np.where(without < threshold, 0, without))


def test_calibration(plan, cells):
    """The mean of a condition that was seen is that of its cells, of one that was not half-way to the anchors'."""
    split = iv.splits.hold_out(cells.obs, plan, ["t_cell|A"])
    model = PRiMeFlow(plan, cells.var_names, GENEWISE).fit(cells, split, config=FIT)
    wanted = pd.DataFrame({"cell_type": ["t_cell", "b_cell"], "perturbation": ["A", "A"]})

    def mean(n_cells: int = 600, **options) -> np.ndarray:
        return model.predict(wanted, n_cells, precision="fp32", **options).X.reshape(2, n_cells, -1).mean(1)

    free = mean()
    model.config = replace(model.config, calibrate=0.5)
    half, few, guided = mean(), model.predict(wanted, 3, precision="fp32"), mean(guidance=1.5)
    model.config = replace(model.config, calibrate=0.0)
    estimate, known = model.anchor.estimate(plan.encode(wanted))
    assert known.tolist() == [1, 2]
    names, x = plan.names(cells.obs).to_numpy(), cells.X.toarray()
    own = x[(names == "b_cell|A") & (split == "train").to_numpy()].mean(0)
    np.testing.assert_allclose(estimate[1].numpy(), own, atol=1e-5)
    np.testing.assert_allclose(half[1], own, atol=0.15)
    np.testing.assert_allclose(half[0], (free[0] + estimate[0].numpy()) / 2, atol=0.15)
    assert few.n_obs == 6  # their mean is not theirs to match: it is taken from more cells
    np.testing.assert_array_equal(guided, mean(guidance=1.5))


@pytest.mark.parametrize("kind", ["genewise", pytest.param("unet", marks=pytest.mark.slow)])
def test_groups_that_were_never_seen(kind, cells):
    """A cell type that no cell of the fit has is known by its control cells, and known groups are as before."""
    new = (cells.obs["cell_type"] == "t_cell").to_numpy()
    plan = iv.Design.from_adata(cells[~new], perturbation="perturbation", control="control", covariates=["cell_type"])
    settings = {} if kind == "genewise" else {"anchor": True, "covariate_scale": 0.0, "hurdle": True}
    model = PRiMeFlow(plan, cells.var_names, replace(CONFIGS[kind], calibrate=0.5, **settings))
    model.fit(cells[~new].copy(), config=FIT)
    wanted = pd.DataFrame({"cell_type": ["t_cell", "b_cell"], "perturbation": ["A", "A"]})
    with pytest.raises(ValueError, match="t_cell"):
        model.predict(wanted, 5)
    wider = model.with_controls(cells)
    assert wider.design.covariates["cell_type"][-1] == "t_cell" and model.with_controls(cells[~new]) is model
    both = model.predict(wanted, 300, controls=cells, precision="fp32")
    names = plan.names(both.obs).to_numpy()
    alone = model.predict(wanted[1:], 300, precision="fp32")
    np.testing.assert_allclose(both.X[names == "b_cell|A"], alone.X, atol=1e-5)
    group, x = wider.design.encode(wanted[:1]), cells.X.toarray()
    control = x[new & plan.is_control(cells.obs)]
    features = wider.anchor(group)[0]
    np.testing.assert_allclose(features[:, 0], control.mean(0), atol=1e-5)
    np.testing.assert_allclose(features[:, 1], control.std(0), atol=1e-4)
    assert features[:, 3].abs().sum() > 0  # the effect of A elsewhere


def test_groups_that_cannot_be_learned_of(cells):
    new = (cells.obs["cell_type"] == "t_cell").to_numpy()
    plan = iv.Design.from_adata(cells[~new], perturbation="perturbation", control="control", covariates=["cell_type"])
    control = plan.is_control(cells.obs)
    model = PRiMeFlow(plan, cells.var_names, PAPER).fit(cells[~new].copy(), config=FIT)
    with pytest.raises(ValueError, match="Only models with anchor=True"):
        model.with_controls(cells)
    with pytest.raises(ValueError, match="holds no control cells"):
        model.with_controls(cells[~control])


@pytest.mark.slow
def test_learns_a_response_it_never_saw(cells, plan):
    """A in t cells: the mean is nearer to the truth than the control mean is, and the spread is that of cells."""
    adata = iv.preprocess.normalize(iv.datasets.toy(n_cells=900, n_genes=N_GENES))
    split = iv.splits.hold_out(adata.obs, plan, ["t_cell|A"])
    config = replace(GENEWISE, cell_width=64)
    fit = replace(FIT, steps=300, batch_size=128, lr=5e-3, warmup=20, ema=0.98)
    model = PRiMeFlow(plan, adata.var_names, config).fit(adata, split, config=fit)
    predicted = model.predict("test", 300, precision="fp32").X
    groups, x = plan.names(adata.obs).to_numpy(), adata.X.toarray()
    truth, control = x[groups == "t_cell|A"], x[groups == "t_cell|control"].mean(0)
    error, base = (np.linalg.norm(m - truth.mean(0)) for m in (predicted.mean(0), control))
    assert error < 0.5 * base
    assert 0.7 < predicted.var(0).sum() / truth.var(0).sum() < 1.3


# ---- presets ---------------------------------------------------------------------------------------------------------

U_NET = {"velocity": "unet", "num_res_blocks": 2, "hidden_dim": 256, "dropout": 0.1, "conv_resample": True,
         "num_heads": 8, "attention_resolutions": (16,), "n_layers_gene_expression": 2, "n_layers_conditions": 2,
         "n_layers_time": 2, "prob_unconditional": 0.2, "interpl_type": "linear", "sigma": 0.0}  # fmt: skip
TABLES = {  # tables 10 to 13: config, fit
    "srivatsan20": (
        U_NET | {"channel_mult": (1, 2, 2, 4, 4)},
        {"lr": 5e-5, "weight_decay": 0.0, "batch_size": 54, "clip": 5.0, "accumulate": 4},
    ),
    "norman19": (
        U_NET | {"channel_mult": (1, 1, 2, 2, 4)},
        {"lr": 5e-5, "weight_decay": 0.0, "batch_size": 100, "clip": 5.0, "accumulate": 4},
    ),
    "mlp-srivatsan20": (
        {"velocity": "mlp", "hidden_dim": 3072, "dropout": 0.0, "n_layers_gene_expression": 1, "n_layers_conditions": 1,
         "n_layers_time": 3, "n_layers_decoding": 2, "prob_unconditional": 0.0, "interpl_type": "linear",
         "sigma": 0.01},
        {"lr": 3.71e-5, "weight_decay": 4.05e-7, "batch_size": 512, "clip": 5.0, "accumulate": 1},
    ),
    "mlp-norman19": (
        {"velocity": "mlp", "hidden_dim": 2048, "dropout": 0.1, "n_layers_gene_expression": 2, "n_layers_conditions": 3,
         "n_layers_time": 5, "n_layers_decoding": 1, "prob_unconditional": 0.1, "interpl_type": "trigonometric",
         "sigma": 0.1},
        {"lr": 8.56e-6, "weight_decay": 9.58e-7, "batch_size": 1024, "clip": 5.0, "accumulate": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_presets_are_the_tables(name):
    preset = PRiMeFlow.PRESETS[name]
    config, fit = TABLES[name]
    assert {field: getattr(preset.config, field) for field in config} == config
    assert {field: getattr(preset.fit, field) for field in fit} == fit
    # what the paper has not: no additions of ours, 100 Euler steps, Adam at a constant rate, plain weights
    ours = {"precondition": False, "anchor": False, "covariate_scale": 1.0, "loss_genes": 0, "hurdle": False,
            "solver": "euler", "steps": 100, "time_scale": 1000.0, "value_scale": 10.0}  # fmt: skip
    assert {field: getattr(preset.config, field) for field in ours} == ours
    fixed = {"optimizer": "adam", "schedule": "constant", "ema": 0.0, "warmup": 0, "betas": (0.9, 0.999)}
    assert {field: getattr(preset.fit, field) for field in fixed} == fixed


def test_layers_of_the_ablation(plan):
    """Tables 12 and 13 count layers; the decoder has one Linear more."""
    with torch.device("meta"):
        network = PRiMeFlow(plan, [f"g{i}" for i in range(30)], "mlp-norman19").velocity
    linear = [
        len([layer for layer in part if isinstance(layer, torch.nn.Linear)])
        for part in (network.values, network.condition.mlp, network.time, network.decode)
    ]
    assert linear == [2, 3, 5, 2]
    assert network.decode[-1].weight.shape == (30, 2048) and network.decode[0].weight.shape == (2048, 3 * 2048)


@pytest.mark.parametrize("change", [{"velocity": "cnn"}, {"interpl_type": "cubic"}, {"prob_unconditional": 1.0}])
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is"):
        Config(**change)


def test_a_batch_without_source_is_enough(plan, cells, batch, dataset):
    model = filled(plan, cells, GENEWISE, dataset)
    with torch.no_grad():
        out = model.sample(Batch(batch.condition), torch.Generator(), FlowSampling(steps=1))
    assert out.shape == (20, N_GENES)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapt_keeps_what_has_a_name(kind, cells, plan):
    """Weights go on where they were, for perturbations and levels by name; what is new begins anew, by the seed."""
    config = replace(CONFIGS[kind], covariate_scale=1.0)
    first = PRiMeFlow(plan, cells.var_names, config).fit(cells, config=FIT)
    other = cells.copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(str).replace({"t_cell": "a new one"})
    other.obs["perturbation"] = other.obs["perturbation"].astype(str).replace({"A": "new", "A+B": "new"})
    design = iv.Design.from_adata(other, perturbation="perturbation", control="control", covariates=["cell_type"])
    still = replace(FIT, steps=1, lr=1e-12, ema=0.0)
    second = first.adapt(design).fit(other, config=still)
    old, new = dict(first.named_parameters()), dict(second.named_parameters())
    columns = [
        *(f"perturbation {name}" for name in plan.perturbations),
        *(f"cell_type {name}" for name in plan.covariates["cell_type"]),
    ]
    known = [
        *(f"perturbation {name}" for name in design.perturbations),
        *(f"cell_type {name}" for name in design.covariates["cell_type"]),
    ]
    for name, value in new.items():
        if not name.endswith("condition.mlp.0.weight"):
            torch.testing.assert_close(value, old[name], atol=1e-6, rtol=0)
            continue
        shared = [column for column in known if column in columns]
        assert 2 <= len(shared) < len(known)
        mine = value[:, [known.index(column) for column in shared]]
        torch.testing.assert_close(mine, old[name][:, [columns.index(column) for column in shared]], atol=1e-6, rtol=0)

    with pytest.raises(ValueError, match="not fitted"):
        PRiMeFlow(plan, cells.var_names, config).adapt(design)
    vectors = pd.DataFrame(
        np.eye(len(design.perturbations) + 2)[: len(design.perturbations)], index=design.perturbations
    )
    with pytest.raises(ValueError, match="features have"):
        features = first.design.with_features(pd.DataFrame(np.eye(len(plan.perturbations)), index=plan.perturbations))
        PRiMeFlow(features, cells.var_names, config).fit(cells, config=FIT).adapt(design.with_features(vectors))

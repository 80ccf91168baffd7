"""Formula tests of count likelihoods, depths, labels, the residual velocity, and guidance by several attributes."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import invirtuo as iv
from invirtuo import flow
from invirtuo.batch import Condition
from invirtuo.nn import (
    BatchNormMLP,
    CountLikelihood,
    LabelEmbedding,
    ResidualVelocity,
    SizeFactor,
    nb_log_prob,
    nb_sample,
)
from invirtuo.nn.residual import scalar_features
from invirtuo.verbs import labels

F64 = {"dtype": torch.float64}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- negative binomial and Bernoulli ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float64, 1e-8, 0.0), (torch.float32, 1e-3, 1e-4)])
def test_golden_log_probabilities(shared, dtype, atol, rtol):
    facts = json.loads(shared("golden/cfgen/nb_expected.json").read_text())
    x, mean, dispersion = (torch.tensor(facts[name], dtype=dtype) for name in ("x", "mu", "theta"))
    found = nb_log_prob(x, mean.log(), dispersion.log())
    np.testing.assert_allclose(found.double(), facts["scipy_exact"], atol=atol, rtol=rtol)


def test_golden_batch(shared):
    with np.load(shared("golden/cfgen/nb_batch.npz")) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    log_mean = arrays["logits"].log_softmax(1) + arrays["size_factor"].log()[:, None]
    found = nb_log_prob(arrays["x"], log_mean, arrays["log_theta"])
    torch.testing.assert_close(found, arrays["log_prob"], atol=1e-6, rtol=0, check_dtype=False)
    cells = CountLikelihood(log_mean, arrays["log_theta"])
    torch.testing.assert_close(
        -cells.log_prob_genes(arrays["x"].to(log_mean)).mean(), arrays["cfgen_loss"].to(log_mean)
    )


@pytest.mark.parametrize("r", [0.01, 3.0, 49.9, 50.1, 500.0])
def test_log_probability_against_scipy(r):
    x = torch.tensor([0.0, 1.0, 7.0, 300.0], **F64)
    mean = torch.tensor([[1e-6], [2.0], [250.0]], **F64)
    expected = stats.nbinom.logpmf(x.numpy(), r, r / (r + mean.numpy()))
    found = nb_log_prob(x, mean.log(), torch.tensor(r, **F64).log())
    np.testing.assert_allclose(found, expected, atol=1e-8, rtol=1e-7)


def test_log_probability_only_where_counts_are_is_the_same_and_so_is_its_gradient():
    x = torch.poisson(torch.full((20, 30), 0.4), generator=gen())
    log_mean = torch.randn(20, 30, generator=gen(1)).requires_grad_()
    log_r = (3 * torch.randn(30, generator=gen(2))).requires_grad_()
    dense = nb_log_prob(x, log_mean, log_r).sum(dim=1)
    grad = torch.autograd.grad(dense.sum(), [log_mean, log_r])
    thin = CountLikelihood(log_mean, log_r).log_prob_genes(x)
    torch.testing.assert_close(thin, dense)
    for a, b in zip(torch.autograd.grad(thin.sum(), [log_mean, log_r]), grad, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("mean", "r"), [(0.3, 0.5), (4.0, 2.0), (60.0, 1e4)])
def test_samples_have_the_mean_variance_and_zeros(mean, r):
    x = nb_sample(torch.full((200_000, 1), mean), torch.tensor([r]), gen()).double()
    variance = mean + mean**2 / r
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / len(x)))
    assert float(x.var()) == pytest.approx(variance, rel=0.05)
    zeros = stats.nbinom.pmf(0, r, r / (r + mean))
    assert float((x == 0).double().mean()) == pytest.approx(zeros, abs=5 * math.sqrt(0.25 / len(x)))


def test_genes_and_peaks_together():
    logits = torch.tensor([[0.0, 30.0, -30.0]]).expand(4000, -1)
    cells = CountLikelihood(torch.zeros(4000, 2), torch.zeros(2), logits)
    x = cells.sample(gen())
    assert x.shape == cells.mean.shape == (4000, 5)
    assert set(x[:, 2:].unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(x[:, 2:].mean(dim=0), torch.tensor([0.5, 1.0, 0.0]), atol=0.04, rtol=0)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x[:, 2:]).sum(dim=1)
    torch.testing.assert_close(cells.log_prob_peaks(x[:, 2:]), expected)


# ---- depth -----------------------------------------------------------------------------------------------------------


def depth(empirical: bool = False):
    """Two groups and a third of one cell; 5 cells of unknown group."""
    size = torch.cat(
        [torch.linspace(50, 150, 41), torch.linspace(900, 1100, 41), torch.tensor([5.0]), torch.full((5,), 400.0)]
    )
    group = torch.tensor([0] * 41 + [1] * 41 + [2] + [-1] * 5)
    made = SizeFactor(empirical=empirical)
    made.fit(size, group, 3)
    return made, size, group


def test_log_normal_by_group():
    made, size, group = depth()
    log = size.log()
    for k in (0, 1):
        drawn = made.sample(torch.full((50_000,), k), gen(k)).log()
        assert float(drawn.mean()) == pytest.approx(float(log[group == k].mean()), abs=0.01)
        assert float(drawn.std()) == pytest.approx(float(log[group == k].std(correction=0)), rel=0.03)
    assert float(made.log_sd[2]) == pytest.approx(float(log.std(correction=0)))  # one cell: spread of all
    assert float(made.log_mean[2]) == pytest.approx(math.log(5))
    pooled = made.sample(torch.full((50_000,), -1), gen(9)).log()
    assert float(pooled.mean()) == pytest.approx(float(log.mean()), abs=0.02)


def test_observed_depths_by_group():
    made, size, group = depth(empirical=True)
    for k in (0, 1, 2):
        drawn = made.sample(torch.full((2000,), k), gen(k))
        assert set(drawn.tolist()) == set(size[group == k].tolist())
    assert set(made.sample(torch.full((5000,), -1), gen()).tolist()) == set(size.tolist())


def test_scaled_depth():
    made, size, _ = depth()
    scaled = made.scaled(size)
    assert float(scaled.min()) == pytest.approx(0, abs=1e-6) and float(scaled.max()) == pytest.approx(1, abs=1e-6)
    flat = SizeFactor()
    flat.fit(torch.full((4,), 7.0), torch.zeros(4, dtype=torch.int64), 0)
    assert flat.scaled(torch.tensor([7.0, 9.0])).tolist() == [0.0, 0.0]
    assert torch.isfinite(flat.sample(torch.tensor([-1, 0]), gen())).all()


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    obs = pd.DataFrame({"type": ["a"] * 6 + ["b"] * 3 + ["?"] * 4, "donor": ["x"] * 5 + ["y"] + ["y"] * 3 + ["y"] * 4})
    design = iv.Design.from_adata(obs, covariates=["type", "donor"], unknown="?")
    assert design.covariates == {"type": ("a", "b"), "donor": ("x", "y")}
    return labels.observed(obs, design)


def drawn(table, n=4000, prior="joint", **where):
    given = labels.given_labels(where, n)
    return labels.draw(table, given, np.random.default_rng(0), prior=prior, unknown="?")


def test_joint_prior(table):
    found = drawn(table).value_counts(normalize=True)
    assert found["a", "x"] == pytest.approx(5 / 9, abs=0.03)
    assert set(found.index) == {("a", "x"), ("a", "y"), ("b", "y")}
    assert set(drawn(table, type="b")["donor"]) == {"y"}
    assert (drawn(table, type="a")["donor"] == "x").mean() == pytest.approx(5 / 6, abs=0.03)


def test_other_priors(table):
    independent = drawn(table, prior="independent").value_counts(normalize=True)
    assert independent["b", "x"] == pytest.approx(1 / 3 * 5 / 13, abs=0.03)
    uniform = drawn(table, prior="uniform").value_counts(normalize=True)
    assert uniform.round(2).between(0.30, 0.37).all() and len(uniform) == 3
    with pytest.raises(ValueError, match="prior is 'flat'"):
        drawn(table, prior="flat")


def test_labels_of_every_cell_stay_in_their_order(table):
    wanted = ["a", "b", "a", "b"] * 50
    found = drawn(table, n=200, type=wanted)
    assert found["type"].tolist() == wanted
    assert (found.loc[found["type"] == "b", "donor"] == "y").all()
    with pytest.raises(ValueError, match="holds 3 labels for 4 cells"):
        labels.given_labels({"type": ["a"] * 3}, 4)


def test_combination_that_was_never_seen(table, caplog):
    found = drawn(table, n=10, type="b", donor="x")
    assert found.drop_duplicates().values.tolist() == [["b", "x"]]
    assert "do not occur together" in caplog.text


@pytest.mark.parametrize("n", [1, 7, 100, 1003])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_rare_counts_by_hand(n, power):
    sizes = {"a": 100, "b": 30, "c": 7}
    counts = labels.rare_counts(sizes, n, power=power)
    weight = np.array([size**-power for size in sizes.values()])
    share = n * weight / weight.sum()
    assert sum(counts.values()) == n
    assert all(math.floor(s) <= counts[k] <= math.floor(s) + 1 for k, s in zip(sizes, share, strict=True))
    rest = (share - np.floor(share)).round(9)
    raised = [counts[k] - math.floor(s) for k, s in zip(sizes, share, strict=True)]
    assert min([r for r, up in zip(rest, raised, strict=True) if up], default=1) >= max(
        [r for r, up in zip(rest, raised, strict=True) if not up], default=0
    )


def test_rare_counts_with_a_cap():
    assert labels.rare_counts({"a": 100, "b": 10}, 50, max_fold=2) == {"a": 30, "b": 20}
    assert labels.rare_counts({"a": 10, "b": 10}, 50, max_fold=2) == {"a": 20, "b": 20}


# ---- networks --------------------------------------------------------------------------------------------------------


def test_batch_norm_of_one_cell():
    torch.manual_seed(0)
    mlp = BatchNormMLP(3, (8, 4), 2)
    mlp.train()
    mlp(torch.randn(50, 3))
    x = torch.randn(1, 3)
    one = mlp(x)
    mlp.eval()
    torch.testing.assert_close(one, mlp(x))
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "_BatchNorm", "ELU"] * 2 + ["Linear"]


def test_golden_time_embedding(shared):
    facts = json.loads(shared("golden/cfgen/model_expected.json").read_text())["time_embedding_dim20"]
    for t, expected in facts.items():
        found = scalar_features(torch.tensor([float(t)]), 20)[0]
        np.testing.assert_allclose(found, expected, atol=1e-4 if float(t) else 1e-7)  # arguments up to 1000 in fp32


NAMES = {
    "time_embedder": "time", "size_factor_embedder": "size", "net_in": "input", "net_out.1": "output",
    "net1.1": "first", "cond_proj.1": "embedding", "net2.1": "second",
}  # fmt: skip


def golden_velocity(shared) -> ResidualVelocity:
    with np.load(shared("golden/cfgen/velocity_weights.npz")) as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    for old, new in NAMES.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    velocity = ResidualVelocity(6, 16, 8, 2)
    velocity.load_state_dict(state)
    return velocity


@pytest.mark.parametrize(
    ("field", "weights"), [("uncond", (0, 0)), ("w_0_0", (0, 0)), ("w_1_1", (1, 1)), ("w_2_0.5", (2, 0.5))]
)
def test_golden_guided_velocity(shared, field, weights):
    facts = json.loads(shared("golden/cfgen/model_expected.json").read_text())["velocity"]
    velocity = golden_velocity(shared)
    low, high = facts["sf_min_max"]
    size = (torch.tensor(facts["log_size_factor"]) - low) / (high - low)
    label = torch.stack([torch.zeros(3, 8), torch.tensor(facts["y"]["a"]), torch.tensor(facts["y"]["b"])])

    def branches(z, t, cell, branch):
        return velocity(z, torch.full((len(z),), float(t)), size[cell], label[branch, cell])

    found = flow.composed(branches, torch.tensor([weights], dtype=torch.float32))(
        torch.tensor(facts["z"]), torch.tensor(0.37)
    )
    np.testing.assert_allclose(found.detach(), facts[field], atol=2e-5)


def test_label_embedding():
    torch.manual_seed(0)
    embed = LabelEmbedding([2, 3], 2, 4)
    condition = Condition(
        torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]),
        {"a": torch.tensor([0, 1, -1]), "b": torch.tensor([2, -1, 0])},
    )
    assert embed.known(condition).tolist() == [[True, True, True], [True, False, True], [False, True, True]]
    none = torch.zeros(3, 3, dtype=torch.bool)
    assert not embed(condition, none).any()
    table_a, table_b = (table.weight for table in embed.tables)
    both = embed(condition, torch.tensor([[True, True, False]]).expand(3, -1))
    torch.testing.assert_close(both[0], table_a[0] + table_b[2])
    torch.testing.assert_close(both[1], table_a[1])  # unknown labels add nothing
    torch.testing.assert_close(both[2], table_b[0])
    alone = embed(condition, torch.tensor([[False, False, True]]).expand(3, -1))
    torch.testing.assert_close(alone[0], embed.perturbation.bias)  # control
    torch.testing.assert_close(alone[2], embed.perturbation.bias + embed.perturbation.weight.sum(dim=1))


# ---- guidance --------------------------------------------------------------------------------------------------------


class Spy(nn.Module):
    """A velocity that depends on the branch, and notes which branches it was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, t, cell, branch):
        self.asked.append(branch.tolist())
        return (1 + branch[:, None]) * x + cell[:, None]


def test_composed_by_hand():
    x = torch.randn(2, 3, generator=gen())
    spy = Spy()
    found = flow.composed(spy, torch.tensor([[2.0, 0.5]]))(x, torch.tensor(0.5))
    cell = torch.arange(2)[:, None]
    v = [(1 + i) * x + cell for i in range(3)]
    torch.testing.assert_close(found, v[0] + 2.0 * (v[1] - v[0]) + 0.5 * (v[2] - v[0]))
    assert spy.asked == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("weights", "branches"), [((0, 0), {0}), ((1, 0), {1}), ((0, 2), {0, 2}), ((0.5, 0.5), {1, 2}), ((1, 1), {0, 1, 2})]
)
def test_branches_without_weight_are_left_out(weights, branches):
    spy = Spy()
    flow.composed(spy, torch.tensor([weights], dtype=torch.float32))(torch.randn(4, 2), torch.tensor(0.1))
    assert len(spy.asked) == 1 and set(spy.asked[0]) == branches


def test_weights_of_every_cell():
    x = torch.randn(3, 2, generator=gen())
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    found = flow.composed(Spy(), weights)(x, torch.tensor(0.5))
    for i in range(3):
        spy = Spy()
        alone = flow.composed(lambda z, t, cell, branch, i=i, spy=spy: spy(z, t, cell + i, branch), weights[[i]])
        torch.testing.assert_close(found[i], alone(x[[i]], torch.tensor(0.5))[0])


def gaussian_field(mean: float, variance: float):
    """Velocity of the straight path from N(0, 1) to N(mean, variance)."""

    def velocity(x, t):
        t = float(t)
        here = (1 - t) ** 2 + t**2 * variance
        return mean + (t * variance - (1 - t)) / here * (x - t * mean)

    return velocity


def score(x, t, mean, variance):
    return -(x - t * mean) / ((1 - t) ** 2 + t**2 * variance)


def test_proposition_1_on_gaussians():
    """The composed velocity is b x + a (score of the composed density at time t), from known scores; at every t."""
    base, conditions, weights = (0.5, 2.0), [(2.0, 1.0), (-1.0, 0.5)], torch.tensor([[0.7, 0.4]], **F64)
    parts = [gaussian_field(*base), *(gaussian_field(*c) for c in conditions)]

    def branches(x, t, cell, branch):
        return torch.stack([parts[i](x[k], t) for k, i in enumerate(branch.tolist())])

    x = torch.linspace(-3, 3, 13, **F64)[:, None]
    for t in (0.05, 0.4, 0.8, 0.99):
        composed_score = score(x, t, *base) + sum(
            w * (score(x, t, *c) - score(x, t, *base)) for w, c in zip(weights[0], conditions, strict=True)
        )
        expected = x / t + (1 - t) / t * composed_score  # straight path: v = x / t + (1 - t) / t * score
        found = flow.composed(branches, weights)(x, torch.tensor(t, **F64))
        torch.testing.assert_close(found, expected)


# ---- dopri5 ----------------------------------------------------------------------------------------------------------


def test_dopri5_is_accurate_and_goes_back():
    x0 = torch.randn(5, 2, generator=gen(), **F64)
    x1 = flow.solve(lambda x, t: x * torch.cos(3 * t), x0, 1, "dopri5")
    torch.testing.assert_close(x1, x0 * math.exp(math.sin(3) / 3), atol=2e-5, rtol=2e-5)
    back = flow.solve(flow.reversed_time(lambda x, t: x * torch.cos(3 * t)), x1, 1, "dopri5")
    torch.testing.assert_close(back, x0, atol=3e-5, rtol=3e-5)


def test_dopri5_takes_more_steps_where_it_is_needed():
    calls = {}
    for speed in (1.0, 60.0):
        times = []
        flow.solve(
            lambda x, t, s=speed, times=times: times.append(float(t)) or torch.sin(s * t) * s + 0 * x,
            torch.zeros(2, 1),
            1,
            "dopri5",
        )
        calls[speed] = len(times)
        assert 0 <= min(times) and max(times) <= 1
    assert calls[60.0] > 2 * calls[1.0]


def test_dopri5_gives_up_on_a_field_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="dopri5 cannot follow"):
        flow.solve(lambda x, t: x / 0, torch.ones(1, 1), 1, "dopri5")

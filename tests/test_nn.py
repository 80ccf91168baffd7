"""Formula tests of layers: parameter counts, new networks, fused norm, U-Net against plain convolutions, anchors."""

from __future__ import annotations

import math
import warnings
from threading import Barrier

import pandas as pd
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from invirtuo.batch import Condition
from invirtuo.cells.pseudobulk import Pseudobulk
from invirtuo.models.primeflow.anchor import PseudobulkAnchor
from invirtuo.models.primeflow.genewise import GenewiseVelocity
from invirtuo.models.primeflow.norm import group_norm_silu
from invirtuo.models.primeflow.shared import shared_network
from invirtuo.models.primeflow.unet import Attention, GroupNormAct, UNet1d
from invirtuo.nn import MLP, ConditionEncoder, ModulatedBlock, sinusoids
from invirtuo.nn.moved import with_mean
from invirtuo.threads import in_threads, operations_on_one_thread


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=gen(seed))


def fill(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every parameter random values, so that nothing is hidden behind a layer of zeros."""
    generator = gen(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


# ---- encodings and MLPs ----------------------------------------------------------------------------------------------


def test_sinusoids_by_hand():
    x = torch.tensor([[0.3, 2.0]])
    out = sinusoids(x, 6, scale=10.0)
    assert out.shape == (1, 2, 6)
    for i, value in enumerate([0.3, 2.0]):
        angles = [10.0 * value * 10_000 ** (-k / 3) for k in range(3)]
        expected = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
        torch.testing.assert_close(out[0, i], expected, atol=1e-5, rtol=0)


def test_sinusoids_of_bf16_values_are_computed_in_fp32():
    assert sinusoids(torch.ones(2, dtype=torch.bfloat16), 4).dtype == torch.float32


def test_mlp_layers():
    kinds = [type(layer).__name__ for layer in MLP(3, 8, 2, n_out=4, dropout=0.1)]
    assert kinds == ["Linear", "SiLU", "Dropout", "Linear", "SiLU", "Dropout", "Linear"]
    assert [type(layer).__name__ for layer in MLP(3, 8, 1)] == ["Linear", "SiLU"]
    assert MLP(3, 8, 0, n_out=4)[0].weight.shape == (4, 3)


def test_modulated_block():
    """x + down(SiLU(up(norm(x) (1 + scale) + shift))); a new block is the identity."""
    x, e = randn(5, 8), randn(5, 6, seed=1)
    block = ModulatedBlock(8, 6)
    assert torch.equal(block(x, e), x)
    fill(block)
    scale, shift = block.modulation(e).split(8, dim=1)
    hidden = F.layer_norm(x, (8,)) * (1 + scale) + shift
    torch.testing.assert_close(block(x, e), x + block.down(F.silu(block.up(hidden))))


def test_condition_encoder():
    condition = Condition(
        torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]),
        {"cell": torch.tensor([2, 0, 1])},
        {"time": torch.tensor([0.5, 0.0, 2.0])},
    )
    encoder = fill(ConditionEncoder(2, [3], 1, 8, covariate_scale=0.5))
    rows = torch.tensor([[0, 1, 0, 0, 0.5, 0.5], [0, 0, 0.5, 0, 0, 0], [1, 1, 0, 0.5, 0, 2.0]])
    torch.testing.assert_close(encoder(condition), encoder.mlp(rows))
    assert len([layer for layer in encoder.mlp if isinstance(layer, nn.Linear)]) == 2
    is_null = torch.tensor([False, True, False])
    mixed = encoder(condition, is_null)
    assert torch.equal(mixed[1], encoder.null)
    assert torch.equal(mixed[[0, 2]], encoder(condition)[[0, 2]])


def test_null_gets_gradients_only_where_it_is_used():
    encoder = ConditionEncoder(2, [3], 0, 8)
    assert torch.equal(encoder.null, torch.zeros(8))
    condition = Condition(torch.eye(2), {"cell": torch.tensor([0, 1])})
    encoder(condition).sum().backward()
    assert encoder.null.grad is None
    encoder(condition, torch.tensor([True, False])).sum().backward()
    assert torch.equal(encoder.null.grad, torch.ones(8))


# ---- fused group norm ------------------------------------------------------------------------------------------------


def plain_norm(x, weight, bias, groups, shift, silu):
    """The framework's own layers, channels first."""
    x = x if shift is None else x + shift[:, None]
    h = F.group_norm(x.transpose(1, 2), groups, weight, bias, 1e-5).transpose(1, 2)
    return F.silu(h) if silu else h


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 32), (12, 4)])
def test_group_norm_silu(channels, groups, with_shift, silu):
    """Forward and all gradients equal group_norm then silu."""
    x = 2 * randn(3, 10, channels) + 1
    weight, bias = 1 + 0.2 * randn(channels, seed=1), randn(channels, seed=2)
    shift = randn(3, channels, seed=3) if with_shift else None
    upstream = randn(3, 10, channels, seed=4)
    results = []
    for function in (lambda *a: group_norm_silu(*a[:5], silu=a[5]), plain_norm):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias, shift) if t is not None]
        out = function(*inputs[:3], groups, inputs[3] if with_shift else None, silu)
        out.backward(upstream)
        results.append([out, *(t.grad for t in inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(group_norm_silu(x, weight, bias, groups, shift, silu=silu), results[1][0])


@pytest.mark.parametrize("with_shift", [True, False])
def test_group_norm_silu_in_bf16(with_shift):
    """Within the rounding of bf16 of the fp32 result, forward and backward."""
    x, weight, bias = randn(3, 40, 32) + 0.5, 1 + 0.2 * randn(32, seed=1), randn(32, seed=2)
    shift = randn(3, 32, seed=3) if with_shift else None
    upstream = randn(3, 40, 32, seed=4)
    low, high = (x.to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float32))
    mine = group_norm_silu(low, weight, bias, 8, shift if shift is None else shift.bfloat16())
    theirs = plain_norm(high, weight, bias, 8, shift, True)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), theirs, atol=0.05, rtol=0.02)
    mine.backward(upstream.bfloat16())
    theirs.backward(upstream)
    torch.testing.assert_close(low.grad.float(), high.grad, atol=0.05, rtol=0.05)


def test_group_norm_silu_with_a_large_mean():
    """Channels far from zero, as after many residual sums, keep their digits."""
    x = randn(2, 200, 16) + 30
    weight, bias = torch.ones(16), torch.zeros(16)
    double = plain_norm(x.double(), weight.double(), bias.double(), 4, None, True)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 4).double(), double, atol=2e-3, rtol=1e-3)


# ---- U-Net -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"width": 256, "mult": (1, 2, 2, 4, 4), "n_res": 2, "attention": (16,)}, 189_671_169),
        ({"width": 256, "mult": (1, 1, 2, 2, 4), "n_res": 2, "attention": (16,)}, 135_568_641),
        ({"width": 32, "mult": (1, 2), "n_res": 1, "attention": (2,)}, 347_585),
        ({"width": 64, "mult": (1, 2, 2), "n_res": 2, "attention": (4,)}, 2_966_849),
    ],
)
def test_parameter_counts(options, parameters):
    """With the time MLP, as in guided diffusion."""
    d = options["width"]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        network = nn.ModuleList([UNet1d(d, d_embedding=4 * d, **options), MLP(d, 4 * d, 1, n_out=4 * d)])
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


TINY = {"width": 32, "mult": (1, 2, 2), "n_res": 1, "attention": (2,), "heads": 4, "dropout": 0.0, "d_embedding": 24}


@pytest.mark.parametrize("options", [{}, {"resample": False}])
def test_new_unet_gives_exactly_zero(options):
    torch.manual_seed(0)
    out = UNet1d(6, 2, **TINY, **options)(randn(2, 8, 6), randn(2, 24))
    assert torch.equal(out, torch.zeros(2, 8, 2))


def test_unet_refuses_lengths_that_do_not_halve():
    network = UNet1d(6, **TINY)
    assert network.multiple == 4
    with pytest.raises(ValueError, match="length 10 is not a multiple of 4"):
        network(randn(1, 10, 6), randn(1, 24))


class PlainUNet:
    """The same network written with conv1d, channels first, from the table of the specification."""

    def __init__(self, state: dict[str, torch.Tensor], *, mult, n_res, attention, heads, resample=True, **_):
        self.state, self.mult, self.n_res, self.attention, self.heads = state, mult, n_res, attention, heads
        self.resample = resample

    def p(self, name):
        return self.state[name + ".weight"], self.state[name + ".bias"]

    def conv(self, name, x, stride=1):
        weight, bias = self.p(name)
        if weight.ndim == 2:
            return F.conv1d(x, weight[:, :, None], bias)
        return F.conv1d(x, weight[:, :, 0], bias, stride=stride, padding=1)

    def norm(self, name, x):
        return F.group_norm(x, x.shape[1] // 8, *self.p(name), eps=1e-5)

    def res(self, name, x, e):
        h = self.conv(f"{name}.conv_in", F.silu(self.norm(f"{name}.norm_in", x)))
        shift = F.linear(F.silu(e), *self.p(f"{name}.embed"))[:, :, None]
        h = self.norm(f"{name}.norm_out", h + shift)
        h = self.conv(f"{name}.conv_out", F.silu(h))
        return h + (self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.state else x)

    def attend(self, name, x):
        c = x.shape[1]
        q, k, v = self.conv(f"{name}.qkv", self.norm(f"{name}.norm", x)).chunk(3, dim=1)
        heads = []
        for i in range(self.heads):
            rows = slice(i * c // self.heads, (i + 1) * c // self.heads)
            logits = torch.einsum("ncq,nck->nqk", q[:, rows], k[:, rows]) / math.sqrt(c / self.heads)
            heads.append(torch.einsum("nqk,nck->ncq", logits.softmax(-1), v[:, rows]))
        return x + self.conv(f"{name}.out", torch.cat(heads, dim=1))

    def __call__(self, x, e):
        h = self.conv("stem", x.transpose(1, 2))
        skips, factor, block = [h], 1, 0
        for level in range(len(self.mult)):
            for _ in range(self.n_res):
                h = self.res(f"encoder.{block}.0", h, e)
                if factor in self.attention:
                    h = self.attend(f"encoder.{block}.1", h)
                skips.append(h)
                block += 1
            if level < len(self.mult) - 1:
                h = self.conv(f"encoder.{block}.0.op", h, stride=2) if self.resample else F.avg_pool1d(h, 2)
                skips.append(h)
                block, factor = block + 1, factor * 2
        h = self.res("middle.2", self.attend("middle.1", self.res("middle.0", h, e)), e)
        block = 0
        for level in reversed(range(len(self.mult))):
            for i in range(self.n_res + 1):
                h = self.res(f"decoder.{block}.0", torch.cat([h, skips.pop()], dim=1), e)
                last = 1
                if factor in self.attention:
                    h, last = self.attend(f"decoder.{block}.1", h), 2
                if level > 0 and i == self.n_res:
                    h = F.interpolate(h, scale_factor=2, mode="nearest")
                    h = self.conv(f"decoder.{block}.{last}.op", h) if self.resample else h
                    factor //= 2
                block += 1
        assert not skips
        return self.conv("head", F.silu(self.norm("norm", h))).transpose(1, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"resample": False}, {"n_res": 2, "attention": (1, 4)}, {"mult": (2, 1)}],
    ids=["plain", "pooled", "more attention", "narrowing"],
)
def test_unet_equals_plain_convolutions(options):
    """Output and gradients of the channels-last network and of conv1d with the same weights."""
    options = TINY | options
    network = fill(UNet1d(6, **options), scale=0.1)
    state = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    x, e = randn(2, 16, 6, seed=1), randn(2, 24, seed=2)
    mine, theirs = network(x, e), PlainUNet(state, **options)(x, e)
    assert float(theirs.detach().std()) > 0.03  # says something
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    largest = max(float(value.grad.abs().max()) for value in state.values())
    for name, parameter in network.named_parameters():
        expected = state[name].grad
        atol = 1e-3 * max(float(expected.abs().max()), 1e-3 * largest)  # some have nearly none
        torch.testing.assert_close(parameter.grad, expected, atol=atol, rtol=0)
    with torch.no_grad():  # the path without gradients
        torch.testing.assert_close(network(x, e), theirs, atol=2e-4, rtol=1e-3)


def test_unet_in_bf16_autocast():
    network = fill(UNet1d(6, **TINY), scale=0.1)
    x, e = randn(2, 8, 6, seed=1), randn(2, 24, seed=2)
    full = network(x, e).detach()
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x, e).detach()
    assert float((low.float() - full).std() / full.std()) < 0.05


def test_attention_is_explicit_softmax():
    layer = fill(Attention(32, 4))
    x = randn(2, 32, 1, 7).contiguous(memory_format=torch.channels_last)
    h = F.group_norm(x[:, :, 0], 4, layer.norm.weight, layer.norm.bias)
    q, k, v = F.linear(h.transpose(1, 2), layer.qkv.weight, layer.qkv.bias).split(32, dim=-1)
    out = torch.zeros(2, 7, 32)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        weights = (q[..., rows] @ k[..., rows].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        out[..., rows] = weights @ v[..., rows]
    expected = x[:, :, 0] + F.linear(out, layer.out.weight, layer.out.bias).transpose(1, 2)
    torch.testing.assert_close(layer(x, None)[:, :, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("channels", "groups"), [(4, 1), (12, 1), (16, 2), (32, 4), (48, 6), (64, 8), (256, 32), (768, 32)]
)
def test_a_group_of_channels_is_wide_enough_to_keep_what_is_added(channels, groups):
    """A norm of one channel takes off what was added to it; the paper's widths have 32 groups, as published."""
    layer = GroupNormAct(channels)
    assert layer.num_groups == groups
    x = randn(2, channels, 1, 7).contiguous(memory_format=torch.channels_last)
    layer.requires_grad_(False)
    plain, shifted = layer(x), layer(x, 3 * randn(2, channels, seed=1))
    assert float((shifted - plain).norm() / plain.norm()) > 0.3


# ---- gene-wise field -------------------------------------------------------------------------------------------------

GENES = 9


def genewise(**options) -> GenewiseVelocity:
    settings = {"n_features": 2, "width": 8, "n_context": 3, "cell_width": 16, "n_blocks": 2, "n_sinusoids": 6}
    return GenewiseVelocity(GENES, 5, **(settings | options))


def inputs(n: int = 4, chosen: torch.Tensor | slice = slice(None)):
    return randn(n, GENES), randn(n, GENES, seed=1), randn(n, 5, seed=2), randn(n, GENES, 2, seed=3)[:, chosen]


def test_new_genewise_field_gives_exactly_zero():
    assert torch.equal(genewise()(*inputs()), torch.zeros(4, GENES))


@pytest.mark.parametrize("chosen", [[3], [8, 0, 5], list(range(GENES))])
def test_chosen_genes_are_those_of_the_full_output(chosen):
    field, genes = fill(genewise()), torch.tensor(chosen)
    torch.testing.assert_close(field(*inputs(chosen=genes), genes), field(*inputs())[:, genes])


def test_chosen_genes_get_the_gradients_of_the_full_output():
    genes = torch.tensor([8, 0, 5])
    fields = fill(genewise()), fill(genewise())
    fields[0](*inputs(chosen=genes), genes).square().sum().backward()
    fields[1](*inputs())[:, genes].square().sum().backward()
    for (name, a), b in zip(fields[0].named_parameters(), fields[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_nothing_depends_on_the_order_of_genes():
    field, other = fill(genewise()), fill(genewise(), seed=1)
    order = torch.randperm(GENES, generator=gen(4))
    state = dict(field.state_dict())
    for name in ("context", "context_bias", "genes", "read_out", "bias_out"):
        state[name] = state[name][order]
    state["read.weight"] = state["read.weight"][:, order]
    other.load_state_dict(state)
    values, cell, embedding, features = inputs()
    permuted = other(values[:, order], cell[:, order], embedding, features[:, order])
    torch.testing.assert_close(permuted, field(values, cell, embedding, features)[:, order], atol=1e-4, rtol=1e-4)


def test_a_gene_sees_its_own_value_and_the_whole_cell():
    field = fill(genewise())
    values, cell, embedding, features = (t.requires_grad_() for t in inputs(1))
    field(values, cell, embedding, features)[0, 2].backward()
    others = torch.arange(GENES) != 2
    assert values.grad[0, 2] != 0 and not values.grad[0, others].any()
    assert features.grad[0, 2].any() and not features.grad[0, others].any()
    assert (cell.grad != 0).all() and (embedding.grad != 0).all()


# ---- pseudobulk anchors ----------------------------------------------------------------------------------------------


def pseudobulk(rows) -> Pseudobulk:
    """Of rows (group, multi-hot, mean), ten cells each."""
    condition = Condition(
        torch.tensor([row[1] for row in rows], dtype=torch.float32), {"cell": torch.tensor([row[0] for row in rows])}
    )
    mean = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    table = pd.DataFrame(index=range(len(rows)))
    return Pseudobulk(table, condition, mean, torch.full_like(mean, 0.25), torch.full((len(rows),), 10))


def anchor_of(rows, n_perturbations: int = 2) -> PseudobulkAnchor:
    anchor = PseudobulkAnchor(1, n_perturbations, len(rows[0][2]))
    anchor.fit(pseudobulk(rows))
    return anchor


def ask(group: int, multi_hot) -> Condition:
    return Condition(torch.tensor([multi_hot], dtype=torch.float32), {"cell": torch.tensor([group])})


TWO_GROUPS = [  # control, A, B in group 0; control and A in group 1, whose control cells differ
    (0, [0, 0], [1.0, 1.0, 1.0]),
    (0, [1, 0], [2.0, 1.0, 1.0]),
    (0, [0, 1], [1.0, 3.0, 1.0]),
    (1, [0, 0], [2.0, 2.0, 0.0]),
    (1, [1, 0], [2.5, 2.0, 0.0]),
]


def test_anchor_leaves_the_condition_itself_out():
    """A in group 0 is expected to act as A does in group 1, and the other way round."""
    anchor = anchor_of(TWO_GROUPS)
    torch.testing.assert_close(anchor.effect(ask(0, [1, 0]))[0], torch.tensor([0.5, 0.0, 0.0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(anchor.effect(ask(1, [1, 0]))[0], torch.tensor([1.0, 0.0, 0.0]), atol=2e-3, rtol=0)
    changed = [row if row[:2] != (0, [1, 0]) else (0, [1, 0], [90.0, 90.0, 90.0]) for row in TWO_GROUPS]
    again = anchor_of(changed)
    torch.testing.assert_close(again.effect(ask(0, [1, 0])), anchor.effect(ask(0, [1, 0])))
    assert float(again.effect(ask(1, [1, 0]))[0, 2]) > 50  # while others do see it


def test_anchor_features_by_hand():
    anchor = anchor_of(TWO_GROUPS)
    features = anchor(ask(1, [0, 1]))[0]  # B was seen in group 0 only
    mean = torch.tensor([2.0, 2.0, 0.0])
    effect = torch.tensor([0.0, 2.0, 0.0])
    torch.testing.assert_close(features[:, 0], mean)
    torch.testing.assert_close(features[:, 1], torch.full((3,), 0.5))
    torch.testing.assert_close(features[:, 2], mean + effect, atol=5e-3, rtol=0)
    torch.testing.assert_close(features[:, 3], effect, atol=5e-3, rtol=0)
    assert torch.equal(anchor.effect(ask(1, [0, 0])), torch.zeros(1, 3))  # control


def test_anchor_expects_nothing_below_zero():
    rows = [(0, [0, 0], [1.0]), (0, [1, 0], [0.2]), (1, [0, 0], [0.3]), (1, [0, 1], [0.3])]
    features = anchor_of(rows)(ask(1, [1, 0]))[0]
    torch.testing.assert_close(features[0], torch.tensor([0.3, 0.5, 0.0, -0.3]))


def test_anchor_by_its_formula():
    """m^T (Z^T S Z + ridge I)^-1 Z^T S Y with the bandwidth that the anchor chose."""
    rows = [(k, m, randn(4, seed=10 * k + sum(m) + 3 * m[0]).abs().tolist())
            for k in range(3) for m in ([0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1])]  # fmt: skip
    anchor = anchor_of(rows, n_perturbations=3)
    assert len(anchor.effects) == 12
    controls = torch.tensor([row[2] for row in rows if not any(row[1])], dtype=torch.float64)
    treated = [row for row in rows if any(row[1])]
    effects = torch.stack([torch.tensor(row[2], dtype=torch.float64) - controls[row[0]] for row in treated])
    designs = torch.tensor([row[1] for row in treated], dtype=torch.float64)
    for group, multi_hot in [(0, [1, 0, 0]), (2, [1, 1, 0]), (1, [1, 0, 1])]:
        similarity = torch.tensor([
            0.0 if (row[0], row[1]) == (group, multi_hot) else
            math.exp(-float((controls[group] - controls[row[0]]).square().sum()) / float(anchor.bandwidth)) + 0.01
            for row in treated
        ], dtype=torch.float64)  # fmt: skip
        s = torch.diag(similarity)
        gram = designs.T @ s @ designs
        ridge = (
            1e-3 * similarity[[any(a and b for a, b in zip(row[1], multi_hot, strict=True)) for row in treated]].max()
        )
        expected = torch.tensor(multi_hot, dtype=torch.float64) @ torch.linalg.solve(
            gram + ridge * torch.eye(3, dtype=torch.float64), designs.T @ s @ effects
        )
        torch.testing.assert_close(anchor.effect(ask(group, multi_hot))[0].double(), expected, atol=1e-4, rtol=1e-3)


ADDITIVE = {"a": [1.0, 0.0, 0.5], "b": [0.0, 2.0, -0.5]}
IDENTICAL = [
    (k, [i, j], [3.0 + i * ADDITIVE["a"][g] + j * ADDITIVE["b"][g] for g in range(3)])
    for k in range(3) for i, j in ([0, 0], [1, 0], [0, 1], [1, 1])
]  # fmt: skip


def test_anchor_recovers_additive_effects_over_identical_groups():
    anchor = anchor_of(IDENTICAL)
    for group, multi_hot, mean in IDENTICAL:
        expected = torch.tensor(mean) - 3.0
        torch.testing.assert_close(anchor.effect(ask(group, multi_hot))[0], expected, atol=5e-3, rtol=0)


def test_anchor_adds_the_parts_of_an_unseen_combination():
    anchor = anchor_of([row for row in IDENTICAL if row[1] != [1, 1]])
    both = torch.tensor(ADDITIVE["a"]) + torch.tensor(ADDITIVE["b"])
    torch.testing.assert_close(anchor.effect(ask(1, [1, 1]))[0], both, atol=5e-3, rtol=0)


def test_anchor_knows_nothing_of_an_unseen_perturbation():
    anchor = anchor_of([row for row in TWO_GROUPS if row[1] != [0, 1]])
    assert torch.equal(anchor.effect(ask(0, [0, 1])), torch.zeros(1, 3))


def test_anchor_null_features():
    anchor = anchor_of(TWO_GROUPS)
    condition = Condition(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), {"cell": torch.tensor([0, 0])})
    mixed = anchor(condition, torch.tensor([False, True]))
    torch.testing.assert_close(mixed[0], anchor(condition)[0])
    mean = torch.tensor([1.5, 1.5, 0.5])
    spread = torch.tensor([0.5, 0.5, 0.5]).sqrt()  # .25 within and .25 between the groups
    expected = torch.stack([mean, spread, mean, torch.zeros(3)], dim=-1)
    torch.testing.assert_close(mixed[1], expected)


def test_anchor_of_a_group_without_controls():
    """It takes mean and spread over all control cells, weighted by their number."""
    training = pseudobulk(TWO_GROUPS)
    training.n_cells[3] = 30  # controls of group 1
    mean, anchor = training.mean, PseudobulkAnchor(1, 2, 3)
    anchor.fit(training)
    overall = torch.tensor([1.75, 1.75, 0.25], dtype=torch.float64)
    spread = 0.25 + (0.25 * (mean[0] - overall) ** 2 + 0.75 * (mean[3] - overall) ** 2)
    features = anchor(ask(2, [0, 0]))[0]
    torch.testing.assert_close(features[:, 0].double(), overall)
    torch.testing.assert_close(features[:, 1].double(), spread.sqrt())


def test_anchor_pools_the_controls_of_a_group():
    """A Design with time or dose has several control conditions per group."""
    rows = [(0, [0, 0], [1.0]), (0, [0, 0], [4.0]), (0, [1, 0], [3.0]), (1, [0, 0], [2.0]), (1, [1, 0], [2.0])]
    training = pseudobulk(rows)
    training.n_cells[1] = 20
    anchor = PseudobulkAnchor(1, 2, 1)
    anchor.fit(training)
    features = anchor(ask(0, [0, 0]))[0, 0]
    assert float(features[0]) == pytest.approx(3.0)
    assert float(features[1]) == pytest.approx(math.sqrt(0.25 + (4 + 2 * 1) / 3))
    assert float(anchor.effect(ask(1, [1, 0]))) == pytest.approx(0.0, abs=1e-6)


def test_anchor_chooses_its_bandwidth_on_few_conditions(monkeypatch):
    """Leave-one-out over thousands of conditions would take hours."""
    n = 700
    multi_hot = torch.zeros(n + 2, 3)
    multi_hot[torch.arange(n) + 2, torch.arange(n) % 3] = 1
    condition = Condition(multi_hot, {"cell": torch.arange(n + 2) % 2})
    solved = []
    weights = PseudobulkAnchor._weights
    monkeypatch.setattr(PseudobulkAnchor, "_weights", lambda self, *a: solved.append(1) or weights(self, *a))
    anchor = PseudobulkAnchor(1, 3, 4)
    mean = randn(n + 2, 4).double()
    anchor.fit(Pseudobulk(pd.DataFrame(index=range(n + 2)), condition, mean, torch.ones_like(mean), torch.ones(n + 2)))
    assert len(anchor.effects) == n and 100 < len(solved) <= 10 * 200


def test_anchor_without_covariates():
    rows = [([0, 0], [1.0]), ([1, 0], [3.0]), ([0, 1], [2.0])]
    condition = Condition(torch.tensor([row[0] for row in rows], dtype=torch.float32))
    mean = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    anchor = PseudobulkAnchor(0, 2, 1)
    anchor.fit(Pseudobulk(pd.DataFrame(index=range(3)), condition, mean, torch.ones_like(mean), torch.ones(3)))
    combination = Condition(torch.ones(1, 2))
    assert float(anchor.effect(combination)) == pytest.approx(3.0, abs=1e-2)


def test_anchor_needs_controls():
    with pytest.raises(ValueError, match="no control cells"):
        anchor_of([row for row in TWO_GROUPS if any(row[1])])


def test_anchor_save_and_load():
    anchor, again = anchor_of(TWO_GROUPS), PseudobulkAnchor(1, 2, 3)
    again(ask(0, [1, 0]))  # fill its memory with what it does not know yet
    again.load_state_dict(load(save({k: v.contiguous() for k, v in anchor.state_dict().items()})))
    for group in (0, 1):
        for multi_hot in ([0, 0], [1, 0], [0, 1], [1, 1]):
            assert torch.equal(again(ask(group, multi_hot)), anchor(ask(group, multi_hot)))


def test_anchor_forgets_when_fitted_again():
    anchor = anchor_of(TWO_GROUPS)
    anchor(ask(0, [1, 1]))
    anchor.fit(pseudobulk(IDENTICAL[:8]))
    torch.testing.assert_close(anchor.effect(ask(0, [1, 1])), anchor_of(IDENTICAL[:8]).effect(ask(0, [1, 1])))


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.0, 1.4, 2.5])
def test_with_mean_reaches_the_mean_and_keeps_order_zeros_and_shape(ratio):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 5, generator=generator) + torch.tensor([-1.0, 0.0, 0.5, 1.0, 3.0])
    values = torch.where(x < 0.25, 0.0, x)
    target = values.mean(0) * ratio
    moved = with_mean(x, x, 1.0, target, 0.25)
    torch.testing.assert_close(moved.mean(0), target, rtol=1e-4, atol=1e-5)
    order = x.argsort(dim=0)
    assert (moved.gather(0, order).diff(dim=0) >= -1e-6).all()
    share, new = (values > 0).float().mean(0), (moved > 0).float().mean(0)
    assert ((new - share).sign() * (1 if ratio >= 1 else -1) >= 0).all()
    if ratio == 1:
        torch.testing.assert_close(moved, values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_mean(x[:7], x, 1.0, target, 0.25), moved[:7])


def test_with_mean_of_silent_and_full_genes():
    x = torch.tensor([[0.0, 2.0, 0.1], [0.1, 1.0, 3.0]])
    moved = with_mean(x, x, 1.0, torch.tensor([1.0, 3.0, 0.0]), 0.5)
    assert not moved[:, [0, 2]].any()
    expression = torch.expm1(moved[:, 1])  # a fold change, after which the mean is the wanted one
    torch.testing.assert_close(expression / torch.expm1(x[:, 1]), (expression[0] / torch.expm1(x[0, 1])).expand(2))
    torch.testing.assert_close(moved[:, 1].mean(), torch.tensor(3.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(with_mean(x, x, 0.0, torch.ones(3), 0.5), torch.where(x < 0.5, 0.0, x))


# ---- the shared network, with and without gradients ------------------------------------------------------------------


def random_genewise(**options) -> GenewiseVelocity:
    generator = torch.Generator().manual_seed(0)
    network = GenewiseVelocity(300, 16, n_features=2, width=16, cell_width=32, n_blocks=1, **options)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


@pytest.mark.parametrize("genes", [None, torch.tensor([7, 0, 299])])
def test_genewise_in_tiles_is_the_same_network(genes, monkeypatch):
    monkeypatch.setattr("invirtuo.models.primeflow.shared.TILE", 1000)
    network, generator = random_genewise(), torch.Generator().manual_seed(1)
    x, e, f = (torch.randn(*shape, generator=generator) for shape in ((20, 300), (20, 16), (20, 300, 2)))
    f = f if genes is None else f[:, genes]
    with torch.no_grad():
        tiled = network(x, x, e, f, genes)
    plain = network(x.clone().requires_grad_(), x, e, f, genes)
    torch.testing.assert_close(tiled, plain.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float64, 10.0, 1e-12), (torch.bfloat16, 1.0, 0.03), (torch.bfloat16, 1e4, 0.03)],
)
def test_tiles_have_the_derivatives_of_the_plain_network(dtype, scale, tolerance, monkeypatch):
    monkeypatch.setattr("invirtuo.models.primeflow.shared.TILE", 1000)
    generator, n, m, w, k, r = torch.Generator().manual_seed(2), 25, 300, 16, 8, 3
    values = torch.randn(n, m, generator=generator)
    shapes = [(n, m, r), (n, w), (n, w, w), (n, w), (w, k + r), (w,), (m, w), (m, w)]
    inputs = [0.3 * torch.randn(*shape, generator=generator) for shape in shapes]
    wanted = torch.randn(n, m, generator=generator).to(dtype)

    def derivatives(values, dtype):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        out = shared_network(values, *given, scale=scale)
        return [out.detach(), *torch.autograd.grad((out * wanted.to(dtype)).sum(), given)]

    tiled, plain = derivatives(values, dtype), derivatives(values.clone().requires_grad_(), torch.float64)
    for one, other in zip(tiled, plain, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_values_that_are_not_finite_pass_through_the_tiles():
    inputs = [torch.ones(shape, dtype=torch.bfloat16) for shape in ((4, 9, 2), (4, 6), (4, 6, 6), (4, 6), (6, 10))]
    genes = [torch.ones(shape, dtype=torch.bfloat16) for shape in ((6,), (9, 6), (9, 6))]
    values = torch.zeros(4, 9).index_fill(1, torch.tensor([3]), float("nan"))
    out = shared_network(values, *inputs, *genes, scale=1.0)
    assert out.isnan().all(dim=0).tolist() == [j == 3 for j in range(9)]


@pytest.mark.parametrize("value_scale", [1.0, 10.0, 100.0])
def test_tabulated_sinusoids_are_as_exact_as_bf16(value_scale):
    network, generator = random_genewise(value_scale=value_scale), torch.Generator().manual_seed(1)
    x, e, f = (torch.randn(*shape, generator=generator) for shape in ((200, 300), (200, 16), (200, 300, 2)))
    exact = network(4 * x, x, e, f).detach()
    with torch.autocast("cpu", torch.bfloat16):
        plain = network((4 * x).requires_grad_(), x, e, f).detach()
        with torch.no_grad():
            tabulated = network(4 * x, x, e, f)
    assert not tabulated.equal(plain)
    assert (tabulated - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()


# ---- work in threads -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_items_are_shared_by_threads_and_come_in_order(two_threads):
    met = Barrier(2)  # passed only if two threads are at work

    def work(i: int) -> tuple[int, int, bool]:
        met.wait(timeout=30)
        return i, torch.get_num_threads(), torch.is_grad_enabled()

    assert in_threads(work, range(4)) == [(i, 1, False) for i in range(4)]
    with operations_on_one_thread():
        assert torch.get_num_threads() == 1
        assert in_threads(work, range(4)) == [(i, 1, False) for i in range(4)]
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // i, [1, 0, 1])
    assert in_threads(str, []) == []


def test_tiles_are_the_same_on_one_thread_and_on_two(two_threads, monkeypatch):
    monkeypatch.setattr("invirtuo.models.primeflow.shared.TILE", 1000)

    def found() -> list[torch.Tensor]:
        field = fill(genewise())
        out = field(*inputs(300))
        out.square().sum().backward()
        return [out.detach(), *(parameter.grad for parameter in field.parameters())]

    on_two = found()
    torch.set_num_threads(1)
    for one, two in zip(found(), on_two, strict=True):
        assert torch.equal(one, two)

"""Formula tests of the trained baselines: known answers on generated cells, parameter counts and losses by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch import nn
from torch.nn import functional as F

import invirtuo as iv
from invirtuo.fit import FitConfig
from invirtuo.model import SampleConfig
from invirtuo.nn import NormMLP

N_GENES = 8
GENES = [f"g{i}" for i in range(N_GENES)]
EFFECT = {
    "control": np.zeros(8),
    "A": np.array([1.0, 0, 0.5, 0, 0, 0, 0, 0]),
    "B": np.array([0, 0.8, 0, -0.6, 0, 0, 0, 0]),
    "C": np.array([0, 0, 0, 0, -0.8, 0.7, 0, 0]),
    "D": np.array([0, 0, 0, 0.7, 0, 0, 0.6, 0]),
}
PAIRS = ("control", *"ABCD", "A+B", "A+D", "B+C", "B+D", "C+D")  # without A+C
BASE = {
    "x": np.array([2.0, 2, 2, 2, 2, 2, 3, 1]),
    "y": np.array([1.5, 2.2, 2, 1.8, 2.5, 2, 1, 3]),
}
FIT = FitConfig(steps=400, batch_size=64, lr=0.01, warmup=0, ema=0.0, clip=0.0, precision="fp32", accelerator="cpu",
                progress=False, val_every=0)  # fmt: skip
NO_SAMPLING = SampleConfig()


def make(labels=("control", "A", "B", "C"), n: int = 40, noise: float = 0.1) -> AnnData:
    """Cells whose expression is the base of the context, plus the effects of the perturbations, plus noise."""
    rng = np.random.default_rng(0)
    keys = [(context, label) for context in BASE for label in labels for _ in range(n)]
    mean = np.array([BASE[context] + sum(EFFECT[part] for part in label.split("+")) for context, label in keys])
    obs = pd.DataFrame(keys, columns=["context", "p"], index=[f"c{i}" for i in range(len(keys))])
    x = np.clip(mean + noise * rng.normal(size=mean.shape), 0.01, None).astype(np.float32)
    return AnnData(x, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def cells():
    return make()


def plan_of(adata, **options) -> iv.Design:
    return iv.Design.from_adata(adata, perturbation="p", control="control", covariates=["context"], **options)


def ask(*conditions) -> pd.DataFrame:
    return pd.DataFrame(conditions, columns=["context", "p"])


def of(adata, context: str, label: str) -> np.ndarray:
    return adata.X[((adata.obs["context"] == context) & (adata.obs["p"] == label)).to_numpy()]


def batch_of(adata, model, size: int = 16) -> iv.Batch:
    return next(iv.CellDataset(adata, model.design).batches(iv.samplers.SAMPLERS[model.sampler], size))


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def published(n_in: int, width: int, n_out: int, n_layers: int) -> int:
    """Parameters of Linear, n times [Linear, LayerNorm without affine, ReLU, dropout], Linear."""
    return (n_in + 1) * width + n_layers * (width + 1) * width + (width + 1) * n_out


def by_hand(mlp: NormMLP, x: torch.Tensor) -> torch.Tensor:
    """The published MLP from its weights alone, without dropout."""
    first, *hidden, last = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    x = x @ first.weight.T + first.bias
    for layer in hidden:
        x = x @ layer.weight.T + layer.bias
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = x.clamp_min(0)
    return x @ last.weight.T + last.bias


def rms(model, context: str, label: str, truth) -> float:
    """Root mean square error of the mean of predicted cells."""
    predicted = model.predict(ask((context, label)), 200, precision="fp32").X.mean(0)
    return float(np.sqrt(((predicted - truth) ** 2).mean()))


# ---- the MLP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_layers", "dropout"), [(0, 0.0), (1, 0.0), (3, 0.2)])
def test_norm_mlp(n_layers, dropout):
    mlp = NormMLP(5, 7, 3, n_layers, dropout).eval()
    assert n_parameters(mlp) == published(5, 7, 3, n_layers)
    x = torch.randn(4, 5)
    torch.testing.assert_close(mlp(x), by_hand(mlp, x))
    kinds = [type(layer) for layer in mlp]
    block = [nn.Linear, nn.LayerNorm, nn.ReLU, *([nn.Dropout] if dropout else [])]
    assert kinds == [nn.Linear, *block * n_layers, nn.Linear]


# ---- latent additive -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize("decode", [True, False])
def test_latent_additive_by_hand(cells, encode, decode):
    config = iv.models.LatentAdditive.Config(6, 4, 2, 0.0, encode_covariates=encode, decode_covariates=decode)
    model = iv.models.LatentAdditive(plan_of(cells), GENES, config)
    n = published(8 + 2 * encode, 6, 4, 2) + published(3, 6, 4, 2) + published(4 + 2 * decode, 6, 8, 2)
    assert n_parameters(model) == n
    batch = batch_of(cells, model)
    context = F.one_hot(batch.condition.covariates["context"], 2).float()
    z = by_hand(model.encode, torch.cat([batch.source, context], 1) if encode else batch.source)
    z = z + by_hand(model.perturbation, batch.condition.perturbation)
    expected = F.softplus(by_hand(model.decode, torch.cat([z, context], 1) if decode else z))
    torch.testing.assert_close(model.sample(batch, torch.Generator(), NO_SAMPLING), expected)
    torch.testing.assert_close(model.loss(batch)["total"], ((expected - batch.target) ** 2).mean())


@pytest.mark.parametrize(("n_layers", "softplus", "allowed"), [(0, False, 0.1), (1, True, 0.9)])
def test_latent_additive_recovers_additive_effects(n_layers, softplus, allowed):
    """A combination that was never seen is the sum of its parts; with hidden layers, only nearer than no change."""
    adata = make(PAIRS)
    config = iv.models.LatentAdditive.Config(32, 8, n_layers, 0.0, softplus=softplus)
    model = iv.models.LatentAdditive(plan_of(adata), GENES, config).fit(adata, config=FIT)
    for context, base in BASE.items():
        truth = base + EFFECT["A"] + EFFECT["C"]
        assert rms(model, context, "A+C", truth) < allowed * np.sqrt(((base - truth) ** 2).mean())


# ---- decoder only ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_covariates", [True, False])
@pytest.mark.parametrize("softplus", [True, False])
def test_decoder_only_by_hand(cells, use_covariates, softplus):
    config = iv.models.DecoderOnly.Config(6, 2, use_covariates=use_covariates, softplus=softplus)
    model = iv.models.DecoderOnly(plan_of(cells), GENES, config)
    assert n_parameters(model) == published(3 + 2 * use_covariates, 6, 8, 2)
    batch = batch_of(cells, model)
    blocks = [F.one_hot(batch.condition.covariates["context"], 2).float()] if use_covariates else []
    expected = by_hand(model.decode, torch.cat([batch.condition.perturbation, *blocks], 1))
    expected = F.softplus(expected) if softplus else expected
    torch.testing.assert_close(model.sample(batch, torch.Generator(), NO_SAMPLING), expected)
    torch.testing.assert_close(model.loss(batch)["total"], ((expected - batch.target) ** 2).mean())


def test_decoder_only_learns_means_and_adds(cells):
    """The mean of every condition, for all of its cells; without hidden blocks an unseen combination is the sum."""
    model = iv.models.DecoderOnly(plan_of(cells), GENES, iv.models.DecoderOnly.Config(32, 1)).fit(cells, config=FIT)
    predicted = model.predict(ask(("x", "A"), ("y", "C"), ("y", "control")), 3, precision="fp32")
    for context, label in (("x", "A"), ("y", "C"), ("y", "control")):
        rows = of(predicted, context, label)
        assert np.ptp(rows, axis=0).max() < 1e-6
        np.testing.assert_allclose(rows[0], of(cells, context, label).mean(0), atol=0.1)
    linear = iv.models.DecoderOnly.Config(32, 0, softplus=False)
    model = iv.models.DecoderOnly(plan_of(cells), GENES, linear).fit(cells, config=FIT)
    assert rms(model, "x", "A+B", BASE["x"] + EFFECT["A"] + EFFECT["B"]) < 0.05


def test_decoder_only_without_controls_trains_on_pairs(cells):
    """The published mode: the loss sees perturbed cells only."""
    model = iv.models.DecoderOnly(plan_of(cells), GENES, iv.models.DecoderOnly.Config(6, 1, learn_controls=False))
    seen = [b.condition.is_control for b in iv.CellDataset(cells, model.design).batches(
        iv.samplers.SAMPLERS[model.sampler], 16)]  # fmt: skip
    assert not torch.cat(seen).any() and len(torch.cat(seen)) == 240


# ---- presets ---------------------------------------------------------------------------------------------------------

BEST = {  # rows of the table of best hyperparameters: fields of Config, then learning rate, weight decay, batch size
    "latent_additive": {
        "norman19": ((4352, 512, 1, 0.1, False, False), 9.260e-5, 2.180e-8, 4000),
        "srivatsan20": ((5376, 192, 2, 0.3, True, True), 3.411e-5, 6.079e-11, 4000),
        "jiang24": ((2304, 64, 4, 0.3, True, True), 5.651e-5, 5.769e-10, 2000),
    },
    "decoder_only": {
        "norman19": ((3328, 3, False, False, False), 1.375e-4, 4.417e-5, 4000),
        "srivatsan20": ((4352, 5, True, True, False), 6.798e-5, 7.602e-6, 4000),
        "jiang24": ((5376, 3, True, True, False), 9.426e-5, 8.514e-8, 2000),
    },
}
FIELDS = {
    "latent_additive": ("width", "n_latent", "n_layers", "dropout", "encode_covariates", "decode_covariates"),
    "decoder_only": ("width", "n_layers", "use_covariates", "softplus", "learn_controls"),
}


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name, rows in BEST.items() for preset in rows])
def test_published_presets(name, preset):
    values, lr, weight_decay, batch_size = BEST[name][preset]
    found = iv.models.MODELS[name].PRESETS[preset]
    assert tuple(getattr(found.config, field) for field in FIELDS[name]) == values
    assert (found.fit.lr, found.fit.weight_decay, found.fit.batch_size) == (lr, weight_decay, batch_size)
    assert found.fit.keep == "best" and found.fit.schedule == "constant" and found.fit.ema == 0
    assert found.fit.patience == 50 and found.fit.steps / found.fit.val_every == pytest.approx(500, rel=0.21)


@pytest.mark.parametrize("name", BEST)
def test_search_names_fields(name):
    model = iv.models.MODELS[name]
    assert 2 <= len(model.SEARCH) <= 4 and "fit.lr" in model.SEARCH
    for field in model.SEARCH:
        assert hasattr(FIT if field.startswith("fit.") else model.Config(), field.removeprefix("fit."))

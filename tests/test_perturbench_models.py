"""Formula tests of the trained baselines: known answers on generated cells, parameter counts and losses by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch import nn
from torch.nn import functional as F

import invirtuo as iv
from invirtuo.fit import FitConfig, noise_seed
from invirtuo.nn import NormMLP
from invirtuo.verbs.sampling import SampleConfig

N_GENES = 8
GENES = [f"g{i}" for i in range(N_GENES)]
EFFECT = {
    "control": np.zeros(8),
    "A": np.array([1.0, 0, 0.5, 0, 0, 0, 0, 0]),
    "B": np.array([0, 0.8, 0, -0.6, 0, 0, 0, 0]),
    "C": np.array([0, 0, 0, 0, -0.8, 0.7, 0, 0]),
    "D": np.array([0, 0, 0, 0.7, 0, 0, 0.6, 0]),
    "E": np.zeros(8),
    "F": np.zeros(8),
}
PAIRS = ("control", *"ABCD", "A+B", "A+D", "B+C", "B+D", "C+D")  # without A+C
BASE = {
    "x": np.array([2.0, 2, 2, 2, 2, 2, 3, 1]),
    "y": np.array([1.5, 2.2, 2, 1.8, 2.5, 2, 1, 3]),
}
FIT = FitConfig(steps=300, batch_size=64, lr=0.01, warmup=0, ema=0.0, clip=0.0, precision="fp32", accelerator="cpu",
                progress=False, val_every=0)  # fmt: skip
NO_SAMPLING = SampleConfig()


def make(labels=("control", "A", "B", "C"), n: int = 32, noise: float = 0.1, strength: float = 1.0) -> AnnData:
    """Cells whose expression is the base of the context, plus the effects of the perturbations, plus noise."""
    rng = np.random.default_rng(0)
    keys = [(context, label) for context in BASE for label in labels for _ in range(n)]
    mean = np.array(
        [BASE[context] + strength * sum(EFFECT[part] for part in label.split("+")) for context, label in keys]
    )
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


def copy_with(model, **changes):
    """The same model with other fields of its Config."""
    twin = copy.copy(model)
    twin.config = replace(model.config, **changes)
    return twin


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
    z = by_hand(model.encoder, torch.cat([batch.source, context], 1) if encode else batch.source)
    z = z + by_hand(model.perturbation, batch.condition.perturbation)
    expected = F.softplus(by_hand(model.decoder, torch.cat([z, context], 1) if decode else z))
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
    expected = by_hand(model.decoder, torch.cat([batch.condition.perturbation, *blocks], 1))
    expected = F.softplus(expected) if softplus else expected
    torch.testing.assert_close(model.sample(batch, torch.Generator(), NO_SAMPLING), expected)
    torch.testing.assert_close(model.loss(batch)["total"], ((expected - batch.target) ** 2).mean())


@pytest.mark.slow
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
    assert not torch.cat(seen).any() and len(torch.cat(seen)) == 192


# ---- CPA -------------------------------------------------------------------------------------------------------------

TINY_CPA = iv.models.CPA.Config(
    4, 6, 2, 2, 1, 0.0, kl_weight=0.7, adversary_weight=3.0, penalty_weight=0.4, adversary_steps=3, warmup_steps=2,
    adversary_width=5, adversary_layers=1,
)  # fmt: skip


def soft_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -(labels * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


@pytest.mark.parametrize("control_class", [True, False])
def test_cpa_by_hand(cells, control_class):
    """Parameters, reconstruction, KL, and the losses of the three kinds of steps."""
    adata = make(PAIRS)
    model = iv.models.CPA(plan_of(adata), GENES, replace(TINY_CPA, control_class=control_class)).train()
    encoder = (
        (8 + 1) * 6 + 2 * (6 + 1) * 6 + 3 * 2 * 6 + 2 * (6 + 1) * 4
    )  # three blocks with affine LayerNorm, two heads
    assert n_parameters(model.encoder) == encoder
    embeddings = published(4, 6, 4, 2) + published(2, 6, 4, 1)
    adversary = published(4, 5, 4 + control_class, 1) + published(4, 5, 2, 1)
    assert n_parameters(model) == encoder + embeddings + published(4, 6, 8, 2) + adversary
    batch = batch_of(adata, model, 200)
    context = F.one_hot(batch.condition.covariates["context"], 2).float()
    mean, log_variance = model.encoder(batch.target)
    torch.manual_seed(5)
    z = mean + (0.5 * log_variance).exp() * torch.randn(200, 4)
    added = by_hand(model.perturbation, batch.condition.perturbation) + by_hand(model.covariates["0"], context)
    squared = ((by_hand(model.decoder, z + added) - batch.target) ** 2).sum(1).mean()
    normal = torch.distributions.Normal
    posterior = normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(posterior, normal(torch.zeros(4), torch.ones(4))).sum(1).mean()
    for step in (0, 1):  # warm-up
        torch.manual_seed(5)
        losses = model.update(batch, step)
        torch.testing.assert_close(losses["total"], squared + 0.7 * kl)
    labels = batch.condition.perturbation
    if control_class:
        labels = torch.cat([labels, (labels.sum(1, keepdim=True) == 0).float()], 1)
    assert labels.sum(1).unique().tolist() == ([1, 2] if control_class else [0, 1, 2])

    def crossed(z):
        first, second = (by_hand(classifier, z) for classifier in model.adversary)
        return soft_cross_entropy(first, labels) + soft_cross_entropy(second, context), first, second

    torch.manual_seed(5)
    losses = model.update(batch, 3)
    torch.testing.assert_close(losses["total"], squared + 0.7 * kl - 3.0 * crossed(z)[0])
    torch.manual_seed(5)
    losses = model.update(batch, 4)
    z = z.detach().requires_grad_()
    value, first, second = crossed(z)
    slopes = [torch.autograd.grad(y.sum(), z, retain_graph=True)[0] for y in (first, second)]
    torch.testing.assert_close(losses["total"], 3.0 * value + 0.4 * sum((slope**2).mean() for slope in slopes))


@pytest.mark.parametrize(
    ("step", "trained"), [(0, "rest"), (1, "rest"), (2, "adversary"), (3, "rest"), (4, "adversary")]
)
def test_cpa_steps_train_one_side(cells, step, trained):
    """Warm-up and every third step: all but the adversary; other steps: the adversary alone."""
    model = iv.models.CPA(plan_of(cells), GENES, TINY_CPA).train()
    model.update(batch_of(cells, model, 64), step)["total"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name.startswith("adversary") == (trained == "adversary")), name
        assert parameter.requires_grad


def test_cpa_one_adam_equals_two(cells):
    """Parameters without gradient keep weights and moments, so one optimiser does what two would do."""
    config = replace(FIT, steps=12, weight_decay=0.01, schedule="constant")
    model = iv.models.CPA(plan_of(cells), GENES, TINY_CPA).fit(cells, config=config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        by_two = iv.models.CPA(plan_of(cells), GENES, TINY_CPA).train()
    sides = [[], []]
    for name, parameter in by_two.named_parameters():
        sides[name.startswith("adversary")].append(parameter)
    optimizers = [torch.optim.Adam(side, lr=config.lr, weight_decay=0.01, fused=True) for side in sides]
    dataset, step = iv.CellDataset(cells, by_two.design), 0
    for epoch in range(3):
        for batch in dataset.batches(iv.samplers.cells, 64, seed=[config.seed, epoch]):
            if step < config.steps:
                torch.manual_seed(noise_seed(config.seed, step, 0))
                by_two.zero_grad()
                by_two.update(batch, step)["total"].backward()
                optimizers[step >= 2 and step % 3 > 0].step()
                step += 1
    assert step == 12
    for (name, parameter), other in zip(model.named_parameters(), by_two.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=name, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adversary", [True, False])
def test_cpa_recovers_additive_effects(adversary):
    """An unseen combination is far closer to the sum of its parts than no change is."""
    adata = make(PAIRS, n=20)
    config = iv.models.CPA.Config(8, 32, 0, 0, 0, 0.0, kl_weight=0.1, adversary=adversary, adversary_weight=0.5,
                                  warmup_steps=100, adversary_layers=1)  # fmt: skip
    model = iv.models.CPA(plan_of(adata), GENES, config).fit(adata, config=FIT)
    for context, base in BASE.items():
        truth = base + EFFECT["A"] + EFFECT["C"]
        assert rms(model, context, "A+C", truth) < 0.3 * np.sqrt(((base - truth) ** 2).mean())


def test_cpa_noise_can_be_turned_off(cells):
    config = replace(TINY_CPA, noise=False)
    model = iv.models.CPA(plan_of(cells), GENES, config).fit(cells, config=replace(FIT, steps=3))
    pool = of(cells, "x", "control")
    one = AnnData(pool[:1], obs=pd.DataFrame({"context": ["x"], "p": ["control"]}, index=["c"]), var=cells.var)
    assert np.ptp(model.predict(ask(("x", "A")), 5, controls=one, precision="fp32").X, axis=0).max() < 1e-6
    model.config = replace(config, noise=True)
    assert np.ptp(model.predict(ask(("x", "A")), 5, controls=one, precision="fp32").X, axis=0).max() > 1e-3


def test_cpa_needs_more_than_one_kind_of_step():
    with pytest.raises(ValueError, match="adversary_steps is 1"):
        iv.models.CPA.Config(adversary_steps=1)


# ---- SAMS-VAE --------------------------------------------------------------------------------------------------------

TINY_SAMS = iv.models.SAMSVAE.Config(3, 6, 2, 1, 1, 0.0, mask_prior=0.2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("covariates", "joint"), [(True, False), (False, False), (False, True)])
def test_sams_vae_by_hand(masked, covariates, joint):
    """Parameters, and every term of the loss with the same draws."""
    adata = make(PAIRS)
    options = {"masked": masked, "joint_effects": joint}
    config = replace(TINY_SAMS, encode_covariates=covariates, decode_covariates=covariates, **options)
    model = iv.models.SAMSVAE(plan_of(adata), GENES, config)
    model.prepare(iv.CellDataset(adata, model.design))
    assert model.n_trained.tolist() == [192, 256, 192, 256]  # cells of A, alone and in pairs
    extra = 2 * covariates
    n = published(3 + 4, 6, 6 if masked else 3, 1) + published(8 + extra + 3, 6, 6, 2) + published(3 + extra, 6, 8, 1)
    assert n_parameters(model) == n + 12 * masked
    if masked:
        assert torch.equal(model.mask_logits, torch.full((4, 3), -1.0))
        with torch.no_grad():
            model.mask_logits.add_(torch.randn(4, 3))
    batch = batch_of(adata, model, 100)
    torch.manual_seed(5)
    losses = model.loss(batch)
    torch.manual_seed(5)

    # a mask for each perturbation, an effect for each perturbation of each cell
    labels = batch.condition.perturbation
    mask = torch.ones(4, 3)
    if masked:
        relaxed = torch.sigmoid((model.mask_logits + torch.logit(torch.rand(4, 3))) / 0.5)
        mask = (relaxed > 0.5).float()
    pairs = [(i, p) for i in range(100) for p in range(4) if labels[i, p]]
    seen = torch.stack([labels[i] if joint else torch.eye(4)[p] for i, p in pairs])
    effect = by_hand(model.effect, torch.cat([mask[[p for _, p in pairs]], seen], 1))
    if masked:
        mean, log_variance = effect.chunk(2, 1)
        noise = torch.randn(len(pairs), 3) if joint else torch.randn(4, 3)[[p for _, p in pairs]]
        effect = mean + (log_variance / 2).exp() * noise
    z_p = torch.zeros(100, 3)
    for (i, p), own in zip(pairs, effect, strict=True):
        z_p[i] = z_p[i] + mask[p] * own
    context = [F.one_hot(batch.condition.covariates["context"], 2).float()] if covariates else []
    m, v = by_hand(model.encoder, torch.cat([batch.target, *context, z_p], 1)).chunk(2, 1)
    z = m + (v / 2).exp() * torch.randn(100, 3)
    expected = F.softplus(by_hand(model.decoder, torch.cat([z + z_p, *context], 1)))
    normal = torch.distributions.Normal
    terms = {
        "squared_error": ((expected - batch.target) ** 2).sum(1).mean(),
        "basal_kl": (normal(m, (v / 2).exp()).log_prob(z) - normal(0.0, 1.0).log_prob(z)).sum(1).mean(),
    }
    if masked:
        weight = labels.sum(0) / torch.tensor([192, 256, 192, 256]) / 100
        kl = torch.distributions.kl_divergence
        of_effects = kl(normal(mean, (log_variance / 2).exp()), normal(torch.zeros(1, 3), torch.ones(1, 3))).sum(1)
        bernoulli = torch.distributions.Bernoulli
        terms["effect_kl"] = (of_effects / torch.tensor([192, 256, 192, 256])[[p for _, p in pairs]]).sum() / 100
        terms["mask_kl"] = (
            weight * kl(bernoulli(logits=model.mask_logits), bernoulli(torch.full((4, 3), 0.2))).sum(1)
        ).sum()
    assert losses.keys() == {"total", *terms}
    torch.testing.assert_close(losses["total"], sum(terms.values()), atol=1e-4, rtol=1e-5)
    for name, value in terms.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-4)


def test_sams_vae_masks_are_hard_and_their_gradient_is_relaxed(cells):
    from invirtuo.models.sams_vae import _hard_mask

    logits = torch.linspace(-2, 2, 9).requires_grad_()
    uniform = torch.rand(5000, 9, generator=torch.Generator().manual_seed(0))
    masks = _hard_mask(logits, uniform, 0.5)
    assert set(masks.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(masks.mean(0), torch.sigmoid(logits), atol=0.03, rtol=0)
    (slope,) = torch.autograd.grad(masks.sum(), logits)
    soft = torch.sigmoid((logits + torch.logit(uniform)) / 0.5)
    torch.testing.assert_close(slope, (soft * (1 - soft) / 0.5).sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_sams_vae_masks_find_planted_sparsity():
    """A and B act, E and F do nothing: their masks close, below where they began; those that act keep a dimension."""
    adata = make(("control", "A", "B", "E", "F"), strength=2.5)
    config = iv.models.SAMSVAE.Config(4, 32, 1, 1, 1, 0.0, mask_prior=0.02)
    model = iv.models.SAMSVAE(plan_of(adata), GENES, config).fit(adata, config=replace(FIT, lr=0.03))
    probability = model.mask_probability().detach().numpy()
    first = 1 / (1 + np.exp(1.0))
    assert (probability[:2].max(1) > 0.5).all(), probability
    assert probability[2:].mean() < first - 0.02 and probability[2:].max() < first + 0.05, probability
    assert rms(model, "x", "A", BASE["x"] + 2.5 * EFFECT["A"]) < 0.5 * np.sqrt(((2.5 * EFFECT["A"]) ** 2).mean())


def test_sams_vae_predictions():
    """The three ways to the basal vector; noise off takes the likelier mask and means."""
    adata = make(("control", "A", "B"), n=40)
    plan = plan_of(adata)
    fit = replace(FIT, steps=20)
    for basal in ("factual", "target", "prior"):
        config = replace(TINY_SAMS, basal=basal, noise=False)
        model = iv.models.SAMSVAE(plan, GENES, config).fit(adata, config=fit)
        batch = iv.Batch(plan.encode(ask(("x", "A"), ("y", "A+B"))), source=torch.rand(2, 8, generator=None) + 1)
        mask = (model.mask_logits > 0).float()
        mean = model.effect(torch.cat([mask, torch.eye(2)], 1)).chunk(2, 1)[0]
        z_p = torch.stack([(mask * mean)[0], (mask * mean).sum(0)])
        own = z_p if basal == "target" else torch.zeros(2, 3)
        z = model.encoder(torch.cat([batch.source, own], 1)).chunk(2, 1)[0] if basal != "prior" else torch.zeros(2, 3)
        expected = F.softplus(model.decoder(z + z_p))
        torch.testing.assert_close(model.sample(batch, torch.Generator(), NO_SAMPLING), expected)
        assert model.needs_source == (basal != "prior")

    # cells of one condition have effects of their own, in the mask that they share
    model.config = replace(config, noise=True, joint_effects=True)
    with torch.no_grad():
        model.mask_logits.fill_(9.0)
        shifts, _ = model._shifts(plan.encode(ask(*[("x", "A")] * 5)).perturbation)
    assert len(shifts.unique(dim=0)) == 5
    with pytest.raises(ValueError, match="basal is 'none'"):
        iv.models.SAMSVAE.Config(basal="none")
    with pytest.raises(ValueError, match="mask_prior is 1"):
        iv.models.SAMSVAE.Config(mask_prior=1)


# ---- Biolord ---------------------------------------------------------------------------------------------------------


def test_biolord_by_hand(cells):
    config = iv.models.Biolord.Config(6, 4, 2, 0.0, code_noise=0.1, code_penalty=0.7, penalty=0.3)
    model = iv.models.Biolord(plan_of(cells), GENES, config)
    networks = published(8, 6, 4, 2) + published(3, 6, 4, 2) + published(12, 6, 8, 2)
    assert n_parameters(model) == networks + 2 * 4
    batch = batch_of(cells, model, 50)
    torch.manual_seed(5)
    losses = model.loss(batch)
    torch.manual_seed(5)
    code = by_hand(model.encoder, batch.target)
    embedding = model.covariates[0].weight[batch.condition.covariates["context"]]
    parts = [code + 0.1 * torch.randn(50, 4), by_hand(model.perturbation, batch.condition.perturbation), embedding]
    squared = ((F.softplus(by_hand(model.decoder, torch.cat(parts, 1))) - batch.target) ** 2).sum(1).mean()
    expected = squared + 0.7 * (code**2).sum(1).mean() + 0.3 * (embedding**2).sum()
    torch.testing.assert_close(losses["total"], expected)
    weights = torch.cat([iv.models.Biolord(plan_of(cells), GENES).covariates[0].weight for _ in range(50)])
    assert float(weights.detach().std()) == pytest.approx(1, abs=0.1)  # N(0, 1) at first


@pytest.fixture(scope="module")
def biolord(cells):
    config = iv.models.Biolord.Config(32, 4, 1, 0.0, code_penalty=0.3)
    return iv.models.Biolord(plan_of(cells), GENES, config).fit(cells, config=FIT)


def test_biolord_disentangles_a_planted_covariate(biolord, cells):
    """Cells of one context that get the embedding of the other move to the mean of the other."""
    for own, other in (("x", "y"), ("y", "x")):
        source = torch.from_numpy(of(cells, own, "A"))
        moved = {}
        for context in (own, other):
            condition = biolord.design.encode(ask(*[(context, "A")] * len(source)))
            moved[context] = biolord.sample(iv.Batch(condition, source=source), torch.Generator(), NO_SAMPLING)
            truth = torch.from_numpy(of(cells, context, "A").mean(0))
            assert (moved[context].mean(0) - truth).square().mean().sqrt() < 0.25
        assert (moved[own].mean(0) - moved[other].mean(0)).abs().max() > 1.5


def test_biolord_predicts_what_it_was_shown_and_adds(biolord):
    for context, base in BASE.items():
        assert rms(biolord, context, "B", base + EFFECT["B"]) < 0.25
    model = copy_with(biolord, noise=False)
    batch = iv.Batch(model.design.encode(ask(("x", "A"))), source=torch.ones(1, 8))
    first, second = (model.sample(batch, torch.Generator().manual_seed(s), NO_SAMPLING) for s in (0, 1))
    assert torch.equal(first, second)
    noisy = biolord.sample(batch, torch.Generator().manual_seed(0), NO_SAMPLING)
    assert not torch.equal(first, noisy)


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
    "cpa": {
        "norman19": ((128, 3328, 1, 2, 1, 0.2, 19.76, 3.805, 1.898, 2, 776, 2, False), 6.844e-5, 1.660e-7, 4000),
        "srivatsan20": ((512, 1280, 3, 2, 1, 0.1, 0.2643, 0.2101, 10.21, 3, 383, 2, False), 2.689e-4, 2.992e-6, 4000),
        "jiang24": ((512, 3328, 7, 2, 1, 0.3, 6.905, 1.487, 2.815, 7, 537, 1, False), 2.630e-5, 3.693e-7, 2000),
    },
    "biolord": {
        "norman19": ((2304, 512, 1, 0.4, 0.1, 0.0, 2621.0), 1.670e-4, 4.608e-4, 1000),
        "srivatsan20": ((2304, 512, 1, 0.4, 0.1, 0.0, 2621.0), 1.670e-4, 4.608e-4, 1000),
    },
    "sams_vae": {
        "norman19": ((128, 3584, 1, 3, 2, 0.4, 0.1138, True, False, False, "target"), 3.026e-5, 4.245e-9, 256),
        "srivatsan20": ((64, 1536, 4, 2, 1, 0.3, 0.01149, True, False, False, "target"), 4.002e-4, 1.749e-6, 256),
        "jiang24": ((64, 3328, 3, 5, 3, 0.5, 0.2068, True, True, True, "prior"), 7.595e-6, 1.592e-8, 256),
        "simple-norman19": ((32, 2048, 1, 1, 3, 0.3, 0.3, False, False, False, "prior"), 1.598e-5, 6.556e-5, 256),
        "simple-srivatsan20": ((32, 2560, 4, 2, 3, 0.4, 0.3, False, True, True, "prior"), 3.418e-4, 6.944e-8, 256),
        "simple-jiang24": ((32, 1536, 5, 2, 3, 0.6, 0.3, False, True, True, "prior"), 3.892e-4, 9.994e-7, 256),
    },
}
WARMUP_EPOCHS = {"norman19": 15, "srivatsan20": 5, "jiang24": 5}
FIELDS = {
    "biolord": ("width", "n_latent", "n_layers", "dropout", "code_noise", "code_penalty", "penalty"),
    "latent_additive": ("width", "n_latent", "n_layers", "dropout", "encode_covariates", "decode_covariates"),
    "decoder_only": ("width", "n_layers", "use_covariates", "softplus", "learn_controls"),
    "cpa": ("n_latent", "width", "n_layers", "n_layers_perturbation", "n_layers_covariates", "dropout", "kl_weight",
            "adversary_weight", "penalty_weight", "adversary_steps", "adversary_width", "adversary_layers",
            "control_class"),
    "sams_vae": ("n_latent", "width", "layers_basal", "layers_effect", "layers_decoder", "dropout", "mask_prior",
                 "masked", "encode_covariates", "decode_covariates", "basal"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name, rows in BEST.items() for preset in rows])
def test_published_presets(name, preset):
    values, lr, weight_decay, batch_size = BEST[name][preset]
    found = iv.models.MODELS[name].PRESETS[preset]
    assert tuple(getattr(found.config, field) for field in FIELDS[name]) == values
    assert (found.fit.lr, found.fit.weight_decay, found.fit.batch_size) == (lr, weight_decay, batch_size)
    assert found.fit.keep == "best" and found.fit.schedule == "val_plateau" and found.fit.ema == 0
    assert found.fit.patience == 50 and found.fit.steps / found.fit.val_every == pytest.approx(500, rel=0.21)


@pytest.mark.parametrize("preset", ["norman19", "srivatsan20", "jiang24"])
def test_linear_additive_trains_as_long_as_its_siblings(preset):
    """The same steps, validations and stopping as the latent additive model, whose data and epochs are the same."""
    own, sibling = (model.PRESETS[preset].fit for model in (iv.models.LinearAdditive, iv.models.LatentAdditive))
    assert replace(own, lr=1.0, weight_decay=0.0) == replace(sibling, lr=1.0, weight_decay=0.0)


def test_every_network_of_cpa_has_its_dropout(cells):
    config = iv.models.CPA.Config(n_latent=4, width=8, dropout=0.3, adversary_width=8)
    model = iv.models.CPA(plan_of(cells), GENES, config)
    for part in (model.encoder, model.perturbation, model.decoder, *model.covariates.values(), *model.adversary):
        found = [module.p for module in part.modules() if isinstance(module, torch.nn.Dropout)]
        assert found and set(found) == {0.3}


def test_classifiers_saved_without_dropout_are_taken(cells):
    """Without dropout a block has three layers in place of four, so that weights were saved under lower numbers."""
    config = iv.models.CPA.Config(n_latent=4, width=8, adversary_width=8, dropout=0.0)
    old = iv.models.CPA(plan_of(cells), GENES, config)
    new = iv.models.CPA(plan_of(cells), GENES, replace(config, dropout=0.2))
    kept = {k: v for k, v in old.state_dict().items() if k.startswith("adversary")}
    rest = {k: v for k, v in new.state_dict().items() if not k.startswith("adversary")}
    new.load_state_dict(kept | rest)
    z = torch.randn(5, 4)
    for one, other in zip(old.eval().adversary, new.eval().adversary, strict=True):
        assert torch.equal(one(z), other(z))
    with pytest.raises(RuntimeError, match="adversary"):
        new.load_state_dict(rest)


@pytest.mark.parametrize("preset", WARMUP_EPOCHS)
def test_cpa_warms_up_for_the_published_epochs(preset):
    found = iv.models.CPA.PRESETS[preset]
    assert found.config.warmup_steps == WARMUP_EPOCHS[preset] * found.fit.val_every  # validated once an epoch


@pytest.mark.parametrize("name", BEST)
def test_search_names_fields(name):
    model = iv.models.MODELS[name]
    assert 2 <= len(model.SEARCH) <= 4 and "fit.lr" in model.SEARCH
    for field in model.SEARCH:
        assert hasattr(FIT if field.startswith("fit.") else model.Config(), field.removeprefix("fit."))

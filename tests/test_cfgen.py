"""Formula tests of CFGen: inputs, likelihood, draws of labels, coupling, guidance; recovery of planted populations."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression

import invirtuo as iv
from invirtuo import flow
from invirtuo.batch import Condition
from invirtuo.cells import multimodal
from invirtuo.fit import FitConfig
from invirtuo.models.counts.cfgen import Autoencoder

CFGen = iv.models.CFGen
Config = CFGen.Config
TINY = Config(hidden_rna=(32, 16), n_latent=4, hidden=32, embedding=16, n_blocks=2, steps=5,
              input_dropout=0.0)  # fmt: skip
FIT = FitConfig(steps=20, batch_size=64, optimizer="adamw", precision="fp32", accelerator="cpu", progress=False,
                warmup=0, val_every=0)  # fmt: skip


def planted(n: int = 900, n_genes: int = 30) -> AnnData:
    """Three populations that differ in a third of their genes each; depth is log-normal; donors change seven genes."""
    rng = np.random.default_rng(0)
    kind, donor = rng.integers(3, size=n), rng.integers(2, size=n)
    share = np.ones((3, n_genes))
    for k in range(3):
        share[k, k * (n_genes // 3) : (k + 1) * (n_genes // 3)] = 8.0
    rate = share[kind]
    rate[:, [0, 1, 2, 10, 11, 20, 21]] *= np.where(donor == 1, 5.0, 1.0)[:, None]
    size = rng.lognormal(6.0, 0.3, n)
    mean = rate / rate.sum(1, keepdims=True) * size[:, None]
    x = rng.poisson(mean * rng.gamma(10.0, 0.1, mean.shape)).astype(np.float32)
    obs = pd.DataFrame(
        {"kind": np.array(["a", "b", "c"])[kind], "donor": np.array(["x", "y"])[donor]}, index=map(str, range(n))
    )
    return AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


@pytest.fixture(scope="module")
def cells():
    return planted()


@pytest.fixture(scope="module")
def design(cells):
    return iv.Design.from_adata(cells, covariates=["kind", "donor"])


@pytest.fixture(scope="module")
def learned(cells, design):
    """A small model that knows the planted populations."""
    config = replace(TINY, hidden_rna=(64, 32), n_latent=6, hidden=64, embedding=32, steps=10, val_share=0.0)
    fit = replace(FIT, steps=900, lr=5e-3, batch_size=128, ema=0.98)
    return CFGen(design, cells.var_names, config).fit(cells, config=fit)


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_golden_encoder_inputs(shared):
    facts = json.loads(shared("golden/cfgen/model_expected.json").read_text())
    x = torch.tensor([facts["x_row0"]])
    names = {"log_counts": "log_gexp", "proportions": "proportions", "log_proportions": "log_gexp_scaled"}
    for ours, theirs in names.items():
        encoder = Autoencoder(replace(TINY, encoder_input=ours), 40, 0, None)
        np.testing.assert_allclose(encoder._scaled(x)[0], facts[theirs], rtol=1e-6)


def test_layers_of_the_paper(cells, design):
    model = CFGen(design, [f"g{i}" for i in range(7)], Config())
    shapes = {k: tuple(v.shape) for k, v in model.autoencoder.named_parameters() if v.ndim == 2 and "weight" in k}
    assert list(shapes.values()) == [(512, 7), (256, 512), (50, 256), (256, 50), (512, 256), (7, 512)]
    n_time, n_size = (
        sum(p.numel() for p in part.parameters()) for part in (model.flow.velocity.time, model.flow.velocity.size)
    )
    assert n_time == n_size == 2 * (128 * 128 + 128)
    for preset, width in (("cfgen_small", (32, 20)), ("cfgen_big", (64, 100))):
        made = CFGen(design, cells.var_names, preset)
        assert (made.config.hidden, made.config.embedding) == width and made.flow.velocity.size is None
        assert made.config.latent_scaling == "none" and made.config.solver == "dopri5"
        assert made.config.size_factor == "by"
        autoencoder, flow = made.stages(made.fit_config).values()
        assert flow.steps == pytest.approx(5 * autoencoder.steps, rel=1e-3)
        assert flow.lr == pytest.approx(0.1 * autoencoder.lr)
        assert (flow.schedule, flow.ema, flow.patience) == ("constant", 0, 0)
    assert [type(layer).__name__ for layer in model.autoencoder.encoders["rna"]] == ["Linear", "_BatchNorm", "ELU"] * 2


def test_loss_is_the_negative_log_likelihood(cells, design):
    torch.manual_seed(0)
    model = CFGen(design, cells.var_names, TINY)
    batch = next(iv.CellDataset(cells, design).batches(iv.samplers.cells, 32))
    x = batch.target
    z = model.autoencoder.encode(x)
    mean = x.sum(1, keepdim=True) * model.autoencoder.decoders["rna"](z).softmax(1)
    r = model.autoencoder.dispersion().exp()
    expected = torch.distributions.NegativeBinomial(r.expand_as(mean), logits=(mean / r).log()).log_prob(x)
    model.stage = "autoencoder"
    losses = model.loss(batch)
    torch.testing.assert_close(losses["total"], -expected.sum(1).mean(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(losses["per_feature"], losses["total"] / 30)


def test_dispersion_by_class(cells, design):
    torch.manual_seed(0)
    model = CFGen(design, cells.var_names, replace(TINY, dispersion="gene:kind"))
    assert model.autoencoder.dispersion.weight.shape == (4, 30)
    condition = Condition(torch.zeros(3, 0), {"kind": torch.tensor([2, 0, -1]), "donor": torch.tensor([0, 0, 0])})
    found = model.autoencoder.decode(torch.zeros(3, 4), torch.ones(3), condition).log_dispersion
    assert torch.equal(found, 10 * model.autoencoder.dispersion.weight[[2, 0, 3]])
    made = model.fit(cells, config=FIT).generate(9, {"kind": "b"})
    assert set(made.obs["kind"]) == {"b"}
    for wrong in ("cell", "gene:color"):
        with pytest.raises(ValueError, match=f"dispersion is '{wrong}'"):
            CFGen(design, cells.var_names, replace(TINY, dispersion=wrong))


def test_input_dropout_is_for_training_alone(cells, design):
    torch.manual_seed(0)
    model = CFGen(design, cells.var_names, replace(TINY, input_dropout=0.5))
    x = torch.from_numpy(cells.X[:9].toarray())
    assert torch.equal(model.autoencoder.encode(x), model.autoencoder.encode(x))
    model.train()
    assert not torch.allclose(model.autoencoder.encode(x), model.autoencoder.encode(x))
    assert not any(CFGen.PRESETS[name].config.input_dropout for name in ("cfgen_small", "cfgen_big"))


@pytest.mark.parametrize("wrong", ["local", "by:color", "global:kind"])
def test_wrong_size_factors(wrong, cells, design):
    with pytest.raises(ValueError, match="size_factor"):
        CFGen(design, cells.var_names, replace(TINY, size_factor=wrong))


@pytest.mark.parametrize(
    "values", [{"conditioning": "both"}, {"coupling": "sinkhorn"}, {"prob_unconditional": 1.5}, {"encoder_input": "x"},
               {"latent_scaling": "pca"}]
)  # fmt: skip
def test_wrong_fields(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Config(**values)


# ---- training of the flow --------------------------------------------------------------------------------------------


def labels_of(n: int, unknown: float = 0.0) -> Condition:
    generator = torch.Generator().manual_seed(0)
    codes = {name: torch.randint(k, (n,), generator=generator) for name, k in (("kind", 3), ("donor", 2))}
    gone = torch.rand(n, generator=generator) < unknown
    return Condition(torch.zeros(n, 0), {**codes, "kind": torch.where(gone, -1, codes["kind"])})


def test_each_cell_draws_its_own_attribute(cells, design):
    """A fifth of the cells without labels; of the others, half with either attribute, never both."""
    model, n = CFGen(design, cells.var_names, TINY), 20_000
    torch.manual_seed(0)
    active = model.drawn_labels(labels_of(n))
    assert active.sum(1).max() == 1
    sd = (0.2 * 0.8 / n) ** 0.5
    assert float((active.sum(1) == 0).float().mean()) == pytest.approx(0.2, abs=3 * sd)
    for k in (0, 1):
        assert float(active[:, k].float().mean()) == pytest.approx(0.4, abs=3 * (0.4 * 0.6 / n) ** 0.5)
    assert len({tuple(row) for row in active[:64].tolist()}) == 3  # within one batch


def test_unknown_labels_are_never_drawn(cells, design):
    model, condition = CFGen(design, cells.var_names, TINY), labels_of(20_000, unknown=0.5)
    torch.manual_seed(0)
    active = model.drawn_labels(condition)
    gone = condition.covariates["kind"] < 0
    assert not active[gone, 0].any()
    assert float(active[gone, 1].float().mean()) == pytest.approx(0.8, abs=0.02)
    nothing = replace(
        condition, covariates={name: torch.full_like(codes, -1) for name, codes in condition.covariates.items()}
    )
    assert not model.drawn_labels(nothing).any()


@pytest.mark.parametrize("p", [0.0, 0.7, 1.0])
def test_probability_of_no_label_is_effective(p, cells, design):
    model = CFGen(design, cells.var_names, replace(TINY, prob_unconditional=p))
    torch.manual_seed(0)
    assert float((~model.drawn_labels(labels_of(20_000)).any(1)).float().mean()) == pytest.approx(p, abs=0.02)


def test_joint_conditioning_takes_all_or_none(cells, design):
    model = CFGen(design, cells.var_names, replace(TINY, conditioning="joint"))
    torch.manual_seed(0)
    active = model.drawn_labels(labels_of(20_000))
    assert set(active.sum(1).tolist()) == {0, 2}
    model.fit(cells, config=FIT)
    assert model.generate(5, guidance=2.0).n_obs == 5
    with pytest.raises(ValueError, match="all attributes have one weight"):
        model.generate(5, guidance={"kind": 1.0})


def test_path_ends_and_velocity(cells, design):
    for sigma in (0.0, 0.1):
        model = CFGen(design, cells.var_names, replace(TINY, sigma_min=sigma))
        z0, z1, t = torch.randn(6, 4), torch.randn(6, 4), torch.full((6,), 0.3)
        torch.testing.assert_close(model.path(z0, z1, 0 * t).xt, z0)
        torch.testing.assert_close(model.path(z0, z1, 0 * t + 1).xt, z1 + sigma * z0)
        point = model.path(z0, z1, t)
        torch.testing.assert_close(point.xt + 0.7 * point.ut, z1 + sigma * z0)  # one Euler step with the exact velocity


def test_flow_loss_by_hand(cells, design, monkeypatch):
    torch.manual_seed(0)
    model = CFGen(design, cells.var_names, replace(TINY, prob_unconditional=0.0))
    z1, size, condition = torch.randn(8, 4), torch.full((8,), 300.0), labels_of(8)
    seen = {}

    def velocity(z, t, scaled, condition, active):
        seen.update(z=z, t=t, active=active)
        return torch.zeros_like(z)

    monkeypatch.setattr(model.flow, "forward", velocity)
    torch.manual_seed(5)
    loss = model.flow_loss(z1, condition, size)
    torch.manual_seed(5)
    z0 = torch.randn(8, 4)
    torch.testing.assert_close(loss, (z1 - z0).square().mean())
    torch.testing.assert_close(seen["z"], seen["t"][:, None] * z1 + (1 - seen["t"][:, None]) * z0)
    gaps = seen["t"].sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((7,), 1 / 8))  # stratified


@pytest.mark.parametrize("within", [False, True])
def test_transport_permutes_noise_alone(within, cells, design, monkeypatch):
    """Latent vector, labels and depth of a cell stay together; the noise is the optimal one."""
    model = CFGen(design, cells.var_names, replace(TINY, coupling="ot", ot_within_class=within, condition_on_size=True))
    torch.manual_seed(0)
    n = 40
    z1, condition, size = torch.randn(n, 4), labels_of(n), torch.arange(1.0, n + 1)
    seen = {}

    def path(z0, z1, t):
        seen.update(z0=z0, z1=z1)
        return flow.PathSample(t, z1, z1 - z0)

    def velocity(z, t, scaled, labels, active):
        seen.update(z=z, scaled=scaled, labels=labels)
        return torch.zeros_like(z)

    monkeypatch.setattr(model, "path", path)
    monkeypatch.setattr(model.flow, "forward", velocity)
    torch.manual_seed(1)
    model.flow_loss(z1, condition, size)
    torch.manual_seed(1)
    z0 = torch.randn(n, 4)
    assert torch.equal(seen["z"], z1) and seen["labels"] is condition
    torch.testing.assert_close(seen["scaled"], model._scaled(size))
    assert torch.equal(seen["z0"].sort(0).values, z0.sort(0).values)  # a permutation
    if not within:
        assert torch.equal(seen["z0"], z0[flow.exact_coupling(z1, z0)])
    else:
        rows = [int((z0 == row).all(1).nonzero()) for row in seen["z0"]]
        assert torch.equal(condition.groups[rows], condition.groups)


# ---- guidance --------------------------------------------------------------------------------------------------------


def test_weights_of_zero_and_one(learned, cells):
    """w = 0 is the unconditional field; one attribute with w = 1 exactly the conditional one."""
    condition = learned.design.encode(cells.obs[:6])
    size, z, t = torch.full((6,), 400.0), torch.randn(6, 6), torch.tensor(0.6)
    time, scaled = torch.full((6,), 0.6), learned._scaled(size)

    def branch(*active):
        return learned.flow(z, time, scaled, condition, torch.tensor([active]).expand(6, -1))

    for weights, expected in (
        ((0.0, 0.0), branch(False, False)),
        ((1.0, 0.0), branch(True, False)),
        ((0.0, 1.0), branch(False, True)),
        ((1.0, 1.0), branch(True, False) + branch(False, True) - branch(False, False)),
    ):
        torch.testing.assert_close(
            learned.field(condition, size, torch.tensor([weights]))(z, t), expected, atol=1e-5, rtol=1e-4
        )


def test_unconditional_cells_do_not_depend_on_labels(learned):
    a, b = (learned.generate(30, {"kind": kind}, guidance=0.0, size_factor=400.0) for kind in "ab")
    assert (a.X != b.X).nnz == 0 and a.obs.columns.tolist() == ["kind", "size_factor"]
    assert learned.generate(30, guidance=0.0).obs.columns.tolist() == ["size_factor"]
    assert learned.generate(30, guidance={"donor": 1.0}).obs.columns.tolist() == ["donor", "size_factor"]


def test_weights_of_every_cell(learned):
    weights = [0.0, 2.0, 1.0] * 10
    mixed = learned.generate(
        30, {"kind": "a"}, guidance={"kind": weights}, size_factor=400.0, output="mean", latent=True
    )
    for weight in (0.0, 1.0, 2.0):
        alone = learned.generate(
            30, {"kind": "a"}, guidance={"kind": weight}, size_factor=400.0, output="mean", latent=True
        )
        rows = np.array(weights) == weight
        np.testing.assert_allclose(mixed.obsm["z"][rows], alone.obsm["z"][rows], atol=1e-4)


def test_strong_weights_warn(learned, caplog):
    with caplog.at_level(logging.WARNING):
        learned.generate(5, guidance=3.0)
    assert not caplog.text
    learned.generate(5, guidance={"kind": 4.0})
    assert "above 3" in caplog.text
    for wrong in ({"color": 1.0}, float("nan")):
        with pytest.raises(ValueError, match="guidance"):
            learned.generate(5, guidance=wrong)


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_planted_populations_come_back(learned, cells):
    """Means by class within 10 %, depths within 5 %, labels that a classifier of real cells confirms."""
    made = learned.generate(1200)
    x, y = (np.log1p(data.X.toarray() / np.asarray(data.X.sum(1)) * 1e3) for data in (cells, made))
    classifier = LogisticRegression(max_iter=500).fit(x, cells.obs["kind"])
    assert classifier.score(y, made.obs["kind"].astype(str)) > 0.95
    donors = LogisticRegression(max_iter=500).fit(x, cells.obs["donor"])
    assert donors.score(y, made.obs["donor"].astype(str)) > 0.8
    for kind in "abc":
        one, other = (np.asarray(d.X[(d.obs["kind"] == kind).to_numpy()].mean(0)).ravel() for d in (cells, made))
        assert np.abs(other.sum() / one.sum() - 1) < 0.1
        np.testing.assert_allclose(other / other.sum(), one / one.sum(), rtol=0.12, atol=0.004)
    real, drawn = np.log(np.asarray(cells.X.sum(1)).ravel()), np.log(made.obs["size_factor"])
    assert drawn.mean() == pytest.approx(real.mean(), rel=0.05) and drawn.std() == pytest.approx(real.std(), rel=0.08)


def test_row_sums_follow_the_depth(learned):
    sizes = np.exp(np.linspace(5.2, 6.8, 300))
    totals = np.asarray(learned.generate(300, size_factor=sizes).X.sum(1)).ravel()
    assert np.corrcoef(totals, sizes)[0, 1] > 0.95


def test_guidance_makes_the_second_attribute_certain(learned, cells):
    x = np.log1p(cells.X.toarray() / np.asarray(cells.X.sum(1)) * 1e3)
    kind, donor = (LogisticRegression(max_iter=500).fit(x, cells.obs[name]) for name in ("kind", "donor"))
    found = []
    for weight in (0.0, 1.0, 2.0):
        made = learned.generate(400, {"kind": "b", "donor": "y"}, guidance={"kind": 1.0, "donor": weight})
        y = np.log1p(made.X.toarray() / np.asarray(made.X.sum(1)) * 1e3)
        assert (kind.predict(y) == "b").mean() > 0.9
        found.append((donor.predict(y) == "y").mean())
    assert found[0] < 0.7 and found[1] > 0.8 and found[2] > 0.9 and found[0] < found[1]


@pytest.mark.slow
def test_it_beats_independent_genes_where_cells_of_a_class_differ(cells):
    """Without labels, genes of one population rise together; independent genes do not know it."""
    design = iv.Design.from_adata(cells)
    fit = replace(FIT, steps=500, lr=5e-3, batch_size=128, ema=0.98)
    config = replace(TINY, hidden_rna=(64, 32), n_latent=6, hidden=64, embedding=32, steps=10)

    def correlation(data):
        return np.corrcoef(np.log1p(data.X.toarray()), rowvar=False)

    real = correlation(cells)
    errors = {}
    for model in (CFGen(design, cells.var_names, config), iv.models.IndependentNB(design, cells.var_names)):
        made = model.fit(cells, config=fit).generate(1500)
        errors[model.name] = np.abs(correlation(made) - real).mean()
    assert errors["cfgen"] < 0.5 * errors["independent_nb"]


def test_correction_takes_out_the_batch_and_keeps_the_type(cells, learned):
    corrected = learned.correct(cells, "donor", reference="x", output="counts")
    after = np.log1p(corrected.layers["corrected"].toarray() / np.asarray(cells.X.sum(1)) * 1e3)
    x = np.log1p(cells.X.toarray() / np.asarray(cells.X.sum(1)) * 1e3)
    kind, donor = (LogisticRegression(max_iter=500).fit(x, cells.obs[name]) for name in ("kind", "donor"))
    was_y = (cells.obs["donor"] == "y").to_numpy()
    assert (donor.predict(x[was_y]) == "y").mean() > 0.8
    assert (donor.predict(after[was_y]) == "y").mean() < 0.35
    assert (kind.predict(after) == cells.obs["kind"]).mean() > 0.95
    assert 0.5 < corrected.uns["invirtuo"]["collapse"] < 1.5


def test_larger_weights_on_the_way_back_bring_types_out(cells, learned):
    """CFGen, table 11: cells of a type come nearer to each other, which equal weights both ways cannot do."""
    names = cells.obs["kind"].to_numpy()

    def within(guidance, inverse) -> float:
        z = learned.correct(cells, "donor", guidance=guidance, invert_guidance=inverse).obsm["X_invirtuo"]
        centres = pd.DataFrame(z).groupby(names).transform("mean").to_numpy()
        return float(((z - centres) ** 2).sum() / ((z - z.mean(axis=0)) ** 2).sum())

    strong = {"kind": 2.0, "donor": 1.0}
    plain, back, both = within(1.0, None), within(strong, None), within(strong, strong)
    assert plain == within(1.0, 1.0)
    assert back < 0.9 * plain
    assert back < 0.9 * both


def test_imputation_beats_zeros_and_the_mean_of_the_genes(cells, learned):
    masked, mask = iv.mask_entries(cells, 0.1)
    filled = learned.impute(masked, masked_fraction=0.1)
    hidden = mask.toarray()
    real, found = cells.X.toarray()[hidden], filled.layers["imputed"][hidden]
    genes = np.broadcast_to(np.asarray(cells.X.mean(0)).ravel(), cells.shape)[hidden]
    assert np.abs(real - found).mean() < 0.8 * np.abs(real - genes).mean()
    assert np.corrcoef(real, found)[0, 1] > np.corrcoef(real, genes)[0, 1]


# ---- genes and peaks -------------------------------------------------------------------------------------------------


def two_modalities(cells) -> dict[str, AnnData]:
    """Genes of the planted cells, and 12 peaks of which four are open in each population; rows in another order."""
    rng = np.random.default_rng(1)
    kind = pd.factorize(cells.obs["kind"], sort=True)[0]
    probability = np.where(np.arange(12)[None] // 4 == kind[:, None], 0.8, 0.05)
    peaks = (rng.random(probability.shape) < probability) * rng.integers(1, 4, probability.shape)
    atac = AnnData(
        sparse.csr_matrix(peaks.astype(np.float32)),
        obs=cells.obs[[]],
        var=pd.DataFrame(index=[f"p{i}" for i in range(12)]),
    )
    return {"rna": cells, "atac": atac[::-1].copy()}


def test_join(cells, caplog):
    pair = two_modalities(cells)
    joined = multimodal.join(pair)
    assert joined.var_names[-1] == "atac:p11" and joined.var["modality"].value_counts().to_dict() == {
        "rna": 30,
        "atac": 12,
    }
    assert "read as open" in caplog.text and joined.obs.equals(cells.obs)
    np.testing.assert_array_equal(joined.X[:, 30:].toarray(), pair["atac"][cells.obs_names].X.toarray() > 0)
    assert (joined.X[:, :30] != cells.X).nnz == 0
    with pytest.raises(ValueError, match="no modality 'protein'"):
        multimodal.join(pair, rna="protein")
    with pytest.raises(ValueError, match="do not hold the same cells"):
        multimodal.join({"rna": cells[:9], "atac": pair["atac"]})
    with pytest.raises(ValueError, match="must follow the genes"):
        CFGen(iv.Design.from_adata(cells, covariates=["kind"]), ["atac:p", "g"])


@pytest.mark.slow
def test_genes_and_peaks_share_a_latent_space(cells):
    joined = multimodal.join(two_modalities(cells))
    design = iv.Design.from_adata(joined, covariates=["kind"])
    config = replace(TINY, hidden_rna=(64, 32), hidden_atac=(32, 16), n_latent=6, hidden=64, embedding=32, steps=10)
    model = CFGen(design, joined.var_names, config)
    assert list(model.autoencoder.encoders) == ["atac", "rna"] and model.autoencoder.latent.in_features == 48
    fit = replace(FIT, steps=500, lr=5e-3, batch_size=128, ema=0.98)
    model.fit(joined, config=fit)
    assert {"train_rna", "train_atac"} <= set(model.history)
    made = model.generate(900)
    assert made.var["modality"].tolist() == joined.var["modality"].tolist()
    peaks = made.X[:, 30:].toarray()
    assert set(np.unique(peaks)) == {0, 1}
    totals = np.asarray(made.X[:, :30].sum(1)).ravel()
    assert np.corrcoef(totals, made.obs["size_factor"])[0, 1] > 0.9  # of the genes alone
    for k, kind in enumerate("abc"):
        rows = (made.obs["kind"] == kind).to_numpy()
        open_ = peaks[rows].mean(0)
        assert open_[4 * k : 4 * k + 4].min() > 0.6 and np.delete(open_, slice(4 * k, 4 * k + 4)).max() < 0.25
        assert made.X[rows][:, 10 * k : 10 * k + 10].sum() > 0.6 * made.X[rows][:, :30].sum()


def test_peaks_alone(cells):
    joined = multimodal.join(two_modalities(cells), rna=None)
    joined.obs["kind"] = cells.obs["kind"].loc[joined.obs_names]
    model = CFGen(
        iv.Design.from_adata(joined, covariates=["kind"]), joined.var_names, replace(TINY, hidden_atac=(32, 16))
    )
    model.fit(joined, config=replace(FIT, steps=40))
    assert set(np.unique(model.generate(50).X.toarray())) <= {0, 1}
    assert model.embed(joined).shape == (joined.n_obs, 4)


def test_modalities_apart(cells):
    mudata = pytest.importorskip("mudata")
    joined = multimodal.join(two_modalities(cells))
    parts = multimodal.part(joined)
    assert isinstance(parts, mudata.MuData) and parts["atac"].var_names[0] == "p0"
    assert (multimodal.join(parts).X != joined.X).nnz == 0


# ---- dispersions of the encoder that is used ---------------------------------------------------------------------


def test_dispersions_are_fitted_to_cells_that_the_encoder_sees_whole(cells, design):
    split = iv.splits.cells(cells.obs, design, test_fraction=0.0, val_fraction=0.3)
    fit = iv.FitConfig(steps=120, batch_size=64, lr=3e-3, warmup=0, val_every=0, progress=False, accelerator="cpu")
    options = {"hidden_rna": (32,), "n_latent": 5, "hidden": 16, "embedding": 16, "n_blocks": 1, "input_dropout": 0.8}
    models = []
    for refit in (False, True):
        config = CFGen.Config(**options, refit_dispersion=refit)
        models.append(CFGen(design, cells.var_names, config).fit(cells, split, fit))
    learned, refitted = models

    # all but the dispersions is the same, and held-out cells are likelier
    first, second = (dict(model.autoencoder.named_parameters()) for model in models)
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["dispersion.weight"]
    batch = iv.CellDataset(cells, design, split).take(np.flatnonzero((split == "val").to_numpy()))
    losses = []
    for model in models:
        with torch.no_grad():
            z = model.autoencoder.encode(batch.target)
            losses.append(
                float(model.reconstruction_losses(batch.target, z, model.total(batch.target), batch.condition)["total"])
            )
    assert losses[1] < losses[0] - 0.5
    assert refitted.autoencoder.dispersion.weight.median() > learned.autoencoder.dispersion.weight.median()

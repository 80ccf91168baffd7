"""Formula tests of ST: symmetry, loss, sizes, mapping of controls, spaces, transfer, and a hidden cell state."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from torch import nn

import invirtuo as iv
from invirtuo.batch import Batch
from invirtuo.cells.samplers import Layout, MappedSets
from invirtuo.fit import FitConfig
from invirtuo.metrics.measures.distribution import energy_distance
from invirtuo.models.state.attention import SetTransformer, pad, windows
from invirtuo.models.state.energy import energy_loss
from invirtuo.verbs.sampling import SampleConfig

ST = iv.models.StateTransition
Config = ST.Config
TINY = Config(set_size=16, hidden_dim=16, n_layers=2, n_heads=2, n_encoder_layers=2)
FIT = FitConfig(steps=4, batch_size=64, warmup=0, precision="fp32", accelerator="cpu", progress=False, val_every=2)
BACKBONES = ["llama", "gpt2"]


@pytest.fixture(scope="module")
def cells():
    return iv.preprocess.normalize(iv.datasets.toy(n_cells=360, n_genes=14))


@pytest.fixture(scope="module")
def plan(cells):
    return iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture(scope="module")
def batched(cells):
    """A Design with a batch."""
    return iv.Design.from_adata(
        cells, perturbation="perturbation", control="control", covariates=["cell_type", "batch"]
    )


@pytest.fixture(autouse=True)
def seeded():
    """First weights that are the same in every process."""
    torch.manual_seed(0)


def stirred(transformer: nn.Module) -> nn.Module:
    """Weights large enough that every part of the network matters."""
    torch.manual_seed(0)
    for parameter in transformer.requires_grad_(False).parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return transformer


# ---- the transformer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("mixing", ["attention", "mean", "none"])
def test_permuting_cells_permutes_the_output(backbone, mixing):
    torch.manual_seed(0)
    transformer = stirred(SetTransformer(16, 3, 4, 64, backbone=backbone, mixing=mixing)).double()
    x, order = torch.randn(2, 9, 16, dtype=torch.float64), torch.randperm(9)
    torch.testing.assert_close(transformer(x)[:, order], transformer(x[:, order]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_cell_sees_every_other_but_in_the_ablations_none_or_the_mean(backbone):
    """Not causal: the last cell changes the first. Of two sets that differ in one cell, `mean` sees the means alone."""
    torch.manual_seed(1)
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[0, -1] += torch.randn(16)
    moves = {}
    for mixing in ("attention", "mean", "none"):
        transformer = stirred(SetTransformer(16, 2, 4, 64, backbone=backbone, mixing=mixing))
        moves[mixing] = (transformer(x) - transformer(changed))[0, :-1].abs().max()
    assert moves["attention"] > 0.01 and moves["mean"] > 0.01 and moves["none"] == 0


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("mixing", ["attention", "mean", "none"])
def test_padding_has_no_influence(backbone, mixing):
    """Sets of 5 and 3 cells, padded, give what they give alone; whatever stands in the padding."""
    transformer = stirred(SetTransformer(16, 2, 4, 64, backbone=backbone, mixing=mixing))
    x = torch.randn(8, 16)
    padded, present = pad(x, [5, 3])
    assert padded.shape == (2, 5, 16) and present.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    together = transformer(padded, present)[present]
    alone = torch.cat([transformer(part[None])[0] for part in x.split([5, 3])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    spoiled = torch.where(present[..., None], padded, 1e3)
    torch.testing.assert_close(transformer(spoiled, present)[present], together, atol=1e-5, rtol=1e-5)


def test_attention_is_that_of_the_paper():
    """softmax(Q K^T / sqrt(d)) V over the cells of a set, head by head, written out."""
    attention = SetTransformer(8, 1, 2, 32).blocks[0].attention
    stirred(attention)
    x = torch.randn(1, 5, 8)
    q, k, v = (part[0] for part in attention.read(x).chunk(3, dim=-1))
    heads = []
    for columns in (slice(0, 4), slice(4, 8)):
        weight = torch.softmax(q[:, columns] @ k[:, columns].T / 2.0, dim=1)
        heads.append(weight @ v[:, columns])
    torch.testing.assert_close(attention(x, None)[0], torch.cat(heads, dim=1) @ attention.write.weight.T)


def test_initial_weights():
    """N(0, 0.02^2) inside the transformer, biases 0, gains 1."""
    transformer = SetTransformer(64, 2, 4, 256, backbone="gpt2").requires_grad_(False)
    for name, value in transformer.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert abs(float(value.std()) - 0.02) < 0.001, name
    with pytest.raises(ValueError, match="5 heads do not divide the width 64"):
        SetTransformer(64, 2, 5, 256)


def test_windows():
    assert windows(5, 16) == [5] and windows(16, 16) == [16] and windows(17, 16) == [9, 8][::-1]
    for n in range(1, 80):
        sizes = windows(n, 16)
        assert sum(sizes) == n and max(sizes) <= 16 and max(sizes) - min(sizes) <= 1 and len(sizes) == -(-n // 16)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_is_twice_that_of_geomloss(shared):
    arrays = np.load(shared("golden/cell_eval/loss/energy.npz"))
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    found = energy_loss(x, y).numpy()
    np.testing.assert_allclose(found, [0.53583, 0.54506, 0.48688], rtol=1e-4)
    np.testing.assert_allclose(0.5 * found, arrays["energy_blur005"], rtol=2e-4)  # its self-distances are not 0
    np.testing.assert_allclose(energy_loss(x, x), 0, atol=1e-6)


def test_loss_by_hand():
    """Equation 18, all pairs, self-pairs too; sets of unequal size; double stays double."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4)) + 1

    def mean(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1).mean()

    expected = [2 * mean(a, b) - mean(a, a) - mean(b, b) for a, b in zip(x, y, strict=True)]
    found = energy_loss(torch.from_numpy(x), torch.from_numpy(y))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_loss_of_equal_sets_has_gradient_zero():
    x = torch.randn(2, 6, 3, requires_grad=True)
    energy_loss(x, x.detach()).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() < 1e-6
    same = torch.zeros(1, 4, 3, requires_grad=True)
    energy_loss(same, torch.ones(1, 4, 3)).sum().backward()
    assert torch.isfinite(same.grad).all() and same.grad.any()


def test_loss_is_computed_in_full_precision():
    x, y = torch.randn(1, 8, 20), torch.randn(1, 8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = energy_loss(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, energy_loss(x, y))


def test_loss_of_the_model_is_that_of_its_sets(cells, plan):
    """Recomputed from predictions set by set; half of it with loss_scale; genes enter with decoder_weight."""
    dataset = iv.CellDataset(cells, plan)
    batch = next(dataset.batches(iv.samplers.Sets(16), 64))
    for config in (TINY, replace(TINY, space="pca", n_embedding=5, decoder_widths=(8,), decoder_dropout=0.0)):
        torch.manual_seed(0)
        model = ST(plan, cells.var_names, config)
        model.prepare(dataset)
        z0, z1 = model.represent(batch.source), model.represent(batch.target)
        predicted, hidden = model(z0, model.encode_condition(batch.condition), [16] * 4)
        main = energy_loss(predicted.view(4, 16, -1), z1.view(4, 16, -1)).mean()
        losses = model.loss(batch)
        if config.space == "genes":
            torch.testing.assert_close(losses["total"], main)
        else:
            decoded = model.decode(predicted, hidden, batch.source, z0)
            change = model.decoder(predicted) - model.decoder(z0)
            torch.testing.assert_close(decoded, batch.source + change)
            genes = energy_loss(decoded.view(4, 16, -1), batch.target.view(4, 16, -1)).mean()
            torch.testing.assert_close(losses["total"], main + 0.1 * genes)
            torch.testing.assert_close(losses["genes"], genes)
        half = ST(plan, cells.var_names, replace(config, loss_scale=0.5))
        half.prepare(dataset)
        half.load_state_dict(model.state_dict())
        torch.testing.assert_close(half.loss(batch)["total"], losses["total"] / 2)


def test_distances_equal_those_of_differences_and_so_do_their_gradients():
    x, y = torch.randn(2, 5, 40), torch.randn(2, 7, 40)
    x[0, 1] = x[0, 0]  # equal rows
    y[1, 2] = x[1, 3] + 1e-4
    for dtype, close in ((torch.float32, 1e-4), (torch.float64, 1e-7)):
        a, b, c, d = (part.to(dtype, copy=True).requires_grad_() for part in (x, y, x, y))
        loss = energy_loss(a, b)
        loss.sum().backward()
        parts = [
            torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").mean((1, 2))
            for u, v in ((c, d), (c, c), (d, d))
        ]
        expected = 2 * parts[0] - parts[1] - parts[2]
        expected.sum().backward()
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        for mine, theirs in ((a.grad, c.grad), (b.grad, d.grad)):
            torch.testing.assert_close(mine, theirs, atol=close, rtol=close)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def linear(n_in: int, n_out: int) -> int:
    return n_in * n_out + n_out


def expected_size(config: Config, n_genes: int, n_codes: int, n_batches: int) -> int:
    """Parameters counted by hand from table 4."""
    h, layers = config.hidden_dim, config.n_encoder_layers
    rest = (layers - 1) * (linear(h, h) + 2 * h)  # a layer norm after every map but the last
    encoders = linear(n_genes, h) + rest + linear(n_codes, h) + rest + n_batches * h
    if config.backbone == "llama":
        block, last = 4 * h * h + 3 * h * 4 * h + 2 * h, h
    else:
        block, last = 4 * linear(h, h) + linear(h, 4 * h) + linear(4 * h, h) + 4 * h, 2 * h
    return encoders + config.n_layers * block + last + linear(h, n_genes)


@pytest.mark.parametrize("preset", ["tahoe", "parse-pbmc", "replogle-nadig"])
def test_parameters_of_the_published_presets(preset, cells, batched):
    """At the widths of table 3 and at small ones; 1 more code than perturbations, for the control label."""
    published = ST.PRESETS[preset].config
    for config in (published, replace(published, hidden_dim=24, n_heads=4)):
        with torch.device("meta"):
            model = ST(batched, cells.var_names, config)
        n_batches = 2 if config.batch_encoder else 0
        assert sum(p.numel() for p in model.parameters()) == expected_size(config, 14, 3 + 1, n_batches)
    table = {"tahoe": (256, 1488, 12, "llama"), "parse-pbmc": (512, 1440, 12, "llama"),
             "replogle-nadig": (32, 128, 8, "gpt2")}  # fmt: skip
    assert (published.set_size, published.hidden_dim, published.n_heads, published.backbone) == table[preset]
    assert published.batch_encoder == (preset == "parse-pbmc") and published.residual == "hidden"
    assert published.n_encoder_layers == published.n_layers == 4 and published.mixing == "attention"


def test_a_small_llama_by_numbers(cells, plan):
    """h 4, 1 block, 1 map per encoder, 14 genes, 4 codes: 60 + 20 + (64 + 192 + 8) + 4 + 70."""
    model = ST(plan, cells.var_names, replace(TINY, hidden_dim=4, n_layers=1, n_encoder_layers=1))
    assert sum(p.numel() for p in model.parameters()) == 60 + 20 + 264 + 4 + 70


# ---- parts and options -----------------------------------------------------------------------------------------------

OPTIONS = [
    *({"mixing": mixing, "backbone": backbone} for mixing in ("mean", "none") for backbone in BACKBONES),
    *({"residual": residual} for residual in ("hidden", "cell", "none")),
    {"output_activation": "relu", "encoder_norm": False, "dropout": 0.1},
    {"batch": "batch", "batch_encoder": True},
    {"batch": "batch", "mapping": "context", "confidence": True},
    {"n_decoder_layers": 3},
    {"space": "pca", "n_embedding": 5, "decoder_widths": (8,)},
    {"space": "pca", "n_embedding": 5, "decoder_widths": (8,), "decode_from": "hidden", "confidence": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_trains_every_parameter_and_predicts(options, cells, batched, tmp_path):
    model = ST(batched, cells.var_names, replace(TINY, **options))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dataset = iv.CellDataset(cells, batched)
    model.prepare(dataset)
    sampler = iv.samplers.named(model.sampler, model.set_size)
    seen = dict.fromkeys(before, False)
    for batch in dataset.batches(sampler, 128, seed=0):
        model.zero_grad()
        losses = model.loss(batch)
        losses["total"].backward()
        for name, parameter in model.named_parameters():
            seen[name] |= bool(parameter.grad.any())
    assert [name for name, reached in seen.items() if not reached] == []
    model.fit(cells, config=FIT)
    wanted = pd.DataFrame({"perturbation": ["A", "B"], "cell_type": "t_cell", "batch": "batch_2"})
    predicted = model.predict(wanted, 21, precision="fp32")
    assert predicted.shape == (42, 14) and np.isfinite(predicted.X).all() and (predicted.X >= 0).all()
    model.save(tmp_path)
    np.testing.assert_array_equal(iv.load(tmp_path).predict(wanted, 21, precision="fp32").X, predicted.X)


def test_residuals(cells, plan):
    """Equation 16 and its variants, recomputed from the parts."""
    dataset = iv.CellDataset(cells, plan)
    batch = next(dataset.batches(iv.samplers.Sets(16), 32))
    for residual in ("hidden", "cell", "expression", "none"):
        torch.manual_seed(0)
        model = ST(plan, cells.var_names, replace(TINY, residual=residual))
        code, added = model.cell_encoder(batch.source), model.encode_condition(batch.condition)
        out = model.transformer((code + added).view(2, 16, -1)).flatten(0, 1)
        expected = {
            "hidden": model.head(out + code + added),
            "cell": model.head(out + code),
            "expression": model.head(out) + batch.source,
            "none": model.head(out),
        }[residual]
        torch.testing.assert_close(model(batch.source, added, [16, 16])[0], expected, atol=1e-5, rtol=1e-5)


def test_clipping(cells, plan):
    configs = [replace(TINY, clip=clip) for clip in (False, True)]
    free, clipped = (ST(plan, cells.var_names, config).fit(cells, config=FIT) for config in configs)
    wanted = pd.DataFrame({"perturbation": ["A"], "cell_type": ["t_cell"]})
    x = free.predict(wanted, 50, precision="fp32").X
    assert (x < 0).any()
    np.testing.assert_array_equal(clipped.predict(wanted, 50, precision="fp32").X, np.maximum(x, 0))


def test_features_are_added_as_they_are(cells):
    """`perturbation_encoder="identity"`: a vector of the width of the network, nothing learned in between."""
    vectors = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 16)), index=["A", "B", "C", "D"])
    design = iv.Design.from_adata(
        cells, perturbation="perturbation", control="control", covariates=["cell_type"], features=vectors
    )
    model = ST(design, cells.var_names, replace(TINY, perturbation_encoder="identity")).fit(cells, config=FIT)
    condition = design.encode(pd.DataFrame({"perturbation": ["D", "A+B", "control"], "cell_type": "t_cell"}))
    expected = np.stack([vectors.loc["D"], vectors.loc[["A", "B"]].sum(), np.zeros(16)])
    np.testing.assert_allclose(model.encode_condition(condition), expected, rtol=1e-5)
    assert model.predict(pd.DataFrame({"perturbation": ["D"], "cell_type": ["t_cell"]}), 3).n_obs == 3
    with pytest.raises(ValueError, match="to cells of width 8; found vectors of width 16. Set hidden_dim=16"):
        ST(design, cells.var_names, replace(TINY, hidden_dim=8, perturbation_encoder="identity"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": "genome"}, "space is 'genome'; expected one of genes, pca, obsm"),
        ({"residual": "H"}, "residual is 'H'"),
        ({"set_size": 0}, "set_size is 0"),
        ({"space": "obsm"}, "go together"),
        ({"obsm": "X_pca"}, "go together"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_wrong_batches(cells, plan):
    with pytest.raises(ValueError, match="batch 'plate' is no covariate of the design; found cell_type"):
        ST(plan, cells.var_names, replace(TINY, batch="plate"))
    alone = iv.Design.from_adata(cells, perturbation="perturbation", control="control")
    with pytest.raises(ValueError, match="a batch encoder needs a covariate"):
        ST(alone, cells.var_names, replace(TINY, batch_encoder=True))


# ---- mapping of controls ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout(cells, batched):
    """Training cells; batch_1 of the t cells has no controls."""
    obs = cells.obs
    drop = (obs["cell_type"] == "t_cell") & (obs["batch"] == "batch_1") & (obs["perturbation"] == "control")
    return Layout.of(obs, batched, np.flatnonzero(~drop))


@pytest.mark.parametrize("mapping", ["batch", "context"])
def test_controls_of_the_batch_or_of_the_context(mapping, cells, layout):
    obs, lonely, mixed = cells.obs, 0, 0
    for rows in MappedSets(8, mapping, 1)(layout, 32, np.random.default_rng(0)):
        assert (obs["perturbation"].iloc[rows.source] == "control").all()
        types = obs["cell_type"].to_numpy()
        np.testing.assert_array_equal(types[rows.source], types[rows.target])
        for target, source in zip(rows.target.reshape(-1, 8), rows.source.reshape(-1, 8), strict=True):
            batch = obs["batch"].iloc[target].unique()
            assert len(batch) == 1 and obs["perturbation"].iloc[target].nunique() == 1
            if types[target[0]] == "t_cell" and batch[0] == "batch_1":
                lonely += 1
                assert (obs["batch"].iloc[source] == "batch_2").all()  # the only controls of the context
            elif mapping == "batch":
                assert (obs["batch"].iloc[source] == batch[0]).all()
            else:
                mixed += obs["batch"].iloc[source].nunique() == 2
    assert lonely > 0 and (mixed > 0) == (mapping == "context")


def test_sets_of_an_epoch(cells, batched, layout):
    """Every cell at least once, redrawn every epoch, the same with the same seed."""

    def epoch(seed):
        return list(MappedSets(4, "batch", 1)(layout, 32, np.random.default_rng(seed)))

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert set(np.concatenate([r.target for r in first])) == set(layout.rows)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.target, b.target)
        np.testing.assert_array_equal(a.source, b.source)
    sets = [{frozenset(s) for r in rows for s in r.target.reshape(-1, 4).tolist()} for rows in (first, second)]
    assert len(sets[0] & sets[1]) < 0.2 * len(sets[0])


def test_prediction_from_the_controls_of_the_mapping(cells, batched, caplog):
    """Without a perturbation effect the control cells come back: those of the batch, or of the context."""
    obs = cells.obs
    drop = (obs["cell_type"] == "t_cell") & (obs["batch"] == "batch_1") & (obs["perturbation"] == "control")
    some, wanted = cells[~drop.to_numpy()].copy(), pd.DataFrame({"perturbation": ["A"], "cell_type": ["b_cell"]})
    pools = {}
    for mapping in ("batch", "context"):
        config = replace(TINY, batch="batch", mapping=mapping)
        with caplog.at_level(logging.INFO):
            model = ST(batched, cells.var_names, config).fit(some, config=FIT)
        nn.init.zeros_(model.head[-1].weight)
        nn.init.zeros_(model.head[-1].bias)
        for batch in ("batch_1", "batch_2"):
            x = model.predict(wanted.assign(batch=batch), 300, precision="fp32").X
            pools[mapping, batch] = {tuple(row) for row in x.round(4)}
        lonely = model.predict(wanted.assign(batch="batch_1", cell_type="t_cell"), 30, precision="fp32").X
        there = some[((some.obs["cell_type"] == "t_cell") & (some.obs["perturbation"] == "control")).to_numpy()]
        assert {tuple(row) for row in lonely.round(4)} <= {tuple(row) for row in there.X.toarray().round(4)}
    assert not pools["batch", "batch_1"] & pools["batch", "batch_2"]
    both = pools["batch", "batch_1"] | pools["batch", "batch_2"]
    assert pools["context", "batch_1"] == pools["context", "batch_2"] == both
    assert "no control cells of the same batch for t_cell|batch_1" in caplog.text


# ---- prediction ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(cells, plan):
    return ST(plan, cells.var_names, TINY).fit(cells, config=replace(FIT, steps=60, lr=3e-3))


def test_windows_do_not_depend_on_batches(fitted, plan):
    """37 cells are windows of 12, 12, 13, whatever the number of cells in the network at once."""
    table = pd.DataFrame({"perturbation": "A", "cell_type": "t_cell"}, index=range(37))
    batch = Batch(plan.encode(table), source=torch.rand(37, 14) * 3)
    found = [fitted.sample(batch, None, SampleConfig(batch_size=size)) for size in (1, 16, 32, 1000)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)
    alone = torch.cat([
        fitted.sample(Batch(plan.encode(table.iloc[rows]), source=batch.source[rows]), None, SampleConfig())
        for rows in torch.arange(37).split(windows(37, 16))
    ])  # fmt: skip
    torch.testing.assert_close(alone, found[0], atol=1e-5, rtol=1e-5)


def test_order_of_control_cells(fitted, plan):
    batch = Batch(plan.encode(pd.DataFrame({"perturbation": ["A"] * 16, "cell_type": "t_cell"})),
                  source=torch.rand(16, 14) * 3)  # fmt: skip
    order = torch.randperm(16)
    found = fitted.sample(batch, None, SampleConfig())
    torch.testing.assert_close(fitted.sample(batch[order], None, SampleConfig()), found[order], atol=1e-5, rtol=1e-5)


def test_prediction_hardly_depends_on_the_set_size(fitted):
    """Means over 600 cells in sets of 8, 16 and 64: within a tenth of the effect."""
    wanted = pd.DataFrame({"perturbation": ["A", "control"], "cell_type": "b_cell"})
    means = []
    for size in (8, 16, 64):
        fitted.set_size = size
        x = fitted.predict(wanted, 600, precision="fp32").X
        means.append(np.stack([x[:600].mean(0), x[600:].mean(0)]))
    fitted.set_size = TINY.set_size
    effect = np.linalg.norm(means[1][0] - means[1][1])
    assert effect > 0.5
    for mean in means:
        assert np.linalg.norm(mean[0] - means[1][0]) < 0.1 * effect


@pytest.mark.slow
def test_confidence_ranks_predictions(cells, plan):
    """Where genes are shuffled in every cell, ST cannot follow, and the head expects a larger distance."""
    config = replace(TINY, confidence=True)
    noisy = cells.copy()
    x = noisy.X.toarray()
    where = (cells.obs["perturbation"] == "A").to_numpy()
    x[where] = np.random.default_rng(0).permuted(x[where], axis=1)
    noisy.X = x
    model = ST(plan, cells.var_names, config).fit(noisy, config=replace(FIT, steps=400, lr=3e-3, ema=0.9))
    wanted = plan.conditions(cells.obs, control=True)
    found = model.expected_loss(wanted, 64)
    assert found.index.tolist() == plan.names(wanted).tolist()
    by_label = found.groupby(wanted["perturbation"].to_numpy()).mean()
    assert by_label[["A", "B", "C", "control"]].idxmax() == "A" and by_label.idxmin() == "control"
    pd.testing.assert_series_equal(model.expected_loss(wanted, 64), found)
    with pytest.raises(ValueError, match="needs a fitted model with a confidence head"):
        ST(plan, cells.var_names, TINY).fit(cells, config=FIT).expected_loss(wanted)


# ---- embedding spaces ------------------------------------------------------------------------------------------------


def embedded(cells: AnnData) -> AnnData:
    """Cells with an embedding in obsm that holds negative values."""
    z = cells.copy()
    x = z.X.toarray()
    z.obsm["X_emb"] = (x - x.mean(0)) @ np.linalg.qr(np.random.default_rng(0).normal(size=(14, 4)))[0]
    return z


def test_obsm_enters_as_it_is(cells, plan, tmp_path):
    z = embedded(cells)
    config = replace(TINY, space="obsm", obsm="X_emb", n_embedding=4, decoder_widths=(16,), decoder_dropout=0.0)
    model = ST(plan, cells.var_names, config)
    with pytest.raises(ValueError, match=r"expected obsm\['X_emb'\] of width 4; found no obsm"):
        model.fit(cells, config=FIT)
    dataset = iv.CellDataset(z, plan, obsm="X_emb")
    batch = next(dataset.batches(iv.samplers.pairs, 5))
    np.testing.assert_allclose(model.represent(batch.target, batch.embedding), z.obsm["X_emb"][batch.index], rtol=1e-6)
    rows = [np.flatnonzero((z.X.toarray() == x).all(1))[0] for x in batch.source.numpy()]
    np.testing.assert_allclose(batch.source_embedding, z.obsm["X_emb"][rows], rtol=1e-6)
    assert dataset.fingerprint() != iv.CellDataset(z, plan).fingerprint()
    with pytest.raises(ValueError, match=r"there is no obsm\['X_other'\]; found X_emb"):
        iv.CellDataset(z, plan, obsm="X_other")
    model.fit(z[:, ::-1].copy(), config=FIT)
    wanted = pd.DataFrame({"perturbation": ["A"], "cell_type": ["t_cell"]})
    predicted = model.predict(wanted, 20, precision="fp32")
    assert predicted.var_names.tolist() == list(cells.var_names)
    assert model.predict(wanted, 20, controls=z).n_obs == 20
    model.save(tmp_path)
    np.testing.assert_array_equal(iv.load(tmp_path).predict(wanted, 20, precision="fp32").X, predicted.X)


@pytest.mark.filterwarnings("ignore:.*zarr.*")
@pytest.mark.parametrize("ending", ["h5", "h5ad", "zarr"])
def test_embeddings_of_a_folder_of_files(cells, plan, tmp_path, ending):
    """Files may end like those that STATE's public loader reads."""
    z = embedded(cells)
    z.uns["invirtuo_obsm"] = {"X_emb": "ours"}
    for i, half in enumerate((z[:200].copy(), z[200:].copy())):
        (half.write_zarr if ending == "zarr" else half.write_h5ad)(tmp_path / f"{i}.{ending}")
    store = iv.CellStore.open(tmp_path)
    assert store.uns["invirtuo_obsm"] == {"X_emb": "ours"} and len(store.obsm) == 1
    np.testing.assert_allclose(store.obsm["X_emb"], z.obsm["X_emb"], rtol=1e-6)
    config = replace(TINY, space="obsm", obsm="X_emb", n_embedding=4)
    model = ST(plan, cells.var_names, config).fit(store, config=FIT)
    assert model.card["encoder"] == "ours"
    for batch in iv.CellDataset(store, plan, obsm="X_emb").batches(iv.samplers.pairs, 50):
        np.testing.assert_allclose(batch.embedding, z.obsm["X_emb"][batch.index], rtol=1e-6)
    assert model.predict(pd.DataFrame({"perturbation": ["A"], "cell_type": ["t_cell"]}), 9).n_obs == 9


def test_embeddings_of_different_widths_are_refused(cells, tmp_path):
    z = embedded(cells)
    narrow = z.copy()
    narrow.obsm["X_emb"] = narrow.obsm["X_emb"][:, :3]
    narrow.obs_names = "narrow_" + narrow.obs_names
    z.write_h5ad(tmp_path / "a.h5ad")
    narrow.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"obsm\['X_emb'\] is 3, 4 wide in different files"):
        iv.CellStore.open(tmp_path).obsm["X_emb"]


def test_principal_components_are_those_of_the_training_cells(cells, plan):
    split = pd.Series(np.where(np.arange(360) % 3 == 0, "test", "train"), index=cells.obs_names)
    model = ST(plan, cells.var_names, replace(TINY, space="pca", n_embedding=3)).fit(cells, split, config=FIT)
    train = cells.X[(split == "train").to_numpy()].toarray()
    np.testing.assert_allclose(model.transforms["pca"].mean, train.mean(0), rtol=1e-5)


# ---- transfer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere():
    """Another screen: other perturbations, batches and cells, 10 of its 12 genes known."""
    raw = iv.datasets.toy(seed=5, n_cells=360, n_genes=14)[:, 4:].copy()
    raw = AnnData(raw.X, obs=raw.obs, var=raw.var[[]])
    more = AnnData(np.random.default_rng(0).poisson(1.0, (360, 2)).astype(np.float32), obs=raw.obs)
    x = np.concatenate([raw.X.toarray(), more.X], axis=1)
    obs = raw.obs.assign(
        perturbation=raw.obs["perturbation"].astype(str).str.replace("C", "E"),
        batch=raw.obs["batch"].astype(str).str.replace("batch_1", "batch_9"),
    )
    names = [*raw.var_names[::-1], "new_1", "new_2"]
    x = np.concatenate([x[:, :10][:, ::-1], x[:, 10:]], axis=1)
    return iv.preprocess.normalize(AnnData(x, obs=obs, var=pd.DataFrame(index=names)))


def test_adapt_keeps_what_it_should(cells, batched, elsewhere, caplog):
    config = replace(TINY, batch="batch", batch_encoder=True, n_decoder_layers=2)
    first = ST(batched, cells.var_names, config).fit(cells, config=FIT)
    design = iv.Design.from_adata(
        elsewhere, perturbation="perturbation", control="control", covariates=["cell_type", "batch"]
    )
    with caplog.at_level(logging.INFO):
        second = first.adapt(design, elsewhere.var_names)
    assert "10 of 12 genes are known" in caplog.text
    old, new = first.state_dict(), second.state_dict()
    place = [first.genes.index(gene) for gene in second.genes[:10]]
    for name, value in new.items():
        if name.startswith("perturbation_encoder."):
            assert value.shape != old[name].shape or not torch.equal(value, old[name]) or "norm" in name or (
                not old[name].any() or (old[name] == 1).all()
            ), name  # fmt: skip
        elif name == "cell_encoder.0.weight":
            torch.testing.assert_close(value[:, :10], old[name][:, place])
        elif name in ("head.3.weight", "head.3.bias"):
            torch.testing.assert_close(value[:10], old[name][place])
        elif name == "batch_encoder.weight":
            assert design.covariates["batch"] == ("batch_2", "batch_9")
            torch.testing.assert_close(value[0], old[name][1])
            torch.testing.assert_close(value[1], old[name].mean(0))
        else:
            assert torch.equal(value, old[name]), name
    assert second.genes == list(elsewhere.var_names) and second.design == design
    for key in ("weight", "bias"):
        assert not torch.equal(new[f"perturbation_encoder.0.{key}"], old[f"perturbation_encoder.0.{key}"])


def test_a_fit_begins_with_the_adapted_weights(cells, plan, elsewhere, tmp_path):
    """All of it moves, from where it was; what is new depends on the seed; a killed fit resumes."""
    first = ST(plan, cells.var_names, TINY).fit(cells, config=FIT)
    design = iv.Design.from_adata(elsewhere, perturbation="perturbation", control="control", covariates=["cell_type"])
    still = replace(FIT, steps=1, lr=1e-12, ema=0.0)
    states = [
        first.adapt(design, elsewhere.var_names).fit(elsewhere, config=replace(still, seed=seed)).state_dict()
        for seed in (0, 0, 1)
    ]
    kept = {k: v for k, v in first.state_dict().items() if k.startswith("transformer.")}
    for name, value in kept.items():
        torch.testing.assert_close(states[0][name], value, atol=1e-6, rtol=0)
    new = "perturbation_encoder.0.weight"
    assert torch.equal(states[0][new], states[1][new]) and not torch.equal(states[0][new], states[2][new])
    moved = first.adapt(design, elsewhere.var_names).fit(elsewhere, config=replace(FIT, steps=6))
    assert not any(torch.equal(moved.state_dict()[name], value) for name, value in kept.items())
    half = first.adapt(design, elsewhere.var_names)
    config = replace(FIT, steps=6, checkpoint_every=3, val_every=0)

    class Killed(Exception):
        pass

    import lightning

    class Killer(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                raise Killed

    with pytest.raises(Killed):
        half.fit(elsewhere, config=config, folder=tmp_path, callbacks=[Killer()])
    resumed = first.adapt(design, elsewhere.var_names).fit(elsewhere, config=config, folder=tmp_path, resume=True)
    straight = first.adapt(design, elsewhere.var_names).fit(elsewhere, config=config)
    assert resumed.history["step"].iloc[-1] == 6
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_adapt_in_an_embedding_space(cells, plan):
    """The decoder begins anew, the way in and out is kept, and so are principal components."""
    config = replace(TINY, space="pca", n_embedding=4, decoder_widths=(8,))
    first = ST(plan, cells.var_names, config).fit(cells, config=FIT)
    second = first.adapt(plan, cells.var_names)
    old, new = first.state_dict(), second.state_dict()
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert {name for name in old if name.startswith(("cell_encoder.", "head.", "transformer."))} <= same
    assert not {"decoder.0.weight", "decoder.3.weight", "perturbation_encoder.0.weight"} & same
    second.fit(cells[:200].copy(), config=FIT)
    np.testing.assert_array_equal(second.transforms["pca"].components, first.transforms["pca"].components)
    with pytest.raises(ValueError, match="expected the same genes in order"):
        first.adapt(plan, cells.var_names[::-1])


def test_adapt_refuses(cells, plan, fitted):
    with pytest.raises(ValueError, match="not fitted yet"):
        ST(plan, cells.var_names, TINY).adapt(plan, cells.var_names)
    with pytest.raises(ValueError, match="2 of 5 genes are known to this model, fewer than min_shared=0.5"):
        fitted.adapt(plan, [*cells.var_names[:2], "x", "y", "z"])
    assert fitted.adapt(plan, [*cells.var_names[:2], "x", "y", "z"], min_shared=0.4).n_genes == 5
    with pytest.raises(ValueError, match="pass a config with layers of the same sizes"):
        fitted.adapt(plan, cells.var_names, replace(TINY, hidden_dim=32))
    assert fitted.adapt(plan, cells.var_names, replace(TINY, set_size=4)).set_size == 4


# ---- a known answer --------------------------------------------------------------------------------------------------


def planted(seed: int = 0, n_contexts: int = 240, n_cells: int = 64) -> tuple[AnnData, np.ndarray]:
    """Contexts of two unlabelled populations in hidden states, one up and one down; A moves cells by their state.

    Where a population lies is new in every context (genes 0-3), and its state is so weak in single cells (genes 4-7)
    that only cells of the same population together show it: 0.15 against noise of 0.5. Genes 8-11 respond, by 1.5.
    Gives the cells and the centres (contexts, 2, 4) of the populations, the one in the state -1 first.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_contexts, 2, 4))
    centres *= 2 / np.linalg.norm(centres, axis=2, keepdims=True)
    rows, obs = [], []
    for context in range(n_contexts):
        for label in ("control", "A"):
            population = rng.integers(2, size=n_cells)
            state = 2.0 * population[:, None] - 1
            response = (label == "A") * 1.5 * state * np.array([1, -1, 1, -1])
            where = centres[context, population] + 0.2 * rng.normal(size=(n_cells, 4))
            weak = 0.15 * state + 0.5 * rng.normal(size=(n_cells, 4))
            rows.append(np.concatenate([where, weak, response + 0.3 * rng.normal(size=(n_cells, 4))], axis=1))
            obs += [(label, f"c{context:03d}")] * n_cells
    x = np.concatenate(rows)
    table = pd.DataFrame(obs, columns=["p", "context"], index=[f"cell_{i}" for i in range(len(obs))])
    cells = AnnData((x - x.min()).astype(np.float32), obs=table, var=pd.DataFrame(index=[f"g{i}" for i in range(12)]))
    return cells, centres - x.min()


def wrong_share(predicted: AnnData, centres: np.ndarray) -> float:
    """Share of predicted cells that do not respond as the population does in which they lie."""
    context = predicted.obs["context"].astype(str).str[1:].astype(int).to_numpy()
    where, response = predicted.X[:, :4], predicted.X[:, 8:] @ np.array([1, -1, 1, -1])
    population = np.linalg.norm(where[:, None] - centres[context], axis=2).argmin(axis=1)
    return float(((response > 0) != (population == 1)).mean())


@pytest.mark.slow
def test_a_hidden_cell_state_needs_attention():
    """In contexts that were never seen responding, ST beats both ablations, the mean effect and its shift of cells."""
    cells, centres = planted()
    design = iv.Design.from_adata(cells, perturbation="p", control="control", covariates=["context"])
    unseen = [f"c{i:03d}" for i in range(30)]
    split = iv.splits.hold_out(
        cells.obs, design, [f"{c}|A" for c in unseen], val_fraction=0.0, control_fractions=(1, 0, 0)
    )
    config = Config(set_size=64, hidden_dim=64, n_layers=2, n_heads=4, n_encoder_layers=2)
    fit = replace(FIT, steps=500, batch_size=512, lr=4e-3, warmup=20, ema=0.9, clip=10.0, val_every=0)
    ablations = ("attention", "mean", "none")
    models = {mixing: ST(design, cells.var_names, replace(config, mixing=mixing)) for mixing in ablations}
    for preset in (None, "shift-cells"):
        models[f"means {preset}"] = iv.models.PerturbationMean(design, cells.var_names, preset)
    distance, wrong = {}, {}
    for name, model in models.items():
        predicted = model.fit(cells, split, config=fit).predict("test", 64, precision="fp32")
        wrong[name] = wrong_share(predicted, centres)
        pairs = [(predicted, "A"), (cells, "A")]
        distance[name] = np.mean([
            energy_distance(*(a[((a.obs["context"] == c) & (a.obs["p"] == p)).to_numpy()].X for a, p in pairs))
            for c in unseen
        ])  # fmt: skip
    assert distance["attention"] < 0.8 * min(distance["mean"], distance["none"]), distance
    assert distance["attention"] < 0.1 * min(distance["means None"], distance["means shift-cells"]), distance
    assert wrong["attention"] < 0.6 * min(wrong["mean"], wrong["none"]), wrong

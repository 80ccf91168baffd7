"""SE: sentences, losses, embeddings that depend on the cell alone, gene vectors, several data sets, ST on top of it."""

from __future__ import annotations

import logging
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

import invirtuo as iv
from invirtuo.cells.preprocess import with_embedding
from invirtuo.models.state.state_embedding import Config, Decoder, StateEmbedding, depth

TINY = Config(gene_width=8, length=10, hidden_dim=16, n_layers=2, n_dataset=3, bin_width=12, n_expressed=6, n_silent=5,
              n_shared=7)  # fmt: skip
PLAN = iv.FitConfig(steps=6, batch_size=16, lr=1e-3, val_every=0, precision="fp32", accelerator="cpu", progress=False)


@pytest.fixture(scope="module")
def two() -> anndata.AnnData:
    """Two data sets with different genes, of which they share some."""
    toy = iv.preprocess.normalize(iv.datasets.toy())
    parts = {"a": toy[:120, :25].copy(), "b": toy[120:220, 10:].copy()}
    joined = anndata.concat(parts, join="outer", label="dataset", index_unique="-", fill_value=0)
    joined.X = joined.X.toarray()
    return joined


@pytest.fixture(scope="module")
def design(two):
    return iv.Design.from_adata(two, covariates=["dataset"])


@pytest.fixture(scope="module")
def fitted(two, design):
    return StateEmbedding(design, two.var_names, TINY).fit(two, config=PLAN)


def prepared(two, design, **options) -> StateEmbedding:
    model = StateEmbedding(design, two.var_names, replace(TINY, **options))
    model.prepare(iv.CellDataset(two, design))
    return model


def test_presets_build(two, design):
    for name in ("default", "tiny", "small"):
        assert StateEmbedding(design, two.var_names, name).preset == name
    paper = StateEmbedding.PRESETS["paper"].config
    sizes = (paper.hidden_dim, paper.n_layers, paper.n_heads, paper.feed_forward, paper.length, paper.gene_width)
    assert sizes == (2048, 16, 16, 3, 2048, 5120)
    assert paper.n_expressed + paper.n_silent + paper.n_shared == 1280
    assert paper.fill == "genes" and paper.dropout == 0.1


def test_number_of_parameters(two, design):
    h, d, n_bins, k = 16, 3, 10, 2 * 16 + 3 + 1 - 16  # k: width of the decoder, (h + d) + h + 1
    k = (h + d) + h + 1
    layer = 4 * h * h + 4 * h + 2 * 3 * h * h + 3 * h + h + 4 * h  # attention, feed-forward, two norms
    bins = 2 * 12 + (12 * n_bins + n_bins) + n_bins * h
    expected = (8 * h + h + 2 * h) + bins + 2 * h + 2 * layer + 4 * h + (h * d + d)
    expected += 2 * (2 * (k * k + k) + 2 * k) + k + 1  # decoder
    expected += (h * h + h) + (2 * h + 2)  # guess of the data set
    assert sum(p.numel() for p in prepared(two, design).parameters()) == expected


def test_sentences_are_sorted_by_value_then_name(two, design):
    model = prepared(two, design, order="value")
    x = torch.zeros(2, len(model.genes))
    x[0, [3, 1, 7, 5]] = torch.tensor([2.0, 1.0, 1.0, 3.0])
    x[1, :12] = torch.arange(1.0, 13.0)
    genes, present = model.sentence(x, model.known[None])
    tied = sorted((1, 7), key=lambda i: model.genes[i])
    assert genes[0, :4].tolist() == [5, 3, *tied]
    assert present[0].tolist() == [True] * 4 + [False] * 6
    assert genes[1].tolist() == list(range(11, 1, -1))  # the longest ten


def test_genes_that_few_cells_express_come_first(two, design):
    model = prepared(two, design)
    share = (two.X > 0).mean(axis=0)
    np.testing.assert_allclose(model.weight, np.log1p(1 / share), rtol=1e-5)
    x = torch.ones(1, len(model.genes))
    genes, _ = model.sentence(x, model.known[None])
    chosen = share[genes[0].numpy()]
    assert (np.diff(chosen) >= 0).all() and chosen.max() <= np.sort(share)[9]


def test_silent_genes_fill_in_a_stored_or_a_random_order(two, design):
    model = prepared(two, design, fill="genes")
    x = torch.zeros(3, len(model.genes))
    x[:, 4] = 1.0
    genes, present = model.sentence(x, model.known[None])
    assert present.all() and (genes[:, 0] == 4).all()
    assert (genes[0] == genes[1]).all()
    other, _ = model.sentence(x, model.known[None], shuffle=True)
    assert (other[:, 0] == 4).all() and not (other[0] == other[1]).all()
    few = torch.zeros_like(model.known)
    few[:6] = True
    _, present = model.sentence(x, few[None])
    assert present.sum(dim=1).tolist() == [6, 6, 6]  # a vocabulary shorter than the sentence


def test_a_gene_belongs_to_a_data_set_that_expresses_it(two, design):
    model = prepared(two, design)
    for level, name in enumerate(design.covariates["dataset"]):
        own = np.asarray((two.X[(two.obs["dataset"] == name).to_numpy()] > 0).sum(axis=0)).ravel() > 0
        assert (model.measured[level].numpy() == own).all()
    assert not (model.measured[0] == model.measured[1]).all()


def test_only_measured_genes_are_asked_for(two, design):
    model = prepared(two, design)
    dataset = iv.CellDataset(two, design)
    batch = dataset.take(np.arange(100, 140))
    allowed = model.measured[batch.condition.covariates["dataset"]]
    genes, present = model.sentence(batch.target, allowed)
    asked, valid = model._target_genes(batch.target, allowed, genes, present)
    assert asked.shape == valid.shape == (40, 6 + 5 + 7)
    assert allowed.gather(1, asked)[valid].all()
    own, counts = asked[:, :11], valid[:, :11]
    for cell in range(40):
        chosen = own[cell][counts[cell]].tolist()
        assert len(set(chosen)) == len(chosen)
        inside = set(genes[cell][present[cell]].tolist())
        expressed = [g for g in chosen if batch.target[cell, g] > 0 and g in inside]
        assert len(expressed) == min(6, int(present[cell].sum()))
        assert not inside & (set(chosen) - set(expressed))
    assert (asked[:, 11:] == asked[:1, 11:]).all()


def test_losses_by_hand(two, design):
    model = prepared(two, design).eval()
    batch = iv.CellDataset(two, design).take(np.arange(100, 130))
    levels = batch.condition.covariates["dataset"]
    torch.manual_seed(3)
    losses = model.loss(batch)
    torch.manual_seed(3)
    genes, present = model.sentence(batch.target, model.measured[levels], shuffle=True)
    codes = model.gene_codes()
    z, token = model.encode(batch.target, genes, present, codes)
    asked, valid = model._target_genes(batch.target, model.measured[levels], genes, present)
    values = batch.target.gather(1, genes)
    mean = torch.stack([v[p & (v > 0)].mean() for v, p in zip(values, present, strict=True)])
    torch.testing.assert_close(depth(batch.target, genes, present), mean)
    guess = model.decoder(z, codes[asked], mean)
    error = torch.where(valid, guess - batch.target.gather(1, asked), 0.0)
    torch.testing.assert_close(losses["genes"], error.square().sum(dim=1).sqrt().mean())
    torch.testing.assert_close(losses["cells"], error[:, -7:].square().sum(dim=0).sqrt().mean())
    chance = torch.log_softmax(model.dataset_head(token), dim=1)
    torch.testing.assert_close(losses["dataset"], -chance[torch.arange(30), levels].mean())
    torch.testing.assert_close(losses["total"], losses["genes"] + losses["cells"] + losses["dataset"])


def test_every_parameter_gets_a_gradient_and_none_is_nan(two, design):
    model = prepared(two, design).train()
    batch = iv.CellDataset(two, design).take(np.arange(100, 130))
    model.loss(batch)["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    zero = torch.zeros(3, 4, requires_grad=True)
    zero.norm(dim=1).mean().backward()
    assert (zero.grad == 0).all()


def test_an_empty_cell_has_an_embedding_and_a_finite_loss(two, design, fitted):
    empty = two[:3].copy()
    empty.X[1] = 0
    z = fitted.embed(empty).X
    assert np.isfinite(z).all() and not np.allclose(z[0], z[1])
    model = prepared(two, design)
    losses = model.loss(iv.CellDataset(empty, design).take(np.arange(3)))
    losses["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_decoder_has_two_skip_blocks():
    decoder = Decoder(2 + 3 + 1)
    z, genes, scalar = torch.randn(4, 2), torch.randn(4, 5, 3), torch.randn(4)
    x = torch.cat([z[2], genes[2, 1], scalar[2:3]])
    for block, norm in zip(decoder.blocks, decoder.norms, strict=True):
        x = norm(x + block(x))
    torch.testing.assert_close(decoder(z, genes, scalar)[2, 1], decoder.out(x)[0])


@pytest.mark.parametrize("fill", ["none", "genes"])
def test_an_embedding_depends_on_the_cell_alone(two, design, fill, tmp_path):
    model = StateEmbedding(design, two.var_names, replace(TINY, fill=fill)).fit(two, config=PLAN)
    all_of_them = model.embed(two).X
    assert all_of_them.shape == (two.n_obs, 16 + 3) and all_of_them.dtype == np.float32
    order = np.random.default_rng(0).permutation(two.n_obs)
    np.testing.assert_allclose(model.embed(two[order]).X, all_of_them[order], atol=1e-6)
    np.testing.assert_allclose(model.embed(two[7]).X[0], all_of_them[7], atol=1e-6)
    shuffled_genes = two[:40, np.random.default_rng(1).permutation(two.n_vars)]
    np.testing.assert_allclose(model.embed(shuffled_genes).X, all_of_them[:40], atol=1e-6)
    unlabelled = anndata.AnnData(two.X[:9], var=two.var)
    np.testing.assert_allclose(model.embed(unlabelled).X, all_of_them[:9], atol=1e-6)
    model.save(tmp_path / "run")
    np.testing.assert_array_equal(iv.load(tmp_path / "run").embed(two).X, all_of_them)
    assert iv.load(tmp_path / "run").checkpoint() == model.checkpoint()


def test_padding_has_no_influence(two, design):
    model = prepared(two, design).eval()
    x = torch.from_numpy(two.X[:2].copy())
    x[0] *= torch.arange(x.shape[1]) < 5  # a short cell beside a long one
    genes, present = model.sentence(x, model.known[None])
    codes = model.gene_codes()
    both = model.encode(x, genes, present, codes)[0]
    alone = model.encode(x[:1], genes[:1], present[:1], codes)[0]
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)
    noise = torch.where(present, genes, genes.flip(1))  # other genes where nothing is read
    torch.testing.assert_close(model.encode(x, noise, present, codes)[0], both, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_learning_lowers_the_loss_and_tells_populations_apart(design, two):
    rng = np.random.default_rng(0)
    programs = rng.random((2, 30)) < 0.4
    kind = np.repeat([0, 1], 150)
    x = rng.poisson(3.0 * programs[kind] + 0.3).astype(np.float32)
    cells = anndata.AnnData(x, obs=pd.DataFrame({"kind": kind.astype(str)}, index=[f"c{i}" for i in range(300)]))
    cells.var_names = [f"g{i}" for i in range(30)]
    cells = iv.preprocess.normalize(cells)
    model = StateEmbedding(iv.Design.from_adata(cells), cells.var_names, replace(TINY, length=30, hidden_dim=32))
    model.fit(cells, config=replace(PLAN, steps=150, lr=3e-3, batch_size=64))
    history = model.history["train_total"]
    assert history.tail(3).mean() < 0.9 * history.head(1).mean()
    z = model.embed(cells).X
    reader = LogisticRegression(max_iter=1000).fit(z[::2], kind[::2])
    assert reader.score(z[1::2], kind[1::2]) > 0.95


# ---- gene vectors ---------------------------------------------------------------------------------------------------


def test_random_vectors_depend_on_the_name_alone(two, design):
    model = prepared(two, design)
    flipped = StateEmbedding(design, two.var_names[::-1], TINY)
    flipped._set_vectors()
    torch.testing.assert_close(flipped.vectors.flip(0), model.vectors)
    assert len(model.vectors.unique(dim=0)) == len(model.genes)


@pytest.mark.parametrize("suffix", ["npz", "csv", "tsv"])
def test_vectors_from_a_file_travel_with_the_weights(two, design, suffix, tmp_path, caplog):
    names, rows = two.var_names[3:20].to_numpy().astype(str), np.random.default_rng(0).normal(size=(17, 8))
    path = tmp_path / f"vectors.{suffix}"
    if suffix == "npz":
        np.savez(path, genes=names, emb=rows.astype(np.float16))
    else:
        pd.DataFrame(rows, index=names).to_csv(path, sep="\t" if suffix == "tsv" else ",")
    with caplog.at_level(logging.INFO):
        model = StateEmbedding(design, two.var_names, replace(TINY, gene_vectors=str(path))).fit(two, config=PLAN)
    assert f"17 of {two.n_vars} genes have a vector" in caplog.text
    np.testing.assert_allclose(model.vectors[3:20], rows, atol=2e-3)
    assert model.known.tolist() == [3 <= i < 20 for i in range(two.n_vars)]
    path.unlink()
    model.save(tmp_path / "run")
    loaded = iv.load(tmp_path / "run")
    assert loaded.config.gene_vectors == path.name  # no path of this machine
    np.testing.assert_array_equal(loaded.embed(two).X, model.embed(two).X)
    loaded.fit(two, config=PLAN)  # with the vectors it has
    silent = two[:5].copy()
    silent.X[:, 20:] = 1.0  # genes without a vector say nothing
    np.testing.assert_allclose(model.embed(silent).X, model.embed(two[:5]).X, atol=1e-6)


def test_one_hot_vectors(two, design, tmp_path):
    model = StateEmbedding(design, two.var_names, replace(TINY, gene_vectors="one-hot")).fit(two, config=PLAN)
    assert model.gene_map.weight.shape == (16, two.n_vars)
    model.save(tmp_path / "run")
    np.testing.assert_array_equal(iv.load(tmp_path / "run").embed(two).X, model.embed(two).X)


def test_options_of_public_code(two, design):
    plain = StateEmbedding(design, two.var_names, replace(TINY, vector_norm=True, cell_norm="l2", value="percent"))
    plain.fit(two, config=PLAN)
    np.testing.assert_allclose(plain.vectors.norm(dim=1), 4.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(plain.embed(two).X, axis=1), 1.0, rtol=1e-5)


def test_bad_vectors(two, design, tmp_path):
    def fit(name, **options):
        StateEmbedding(design, two.var_names, replace(TINY, gene_vectors=str(tmp_path / name), **options)).fit(
            two, config=PLAN
        )

    with pytest.raises(ValueError, match="holds no vectors"):
        fit("missing.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="holds no vectors"):
        fit("broken.npz")
    np.savez(tmp_path / "pickled.npz", genes=np.array(["a", {}], dtype=object), emb=np.zeros((2, 8)))
    with pytest.raises(ValueError, match="holds no vectors"):
        fit("pickled.npz")
    pd.DataFrame(np.ones((2, 8)), index=["x", "x"]).to_csv(tmp_path / "twice.csv")
    with pytest.raises(ValueError, match="twice"):
        fit("twice.csv")
    pd.DataFrame(np.ones((2, 8)), index=["x", "y"]).to_csv(tmp_path / "others.csv")
    with pytest.raises(ValueError, match="no vector for any of the genes"):
        fit("others.csv")
    pd.DataFrame(np.ones((1, 5)), index=[two.var_names[0]]).to_csv(tmp_path / "narrow.csv")
    with pytest.raises(ValueError, match="set gene_width=5"):
        fit("narrow.csv")


# ---- contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fill": "zeros"}, "expected one of none, genes"),
        ({"value": "raw"}, "log, percent"),
        ({"length": 0}, "at least 1"),
        ({"hidden_dim": 15}, "do not divide"),
    ],
)
def test_bad_configs(options, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **options)


def test_bad_data(two, design, fitted):
    with pytest.raises(ValueError, match="not fitted yet"):
        StateEmbedding(design, two.var_names, TINY).embed(two)
    with pytest.raises(ValueError, match="looks like raw counts"):
        fitted.embed(iv.datasets.toy())
    nameless = two.copy()
    nameless.obs["dataset"] = nameless.obs["dataset"].astype(object).where(np.arange(two.n_obs) > 3, "?")
    unknown = iv.Design.from_adata(nameless, covariates=["dataset"], unknown="?")
    with pytest.raises(ValueError, match="name the data set of every cell"):
        StateEmbedding(unknown, two.var_names, TINY).fit(nameless, config=PLAN)
    strange = two.copy()
    strange.var_names = [f"x{i}" for i in range(two.n_vars)]
    with pytest.raises(ValueError, match="none of the genes"):
        fitted.embed(strange)
    doubled = two.copy()
    doubled.var_names = [two.var_names[0]] * two.n_vars
    with pytest.raises(ValueError, match="not unique"):
        fitted.embed(doubled)


@pytest.mark.parametrize("layout", ["csr", "csc", "backed", "view", "subset of genes"])
def test_every_layout_of_the_cells(two, fitted, layout, tmp_path):
    expected = fitted.embed(two).X
    given = two.copy()
    if layout in ("csr", "csc"):
        given.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[layout](two.X)
    elif layout == "backed":
        two.write_h5ad(tmp_path / "two.h5ad")
        given = anndata.read_h5ad(tmp_path / "two.h5ad", backed="r")
    elif layout == "view":
        given = two[10:30]
        expected = expected[10:30]
    else:
        given = two[:, np.flatnonzero((two.X > 0).any(axis=0))[::-1]]  # and in another order
    np.testing.assert_allclose(fitted.embed(given).X, expected, atol=1e-6)


def test_a_killed_fit_goes_on_where_it_stopped(two, design, tmp_path):
    whole = StateEmbedding(design, two.var_names, TINY).fit(two, config=PLAN)

    class Stop(RuntimeError):
        pass

    import lightning

    class Killer(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
            if batch_index == 3:
                raise Stop

    plan = replace(PLAN, checkpoint_every=2)
    with pytest.raises(Stop):
        StateEmbedding(design, two.var_names, TINY).fit(two, config=plan, folder=tmp_path, callbacks=[Killer()])
    resumed = StateEmbedding(design, two.var_names, TINY).fit(two, config=plan, folder=tmp_path, resume=True)
    for mine, theirs in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_command_line(two, tmp_path, run):
    two.write_h5ad(tmp_path / "two.h5ad")
    fields = ["length=10", "hidden_dim=16", "n_layers=1", "gene_width=8"]
    code, _, err = run("fit", "state_embedding", tmp_path / "two.h5ad", "--covariate", "dataset",
                       *(part for field in fields for part in ("--set", field)),
                       "--fit-set", "steps=2", "--out", tmp_path / "run", "--quiet")  # fmt: skip
    assert code == 0, err
    ask = ("embed", tmp_path / "run", tmp_path / "two.h5ad", "--quiet", "--out")
    assert run(*ask, tmp_path / "z.h5ad")[0] == 0
    assert anndata.read_h5ad(tmp_path / "z.h5ad").shape == (two.n_obs, 16 + 10)
    assert run(*ask, tmp_path / "both.h5ad", "--key", "X_state")[0] == 0
    assert anndata.read_h5ad(tmp_path / "both.h5ad").obsm["X_state"].shape == (two.n_obs, 26)
    code, _, err = run("predict", tmp_path / "run", "--out", tmp_path / "p.h5ad")
    assert code == 2 and "which cannot predict" in err and not (tmp_path / "p.h5ad").exists()


# ---- ST on SE -------------------------------------------------------------------------------------------------------


def test_st_learns_from_embeddings_of_one_encoder(fitted, two, design, tmp_path):
    cells = iv.preprocess.normalize(iv.datasets.toy())
    marked = with_embedding(cells, fitted.embed(cells))
    assert "X_state" not in cells.obsm
    screen = iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])
    kind = iv.models.StateTransition
    config = kind.Config(space="obsm", obsm="X_state", n_embedding=19, hidden_dim=16, n_layers=1, n_heads=2, set_size=4,
                         decoder_widths=(16,))  # fmt: skip
    model = kind(screen, cells.var_names, config).fit(marked, config=PLAN)
    assert model.card["encoder"] == fitted.checkpoint()
    model.save(tmp_path / "st")
    loaded = iv.load(tmp_path / "st")
    wanted = screen.conditions(cells.obs).iloc[:2]
    loaded.predict(wanted, 3, controls=marked)
    other = StateEmbedding(design, two.var_names, TINY).fit(two, config=replace(PLAN, seed=1))
    foreign = with_embedding(cells, other.embed(cells))
    with pytest.raises(ValueError, match="made by the encoder"):
        loaded.predict(wanted, 3, controls=foreign)
    with pytest.raises(ValueError, match="made by the encoder"):
        loaded.adapt(screen, cells.var_names).fit(foreign, config=PLAN)
    with pytest.raises(ValueError, match="embed these cells"):
        with_embedding(cells[:5], fitted.embed(cells))

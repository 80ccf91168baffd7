"""Formula tests of cellFlow for counts: identity decoder, depths by class, path, transport, and planted populations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import invirtuo as iv
from invirtuo.fit import FitConfig

CellFlowCounts = iv.models.CellFlowCounts
Config = CellFlowCounts.Config
TINY = Config(hidden_encoder=(32, 32), hidden=64, label_embedding=12, embedding=16, n_blocks=2, steps=10,
              input_dropout=0.0)  # fmt: skip
FIT = FitConfig(steps=500, batch_size=128, optimizer="adamw", lr=5e-3, ema=0.98, precision="fp32", accelerator="cpu",
                progress=False, warmup=0, val_every=0)  # fmt: skip


def planted(n: int = 800, n_genes: int = 20) -> AnnData:
    """Two populations that differ in their genes and in their depth."""
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=n)
    share = np.where((np.arange(n_genes) < n_genes // 2) == (kind == 0)[:, None], 6.0, 1.0)
    size = rng.lognormal(np.where(kind == 0, 5.0, 6.5), 0.2)
    mean = share / share.sum(1, keepdims=True) * size[:, None]
    x = rng.poisson(mean * rng.gamma(10.0, 0.1, mean.shape)).astype(np.float32)
    obs = pd.DataFrame({"kind": np.array(["a", "b"])[kind]}, index=map(str, range(n)))
    return AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


@pytest.fixture(scope="module")
def cells():
    return planted()


@pytest.fixture(scope="module")
def design(cells):
    return iv.Design.from_adata(cells, covariates=["kind"])


def test_presets_hold_the_paper(design, cells):
    paper = CellFlowCounts.PRESETS["paper"]
    assert (paper.config.hidden, paper.config.n_blocks, paper.config.label_embedding, paper.config.sigma) == (
        512,
        3,
        256,
        1e-4,
    )
    assert paper.config.coupling == "ot" and not paper.config.ot_within_class and paper.config.solver == "dopri5"
    model = CellFlowCounts(design, cells.var_names, "paper")
    plans = model.stages(model.fit_config)
    assert (
        plans["autoencoder"].lr == 1e-3 and plans["flow"].lr == pytest.approx(1e-4) and plans["flow"].batch_size == 256
    )
    shapes = [tuple(p.shape) for p in model.autoencoder.mlp.parameters() if p.ndim == 2]
    assert shapes == [(512, 20), (512, 512), (20, 512)]


def test_the_latent_vector_is_the_logits(design, cells):
    model = CellFlowCounts(design, cells.var_names, TINY)
    z, size = torch.randn(5, 20), torch.tensor([10.0, 20, 30, 40, 50])
    mean = model.autoencoder.decode(z, size, None).mean
    torch.testing.assert_close(mean, size[:, None] * z.softmax(1))


def test_noise_around_the_path(design, cells):
    model = CellFlowCounts(design, cells.var_names, replace(TINY, sigma=0.2))
    z0, z1, t = torch.zeros(4000, 20), torch.ones(4000, 20), torch.full((4000,), 0.4)
    torch.manual_seed(0)
    point = model.path(z0, z1, t)
    assert float(point.xt.mean()) == pytest.approx(0.4, abs=0.005) and float(point.xt.std()) == pytest.approx(
        0.2, abs=0.005
    )
    assert torch.equal(point.ut, z1 - z0)


def test_all_labels_are_always_seen(design, cells):
    model = CellFlowCounts(design, cells.var_names, TINY)
    assert model.drawn_labels(design.encode(cells.obs)).all()
    with pytest.raises(ValueError, match="has no option guidance"):
        model.fit(cells, config=replace(FIT, steps=4)).generate(5, guidance=2.0)


def test_peaks_are_refused(design):
    for kind in (CellFlowCounts, iv.models.IndependentNB):
        with pytest.raises(ValueError, match="models genes alone, found 1 peaks"):
            kind(design, ["g0", "atac:p0"])


@pytest.mark.slow
def test_planted_populations_come_back(design, cells):
    model = CellFlowCounts(design, cells.var_names, TINY).fit(cells, config=FIT)
    made = model.generate(1000)
    for kind in "ab":
        one, other = (data[(data.obs["kind"] == kind).to_numpy()] for data in (cells, made))
        real, drawn = np.log(np.asarray(one.X.sum(1)).ravel()), np.log(other.obs["size_factor"])
        assert drawn.mean() == pytest.approx(real.mean(), rel=0.05) and drawn.std() == pytest.approx(
            real.std(), rel=0.15
        )
        share, found = (np.asarray(data.X.mean(0)).ravel() / data.X.mean(0).sum() for data in (one, other))
        np.testing.assert_allclose(found, share, rtol=0.12, atol=0.004)


# ---- independent negative binomials ----------------------------------------------------------------------------------


def test_independent_moments_by_hand(design, cells):
    model = iv.models.IndependentNB(design, cells.var_names).fit(cells)
    rows = (cells.obs["kind"] == "b").to_numpy()
    x = cells.X[rows].toarray().astype(np.float64)
    size = x.sum(1)
    share = x.sum(0) / size.sum()
    residual = ((x - size[:, None] * share) ** 2).sum(0)
    inverse = (residual - x.sum(0)) / ((size[:, None] * share) ** 2).sum(0)
    row = int((model.labels[:, 0] == 1).nonzero())
    np.testing.assert_allclose(model.log_share[row].exp(), share, rtol=1e-5)
    np.testing.assert_allclose(1 / model.log_dispersion[row].exp(), np.maximum(inverse, 1e-6), rtol=1e-4)


def test_independent_cells_have_the_moments(design, cells):
    model = iv.models.IndependentNB(design, cells.var_names).fit(cells)
    made = model.generate(20_000, {"kind": "a"})
    one = cells[(cells.obs["kind"] == "a").to_numpy()].X.toarray()
    x = made.X.toarray()
    np.testing.assert_allclose(x.mean(0), one.mean(0), rtol=0.05)
    np.testing.assert_allclose(x.var(0), one.var(0), rtol=0.25)


def test_independent_genes_cannot_combine(cells):
    cells = cells.copy()
    cells.obs["donor"] = np.where(cells.obs["kind"] == "a", "x", "y")
    model = iv.models.IndependentNB(iv.Design.from_adata(cells, covariates=["kind", "donor"]), cells.var_names).fit(
        cells
    )
    with pytest.raises(ValueError, match="cannot put kind, donor together anew"):
        model.generate(5, {"kind": "a", "donor": "y"})

"""Formula tests of prediction in pieces: written while drawn, and over Ray, with a lost worker, the same cells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import invirtuo as iv
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.workers import over_ray


@dataclass(frozen=True)
class Setting:
    """Where to note that a worker was lost; "" loses none."""

    mark: str = ""


class Fragile(PerturbationModel):
    """Draws noise; its first worker process dies in the middle of the work."""

    name = "fragile"
    Config = Setting

    def sample(self, batch, generator, config):
        import torch

        mark = Path(self.config.mark)
        if self.config.mark and os.getpid() != int(mark.read_text()) and not mark.with_suffix(".lost").exists():
            mark.with_suffix(".lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(len(batch.condition), len(self.genes), generator=generator)


@pytest.fixture(scope="module")
def cells():
    return iv.preprocess.normalize(iv.datasets.toy(n_cells=300, n_genes=12))


@pytest.fixture(scope="module")
def plan(cells):
    return iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture(scope="module")
def model(cells, plan):
    config = iv.models.PRiMeFlow.Config(hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=1)
    fit = iv.FitConfig(steps=5, batch_size=32, progress=False, accelerator="cpu")
    return iv.models.PRiMeFlow(plan, cells.var_names, config).fit(cells, config=fit)


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason="needs ray")


def same(first, second) -> None:
    np.testing.assert_array_equal(np.asarray(first.X[:]), np.asarray(second.X[:]))
    pd.testing.assert_frame_equal(first.obs, second.obs)
    assert first.uns["invirtuo"].keys() == second.uns["invirtuo"].keys()


@pytest.mark.slow
def test_written_while_drawn(model, plan, cells, tmp_path):
    wanted = plan.conditions(cells.obs)
    expected = model.predict(wanted, 7, seed=3)
    backed = model.predict(wanted, 7, seed=3, out=tmp_path / "p.h5ad")
    assert backed.isbacked
    same(backed, expected)
    backed.file.close()
    read = anndata.read_h5ad(tmp_path / "p.h5ad")
    same(read, expected)
    assert read.var_names.tolist() == expected.var_names.tolist()


def test_a_failed_prediction_leaves_the_old_file(model, plan, cells, tmp_path, monkeypatch):
    (tmp_path / "p.h5ad").write_text("old")
    monkeypatch.setattr(type(model), "sample", lambda *a: {}["no memory"])
    with pytest.raises(KeyError):
        model.predict(plan.conditions(cells.obs), 7, out=tmp_path / "p.h5ad")
    assert (tmp_path / "p.h5ad").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_ray_draws_the_same_cells(ray, model, plan, cells, tmp_path):
    wanted = plan.conditions(cells.obs)
    expected = model.predict(wanted, 7, seed=3)
    same(model.predict(wanted, 7, seed=3, engine="ray", n_jobs=2), expected)
    backed = model.predict(wanted, 7, seed=3, engine="ray", n_jobs=1, out=tmp_path / "p.h5ad")
    same(backed, expected)
    backed.file.close()


@pytest.mark.slow
def test_a_lost_worker_is_replaced(ray, plan, cells, tmp_path):
    mark = tmp_path / "mark"
    mark.write_text(str(os.getpid()))
    fragile, calm = (Fragile(plan, cells.var_names, Setting(m)).fit(cells) for m in (str(mark), ""))
    wanted = plan.conditions(cells.obs)
    made = fragile.predict(wanted, 5, engine="ray", n_jobs=1)
    assert mark.with_suffix(".lost").exists()
    np.testing.assert_array_equal(made.X, calm.predict(wanted, 5).X)


HANDLER = """
import os, signal
from invirtuo.workers import over_ray

heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
for _ in over_ray(lambda item: item, [0], n_jobs=1):
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
print(len(heard))
"""


@pytest.mark.slow
def test_the_handler_of_sigterm_is_kept(ray):
    """While a cluster that was started is there, and after it; Ray's own would end the process."""
    done = subprocess.run([sys.executable, "-c", HANDLER], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_unknown_engines_are_refused(model, generator, plan, cells):
    with pytest.raises(ValueError, match="engine is 'abacus'; expected local or ray"):
        model.predict(plan.conditions(cells.obs), 3, engine="abacus")
    with pytest.raises(ValueError, match="engine is 'abacus'; expected local or ray"):
        generator.generate(3, engine="abacus")


# ---- counts ----------------------------------------------------------------------------------------------------------


class FragileCounts(iv.models.IndependentNB):
    """Its first worker process dies in the middle of the work."""

    Config = Setting

    def likelihood(self, batch, weights, generator, config):
        mark = Path(self.config.mark)
        if self.config.mark and os.getpid() != int(mark.read_text()) and not mark.with_suffix(".lost").exists():
            mark.with_suffix(".lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().likelihood(batch, weights, generator, config)


@pytest.fixture(scope="module")
def cluster(ray):
    """A cluster of this session, which is used and left running."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, handler)
    yield ray
    assert ray.is_initialized()
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def counts():
    return iv.datasets.toy(n_cells=300, n_genes=12)


@pytest.fixture(scope="module")
def generator(counts):
    design = iv.Design.from_adata(counts, covariates=["cell_type", "batch"])
    config = iv.models.CFGen.Config(hidden_rna=(16,), n_latent=4, hidden=16, embedding=8, n_blocks=1, steps=2)
    fit = iv.FitConfig(steps=8, batch_size=64, progress=False, accelerator="cpu", val_every=0, precision="fp32")
    return iv.models.CFGen(design, counts.var_names, config).fit(counts, config=fit)


def same_counts(first, second) -> None:
    x, y = (made.to_memory().X if made.isbacked else made.X for made in (first, second))
    np.testing.assert_array_equal(x.toarray(), y.toarray())
    pd.testing.assert_frame_equal(first.obs, second.obs, check_categorical=False)


@pytest.mark.slow
def test_ray_generates_the_same_counts(cluster, generator, tmp_path):
    weights = {"cell_type": np.linspace(0.5, 2.0, 6000).tolist(), "batch": 1.0}
    options = {"prior": "uniform", "guidance": weights, "latent": True, "seed": 4}
    expected = generator.generate(6000, output="both", **options)
    made = generator.generate(6000, output="both", **options, engine="ray", n_jobs=2)
    same_counts(made, expected)
    np.testing.assert_array_equal(made.layers["mean"], expected.layers["mean"])
    np.testing.assert_array_equal(made.obsm["z"], expected.obsm["z"])
    backed = generator.generate(6000, **options, engine="ray", n_jobs=1, out=tmp_path / "g.h5ad", chunk_size=1000)
    assert backed.isbacked
    same_counts(backed, expected)
    backed.file.close()
    table = expected.obs[["cell_type", "batch"]].drop_duplicates()[:2]
    same_counts(generator.predict(table, 600, engine="ray", n_jobs=1), generator.predict(table, 600))


def test_a_lost_worker_of_counts_is_replaced(cluster, counts, tmp_path):
    design = iv.Design.from_adata(counts, covariates=["cell_type"])
    mark = tmp_path / "mark"
    mark.write_text(str(os.getpid()))
    fragile, calm = (FragileCounts(design, counts.var_names, Setting(m)).fit(counts) for m in (str(mark), ""))
    made = fragile.generate(2000, engine="ray", n_jobs=1)
    assert mark.with_suffix(".lost").exists()
    same_counts(made, calm.generate(2000))


def test_results_in_order_wait_for_earlier_ones(cluster):
    def work(seconds):
        import time

        time.sleep(seconds)
        return seconds

    items = [1.0, 0.0, 0.1, 0.0, 0.1]
    ordered = list(over_ray(work, items, n_jobs=2, at_once=3, in_order=True))
    assert ordered == list(enumerate(items))
    assert sorted(over_ray(work, items, n_jobs=2)) == ordered

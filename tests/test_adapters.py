"""Adapters of other packages, on stubs of their interfaces: what they are told, and what comes of their answers."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import invirtuo as iv
from invirtuo.bench.entry import as_entries
from invirtuo.bench.question import Asked, Question
from invirtuo.splits import hold_out

ADAPTERS = Path(__file__).parents[1] / "adapters"
N = 40
if not ADAPTERS.is_dir():
    pytest.skip("adapters come with the repository alone", allow_module_level=True)


@pytest.fixture
def asked(toy, design, tmp_path) -> Question:
    """A question about a single perturbation and a combination, in the folder q."""
    cells = iv.preprocess.normalize(toy)
    split = partial(hold_out, conditions=("monocyte|A", "b_cell|A+B"), val=("t_cell|B",))(cells.obs, design)
    question = Question(cells, design, split, Asked(n_cells=N))
    question.write(tmp_path / "q")
    return question


@pytest.fixture
def adapter(monkeypatch):
    """Give a function that imports an adapter, with stubs in place of the packages that it calls."""
    monkeypatch.syspath_prepend(ADAPTERS)

    def load(name: str, **packages):
        monkeypatch.setitem(sys.modules, "folder", importlib.import_module("folder"))
        for package, attributes in packages.items():
            stub = types.ModuleType(package)
            vars(stub).update(attributes)
            monkeypatch.setitem(sys.modules, package, stub)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def check(asked: Question, folder: Path, *, doubled: bool = True) -> None:
    """The answer is taken; what a stub does to a cell for each part of a perturbation is in it."""
    answer = asked.read(folder / "predicted.h5ad")
    names = asked.design.names(answer.obs)
    assert names.value_counts().to_dict() == {"monocyte|A": N, "b_cell|A+B": N}
    start = anndata.read_h5ad(folder / "controls.h5ad")
    change = {}
    for name in names.unique():
        group = start.obs["cell_type"] == name.split("|")[0]
        own = answer.X[(names == name).to_numpy()].mean()
        change[name] = own / start.X[group.to_numpy()].mean()
    if doubled:
        assert 1.1 < change["monocyte|A"] < 3 and change["b_cell|A+B"] > 1.15 * change["monocyte|A"], change


class Fitted:
    """What the stubs of models have in common."""

    def __init__(self, cells, **options):
        self.cells, self.options = cells, options

    @classmethod
    def setup_anndata(cls, cells, **columns):
        """Note the columns, which must be there."""
        cls.columns = columns

    def train(self, *args, **options):
        """Nothing to learn."""


class SCVI(Fitted):
    """Latent vectors of two numbers; counts are drawn at the depth that is asked for."""

    @property
    def adata_manager(self):
        names = sorted(self.cells.obs["perturbation"].unique())
        return SimpleNamespace(get_state_registry=lambda key: SimpleNamespace(categorical_mapping=names))

    @property
    def module(self):
        return SimpleNamespace(generative=self._generative)

    def get_latent_representation(self, cells=None):
        """Depth, and how much of it the first genes have."""
        x = (self.cells if cells is None else cells).layers["counts"].toarray()
        return np.stack([x.sum(1), x[:, :5].sum(1)], axis=1)

    def _generative(self, z, library, batch_index):
        assert z.shape == (2 * N, 2) and library.shape == batch_index.shape == (2 * N, 1)
        rate = torch.exp(library) / self.cells.n_vars
        return {"px": torch.distributions.Poisson(rate.expand(-1, self.cells.n_vars))}


def test_scvi(asked, adapter, tmp_path):
    module = adapter("scvi_latent", scvi={"settings": SimpleNamespace(), "model": SimpleNamespace(SCVI=SCVI)})
    for how in ("shift", "swap"):
        module.main(str(tmp_path / "q"), how)
        check(asked, tmp_path / "q", doubled=False)
    # a pair that no cell had moves by the sum of its parts
    question = module.folder.read(str(tmp_path / "q"))
    moved = {"A": np.array([1.0, 0.0]), "B": np.array([0.0, 2.0])}
    np.testing.assert_array_equal(module.shift(question, moved, "A+B"), [1.0, 2.0])
    with pytest.raises(SystemExit, match=r"no training cell has a part of A\+C"):
        module.shift(question, moved, "A+C")


def test_scvi_as_a_generator(toy, adapter, tmp_path):
    """Cells of each class that is asked for, at the depths of its training cells."""
    design = iv.Design.from_adata(toy, covariates=["cell_type"])
    toy.layers["counts"] = toy.X
    split = iv.splits.cells(toy.obs, design)
    question = Question(toy, design, split, Asked(labels=toy.obs[split == "test"][:80]))
    question.write(tmp_path / "q")

    class Prior(SCVI):
        @property
        def adata_manager(self):
            names = sorted(self.cells.obs["group"].unique())
            return SimpleNamespace(get_state_registry=lambda key: SimpleNamespace(categorical_mapping=names))

        @property
        def module(self):
            return SimpleNamespace(generative=self._generative, n_latent=2)

    packages = {"scvi": {"settings": SimpleNamespace(), "model": SimpleNamespace(SCVI=Prior)}}
    adapter("scvi_prior", **packages).main(str(tmp_path / "q"))
    made = question.read(tmp_path / "q" / "generated.h5ad")
    assert made.n_obs == 2 * N
    depth = np.asarray(toy.X.sum(axis=1)).ravel()
    np.testing.assert_allclose(np.asarray(made.X.sum(axis=1)).mean(), depth.mean(), rtol=0.2)


class Scgen(Fitted):
    """Adds one to what is expressed for each perturbation."""

    def predict(self, ctrl_key, stim_key, adata_to_predict, restrict_arithmetic_to):
        """Groups of the difference have both labels."""
        assert ctrl_key == "control" and adata_to_predict.obs["group"].nunique() == 1
        obs = self.cells.obs[self.cells.obs["group"].isin(restrict_arithmetic_to["group"])]
        assert {stim_key, "control"} <= set(obs.groupby("group")["perturbation"].agg(set).explode())
        assert obs[obs["perturbation"] == stim_key]["group"].nunique() == obs["group"].nunique()
        found = adata_to_predict.copy()
        x = found.X.toarray() if hasattr(found.X, "toarray") else found.X
        found.X = np.where(x > 0, x + 1, -0.1)
        return found, None


def test_scgen(asked, adapter, tmp_path):
    settings = SimpleNamespace()
    packages = {"pertpy": {"tl": SimpleNamespace(Scgen=Scgen)}, "scvi": {"settings": settings}}
    adapter("scgen_shift", **packages).main(str(tmp_path / "q"))
    assert settings.seed == 0 and Scgen.columns == {"batch_key": "perturbation", "labels_key": "group"}
    check(asked, tmp_path / "q")


class Biolord(Fitted):
    """Adds one to what is expressed for each attribute."""

    def predict(self, cells):
        """Cells are training cells, told by their vectors."""
        assert set(cells.obs["perturbation"]) == {"control"} and cells.obs_names.is_unique
        x = np.where(cells.X > 0, cells.X + cells.obsm["perturbed"].sum(1, keepdims=True), -0.1)
        return anndata.AnnData(x), None


@pytest.mark.filterwarnings("ignore:Observation names are not unique")  # of cells drawn twice, named anew afterwards
def test_biolord(asked, adapter, tmp_path):
    adapter("biolord_attributes", biolord={"Biolord": Biolord}).main(str(tmp_path / "q"))
    assert Biolord.columns["categorical_attributes_keys"] == ["cell_type"]
    check(asked, tmp_path / "q")


class CPA(Fitted):
    """Multiplies counts for each part of a combination."""

    def predict(self, cells, batch_size):
        """Wanted cells are those that are told apart as out of distribution."""
        assert set(cells.obs["part"]) == {"ood"} and set(cells.obs["perturbation"]) == {"A", "A+B"}
        n_parts = 1 + cells.obs["perturbation"].str.count(r"\+").to_numpy()
        cells.obsm["CPA_pred"] = cells.X.toarray() * np.e ** n_parts[:, None]


def test_cpa(asked, adapter, tmp_path):
    adapter("cpa_additive", cpa={"CPA": CPA}).main(str(tmp_path / "q"))
    assert CPA.columns["control_group"] == "control" and CPA.columns["is_count_data"]
    check(asked, tmp_path / "q")


class CellFlow(Fitted):
    """Adds one to what is expressed for each part that is no control label."""

    def prepare_data(self, perturbation_covariates, **options):
        """A column for each part, each with a vector."""
        self.columns = perturbation_covariates["perturbation"]
        vectors = self.cells.uns["of_perturbation"]
        assert not vectors["control"].any() and all(vectors[name].sum() == 1 for name in vectors if name != "control")
        assert set(np.unique(self.cells.obs[self.columns])) <= set(vectors)

    def prepare_model(self, **options):
        """Nothing to make."""

    def predict(self, cells, condition, sample_rep):
        """Of one condition."""
        assert len(condition) == 1 and cells.obs["is_control"].all()
        n_parts = (condition[self.columns] != "control").to_numpy().sum()
        return {"one": np.where(cells.obsm["X_pca"] > 0, cells.obsm["X_pca"] + n_parts, -0.1)}


def test_cellflow(asked, adapter, tmp_path):
    def of_values(cells, **options):
        cells.obsm["X_pca"] = np.asarray(cells.X)

    def read_back(cells, use_rep, ref_adata, layers_key_added):
        cells.layers[layers_key_added] = cells.obsm[use_rep]

    pp = SimpleNamespace(centered_pca=of_values, project_pca=of_values, reconstruct_pca=read_back)
    packages = {"cellflow": {"pp": pp, "model": SimpleNamespace(CellFlow=CellFlow)}, "optax": {"adam": float}}
    adapter("cellflow_pca", **packages).main(str(tmp_path / "q"))
    check(asked, tmp_path / "q")


def test_state(asked, adapter, tmp_path, monkeypatch):
    """The command line of the package finds its files, and every wanted cell after its control cell."""
    module, calls = adapter("arc_state"), []

    def state(verb, *words):
        calls.append(verb)
        if verb == "train":
            settings = dict(word.split("=", 1) for word in words)
            vectors = torch.load(settings["data.kwargs.perturbation_features_file"])
            assert {"A", "B", "A+B", "control"} <= set(vectors) and not vectors["control"].any()
            torch.testing.assert_close(vectors["A+B"], vectors["A"] + vectors["B"])
            assert Path(settings["data.kwargs.toml_config_path"]).is_file()
            return
        options = dict(zip(words[::2], words[1::2], strict=True))
        cells = anndata.read_h5ad(options["--adata"])
        n_parts = cells.obs["perturbed"].map({"control": 0, "A": 1, "A+B": 2}).to_numpy(float)
        x = cells.obsm["X_hvg"]
        cells.obsm["X_hvg"] = np.where(x > 0, x + n_parts[:, None], -0.1)
        cells.write_h5ad(options["--output"])

    monkeypatch.setattr(module, "state", state)
    module.main(str(tmp_path / "q"))
    assert calls == ["train", "infer"]
    check(asked, tmp_path / "q")


def test_what_was_never_seen_is_refused(asked, adapter, tmp_path):
    folder = adapter("folder")
    question = folder.read(str(tmp_path / "q"))
    assert question.parts("A+B") == ["A", "B"] and question.parts("control") == []
    with pytest.raises(SystemExit, match="no training cell has Z"):
        question.multi_hots(pd.Series(["A+Z"]))


def test_requirements_are_pinned_and_what_predicts_is_among_the_peers():
    named = {word for entry in json.loads((ADAPTERS / "peers.json").read_text()) for word in entry["command"]}
    for file in sorted(file for file in ADAPTERS.glob("*_*.py") if file.name != "scvi_prior.py"):
        (needed,) = re.findall(r"# dependencies = (\[.*\])", file.read_text())
        assert all(re.search("==|<", name) for name in json.loads(needed)), needed
        assert f"adapters/{file.name}" in named, file.name


def test_the_list_of_peers_can_be_read(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    entries = as_entries(str(ADAPTERS / "peers.json"))
    assert len({entry.label for entry in entries}) == len(entries) > 4

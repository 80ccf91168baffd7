"""Named data sets: found, checked, described; downloads; the toy cells keep what they promise."""

from __future__ import annotations

import functools
import gzip
import http.server
import logging
import threading
from dataclasses import replace

import numpy as np
import pytest

import invirtuo as iv
from invirtuo.cells import datasets


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch, tmp_path):
    """Nothing of the machine decides what is found."""
    monkeypatch.delenv("INVIRTUO_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def served(tmp_path):
    """A folder and the address under which this machine serves it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def toy_source(monkeypatch, toy):
    """The toy cells as a named data set, not checked by md5."""
    source = replace(datasets.DATASETS["kang_full"], file="toy.h5ad", shape=toy.shape, md5=None, size_factor=None)
    source = replace(source, covariates=("cell_type",))
    monkeypatch.setitem(datasets.DATASETS, "toy", source)
    return source


# Named data sets ------------------------------------------------------------------------------------------------------


def test_kang_is_bundled():
    kang = iv.datasets.load("kang")
    assert kang.shape == (13999, 2010)
    assert iv.preprocess.looks_like_counts(kang.X)
    assert kang.uns["invirtuo"] == {"dataset": "kang", "size_factor": "umi_total"}
    assert kang.obs["perturbation"].value_counts().to_dict() == {"IFN-beta": 7451, "control": 6548}
    design = iv.datasets.design("kang", kang)
    assert design.perturbations == ("IFN-beta",)
    assert len(design.covariates["cell_type"]) == 8
    new = iv.preprocess.normalize(kang, n_genes=100)
    np.testing.assert_allclose(new.obs["total_counts"], kang.obs["umi_total"])


def test_describe_has_a_row_for_each():
    table = iv.datasets.describe()
    assert list(table.index) == list(datasets.DATASETS)
    assert table.loc["kang", "here"]
    assert not table.loc["pbmc3k", "here"]
    assert (table[["title", "licence", "citation", "file"]] != "").all(axis=None)


@pytest.mark.parametrize("name", [name for name, source in datasets.DATASETS.items() if source.md5])
def test_shared_files_are_what_they_should_be(shared, name, caplog):
    folder = shared("data")
    source = datasets.DATASETS[name]
    caplog.set_level(logging.INFO)
    adata = iv.datasets.load(name, data_dir=folder)
    assert adata.shape == source.shape
    assert iv.preprocess.looks_like_counts(adata.X)
    assert source.licence in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    if source.perturbation:
        assert iv.datasets.design(name, adata).perturbations


def test_absent_file_says_where_to_put_it(tmp_path):
    with pytest.raises(ValueError, match=r"pbmc3k.h5ad. Put .* data_dir= or the environment variable INVIRTUO_DATA"):
        iv.datasets.load("pbmc3k")
    with pytest.raises(ValueError, match="is not at .*elsewhere"):
        iv.datasets.load("pbmc3k", data_dir=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is not at .*none\.h5ad"):
        iv.datasets.load("kang", tmp_path / "none.h5ad")


def test_data_folder_may_come_from_the_environment(monkeypatch, toy, toy_source, tmp_path):
    toy.write_h5ad(tmp_path / "toy.h5ad")
    monkeypatch.setenv("INVIRTUO_DATA", str(tmp_path))
    assert iv.datasets.load("toy").shape == toy.shape
    monkeypatch.setenv("INVIRTUO_DATA", "/nowhere")
    assert iv.datasets.load("toy", data_dir=tmp_path).shape == toy.shape


def test_unknown_name():
    with pytest.raises(ValueError, match="no data set 'king'; known: kang"):
        iv.datasets.load("king")


def test_no_design_without_perturbation():
    with pytest.raises(ValueError, match="nothing was perturbed in 'pbmc3k'.*kang"):
        iv.datasets.design("pbmc3k")


def test_another_file_under_the_name(toy, tmp_path, caplog):
    file = tmp_path / "pbmc3k.h5ad"
    toy.obs["umi_total"] = 1.0
    toy.write_h5ad(file)
    with pytest.raises(ValueError, match="has md5 .*; expected fcde6881"):
        iv.datasets.load("pbmc3k", data_dir=tmp_path)
    assert iv.datasets.load("pbmc3k", file).shape == toy.shape
    assert "not the published file" in caplog.text
    assert "the published file 2638 x 13714" in caplog.text


def test_missing_columns(toy, toy_source, tmp_path):
    del toy.obs["cell_type"]
    toy.write_h5ad(tmp_path / "toy.h5ad")
    with pytest.raises(ValueError, match="is not 'toy': obs lacks cell_type; found perturbation, batch"):
        iv.datasets.load("toy", data_dir=tmp_path)


def test_counts_in_a_layer_come_to_x(monkeypatch, toy, toy_source, tmp_path):
    monkeypatch.setitem(datasets.DATASETS, "toy", replace(toy_source, counts_layer="counts"))
    iv.preprocess.normalize(toy).write_h5ad(tmp_path / "toy.h5ad")
    back = iv.datasets.load("toy", data_dir=tmp_path)
    assert back.var_names.tolist() == sorted(toy.var_names)
    assert (back.X != toy[:, back.var_names].X).nnz == 0
    assert not back.layers
    published = iv.datasets.load("toy", data_dir=tmp_path, counts=False)
    np.testing.assert_allclose(published.X.toarray(), iv.preprocess.normalize(toy)[:, back.var_names].X.toarray())
    toy.write_h5ad(tmp_path / "toy.h5ad")
    with pytest.raises(ValueError, match="no layer 'counts'"):
        iv.datasets.load("toy", data_dir=tmp_path)


def test_published_expression_needs_a_file_with_it(monkeypatch, toy, toy_source, tmp_path):
    monkeypatch.setitem(datasets.DATASETS, "toy", toy_source)
    toy.write_h5ad(tmp_path / "toy.h5ad")
    with pytest.raises(ValueError, match="holds raw counts only"):
        iv.datasets.load("toy", data_dir=tmp_path, counts=False)


# Downloads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_download_is_kept(toy, toy_source, served, tmp_path, packed):
    folder, address = served
    toy.write_h5ad(folder / "x.h5ad")
    if packed:
        (folder / "x.h5ad.gz").write_bytes(gzip.compress((folder / "x.h5ad").read_bytes()))
    url = f"{address}/x.h5ad{'.gz' if packed else ''}"
    cache = tmp_path / "cache"
    assert iv.datasets.load("toy", url, data_dir=cache).shape == toy.shape
    assert [file.name for file in cache.iterdir()] == ["toy.h5ad"]
    for file in folder.iterdir():
        file.unlink()
    assert iv.datasets.load("toy", url, data_dir=cache).shape == toy.shape


def test_download_that_is_not_what_it_should_be(monkeypatch, toy_source, served, tmp_path):
    folder, address = served
    (folder / "x.h5ad").write_text("no cells")
    monkeypatch.setitem(datasets.DATASETS, "toy", replace(toy_source, md5="0" * 32))
    with pytest.raises(ValueError, match="has md5 .* Nothing was kept"):
        iv.datasets.load("toy", f"{address}/x.h5ad", data_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot download .*404"):
        iv.datasets.load("toy", f"{address}/y.h5ad", data_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot download"):
        (folder / "z.h5ad.gz").write_text("not packed")
        iv.datasets.load("toy", f"{address}/z.h5ad.gz", data_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# Toy ------------------------------------------------------------------------------------------------------------------


def test_toy_is_the_same_for_the_same_seed():
    one, again, other = iv.datasets.toy(3), iv.datasets.toy(3), iv.datasets.toy(4)
    assert (one.X != again.X).nnz == 0
    assert one.obs.equals(again.obs)
    assert (one.X != other.X).nnz > 1000


def test_toy_holds_counts_of_every_condition(toy, design):
    assert iv.preprocess.looks_like_counts(toy.X)
    assert toy.X.dtype == np.float32
    assert list(toy.var_names[:2]) == ["gene_0", "gene_1"]
    assert design.perturbations == ("A", "B", "C")
    assert set(toy.obs["perturbation"]) == {"control", "A", "B", "C", "A+B", "A+C", "B+C"}
    assert len(design.conditions(toy.obs, control=True)) == 21
    assert design.names(toy.obs).value_counts().min() >= 20
    assert set(toy.obs["batch"]) == {"batch_1", "batch_2"}


def test_toy_effects_can_be_found_and_add_up():
    toy = iv.datasets.toy(n_cells=4000)
    counts, label = toy.X.toarray(), toy.obs["perturbation"]
    control = np.log(counts[label == "control"].mean(0) + 0.01)
    for pair in ("A", "B+C"):
        measured = np.log(counts[label == pair].mean(0) + 0.01) - control
        planted = sum(toy.var[f"effect_{part}"].to_numpy() for part in pair.split("+"))
        assert np.corrcoef(measured, planted)[0, 1] > 0.95
        assert np.abs(measured - planted).mean() < 0.15


@pytest.mark.parametrize("size", [{"n_cells": 20}, {"n_genes": 3}])
def test_toy_too_small(size):
    with pytest.raises(ValueError, match="expected at least 42 cells and 10 genes"):
        iv.datasets.toy(**size)

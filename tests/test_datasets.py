"""Named data sets: found, checked, described; downloads; the toy cells keep what they promise."""

from __future__ import annotations

import functools
import gzip
import http.server
import logging
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

import invirtuo as iv
from invirtuo.cells import datasets, downloads


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
    """The toy cells as a named data set, not checked."""
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
    assert table.loc[["kang", "jiang24", "norman19", "pbmc3k"], "status"].tolist() == [
        *("bundled", "downloadable", "by hand", "to be rebuilt")
    ]


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
    put = "pbmc3k.h5ad. It has no public address; see docs/data.md how to rebuild it. Put .* data_dir= .* INVIRTUO_DATA"
    with pytest.raises(ValueError, match=put):
        iv.datasets.load("pbmc3k")
    with pytest.raises(ValueError, match="is not at .*elsewhere"):
        iv.datasets.load("pbmc3k", data_dir=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is not at .*none\.h5ad"):
        iv.datasets.load("kang", tmp_path / "none.h5ad")


def test_a_task_without_its_data_says_the_same_at_once(tmp_path):
    for name, task in {"kang_full": "kang-celltype", "norman19": "norman19", "jiang24": "jiang24"}.items():
        with pytest.raises(ValueError, match="is not at .* data_dir=") as caught:
            iv.datasets.look(name, data_dir=tmp_path)
        with pytest.raises(ValueError) as of_task:
            iv.bench.TASKS[task].look(tmp_path)
        assert str(of_task.value) == str(caught.value)


def test_the_command_lists_what_is_here(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, said, _ = run("list", "datasets")
    assert code == 0
    lines = {line.split()[0]: line for line in said.splitlines() if line[0] != " "}
    assert list(lines) == list(datasets.DATASETS)
    assert "13,999 x 2,010" in lines["kang"] and "bundled" in lines["kang"]
    assert "downloadable" in lines["jiang24"] and "CC BY-NC" in lines["jiang24"]
    assert "to be rebuilt" in lines["pbmc3k"] and "by hand" in lines["norman19"]


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
    with pytest.raises(ValueError, match="has md5 .*; expected fcde6881.*other cells, genes, values, labels"):
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


@pytest.fixture
def remote(monkeypatch, toy, toy_source, served):
    """The toy cells behind an address that the data set knows, and the file that is served there."""
    folder, address = served
    file = folder / "x.h5ad"
    toy.write_h5ad(file)
    source = replace(toy_source, address=f"{address}/x.h5ad", md5=downloads.md5_of(file))
    monkeypatch.setitem(datasets.DATASETS, "toy", source)
    return file


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


def test_a_known_address_is_downloaded_from_once(toy, remote, tmp_path):
    cache = tmp_path / "cache"
    assert iv.datasets.describe(data_dir=cache).loc["toy", "status"] == "downloadable"
    assert iv.datasets.load("toy", data_dir=cache).shape == toy.shape
    assert [file.name for file in cache.iterdir()] == ["toy.h5ad"]
    assert iv.datasets.describe(data_dir=cache).loc["toy", "status"] == "here"
    remote.unlink()
    assert iv.datasets.load("toy", data_dir=cache).shape == toy.shape
    assert iv.datasets.look("toy", data_dir=cache)[1].shape == toy.shape


def test_to_look_downloads_nothing(remote, tmp_path):
    with pytest.raises(
        ValueError, match=r"is not at .*toy.h5ad\. invirtuo.datasets.load\('toy'\) downloads it from http"
    ):
        iv.datasets.look("toy", data_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_download_that_is_not_what_it_should_be(monkeypatch, toy_source, served, tmp_path):
    folder, address = served
    cache = tmp_path / "cache"
    (folder / "x.h5ad").write_text("no cells")
    (folder / "z.h5ad.gz").write_text("not packed")
    monkeypatch.setitem(datasets.DATASETS, "toy", replace(toy_source, md5="0" * 32))
    with pytest.raises(ValueError, match=r"cannot download .*MD5 hash .* does not match"):
        iv.datasets.load("toy", f"{address}/x.h5ad", data_dir=cache)
    with pytest.raises(ValueError, match=r"cannot download .*404.*is not at .*toy.h5ad.*data_dir=.*INVIRTUO_DATA"):
        iv.datasets.load("toy", f"{address}/y.h5ad", data_dir=cache)
    with pytest.raises(ValueError, match="cannot download .*[Nn]ot a gzipped file"):
        iv.datasets.load("toy", f"{address}/z.h5ad.gz", data_dir=cache)
    assert not list(cache.iterdir())


def test_a_download_that_ends_half_way_leaves_nothing(monkeypatch, remote, tmp_path):
    def half(handler, source, target):
        target.write(source.read()[:1000])

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", half)
    with pytest.raises(ValueError, match="cannot download"):
        iv.datasets.load("toy", data_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_download_that_is_killed_leaves_no_half_file(remote, tmp_path):
    """The end of the process, of which no clean-up hears."""
    code = f"""
import os, pathlib, sys
from invirtuo.cells import downloads
class Stop:
    def __init__(self, **options): pass
    def __call__(self, url, target, _):
        pathlib.Path(target).write_bytes(b"half")
        os._exit(9)
import pooch
pooch.HTTPDownloader = Stop
downloads.download({datasets.DATASETS["toy"].address!r}, pathlib.Path({str(tmp_path)!r}, "cache", "toy.h5ad"))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert not (tmp_path / "cache" / "toy.h5ad").exists()
    iv.datasets.load("toy", data_dir=tmp_path / "cache")


def test_offline_says_what_was_tried_and_what_to_do(monkeypatch, toy_source, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}/x.h5ad"
        monkeypatch.setitem(datasets.DATASETS, "toy", replace(toy_source, address=address))
        with pytest.raises(ValueError) as caught:
            iv.datasets.load("toy", data_dir=tmp_path)
    told = str(caught.value)
    for words in (f"cannot download {address}", f"is not at {tmp_path / 'toy.h5ad'}", "data_dir=", "INVIRTUO_DATA"):
        assert words in told
    assert "\n" not in told


# Rebuilt files --------------------------------------------------------------------------------------------------------


def test_a_rebuilt_file_counts_by_its_cells(monkeypatch, toy, toy_source, tmp_path, caplog):
    known = " ".join(downloads.fingerprint(toy, toy_source.columns).values())
    monkeypatch.setitem(datasets.DATASETS, "toy", replace(toy_source, md5="0" * 32, content=known))
    file = tmp_path / "toy.h5ad"
    toy.write_h5ad(file, compression="gzip")
    assert iv.datasets.load("toy", data_dir=tmp_path).shape == toy.shape
    assert not caplog.records

    toy.X.data[5] += 1
    toy.obs["cell_type"] = toy.obs["cell_type"].cat.rename_categories({"b_cell": "B cell"})
    toy.write_h5ad(file)
    with pytest.raises(ValueError, match=r"other values, labels\. Copy or rebuild it again"):
        iv.datasets.load("toy", data_dir=tmp_path)
    assert iv.datasets.load("toy", file).shape == toy.shape
    assert "not the published file" in caplog.text


def test_fingerprint_names_the_part_that_differs(toy):
    columns = ["cell_type", "batch"]
    known = downloads.fingerprint(toy, columns)
    other = toy.copy()
    other.obs_names = [f"{name}-1" for name in toy.obs_names]
    other.obs["batch"] = other.obs["batch"].astype(str)  # the same labels in another form
    found = downloads.fingerprint(other, columns)
    assert [part for part in known if known[part] != found[part]] == ["cells"]
    assert downloads.fingerprint(toy[:, ::-1].copy(), columns)["genes"] != known["genes"]
    assert downloads.fingerprint(toy, ["no such column"])["labels"] == ""


@pytest.mark.parametrize("name", [name for name, source in datasets.DATASETS.items() if source.md5])
def test_known_fingerprints_are_those_of_the_known_files(shared, name):
    folder = shared("data")
    adata = iv.datasets.load(name, data_dir=folder)
    assert datasets.differences(name, adata) == []


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

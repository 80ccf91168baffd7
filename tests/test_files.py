"""Writing that is whole or not there, into what may be written; reading that says what is wrong with a file."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import threading
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError
from scipy import sparse
from scipy.io import mmwrite

import invirtuo as iv
from invirtuo.cells.files import check_h5ad, check_writable, making, read_h5ad, write_h5ad, writing, writing_h5ad
from invirtuo.cells.source import opened


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writing ---------------------------------------------------------------------------------------------------------


def private(path: Path) -> None:
    """Write as safetensors does, through a private file of its own."""
    own = path.with_name("own")
    own.touch(mode=0o600)
    own.write_text("x")
    own.replace(path)


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with writing(tmp_path / "a") as part:
            private(part)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    (tmp_path / "a").touch(mode=0o600)
    with writing(tmp_path / "a") as part:
        part.write_text("secret")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, there):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target.csv", tmp_path / "link.csv"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    with writing(link) as part:
        part.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert names(tmp_path / "far") == ["target.csv"]


def test_a_pipe_gets_the_bytes(tmp_path):
    pipe, got = tmp_path / "pipe.csv", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    check_writable(pipe)
    with writing(pipe) as part:
        part.write_text("a,b")
    reader.join(5)
    assert got == ["a,b"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_that_nobody_reads_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("invirtuo.files.PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="nobody reads"), writing(tmp_path / "pipe") as part:
        part.write_text("a,b")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_devices_stay_devices(capfd):
    with writing("/dev/null") as part:
        part.write_text("a,b")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with writing("/dev/stdout") as part:
        part.write_text("a,b")
    assert capfd.readouterr().out == "a,b"
    with pytest.raises(OSError, match="No space left on device.*'/dev/full'"), writing("/dev/full") as part:
        part.write_text("a,b")


def test_cells_that_are_written_here_and_there_need_a_file():
    with pytest.raises(ValueError, match="/dev/null is no regular file"):
        with writing_h5ad("/dev/null", pd.DataFrame(), pd.DataFrame(), {}):
            pass


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device (os error 28)"),
                                   RuntimeError("write failed: errno = 28, error message = 'No space'"),
                                   OSError(errno.ENOSPC, "No space left on device")])  # fmt: skip
def test_a_full_disk_is_said_in_one_way(tmp_path, error):
    with pytest.raises(OSError, match=r"No space left on device: '.*x/y'") as caught, writing(tmp_path / "x" / "y"):
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError, match="mine"), writing(tmp_path / "x" / "y"):
        raise KeyError("mine")
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [500, 3000, 40_000, 100_000])
def test_hdf5_on_a_full_disk(toy, tmp_path, capfd, full_disk, size):
    """HDF5 prints a traceback for every object that it cannot close, and crashes when the process ends."""
    write_h5ad(toy[:5].copy(), tmp_path / "cells.h5ad")
    before = (tmp_path / "cells.h5ad").read_bytes()
    with full_disk(size), pytest.raises(OSError, match=r"File too large: '.*cells.h5ad'"):
        write_h5ad(toy, tmp_path / "cells.h5ad")
    assert (tmp_path / "cells.h5ad").read_bytes() == before
    assert names(tmp_path) == ["cells.h5ad"]
    assert capfd.readouterr() == ("", "")


def test_cells_are_written_as_anndata_writes_them(toy, tmp_path):
    toy.obsm["pca"] = np.arange(2.0 * toy.n_obs).reshape(-1, 2)
    toy.write_h5ad(tmp_path / "theirs.h5ad")
    write_h5ad(toy, tmp_path / "ours.h5ad")
    listed = []
    for name in ("theirs.h5ad", "ours.h5ad"):
        listed.append(set())
        with h5py.File(tmp_path / name) as file:
            file.visit(listed[-1].add)
    assert listed[0] == listed[1]
    ours = ad.read_h5ad(tmp_path / "ours.h5ad")
    assert (ours.X != toy.X).nnz == 0 and ours.obs.equals(toy.obs)


def test_a_folder_is_whole_or_not_there(tmp_path):
    left_over = tmp_path / ".run.v2.00000000.part"  # of a process that was killed
    left_over.mkdir()
    with pytest.raises(KeyError), making(tmp_path / "run.v2") as part:
        (part / "a").write_text("half")
        raise KeyError
    assert names(tmp_path) == []
    with making(tmp_path / "run.v2") as part:
        (part / "a").write_text("whole")
    assert (tmp_path / "run.v2" / "a").read_text() == "whole"


# ---- before any work -------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "link").symlink_to(file)
    for path, options, message in (
        (tmp_path, {}, "is a folder; give the name of a file"),
        (file, {"folder": True}, "is a file; expected a folder"),
        (file / "run", {}, "file is a file; .*cannot lie under it"),
        (file / "deep" / "run", {"folder": True}, "cannot lie under it"),
        (file, {"inputs": ["other", file]}, "would be replaced by it"),
        (file, {"inputs": [tmp_path / "link"]}, "would be replaced by it"),
    ):
        with pytest.raises(ValueError, match=message):
            check_writable(path, **options)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="protected from writing"):
        check_writable(file)
    assert file.read_text() == "x"


def test_a_folder_that_refuses_files(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("invirtuo.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot be written: .*Read-only file system; give another place"):
        check_writable(tmp_path / "new" / "x.csv")


def test_looking_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b.csv")
    check_writable(tmp_path / "a" / "b", folder=True)
    assert names(tmp_path) == []


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(toy, tmp_path):
    toy.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_a_locked_file(file):
    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is locked: another process has it open"):
            read_h5ad(file)
    assert read_h5ad(file).n_obs == 600


def test_a_file_that_may_not_be_read(file, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_h5ad(file)


def test_a_missing_filter_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with h5py.File(file, "r+") as cells:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((4,))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((4,))
        h5py.h5d.create(cells["uns"].id, b"packed", h5py.h5t.IEEE_F32LE, space, properties)
    with pytest.raises(ValueError, match="/uns/packed is compressed .* filter 32015.*pip install hdf5plugin"):
        read_h5ad(file)


# ---- other kinds -----------------------------------------------------------------------------------------------------


def write_mudata(path, modalities):
    """As MuData lies in a file."""
    shared = pd.DataFrame({"site": "s1"}, index=next(iter(modalities.values())).obs_names)
    with h5py.File(path, "w") as file:
        ad.io.write_elem(file, "obs", shared)
        for name, modality in modalities.items():
            ad.io.write_elem(file, f"mod/{name}", modality)


def test_a_modality_of_mudata_is_read_with_what_the_modalities_share(tmp_path):
    rna = iv.datasets.toy(n_cells=100, n_genes=12)
    proteins = ad.AnnData(np.ones((100, 2), np.float32), obs=pd.DataFrame(index=rna.obs_names))
    write_mudata(tmp_path / "x.h5mu", {"rna": rna, "prot": proteins})
    cells = read_h5ad(tmp_path / "x.h5mu" / "rna")
    np.testing.assert_array_equal(cells.X.toarray(), rna.X.toarray())
    assert list(cells.obs["perturbation"]) == list(rna.obs["perturbation"]) and set(cells.obs["site"]) == {"s1"}
    assert opened(tmp_path / "x.h5mu" / "prot", small_in_memory=True).shape == (100, 2)
    with pytest.raises(ValueError, match="holds prot, rna; name one, as in .*x.h5mu/rna"):
        read_h5ad(tmp_path / "x.h5mu")
    with pytest.raises(ValueError, match="has no modality 'gex'; found prot, rna"):
        read_h5ad(tmp_path / "x.h5mu" / "gex")
    with pytest.raises(ValueError, match="is a MuData file, and here h5ad is expected"):
        check_h5ad(tmp_path / "x.h5mu")


def test_rna_and_atac_of_mudata_are_joined(tmp_path):
    rna, peaks = iv.datasets.toy(n_cells=100, n_genes=12), iv.datasets.toy(n_cells=100, n_genes=10)
    write_mudata(tmp_path / "x.h5mu", {"rna": rna, "atac": peaks})
    joined = read_h5ad(tmp_path / "x.h5mu")
    assert joined.shape == (100, 22) and list(joined.var["modality"]) == ["rna"] * 12 + ["atac"] * 10
    write_mudata(tmp_path / "one.h5mu", {"rna": rna})
    assert read_h5ad(tmp_path / "one.h5mu").shape == (100, 12)


def test_hostile_mudata_is_refused(tmp_path):
    write_mudata(tmp_path / "x.h5mu", {"rna": iv.datasets.toy(n_cells=100, n_genes=12)})
    with h5py.File(tmp_path / "x.h5mu", "a") as file:
        file["mod/rna/obsm/secret"] = h5py.ExternalLink("/etc/other.h5", "/")
    with pytest.raises(ValueError, match="link"):
        read_h5ad(tmp_path / "x.h5mu" / "rna")


def test_counts_of_10x_genomics(tmp_path):
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(0.5, (20, 4)).astype(np.float32))
    cells, ids, names = [f"cell{i}" for i in range(20)], ["g0", "g1", "g2", "g3"], ["A", "B", "B", "C"]

    # a folder of text
    (tmp_path / "folder").mkdir()
    mmwrite(tmp_path / "folder" / "matrix.mtx", counts.T)
    (tmp_path / "folder" / "barcodes.tsv").write_text("\n".join(cells))
    rows = [f"{i}\t{name}\tGene Expression" for i, name in zip(ids, names, strict=True)]
    (tmp_path / "folder" / "genes.tsv").write_text("\n".join(rows))

    # HDF5
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("matrix")
        group["shape"], group["barcodes"] = counts.shape[::-1], np.array(cells, "S")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        for key, values in {
            "id": ids,
            "name": names,
            "feature_type": ["Gene Expression"] * 4,
            "genome": ["x"] * 4,
        }.items():
            group[f"features/{key}"] = np.array(values, "S")

    for path in (tmp_path / "folder", tmp_path / "x.h5"):
        read = read_h5ad(path)
        np.testing.assert_array_equal(read.X.toarray(), counts.toarray())
        assert list(read.var_names) == ["A", "B", "B-1", "C"] and list(read.obs_names) == cells

"""Files packed with gzip are read wherever files are, and what they were unpacked to is gone afterwards."""

from __future__ import annotations

import gc
import gzip
import shutil
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import invirtuo as iv
from invirtuo.cells import datasets
from invirtuo.cells.files import bytes_by_row, check_h5ad, read_h5ad
from invirtuo.cells.packed import plain
from invirtuo.cells.source import opened


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder for temporary files, which must be empty after each use."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def packed(toy, tmp_path):
    """Normalised toy cells in a folder that cannot be written to."""
    folder = tmp_path / "data"
    folder.mkdir()
    iv.preprocess.normalize(toy).write_h5ad(folder / "cells.h5ad")
    pack(folder / "cells.h5ad")
    folder.chmod(0o500)
    yield folder / "cells.h5ad.gz"
    folder.chmod(0o700)


def pack(file: Path) -> None:
    """Pack a file as gzip does, and remove it."""
    with open(file, "rb") as source, gzip.open(f"{file}.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    file.unlink()


def left(folder: Path) -> list[Path]:
    gc.collect()
    return list(folder.glob("invirtuo-*"))


def test_cells_are_read_and_nothing_is_left(packed, toy, temporary):
    cells = read_h5ad(packed)
    assert cells.shape == toy.shape and cells.obs.equals(toy.obs.assign(total_counts=cells.obs["total_counts"]))
    assert bytes_by_row(packed) > 0
    check_h5ad(packed)
    assert left(temporary) == []
    assert [file.name for file in packed.parent.iterdir()] == ["cells.h5ad.gz"]


def test_cells_that_stay_on_disk_keep_what_was_unpacked(packed, temporary, monkeypatch):
    whole = read_h5ad(packed)
    monkeypatch.setattr("invirtuo.cells.source.IN_MEMORY", 0)
    for read in (partial(read_h5ad, backed=True), partial(opened, small_in_memory=True)):
        cells = read(packed)
        assert cells.isbacked and left(temporary)
        np.testing.assert_array_equal(cells[[5, 3]].X.toarray(), whole[[5, 3]].X.toarray())
        cells.file.close()
        del cells
        assert left(temporary) == []


def test_a_store_of_packed_files(packed, temporary):
    store = iv.CellStore.open(packed.parent)
    assert store.n_obs == 600 and len(left(temporary)) == 1
    np.testing.assert_array_equal(store.read(np.array([7, 2])).toarray(), read_h5ad(packed)[[7, 2]].X.toarray())
    del store
    assert left(temporary) == []


def test_cells_that_lie_there_twice_are_taken_once(packed):
    packed.parent.chmod(0o700)
    (packed.parent / "cells.h5ad").write_bytes(gzip.decompress(packed.read_bytes()))
    assert iv.CellStore.open(packed.parent).n_obs == 600


def test_memory_does_not_grow_with_the_file(tmp_path, temporary):
    with gzip.open(tmp_path / "large.h5ad.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    path = plain(tmp_path / "large.h5ad.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert Path(path).stat().st_size == 64 << 20
    assert peak < 8 << 20


@pytest.mark.parametrize("read", [read_h5ad, iv.CellStore.open])
def test_bad_files_are_named(packed, temporary, tmp_path, read):
    whole = packed.read_bytes()
    for name, content, message in (
        ("short.h5ad.gz", whole[: len(whole) // 2], "short.h5ad.gz is not a whole gzip file"),
        ("flipped.h5ad.gz", whole[:-8] + b"\0" + whole[-7:], "flipped.h5ad.gz is not a whole gzip file: CRC"),
        ("text.h5ad.gz", b"no cells", "text.h5ad.gz is not a whole gzip file: Not a gzipped file"),
        ("empty.h5ad.gz", gzip.compress(b"no cells"), "empty.h5ad.gz is not an HDF5 file"),
        ("unpacked.h5ad", whole, "unpacked.h5ad is packed with gzip; give it a name that ends in .gz"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
        assert str(temporary) not in str(caught.value)
        del caught
        assert left(temporary) == []
    with pytest.raises(ValueError, match=r"none.h5ad.gz does not exist"):
        read(tmp_path / "none.h5ad.gz")


def test_no_room_for_what_is_unpacked(packed, temporary, full_disk):
    with (
        full_disk(1000),
        pytest.raises(ValueError, match="cannot be unpacked into .*temporary: File too large.*TMPDIR"),
    ):
        read_h5ad(packed)
    assert left(temporary) == []


# ---- data sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "srivatsan20_highest_dose_processed.h5ad", "srivatsan20_highest_dose_processed.h5ad.gz",
    "sciplex3_processed.h5ad", "sciplex3_processed.h5ad.gz",
])  # fmt: skip
def test_every_name_of_a_file_is_found(toy, tmp_path, temporary, name):
    cells = iv.preprocess.normalize(toy)
    cells.obs["condition"] = cells.obs["perturbation"]
    path = tmp_path / name.removesuffix(".gz")
    cells.write_h5ad(path)
    if name.endswith(".gz"):
        pack(path)
    assert iv.datasets.load("srivatsan20", data_dir=tmp_path).shape == toy.shape
    assert iv.datasets.load("srivatsan20", tmp_path / name).shape == toy.shape
    assert iv.datasets.describe(data_dir=tmp_path).loc["srivatsan20", "here"]
    assert left(temporary) == []


def test_a_missing_file_is_asked_for_under_all_names(tmp_path):
    with pytest.raises(ValueError, match="srivatsan20_highest_dose_processed.h5ad, .*gz, sciplex3_processed.h5ad or"):
        iv.datasets.load("srivatsan20", data_dir=tmp_path)


def test_the_checksum_is_of_what_is_packed(tmp_path, shared, temporary):
    file = shared("data/" + datasets.DATASETS["papalexi"].file)
    shutil.copy(file, tmp_path / file.name)
    (tmp_path / file.name).chmod(0o600)
    pack(tmp_path / file.name)
    assert iv.datasets.load("papalexi", data_dir=tmp_path).n_obs == 20729
    assert left(temporary) == []


# ---- the command line ------------------------------------------------------------------------------------------------


def test_verbs_take_packed_files(run, packed, toy, tmp_path, temporary):
    columns = ("--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type")
    code, _, err = run("check", packed, *columns)
    assert code == 0, err
    toy.write_h5ad(tmp_path / "raw.h5ad")
    pack(tmp_path / "raw.h5ad")
    code, _, err = run("prepare", tmp_path / "raw.h5ad.gz", tmp_path / "prepared.h5ad")
    assert code == 0, err
    small = ("--set", "hidden_dim=8", "--fit-set", "steps=2", "--fit-set", "val_every=2")
    for model, options in (("no_change", ()), ("fm_pca", (*small, "--memory", "8 MiB"))):
        code, _, err = run("fit", model, packed, *columns, "--out", tmp_path / model, *options, "--quiet")
        assert code == 0, err
    code, _, err = run("check", tmp_path / "none.h5ad.gz")
    assert code == 2 and "does not exist" in err and err.count("\n") == 1
    assert left(temporary) == []

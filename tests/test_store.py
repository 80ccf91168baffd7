"""Formula tests of cells on disk: what is read equals what is in memory, in every format, and memory is bounded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import anndata
import h5py
import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import invirtuo as iv
from invirtuo.cells.samplers import SAMPLERS, cells, named, pairs
from invirtuo.cells.shuffle import shuffle
from invirtuo.cells.store import n_bytes

pytestmark = pytest.mark.usefixtures("few_pilots")
FIT = iv.FitConfig(steps=12, batch_size=32, precision="fp32", accelerator="cpu", progress=False, val_every=6)


@pytest.fixture(scope="module")
def whole():
    """1,000 cells in memory, log values; names repeat in no file."""
    return iv.preprocess.normalize(iv.datasets.toy(n_cells=1000, n_genes=40))


@pytest.fixture(scope="module")
def plan(whole):
    return iv.Design.from_adata(whole, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture(scope="module")
def split(whole):
    return pd.Series(np.array(["train", "train", "val", "test"])[np.arange(1000) % 4], index=whole.obs_names)


def plain(adata) -> anndata.AnnData:
    return anndata.AnnData(adata.X.copy(), obs=adata.obs.copy(), var=adata.var[[]].copy())


def contiguous(adata, path, dtype="<i4") -> None:
    """An h5ad whose values lie in one piece."""
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices"):
            values = file["X"][name][:]
            del file["X"][name]
            file["X"].create_dataset(name, data=values.astype(dtype) if name == "indices" else values)


WRITE = {
    "h5ad": lambda a, path: a.write_h5ad(path),
    "gzip": lambda a, path: a.write_h5ad(path, compression="gzip"),
    "contiguous": contiguous,
    "contiguous, wide": lambda a, path: contiguous(a, path, "<i8"),
    "zarr": lambda a, path: a.write_zarr(path),
    "dense": lambda a, path: anndata.AnnData(a.X.toarray(), obs=a.obs, var=a.var).write_h5ad(path),
    "double": lambda a, path: anndata.AnnData(a.X.astype(np.float64), obs=a.obs, var=a.var).write_h5ad(path),
    "other order": lambda a, path: a[:, ::-1].copy().write_h5ad(path),
}


def spread(adata, folder, kind="h5ad", edges=(0, 300, 301, 1000)):
    """The cells in three files."""
    folder.mkdir(exist_ok=True)
    for i, (a, b) in enumerate(pairwise(edges)):
        suffix = "zarr" if kind == "zarr" else "h5ad"
        WRITE["h5ad" if i == 0 and kind == "other order" else kind](plain(adata[a:b]), folder / f"{i}.{suffix}")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return spread(whole, tmp_path / "cells")


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*zarr.*")
@pytest.mark.parametrize("kind", WRITE)
def test_every_format_reads_the_same(whole, tmp_path, kind):
    store = iv.CellStore.open(spread(whole, tmp_path / "cells", kind))
    assert store.var_names.tolist() == whole.var_names.tolist()
    assert store.obs.index.tolist() == whole.obs_names.tolist()
    assert store.obs["perturbation"].tolist() == whole.obs["perturbation"].tolist()
    rng = np.random.default_rng(0)
    x = whole.X.toarray()
    for rows in (np.arange(1000), [5], [], np.arange(290, 310), rng.permutation(1000)[:77], [3, 3, 999, 300, 0]):
        read = store.X[np.asarray(rows, dtype=int)]
        np.testing.assert_array_equal(read.toarray(), x[np.asarray(rows, dtype=int)])
        assert read.dtype == np.float32
        assert read.data.all()
    genes = whole.var_names[[7, 2, 30]]
    np.testing.assert_array_equal(store[:, genes].X[10:400].toarray(), x[10:400][:, [7, 2, 30]])


def test_blocks_pass_over_everything_in_pieces(whole, folder):
    store = iv.CellStore.open(folder, memory="1 MiB")
    pieces = list(store.blocks())
    assert len(pieces) > 1
    np.testing.assert_array_equal(sparse.vstack([x for _, x in pieces]).toarray(), whole.X.toarray())
    rows = np.arange(1, 1000, 3)
    np.testing.assert_array_equal(np.concatenate([r for r, _ in store.blocks(rows)]), rows)
    assert list(store.blocks(rows[:0])) == []


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(folder):
    """A store of which a window holds about an eighth."""
    store = iv.CellStore.open(folder, memory="1 MiB", block=16)
    store.memory = 64_000
    return store


def rows_of(batches) -> np.ndarray:
    return np.concatenate([batch.index.numpy() for batch in batches])


def test_an_epoch_holds_every_training_cell_once(small, plan, split, whole):
    dataset = iv.CellDataset(small, plan, split)
    memory = iv.CellDataset(plain(whole), plan, split)
    batches = list(dataset.batches(cells, 32, seed=[1, 2]))
    assert sorted(rows_of(batches)) == memory.rows("train").tolist()
    assert len({number for number, *_ in dataset.windows(cells, [[1, 2]])}) == 1
    assert len(list(dataset.windows(cells, [[1, 2]]))) > 4
    for batch in batches:
        same = memory.take(batch.index.numpy())
        assert torch.equal(batch.target, same.target)
        torch.testing.assert_close(batch.size_factor, same.size_factor)
        assert torch.equal(batch.condition.perturbation, same.condition.perturbation)
        assert torch.equal(batch.condition.covariates["cell_type"], same.condition.covariates["cell_type"])


def test_order_is_of_the_seed_and_entered_anywhere(small, plan, split):
    dataset = iv.CellDataset(small, plan, split)
    first = [batch.index.tolist() for batch in dataset.batches(cells, 32, seed=[1, 2])]
    assert first == [batch.index.tolist() for batch in dataset.batches(cells, 32, seed=[1, 2])]
    assert first[7:] == [batch.index.tolist() for batch in dataset.batches(cells, 32, seed=[1, 2], skip=7)]
    other = [batch.index.tolist() for batch in dataset.batches(cells, 32, seed=[1, 3])]
    assert first != other
    assert not np.array_equal(np.sort(first[0]), np.sort(other[0]))


def test_skipped_windows_are_not_read(small, plan, split, monkeypatch):
    dataset = iv.CellDataset(small, plan, split)
    every = list(dataset.windows(cells, [0]))
    read, gather = [], type(small)._gather
    monkeypatch.setattr(type(small), "_gather", lambda store, rows: read.append(len(rows)) or gather(store, rows))
    skip = sum(-(-len(layout.rows) // 32) for _, layout, _, _ in every[:-2])
    assert len(list(dataset.batches(cells, 32, seed=0, skip=skip))) > 0
    assert read == [len(layout.rows) for _, layout, _, _ in every[-2:]]


@pytest.mark.parametrize("sampler", ["cells", "pairs", "sets"])
def test_ranks_share_an_epoch(small, plan, split, sampler):
    dataset = iv.CellDataset(small, plan, split)
    draw = named(sampler, 8)
    shares = [set(rows_of(dataset.batches(draw, 32, seed=5, rank=rank, n_ranks=3)).tolist()) for rank in range(3)]
    assert not any(a & b for a, b in ((shares[0], shares[1]), (shares[0], shares[2]), (shares[1], shares[2])))
    every = set(rows_of(dataset.batches(draw, 32, seed=5)).tolist())
    assert set.union(*shares) == every
    assert max(map(len, shares)) < 0.5 * len(every)


def test_pairs_find_controls_of_the_same_kind(small, plan, split, whole):
    dataset = iv.CellDataset(small, plan, split)
    x, groups = whole.X.toarray(), plan.groups(whole.obs).to_numpy()
    train = (split == "train").to_numpy()
    usable = {g: {r.tobytes() for r in x[train & plan.is_control(whole.obs) & (groups == g)]} for g in set(groups)}
    batches = list(dataset.batches(pairs, 32, seed=0))
    assert sorted(rows_of(batches)) == np.flatnonzero(train & ~plan.is_control(whole.obs)).tolist()
    drawn = set()
    for batch in batches:
        for row, source in zip(batch.index.tolist(), batch.source.numpy(), strict=True):
            assert source.tobytes() in usable[groups[row]]
            drawn.add(source.tobytes())
    assert len(drawn) > 0.5 * sum(map(len, usable.values()))


def test_sets_are_of_one_condition(small, plan, split, whole):
    dataset = iv.CellDataset(small, plan, split)
    names, groups = plan.names(whole.obs).to_numpy(), plan.groups(whole.obs).to_numpy()
    x, train = whole.X.toarray(), (split == "train").to_numpy()
    place = {row.tobytes(): i for i, row in enumerate(x)}
    batches = list(dataset.batches(named("sets", 8), 32, seed=0))
    assert set(rows_of(batches)) == set(np.flatnonzero(train))
    assert len(rows_of(batches)) < 1.6 * train.sum()  # the share that fills up sets is small
    for batch in batches:
        assert batch.set_size == 8
        for i in range(0, len(batch), 8):
            index = batch.index.numpy()[i : i + 8]
            assert len(set(names[index])) == 1
            sources = [place[row.tobytes()] for row in batch.source.numpy()[i : i + 8]]
            assert set(groups[sources]) == {groups[index[0]]}
            assert plan.is_control(whole.obs.iloc[sources]).all() and train[sources].all()


def test_memory_is_bounded(whole, folder, plan):
    store = iv.CellStore.open(folder, memory="1 MiB", block=16)
    store.memory = 64_000
    dataset = iv.CellDataset(store, plan)
    sizes = []
    for _, layout, _, _ in dataset.windows(pairs, [0]):
        sizes.append(int(store.lengths[layout.rows].sum()) * 8 + 16 * len(layout.rows))
    assert max(sizes) < 64_000 * 7 / 16 + 16 * 40 * 8 + 500
    cached = sum(map(len, dataset._controls.rows.values()))
    assert cached * (store.lengths.mean() * 8 + 16) < 64_000 / 8 * 1.3


def test_samplers_of_time_courses_stay_in_memory(small, plan):
    dataset = iv.CellDataset(small, plan)
    with pytest.raises(ValueError, match="'courses' needs whole time courses and reads from memory only"):
        next(dataset.batches(SAMPLERS["courses"], 32))


def test_samplers_of_ones_own_say_what_they_group(small, plan, split):
    """A function is read as cells are; one with `groups_conditions` finds cells of a condition together, in sets."""
    dataset = iv.CellDataset(small, plan, split)

    def mine(layout, batch_size, rng):
        yield from named("sets", 8)(layout, batch_size, rng)

    def order(sampler):
        return [layout.rows.tolist() for _, layout, _, _ in dataset.windows(sampler, [3])]

    assert order(mine) == order(cells)
    mine.groups_conditions, mine.set_size = True, 8
    assert order(mine) == order(named("sets", 8)) != order(cells)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_memory(small, plan, split, whole):
    disk, memory = iv.CellDataset(small, plan, split), iv.CellDataset(plain(whole), plan, split)
    for part in ("train", "val"):
        found, expected = disk.pseudobulk(part), memory.pseudobulk(part)
        pd.testing.assert_frame_equal(plan.tidy(found.table), plan.tidy(expected.table))
        for name in ("mean", "variance", "n_cells"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        assert disk.extremes(part) == memory.extremes(part) > (0, 0)
        np.testing.assert_allclose(disk.overdispersion(part), memory.overdispersion(part), rtol=1e-9)
    torch.testing.assert_close(disk.size_factor, memory.size_factor)
    a, b = disk.layout("val"), memory.layout("val")
    np.testing.assert_array_equal(a.condition, b.condition)


def test_size_factors_without_a_column(whole, plan, split, tmp_path):
    bare = plain(whole)
    del bare.obs["total_counts"]
    store = iv.CellStore.open(spread(bare, tmp_path / "bare"))
    expected = iv.CellDataset(bare, plan, split).size_factor
    torch.testing.assert_close(iv.CellDataset(store, plan, split).size_factor, expected)


def test_fingerprints_tell_stores_apart(whole, plan, folder, tmp_path):
    first = iv.CellDataset.open(folder, plan)
    assert first.fingerprint() == iv.CellDataset.open(folder, plan).fingerprint()
    changed = whole.copy()
    changed.X.data[70] *= 1.5
    assert iv.CellDataset.open(spread(changed, tmp_path / "changed"), plan).fingerprint() != first.fingerprint()
    assert iv.CellDataset.open(folder, plan, memory="1 MiB").fingerprint() != first.fingerprint()


# ---- fitting ---------------------------------------------------------------------------------------------------------

CONFIGS = {
    "primeflow": iv.models.PRiMeFlow.Config(hidden_dim=16, gene_width=8, n_context=2, cell_width=16, n_blocks=1),
    "fm_pca": iv.models.FMPCA.Config(hidden_dim=16, n_pcs=5),
    "linear_additive": None,
    "latent_additive": None,
    "ridge": None,
    "context_mean": None,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_fit_from_files(name, whole, plan, split, folder):
    def made():
        return iv.models.MODELS[name](plan, whole.var_names, CONFIGS[name])

    one = made().fit(folder, split, FIT)
    memory = made().fit(plain(whole), split, FIT)
    assert one.card | {"data_hash": ""} == memory.card | {"data_hash": ""}
    predicted, expected = (m.predict("val" if m.card["held_out"]["val"] else plan.conditions(whole.obs), 5).X
                           for m in (one, memory))  # fmt: skip
    assert predicted.shape == expected.shape and np.isfinite(predicted).all()
    if not list(one.parameters()):
        np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)
    else:
        losses = one.history["val_total"].dropna()
        assert len(losses) == 2
        again = made().fit(iv.CellStore.open(sorted(folder.iterdir())), split, FIT)
        pd.testing.assert_frame_equal(again.history.drop(columns="seconds"), one.history.drop(columns="seconds"))
        np.testing.assert_array_equal(again.predict(plan.conditions(whole.obs)[:2], 5).X,
                                      one.predict(plan.conditions(whole.obs)[:2], 5).X)  # fmt: skip


def test_count_models_fit_from_files(raw, tmp_path):
    plan = iv.Design.from_adata(raw, covariates=["cell_type"])
    config = iv.models.CFGen.Config(n_latent=4, hidden_rna=(16,), hidden=16, embedding=8, n_blocks=1)
    counts = iv.CellStore.open(spread(raw, tmp_path / "raw"))
    shuffle(counts, tmp_path / "store", counts=True)
    for cells_of in (counts, tmp_path / "store"):
        model = iv.models.CFGen(plan, raw.var_names, config).fit(cells_of, config=FIT)
        assert model.generate(7).X.sum() > 0
    memory = iv.models.CFGen(plan, raw.var_names, config).fit(raw, config=FIT)
    assert {tuple(row.values()) for row in model.card["labels"]} == {tuple(r.values()) for r in memory.card["labels"]}
    broken = spread(iv.preprocess.normalize(raw), tmp_path / "log")
    with pytest.raises(ValueError, match="expected raw counts"):
        iv.models.CFGen(plan, raw.var_names, config).fit(broken, config=FIT)
    empty = raw.copy()
    empty.X.data[empty.X.indptr[3] : empty.X.indptr[4]] = 0
    with pytest.raises(ValueError, match="1 training cells have no counts; remove them"):
        iv.models.CFGen(plan, raw.var_names, config).fit(spread(empty, tmp_path / "empty"), config=FIT)


def test_embeddings_and_transitions_fit_from_files(whole, plan, split, folder):
    sizes = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    se = iv.models.StateEmbedding.Config(**sizes, gene_vectors="random", gene_width=8, n_dataset=2, length=8)
    st = iv.models.StateTransition.Config(**sizes, set_size=16)
    for kind, config, data in (("state_embedding", se, plan), ("state_transition", st, plan)):
        disk, memory = (iv.models.MODELS[kind](data, whole.var_names, config) for _ in range(2))
        disk.prepare(iv.CellDataset.open(folder, data, split))
        memory.prepare(iv.CellDataset(plain(whole), data, split))
        for key, value in memory.named_buffers():
            assert torch.equal(dict(disk.named_buffers())[key], value), key
        assert np.isfinite(disk.fit(folder, split, FIT).history["train_total"]).all()


def test_validation_cells_are_those_of_memory(whole, plan, split, folder):
    model = iv.models.LinearAdditive(plan, whole.var_names)
    disk, memory = iv.CellDataset.open(folder, plan, split), iv.CellDataset(plain(whole), plan, split)
    assert iv.fit.validation_losses(model, disk, FIT) == iv.fit.validation_losses(model, memory, FIT)
    assert iv.fit.validation_losses(model, disk, FIT) == iv.fit.validation_losses(model, memory, FIT)


def test_a_fit_from_files_resumes_to_the_same_numbers(whole, plan, split, folder, tmp_path):
    def made():
        return iv.models.PRiMeFlow(plan, whole.var_names, CONFIGS["primeflow"])

    def store():
        small = iv.CellStore.open(folder, memory="1 MiB", block=16)
        small.memory = 64_000
        return small

    config = replace(FIT, steps=40, checkpoint_every=13, keep_checkpoints=True)  # more than two epochs
    straight = made().fit(store(), split, config)
    with pytest.raises(KeyError, match="killed"):
        made().fit(store(), split, config, folder=tmp_path / "run", callbacks=[Kill(30)])
    resumed = made().fit(store(), split, config, folder=tmp_path / "run", resume=True)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    with pytest.raises(ValueError, match="other data, another split or another way of reading"):
        made().fit(iv.CellStore.open(folder), split, config, folder=tmp_path / "run", resume=True)


class Kill(lightning.Callback):
    """Ends a fit with an error at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.step:
            raise KeyError("killed")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_memory_is_read_from_text():
    assert [n_bytes(t) for t in ("256 MiB", "4 GB", "1.5GiB", 2**21, "3000k")] == [
        2**28, 4 * 10**9, 3 * 2**29, 2**21, 3_000_000]  # fmt: skip
    for wrong in ("much", "12 bytes", 100, "1 KiB", "-3 GB"):
        with pytest.raises(ValueError, match="memory is"):
            n_bytes(wrong)


def broken(adata, path, change) -> None:
    contiguous(plain(adata), path)
    with h5py.File(path, "r+") as file:
        change(file)


def put(name, place, value):
    def change(file):
        file["X"][name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("data", 3, np.nan), "b.h5ad: X holds .first in row 0. NaN or infinite values"),
        (put("data", 3, -1.0), "b.h5ad: X holds .first in row 0. negative values"),
        (put("indices", 3, 4000), "column numbers from 0 to 4000; expected 0 to 39"),
        (put("indices", 3, -1), "column numbers from -1"),
        (put("indptr", 5, 10**6), "indptr of X falls"),
        (put("indptr", -1, 7), "indptr that ends"),
    ],
)
def test_bad_values_name_their_file(whole, plan, tmp_path, change, message):
    plain(whole[:200]).write_h5ad(tmp_path / "a.h5ad")
    broken(whole[200:400], tmp_path / "b.h5ad", change)
    with pytest.raises(ValueError, match=message):
        iv.CellDataset.open([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], plan)


def test_bad_files_are_refused(whole, plan, folder, tmp_path):
    def expect(message, *paths):
        with pytest.raises(ValueError, match=message):
            iv.CellDataset.open(list(paths), plan)

    first = folder / "0.h5ad"
    expect("does not exist", first, tmp_path / "nowhere.h5ad")
    expect("no files were given")
    expect("named twice", first, first)
    (tmp_path / "empty").mkdir()
    expect("holds no .h5ad or .zarr", tmp_path / "empty")
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes((folder / "2.h5ad").read_bytes()[:30_000])
    expect("cut.h5ad is truncated or damaged", first, cut)
    (tmp_path / "text.h5ad").write_text("no cells")
    expect("not an HDF5 file", tmp_path / "text.h5ad")
    fewer = tmp_path / "fewer.h5ad"
    plain(whole[:50, :-2]).write_h5ad(fewer)
    expect("fewer.h5ad has 38 genes, .*0.h5ad 40; 2 are in one of them only: gene_38, gene_39. Write", first, fewer)
    columns = tmp_path / "columns.h5ad"
    anndata.AnnData(whole.X.tocsc(), obs=whole.obs, var=whole.var).write_h5ad(columns)
    expect("stored by columns .CSC.; write it as CSR", columns)
    lacking = tmp_path / "lacking.h5ad"
    other = plain(whole[:50])
    del other.obs["cell_type"]
    other.write_h5ad(lacking)
    expect("column 'cell_type' is not in the table", first, lacking)


def test_names_of_cells_may_repeat_with_a_split_in_order(whole, plan, split, tmp_path):
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in "ab":
        plain(whole[:300]).write_h5ad(twice / f"{name}.h5ad")
    store = iv.CellStore.open(twice)
    dataset = iv.CellDataset(store, plan, pd.Series(["train"] * 300 + ["val"] * 300, index=store.obs.index))
    assert dataset.rows("val").tolist() == list(range(300, 600))
    with pytest.raises(ValueError, match="does not name every one"):
        iv.CellDataset(store, plan, split[:300])


# ---- shuffled stores -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw():
    return iv.datasets.toy(n_cells=1000, n_genes=40)


def by_name(store) -> pd.DataFrame:
    return pd.DataFrame(store.X[:].toarray(), index=store.obs.index, columns=store.var_names)


@pytest.mark.parametrize("compression", ["none", "gzip", "lzf"])
def test_a_shuffled_store_holds_the_same_cells(raw, whole, plan, tmp_path, compression):
    source = iv.CellStore.open(spread(raw, tmp_path / "raw"), memory="1 MiB")
    source.memory = 100_000
    manifest = shuffle(source, tmp_path / "store", compression=compression)
    store = iv.CellStore.open(tmp_path / "store")
    assert len(manifest["files"]) > 3 and store.n_obs == 1000
    np.testing.assert_allclose(by_name(store).loc[whole.obs_names].to_numpy(), whole.X.toarray(), rtol=1e-6)
    obs = store.obs.loc[whole.obs_names]
    assert obs["perturbation"].tolist() == whole.obs["perturbation"].tolist()
    np.testing.assert_allclose(obs["total_counts"], whole.obs["total_counts"])
    places = store.obs.index.get_indexer(whole.obs_names)
    assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.15
    part = anndata.read_h5ad(tmp_path / "store" / manifest["files"][1])  # an ordinary file
    np.testing.assert_array_equal(part.X.toarray(), by_name(store).loc[part.obs_names].to_numpy())
    assert store.block == 4096
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "store" / "buckets").exists()
    dataset = iv.CellDataset(store, plan)
    assert sorted(rows_of(dataset.batches(cells, 32))) == list(range(1000))


def test_shuffling_is_of_the_seed(raw, tmp_path):
    source = iv.CellStore.open(spread(raw, tmp_path / "raw"))
    one, two, three = (shuffle(source, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert one == two and one["digest"] != three["digest"]


def test_genes_are_chosen_on_training_cells_in_pieces(raw, tmp_path):
    names = raw.obs_names
    split = pd.Series(np.where(np.arange(1000) % 3, "train", "test"), index=names)
    source = iv.CellStore.open(spread(raw, tmp_path / "raw"), memory="1 MiB")
    source.memory = 100_000
    shuffle(source, tmp_path / "store", n_genes=15, keep=["gene_0"], split=split)
    expected = iv.preprocess.normalize(raw, n_genes=15, keep=["gene_0"], split=split)
    store = iv.CellStore.open(tmp_path / "store")
    assert store.var_names.tolist() == expected.var_names.tolist()
    np.testing.assert_allclose(by_name(store).loc[names].to_numpy(), expected.X.toarray(), rtol=1e-6)
    np.testing.assert_allclose(store.obs.loc[names, "total_counts"], expected.obs["total_counts"])


def test_values_stay_where_they_are_no_counts(whole, raw, tmp_path):
    logs = iv.CellStore.open(spread(whole, tmp_path / "log"))
    assert shuffle(logs, tmp_path / "a")["values"] == "as given"
    stored = by_name(iv.CellStore.open(tmp_path / "a")).loc[whole.obs_names]
    np.testing.assert_array_equal(stored.to_numpy(), whole.X.toarray())
    with pytest.raises(ValueError, match="ask for raw counts"):
        shuffle(logs, tmp_path / "b", n_genes=3)
    counts = iv.CellStore.open(spread(raw, tmp_path / "raw"))
    assert shuffle(counts, tmp_path / "c", counts=True)["values"] == "counts"
    stored = by_name(iv.CellStore.open(tmp_path / "c")).loc[whole.obs_names]
    np.testing.assert_array_equal(stored.to_numpy(), raw.X.toarray())


def test_a_failed_shuffle_leaves_nothing(raw, tmp_path, monkeypatch):
    source = iv.CellStore.open(spread(raw, tmp_path / "raw"))
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("anndata.io.write_elem", lambda *a: {}["disk full"])
        shuffle(source, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    (tmp_path / "store").mkdir()
    with pytest.raises(ValueError, match="store exists; give the name of a new folder"):
        shuffle(source, tmp_path / "store")


KILLED = """
import os, signal, sys
import invirtuo as iv
from invirtuo.cells import shuffle as module
from invirtuo.cells.shuffle import shuffle
real = module._Plan._write_file
def write(self, path, *rest):
    real(self, path, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
module._Plan._write_file = write
shuffle(iv.CellStore.open(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_shuffle_leaves_no_store(raw, tmp_path):
    folder = spread(raw, tmp_path / "raw")
    run = subprocess.run([sys.executable, "-c", KILLED, folder, tmp_path / "store"], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    assert len(list(tmp_path.glob(".store.*.part"))) == 1
    shuffle(iv.CellStore.open(folder), tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store"]


def test_damaged_manifests_are_refused(raw, tmp_path):
    shuffle(iv.CellStore.open(spread(raw, tmp_path / "raw")), tmp_path / "store")
    manifest = tmp_path / "store" / "store.json"
    facts = json.loads(manifest.read_text())

    def expect(message, **changes):
        manifest.write_text(json.dumps(facts | changes))
        with pytest.raises(ValueError, match=message):
            iv.CellStore.open(tmp_path / "store")

    expect("names files outside of its folder", files=["../raw/0.h5ad"])
    expect("tells of 999 cells, the files hold 1000", n_obs=999)
    expect("is damaged", files=[])
    expect("does not exist", files=["00009.h5ad"])
    manifest.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        iv.CellStore.open(tmp_path / "store")


def test_a_file_that_is_cut_while_it_is_read(raw, plan, tmp_path):
    shuffle(iv.CellStore.open(spread(raw, tmp_path / "raw")), tmp_path / "store")
    store = iv.CellStore.open(tmp_path / "store")
    dataset = iv.CellDataset(store, plan)
    path = store.parts[0].path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="00000.h5ad is truncated or damaged"):
        list(dataset.batches(cells, 32))

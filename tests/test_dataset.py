"""Formula tests of CellDataset: storage formats, split alignment, pseudobulk, fingerprint, and the caller's object."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import invirtuo as iv
from invirtuo.cells.samplers import SAMPLERS, cells, pairs, sets


def wide(x):
    """The same matrix with 64-bit indices, as large matrices have."""
    x = x.copy()
    x.indices, x.indptr = x.indices.astype(np.int64), x.indptr.astype(np.int64)
    return x


def with_zeros(x):
    """The same matrix with its zeros stored."""
    rows, columns = np.indices(x.shape)
    indptr = np.arange(x.shape[0] + 1) * x.shape[1]
    return sparse.csr_matrix((x.toarray()[rows.ravel(), columns.ravel()], columns.ravel(), indptr), x.shape)


FORMATS = {
    "csr": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "wide indices": wide,
    "stored zeros": with_zeros,
    "dense": lambda x: x.toarray(),
    "double": lambda x: x.toarray().astype(np.float64),
    "fortran": lambda x: np.asfortranarray(x.toarray()),
}


@pytest.fixture
def small():
    return iv.preprocess.normalize(iv.datasets.toy(n_cells=120, n_genes=12))


@pytest.fixture
def small_design(small):
    return iv.Design.from_adata(small, perturbation="perturbation", control="control", covariates=["cell_type"])


def with_x(adata, x) -> anndata.AnnData:
    return anndata.AnnData(x, obs=adata.obs.copy(), var=adata.var.copy())


def batches(dataset, sampler=cells, size=32, **options):
    return list(dataset.batches(sampler, size, **options))


def assert_same(first, second) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.target, b.target)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.condition.perturbation, b.condition.perturbation)
        torch.testing.assert_close(a.size_factor, b.size_factor)


@pytest.fixture(params=[*FORMATS, "view", "backed", "reordered"])
def stored(request, small, tmp_path):
    """The same cells, stored in every way there is."""
    if request.param in FORMATS:
        return with_x(small, FORMATS[request.param](small.X))
    plain = with_x(small, small.X)
    if request.param == "view":
        more = plain[:7].copy()
        more.obs_names = [f"more_{i}" for i in range(7)]
        return anndata.concat([plain, more])[np.arange(127) < 120]
    if request.param == "backed":
        plain.write_h5ad(tmp_path / "cells.h5ad")
        return anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    x = small.X.copy()  # the same values, entries of each row in reverse order
    for i in range(x.shape[0]):
        row = slice(x.indptr[i], x.indptr[i + 1])
        x.indices[row], x.data[row] = x.indices[row][::-1].copy(), x.data[row][::-1].copy()
    return with_x(small, sparse.csr_matrix((x.data, x.indices, x.indptr), x.shape))


def test_every_storage_gives_the_same_batches(small, small_design, stored):
    reference = iv.CellDataset(with_x(small, small.X), small_design)
    dataset = iv.CellDataset(stored, small_design)
    assert_same(batches(dataset, seed=1), batches(reference, seed=1))
    assert dataset.fingerprint() == reference.fingerprint()
    np.testing.assert_allclose(dataset.pseudobulk().mean, reference.pseudobulk().mean, rtol=1e-6)


def raw(x) -> list[bytes]:
    parts = [x.data, x.indices, x.indptr] if sparse.issparse(x) else [x]
    return [np.asarray(part).tobytes() for part in parts]


def test_the_given_object_is_not_written_to(small, small_design, stored):
    x = stored.X if not stored.isbacked else stored.to_memory().X
    before, obs = raw(x), stored.obs.copy(deep=True)
    dataset = iv.CellDataset(stored, small_design, pd.Series("train", index=stored.obs_names))
    for name in ("cells", "pairs", "sets"):
        for batch in dataset.batches(SAMPLERS[name], 32):
            batch.target.add_(1.0)
            batch.condition.perturbation.add_(1.0)
    dataset.pseudobulk(), dataset.fingerprint()
    assert raw(stored.X if not stored.isbacked else stored.to_memory().X) == before
    pd.testing.assert_frame_equal(stored.obs, obs)
    assert_same(batches(dataset), batches(iv.CellDataset(small, small_design)))


def test_batches_hold_the_right_cells(small, small_design):
    dataset = iv.CellDataset(small, small_design)
    dense = small.X.toarray()
    for batch in dataset.batches(pairs, 32, seed=3):
        np.testing.assert_array_equal(batch.target.numpy(), dense[batch.index])
        expected = small_design.encode(small.obs.iloc[batch.index.numpy()])
        assert torch.equal(batch.condition.perturbation, expected.perturbation)
        assert torch.equal(batch.condition.covariates["cell_type"], expected.covariates["cell_type"])
        rows = [np.flatnonzero((dense == row).all(1))[0] for row in batch.source.numpy()]
        assert small_design.is_control(small.obs.iloc[rows]).all()
        assert batch.target.dtype == batch.source.dtype == torch.float32
    set_batch = next(dataset.batches(sets, 128))
    assert set_batch.set_size == 64 and len(set_batch) == 128


def test_seed_and_skip(small, small_design):
    dataset = iv.CellDataset(small, small_design)
    first = batches(dataset, seed=[1, 2])
    assert_same(first, batches(dataset, seed=[1, 2]))
    assert_same(first[2:], batches(dataset, seed=[1, 2], skip=2))
    assert not torch.equal(first[0].index, batches(dataset, seed=[1, 3])[0].index)
    assert batches(dataset, skip=99) == []


def test_skipped_batches_are_not_read(small, small_design, monkeypatch):
    dataset = iv.CellDataset(small, small_design)
    read = []
    monkeypatch.setattr(dataset, "dense", lambda rows: read.append(len(rows)) or torch.zeros(len(rows), 12))
    batches(dataset, skip=2)
    assert sum(read) == 120 - 64


# ---- split -----------------------------------------------------------------------------------------------------------


def test_parts_of_the_split(small, small_design):
    split = pd.Series(np.array(["train", "val", "test", ""])[np.arange(120) % 4], index=small.obs_names)
    dataset = iv.CellDataset(small, small_design, split)
    for i, part in enumerate(["train", "val", "test"]):
        index = torch.cat([batch.index for batch in dataset.batches(cells, 16, part=part)])
        np.testing.assert_array_equal(np.sort(index), np.arange(120)[np.arange(120) % 4 == i])


@pytest.mark.parametrize("kind", ["shuffled", "category", "longer", "list", "missing"])
def test_splits_are_aligned_by_name(small, small_design, kind):
    split = pd.Series(np.where(np.arange(120) % 3, "train", "test"), index=small.obs_names, dtype=object)
    expected = split.to_numpy().copy()
    if kind == "shuffled":
        split = split.sample(frac=1, random_state=0)
    elif kind == "category":
        split = split.astype("category")
    elif kind == "longer":
        split = pd.concat([pd.Series("val", index=["someone else"]), split])
    elif kind == "list":
        split = split.tolist()
    else:
        split.iloc[0], expected[0] = None, ""
    assert iv.CellDataset(small, small_design, split).split.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.iloc[:-1], "119 entries and does not name every one of the 120 cells"),
        (lambda s: s.rename(lambda name: name + "x"), "does not name every one of the 120 cells"),
        (lambda s: pd.concat([s, s.iloc[:1]]), "121 entries"),
        (lambda s: s.tolist()[:-1], "119 entries"),
        (lambda s: s.replace("val", "valid"), "the split holds 'valid'; expected"),
        (lambda s: s.replace("train", "test"), 'no "train" cells'),
    ],
)
def test_bad_splits(small, small_design, change, message):
    split = pd.Series(np.where(np.arange(120) % 3, "train", "val"), index=small.obs_names, dtype=object)
    with pytest.raises(ValueError, match=message):
        iv.CellDataset(small, small_design, change(split))


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_pseudobulk_is_pandas_groupby(small, small_design):
    split = pd.Series(np.where(np.arange(120) % 3, "train", "val"), index=small.obs_names)
    dataset = iv.CellDataset(small, small_design, split)
    for part in ("train", "val"):
        found = dataset.pseudobulk(part)
        chosen = (split == part).to_numpy()
        values = pd.DataFrame(small.X.toarray()[chosen].astype(np.float64))
        grouped = values.groupby(small_design.names(small.obs[chosen]).to_numpy())
        assert small_design.names(found.table).tolist() == list(grouped.groups)
        np.testing.assert_allclose(found.mean, grouped.mean().to_numpy(), rtol=1e-10)
        np.testing.assert_allclose(found.variance, grouped.var(ddof=0).to_numpy(), atol=1e-9)
        np.testing.assert_array_equal(found.n_cells, grouped.size())
    empty = dataset.pseudobulk("test")
    assert len(empty) == len(empty.table) == len(empty.mean) == len(empty.condition) == 0


def test_size_factors(small, small_design):
    split = pd.Series(np.where(np.arange(120) < 60, "train", "test"), index=small.obs_names)
    depth = small.obs["total_counts"].to_numpy()
    expected = torch.from_numpy((depth / np.median(depth[:60])).astype(np.float32))
    torch.testing.assert_close(iv.CellDataset(small, small_design, split).size_factor, expected)
    del small.obs["total_counts"]  # then from the counts of the genes at hand
    torch.testing.assert_close(iv.CellDataset(small, small_design, split).size_factor, expected)


def test_fingerprint_tells_data_apart(small, small_design):
    def fingerprint(change) -> str:
        adata = small.copy()
        adata = change(adata) or adata
        return iv.CellDataset(adata, small_design).fingerprint()

    def one_value(adata):
        adata.X.data[5] += 1e-3

    def one_label(adata):
        adata.obs.iloc[0, adata.obs.columns.get_loc("perturbation")] = "A"  # was a control

    prints = {
        "same": fingerprint(lambda adata: None),
        "value": fingerprint(one_value),
        "label": fingerprint(one_label),
        "gene": fingerprint(lambda adata: setattr(adata, "var_names", [*adata.var_names[:-1], "other"])),
        "cells": fingerprint(lambda adata: adata[:-1]),
        "order": fingerprint(lambda adata: adata[::-1]),
        "genes": fingerprint(lambda adata: adata[:, ::-1]),
    }
    assert len(set(prints.values())) == len(prints)
    assert prints["same"] == iv.CellDataset(small, small_design).fingerprint()


# ---- bad cells -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (-1.0, "negative values")]
)
def test_bad_values_are_refused(small, small_design, value, message):
    small.X.data[3] = value
    with pytest.raises(ValueError, match=message):
        iv.CellDataset(small, small_design)


def test_repeated_genes_and_unknown_labels_are_refused(small, small_design):
    small.obs["cell_type"] = small.obs["cell_type"].cat.rename_categories({"t_cell": "neuron"})
    with pytest.raises(ValueError, match="neuron"):
        iv.CellDataset(small, small_design)
    small.var_names = ["gene_0", *small.var_names[:-1]]
    with pytest.raises(ValueError, match="gene_0"):
        iv.CellDataset(small, small_design)


def test_an_anndata_without_x_is_refused(toy, design):
    with pytest.raises(ValueError, match="has no X"):
        iv.CellDataset(anndata.AnnData(obs=toy.obs, var=toy.var), design)


# ---- technical batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched():
    """Two batches that differ by a shift; perturbed cells are mostly in the second, control cells in the first."""
    rng = np.random.default_rng(0)
    label = np.repeat(["control", "A", "control", "A"], [90, 10, 30, 70])
    plate = np.repeat(["one", "two"], 100)
    shift = (plate == "two")[:, None] * np.linspace(0, 2, 5)
    effect = (label == "A")[:, None] * np.array([1.0, 0, 0, 0, 0.5])
    values = 3 + shift + effect + rng.normal(0, 0.01, (200, 5))
    obs = pd.DataFrame({"gene": label, "plate": plate}, index=[f"c{i}" for i in range(200)])
    return anndata.AnnData(values.astype(np.float32), obs=obs, var=pd.DataFrame(index=list("vwxyz")))


def test_effects_are_those_beside_control_cells_of_the_same_batch(batched):
    for batch, expected in (("plate", [1.0, 0, 0, 0, 0.5]), (None, None)):
        design = iv.Design.from_adata(batched, perturbation="gene", control="control", batch=batch)
        bulk = iv.CellDataset(batched, design).pseudobulk()
        effect = (bulk.mean[0] - bulk.mean[1]).numpy()
        if batch:
            np.testing.assert_allclose(effect, expected, atol=0.02)
            assert list(design.names(batched.obs).unique()) == ["control", "A"]  # conditions know no batches
        else:
            assert abs(effect[4] - 0.5) > 0.5  # the batch looks like an effect
    model = iv.models.PerturbationMean(iv.Design.from_adata(
        batched, perturbation="gene", control="control", batch="plate"), batched.var_names)  # fmt: skip
    predicted = model.fit(batched).predict(["A"], 1).X[0]
    control = batched[batched.obs["gene"] == "control"].X.mean(0)
    np.testing.assert_allclose(predicted - control, [1.0, 0, 0, 0, 0.5], atol=0.02)


@pytest.mark.parametrize("sampler", ["pairs", "sets"])
def test_cells_are_paired_within_their_batch(batched, sampler):
    design = iv.Design.from_adata(batched, perturbation="gene", control="control", batch="plate")
    layout = iv.CellDataset(batched, design).layout()
    plate = batched.obs["plate"].to_numpy()
    for rows in iv.samplers.named(sampler, 8)(layout, 32, np.random.default_rng(0)):
        assert (plate[rows.target] == plate[rows.source]).all()

    # a batch without control cells borrows those of the other
    lonely = batched[~((plate == "two") & (batched.obs["gene"] == "control"))].copy()
    layout = iv.CellDataset(lonely, design).layout()
    plate = lonely.obs["plate"].to_numpy()
    drawn = list(iv.samplers.named(sampler, 8)(layout, 32, np.random.default_rng(0)))
    assert {"one"} == {p for rows in drawn for p in plate[rows.source]}
    assert {"one", "two"} == {p for rows in drawn for p in plate[rows.target]}


def test_a_batch_column_must_be_there(batched):
    with pytest.raises(ValueError, match="'lane'"):
        iv.Design.from_adata(batched, perturbation="gene", control="control", batch="lane")
    with pytest.raises(ValueError, match="plate.*more than one role"):
        iv.Design.from_adata(batched, perturbation="gene", control="control", covariates=["plate"], batch="plate")
    design = iv.Design.from_adata(batched, perturbation="gene", control="control", batch="plate")
    assert iv.Design.from_json(design.to_json()) == design


def test_a_model_that_takes_no_heed_of_batches_says_so(batched, caplog):
    design = iv.Design.from_adata(batched, perturbation="gene", control="control", batch="plate")
    few = iv.FitConfig(steps=1, batch_size=16, progress=False)
    for model, heeds in ((iv.models.LinearAdditive, True), (iv.models.PerturbationMean, True), (iv.models.CPA, False)):
        caplog.clear()
        model(design, batched.var_names).fit(batched, config=few)
        assert ("the batches in 'plate' make no difference" in caplog.text) != heeds, model

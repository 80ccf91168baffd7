"""Formula and contract: what is said of the values of a matrix, and by whom."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import invirtuo as iv
from invirtuo.cells import preprocess
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.shuffle import shuffle
from invirtuo.cells.values import look

COUNTS = iv.datasets.toy(n_cells=300, n_genes=60)
LOG = preprocess.normalize(COUNTS)
DESIGN = iv.Design.from_adata(LOG, perturbation="perturbation", control="control", covariates=["cell_type"])
FORMS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda x: x.toarray()}


def with_values(change, adata=LOG) -> anndata.AnnData:
    """The cells with other values above zero."""
    other = adata.copy()
    other.X = adata.X.copy()
    other.X.data = np.asarray(change(other.X.data), dtype=np.float32)
    return other


def unit_variance(adata: anndata.AnnData) -> anndata.AnnData:
    dense = adata.X.toarray()
    other = adata.copy()
    other.X = dense / dense.std(axis=0)
    return other


SCALES = {
    "counts": COUNTS,
    "log1p": LOG,
    "log2": with_values(lambda x: x / np.log(2)),
    "log10": with_values(lambda x: x / np.log(10)),
    "log1p twice": with_values(np.log1p),
    "linear": with_values(np.expm1),
    "unit variance": unit_variance(LOG),
    "negative": with_values(lambda x: x - x.mean()),
    "zeros": with_values(lambda x: x * 0),
}
OFF = ["log2", "log10", "log1p twice", "linear", "unit variance", "zeros"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SCALES)
def test_scales_are_told_apart(kind, form):
    assert look(FORMS[form](sparse.csr_matrix(SCALES[kind].X))).kind == kind


def test_depth_is_found():
    assert look(LOG.X).target_sum == pytest.approx(1e4, rel=1e-4)
    million = preprocess.normalize(COUNTS, target_sum=1e6)
    assert look(million.X).kind == "log1p"
    assert look(million.X).target_sum == pytest.approx(1e6, rel=1e-4)
    assert look(LOG[:, :30].X).target_sum is None


@pytest.mark.parametrize("kind", OFF)
def test_all_who_look_at_values_say_the_same(kind):
    adata = SCALES[kind]
    text = look(adata.X).text
    told = preprocess.check(adata, DESIGN, expect="log")
    assert any(text in finding for finding in told.loc[told["level"] == "error", "finding"])
    with pytest.raises(ValueError) as refused:
        iv.models.NoChange(DESIGN, adata.var_names).fit(adata)
    assert text in str(refused.value)


@pytest.mark.parametrize("kind", [kind for kind in OFF if kind != "zeros"])
def test_check_warns_without_being_told_what_to_expect(kind):
    told = preprocess.check(SCALES[kind])
    assert (told.loc[told["about"] == "scale", "level"] == "warning").all()


@pytest.mark.parametrize("kind", ["log2", "log10"])
def test_evaluate_refuses_another_logarithm(kind):
    with pytest.raises(ValueError, match=rf"pred like {kind}\(1 \+ x\)"):
        iv.evaluate(SCALES[kind], LOG, DESIGN, ["rmse_mean"])


def test_evaluate_refuses_another_depth():
    million = preprocess.normalize(COUNTS, target_sum=1e6)
    with pytest.raises(ValueError, match="10,000 a cell.* and pred like .*1,000,000 a cell"):
        iv.evaluate(million, LOG, DESIGN, ["rmse_mean"])


def test_evaluate_warns_of_predictions_on_another_level(caplog):
    noise = np.random.default_rng(0).random(LOG.X.nnz)
    iv.evaluate(with_values(lambda x: x / np.log(2) + 0.3 * noise), LOG, DESIGN, ["rmse_mean"])
    assert "times those of real" in caplog.text


def test_evaluate_has_nothing_to_say_of_usual_predictions(caplog):
    means = iv.models.PerturbationMean(DESIGN, LOG.var_names).fit(LOG)
    iv.evaluate(means.predict(DESIGN.conditions(LOG.obs), 20), LOG, DESIGN, ["rmse_mean"])
    assert not caplog.text


# ---- entries that are stored in pieces ----


def in_pieces(adata: anndata.AnnData) -> anndata.AnnData:
    """The same values, each stored as two that add up to it."""
    x = sparse.csr_matrix(adata.X)
    data = np.repeat(x.data, 2)
    data[::2] = np.floor(data[::2] / 3) if np.array_equal(x.data, np.rint(x.data)) else data[::2] / 3
    data[1::2] -= data[::2]
    other = adata.copy()
    other.X = sparse.csr_matrix((data, np.repeat(x.indices, 2), x.indptr * 2), x.shape)
    return other


def test_pieces_are_read_as_what_they_add_up_to(tmp_path):
    counts, log = in_pieces(COUNTS), in_pieces(LOG)
    before = counts.X.data.copy()
    np.testing.assert_allclose(preprocess.normalize(counts).X.toarray(), LOG.X.toarray(), rtol=1e-6)
    np.testing.assert_array_equal(counts.X.data, before)  # the caller's matrix stays as it is
    whole, pieces = (CellDataset(adata, DESIGN) for adata in (LOG, log))
    assert whole.extremes() == pytest.approx(pieces.extremes(), rel=1e-5)
    ours, theirs = whole.pseudobulk(), pieces.pseudobulk()
    for name in ("mean", "variance", "n_cells"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)
    log.write_h5ad(tmp_path / "a.h5ad")
    counts.write_h5ad(tmp_path / "counts.h5ad")
    stored = iv.CellStore.open(tmp_path / "a.h5ad")
    assert stored.X[:].has_canonical_format
    np.testing.assert_allclose(stored.X[[5, 2, 9]].toarray(), LOG.X[[5, 2, 9]].toarray(), rtol=1e-5)
    shuffle(iv.CellStore.open(tmp_path / "counts.h5ad"), tmp_path / "store", n_genes=None)
    made = anndata.read_h5ad(tmp_path / "store" / "00000.h5ad")
    np.testing.assert_allclose(made.X.toarray(), LOG[made.obs_names].X.toarray(), rtol=1e-5)


# ---- files on different scales, of older layouts ----


@pytest.mark.parametrize("kind", ["counts", "log2", "log10", "unit variance"])
def test_files_on_different_scales_are_not_joined(kind, tmp_path):
    LOG[:150].copy().write_h5ad(tmp_path / "a.h5ad")
    SCALES[kind][150:].copy().write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"a\.h5ad looks like log1p values .*b\.h5ad like .*expected files on one"):
        iv.CellStore.open(tmp_path)


def test_files_of_different_depths_are_not_joined(tmp_path):
    LOG[:150].copy().write_h5ad(tmp_path / "a.h5ad")
    preprocess.normalize(COUNTS, target_sum=1e6)[150:].copy().write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match="1,000,000 a cell"):
        iv.CellStore.open(tmp_path)


def write_07(adata: anndata.AnnData, path) -> None:
    """The layout of AnnData 0.7: labels are codes with a reference to their names."""
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["obs"]
        obs, text = file.create_group("obs"), h5py.string_dtype()
        obs.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.1.0"})
        obs.attrs["column-order"] = ["cell_type", "depth"]
        obs.create_dataset("_index", data=np.array(adata.obs_names, dtype=object), dtype=text)
        obs.create_dataset("depth", data=np.arange(float(adata.n_obs)))
        column = adata.obs["cell_type"].astype(str).astype("category")
        names = np.array(column.cat.categories, dtype=object)
        known = obs.create_group("__categories").create_dataset("cell_type", data=names, dtype=text)
        known.attrs["ordered"] = False
        stored = obs.create_dataset("cell_type", data=column.cat.codes.to_numpy(np.int8))
        stored.attrs["categories"] = known.ref


@pytest.mark.filterwarnings("ignore:Element:anndata._warnings.OldFormatWarning")
def test_labels_of_anndata_07_are_read_as_labels(tmp_path):
    parts = [COUNTS[(COUNTS.obs["cell_type"] != kind).to_numpy()].copy() for kind in ("b_cell", "t_cell")]
    for name, part in zip("ab", parts, strict=True):
        write_07(part, tmp_path / f"{name}.h5ad")
    store = iv.CellStore.open(tmp_path)
    assert store.obs["cell_type"].astype(str).tolist() == [label for part in parts for label in part.obs["cell_type"]]
    assert store.obs["depth"].tolist() == [*range(parts[0].n_obs), *range(parts[1].n_obs)]


def write_06(adata: anndata.AnnData, path) -> None:
    """The layout of AnnData 0.6: tables are compound arrays."""
    with h5py.File(path, "w") as file:
        file["X"] = adata.X.toarray()
        for name, index in (("obs", adata.obs_names), ("var", adata.var_names)):
            names = np.array(index, dtype="S20")
            file[name] = np.array([(one,) for one in names], dtype=[("index", "S20")])


def test_files_of_anndata_06_are_read_or_refused_by_name(tmp_path):
    write_06(COUNTS, tmp_path / "old.h5ad")
    with pytest.raises(ValueError, match=r"old\.h5ad .*AnnData 0\.6; read it with anndata.read_h5ad"):
        iv.CellStore.open(tmp_path / "old.h5ad")


def test_the_file_that_lacks_a_column_is_named(tmp_path):
    LOG[:150].copy().write_h5ad(tmp_path / "a.h5ad")
    rest = LOG[150:].copy()
    rest.obs = rest.obs.drop(columns="cell_type")
    rest.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"b\.h5ad lacks it"):
        DESIGN.encode(iv.CellStore.open(tmp_path).obs)


# ---- arguments that cannot be meant ----


@pytest.mark.parametrize("target_sum", [0, -5, float("nan"), float("inf")])
def test_target_sum_must_be_a_depth(target_sum, tmp_path):
    COUNTS.write_h5ad(tmp_path / "a.h5ad")
    store = iv.CellStore.open(tmp_path / "a.h5ad")
    for call in (
        lambda: preprocess.normalize(COUNTS, target_sum=target_sum),
        lambda: preprocess.perturbench(COUNTS, DESIGN, target_sum=target_sum),
        lambda: shuffle(store, tmp_path / "store", target_sum=target_sum),
    ):
        with pytest.raises(ValueError, match="target_sum is"):
            call()


@pytest.mark.parametrize("n_genes", [0, 2.5, "5", float("nan"), True])
def test_numbers_of_genes_are_whole(n_genes):
    with pytest.raises(ValueError, match="n_genes is .* whole number"):
        preprocess.normalize(COUNTS, n_genes=n_genes)
    assert preprocess.normalize(COUNTS, n_genes=np.int64(7)).n_vars == 7


def test_a_split_is_a_series():
    split = pd.DataFrame({"split": "train"}, index=LOG.obs_names)
    with pytest.raises(ValueError, match="split is a DataFrame with split"):
        CellDataset(LOG, DESIGN, split)

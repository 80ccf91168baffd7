"""Checks, damaged files, normalisation, gene choice, the knock-down filter: formulas, references, bad input."""

from __future__ import annotations

import html
import json

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import invirtuo as iv
from invirtuo.cells import preprocess
from invirtuo.cells.files import read_h5ad, writing
from invirtuo.cells.genes import loess, variable_genes

KINDS = ["csr", "csc", "dense", "view", "backed"]


def stored_as(adata, kind, folder):
    """The same cells with another kind of matrix."""
    new = adata.copy()
    if kind == "csc":
        new.X = sparse.csc_matrix(new.X)
    elif kind == "dense":
        new.X = new.X.toarray()
    elif kind == "view":
        return new[np.arange(new.n_obs)]
    elif kind == "backed":
        file = folder / f"cells_{new.X.max():.0f}.h5ad"
        new.write_h5ad(file)
        return read_h5ad(file, backed=True)
    return new


def logged(adata, times=1):
    new = preprocess.normalize(adata)
    for _ in range(times - 1):
        new.X = new.X.log1p()
    return new


# Scale ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scale_is_told_for_every_matrix(toy, tmp_path, kind):
    counts = stored_as(toy, kind, tmp_path)
    assert preprocess.looks_like_counts(counts.X)
    preprocess.require_counts(counts)
    with pytest.raises(ValueError, match="looks like raw counts .* expected log1p .*normalize"):
        preprocess.require_log(counts)
    log = stored_as(logged(toy), kind, tmp_path)
    assert not preprocess.looks_like_counts(log.X)
    preprocess.require_log(log)
    with pytest.raises(ValueError, match=r"log1p values .* expected raw counts .* layer='counts'"):
        preprocess.require_counts(log)


@pytest.mark.parametrize("n_genes", [100, 40])
def test_two_logarithms_are_found(toy, n_genes):
    twice = logged(toy, times=2)[:, :n_genes]
    with pytest.raises(ValueError, match="log1p taken twice .*expm1"):
        preprocess.require_log(twice)
    preprocess.require_log(logged(toy)[:, :n_genes])


def test_small_log_values_are_no_second_logarithm(toy):
    smooth = logged(toy)
    smooth.X = np.random.default_rng(0).gamma(2.0, 0.15, smooth.shape)
    preprocess.require_log(smooth)


def test_values_without_logarithm(toy):
    linear = logged(toy)
    linear.X = linear.X.expm1()
    with pytest.raises(ValueError, match="without logarithm"):
        preprocess.require_log(linear)


def test_zeros_are_neither(toy):
    toy.X = sparse.csr_matrix(toy.shape, dtype=np.float32)
    with pytest.raises(ValueError, match="nothing but zeros"):
        preprocess.require_log(toy)
    with pytest.raises(ValueError, match="nothing but zeros"):
        preprocess.require_counts(toy)


def test_negative_values_are_allowed_in_predictions(toy):
    predicted = logged(toy)
    predicted.X = predicted.X.toarray() - 0.01
    with pytest.raises(ValueError, match="negative values"):
        preprocess.require_log(predicted)
    preprocess.require_log(predicted, allow_negative=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(toy, bad):
    toy.X.data[-1] = bad
    with pytest.raises(ValueError, match="X holds 1 NaN or infinite values"):
        preprocess.check_values(toy)


def test_missing_layer(toy):
    with pytest.raises(ValueError, match="no layer 'raw'; found no layers"):
        preprocess.require_counts(toy, layer="raw")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gene_1"], "1 gene names occur more than once .*gene_1"),
        ([" "], "1 genes have no name"),
    ],
)
def test_gene_names(toy, names, message):
    toy.var_names = [*names, *toy.var_names[1:]]
    with pytest.raises(ValueError, match=message):
        preprocess.check_genes(toy)


def test_no_cells(toy):
    with pytest.raises(ValueError, match="0 cells and 100 genes"):
        preprocess.check_genes(toy[:0])


# check ----------------------------------------------------------------------------------------------------------------


def test_check_lists_all_findings(toy, design):
    good = preprocess.check(toy, design, expect="counts")
    assert set(good["level"]) == {"note"}
    assert good["finding"].str.contains("3 single perturbations, 18 perturbed conditions in 3 covariate groups").any()
    toy.var_names = ["gene_1", *toy.var_names[1:]]
    toy.X.data[0] = np.nan
    bad = preprocess.check(toy, design, expect="log")
    assert bad["level"].tolist()[:3] == ["error"] * 3
    errors = bad[bad["level"] == "error"]
    for text in (repr(errors), errors._repr_html_()):
        assert all(finding in html.unescape(text) for finding in errors["finding"])
    assert {"genes", "values", "scale"} <= set(bad.loc[bad["level"] == "error", "about"])


def test_check_warns_of_groups_without_control(toy, design):
    alone = toy[~((toy.obs["cell_type"] == "b_cell") & (toy.obs["perturbation"] == "control"))].copy()
    found = preprocess.check(alone, design)
    assert found["finding"].str.contains("no control cells in 1 covariate groups: b_cell").any()


def test_check_warns_of_small_conditions(toy, design):
    few = toy[(toy.obs["perturbation"] != "A") | (np.arange(toy.n_obs) < 60)].copy()
    found = preprocess.check(few, design)
    assert found["finding"].str.contains("3 conditions have fewer than 20 cells: ").any()


def test_check_reports_labels_unknown_to_the_design(toy, design):
    toy.obs["perturbation"] = toy.obs["perturbation"].astype(str).replace("A", "Z")
    found = preprocess.check(toy, design)
    assert found.loc[0, "level"] == "error"
    assert "'Z'" in found.loc[0, "finding"]


# Reading and writing --------------------------------------------------------------------------------------------------


@pytest.fixture
def file(toy, tmp_path):
    path = tmp_path / "toy.h5ad"
    toy.write_h5ad(path)
    return path


def test_read_gives_back_what_was_written(toy, file):
    back = read_h5ad(file)
    assert (back.X != toy.X).nnz == 0
    assert back.obs.equals(toy.obs)


def test_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(ValueError, match="is a folder"):
        read_h5ad(tmp_path)
    (tmp_path / "text.h5ad").write_text("a,b")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        read_h5ad(tmp_path / "text.h5ad")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_file(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_h5ad(file)


def external_link(f):
    del f["X"]
    f["X"] = h5py.ExternalLink("/etc/other.h5", "/X")


def soft_link(f):
    f["layers/again"] = h5py.SoftLink("/X")


def external_storage(f):
    f.create_dataset("uns/secret", shape=(4,), dtype="u1", external=[("/etc/hostname", 0, 4)])


def virtual(f):
    layout = h5py.VirtualLayout(shape=(4,), dtype="u1")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "data", shape=(4,))
    f.create_virtual_dataset("uns/secret", layout)


def loop(f):
    f["uns/again"] = f["uns"]


def inflated(f):
    f.create_dataset("uns/huge", shape=(1 << 40,), dtype="f8", chunks=True)


def set_value(name, position, value):
    def change(f):
        f[name][position] = value

    return change


def set_shape(f):
    f["X"].attrs["shape"] = (600, 7)


def shorter(f):
    values = f["X/data"][:-1]
    del f["X/data"]
    f["X/data"] = values


def other_cells(f):
    f["X"].attrs["shape"] = (599, 100)
    pointers = f["X/indptr"][:-1]
    del f["X/indptr"]
    f["X/indptr"] = pointers
    for name in ("data", "indices"):
        values = f[f"X/{name}"][: pointers[-1]]
        del f[f"X/{name}"]
        f[f"X/{name}"] = values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external_link, "/X is a link to /etc/other.h5:/X; links are not followed"),
        (soft_link, "/layers/again is a link to /X"),
        (external_storage, "/uns/secret keeps its values in other files"),
        (virtual, "/uns/secret keeps its values in other files"),
        (loop, "/uns.* contains itself"),
        (inflated, "/uns/huge declares .* bytes"),
        (set_value("X/indices", 5, 100), "indices from 0 to 100; expected 0 to 99"),
        (set_value("X/indices", 5, -1), "indices from -1"),
        (set_value("X/indptr", 3, 10**6), "does not rise"),
        (set_value("X/indptr", -1, 5), "does not rise"),
        (set_shape, "indices from 0 to 99; expected 0 to 6"),
        (shorter, "values but .* indices"),
        (other_cells, "not a readable h5ad"),
        (set_value("obs/cell_type/codes", 0, 99), "not a readable h5ad"),
        (lambda f: f.pop("obs"), "has no obs"),
        (lambda f: f["X"].pop("indptr"), "needs data, indices, indptr"),
    ],
)
def test_hostile_file(file, change, message):
    with h5py.File(file, "r+") as f:
        change(f)
    with pytest.raises(ValueError, match=message):
        read_h5ad(file)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with writing(path) as part:
        part.write_text("whole")
    with pytest.raises(RuntimeError, match="stop"), writing(path) as part:
        part.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["table.csv"]
    with pytest.raises(ValueError, match="is a folder"), writing(tmp_path):
        pass


# normalize ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_normalize_is_log1p_of_cp10k(toy, tmp_path, kind):
    new = preprocess.normalize(stored_as(toy, kind, tmp_path))
    counts = toy.X.toarray().astype(float)
    expected = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    assert sparse.issparse(new.X)
    assert new.X.format == "csr"
    assert new.X.dtype == np.float32
    np.testing.assert_allclose(new.X.toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(new.layers["counts"].toarray(), counts)
    np.testing.assert_allclose(new.obs["total_counts"], counts.sum(1))


def test_normalize_leaves_the_given_object(toy):
    before = toy.copy()
    preprocess.normalize(toy, n_genes=10)
    assert (toy.X != before.X).nnz == 0
    assert list(toy.obs) == list(before.obs)
    assert list(toy.var) == list(before.var)
    assert dict(toy.uns) == dict(before.uns)
    assert not toy.layers


def test_normalize_by_a_depth_over_all_genes(toy):
    toy.obs["depth"] = np.asarray(toy.X.sum(1)).ravel() * 2.0
    part = preprocess.normalize(toy[:, :50].copy(), size_factor="depth")
    expected = np.log1p(1e4 * toy.X.toarray()[:, :50] / toy.obs["depth"].to_numpy()[:, None])
    np.testing.assert_allclose(part.X.toarray(), expected, rtol=1e-5)


def test_normalize_takes_the_depth_that_the_data_set_notes(toy):
    toy.obs["depth"] = np.asarray(toy.X.sum(1)).ravel() * 2.0
    toy.uns["invirtuo"] = {"size_factor": "depth"}
    np.testing.assert_allclose(preprocess.normalize(toy).obs["total_counts"], toy.obs["depth"])


def test_genes_stay_in_order_and_kept_ones_stay(toy):
    chosen = preprocess.normalize(toy, n_genes=20)
    dropped = [name for name in toy.var_names if name not in chosen.var_names]
    kept = preprocess.normalize(toy, n_genes=20, keep=dropped[:2])
    assert chosen.n_vars == 20
    assert set(kept.var_names) == {*chosen.var_names, *dropped[:2]}
    assert list(kept.var_names) == [name for name in toy.var_names if name in set(kept.var_names)]
    assert not kept.var.loc[dropped[:2], "highly_variable"].any()


def test_gene_choice_does_not_see_held_out_cells(toy):
    split = pd.Series("train", index=toy.obs_names)
    split[toy.obs["cell_type"] == "b_cell"] = "test"
    chosen = preprocess.normalize(toy, n_genes=20, split=split)
    spoiled = toy.copy()
    held_out = (split == "test").to_numpy()
    counts = spoiled.X.toarray()
    counts[held_out] = counts[held_out][:, ::-1] * 50
    spoiled.X = sparse.csr_matrix(counts)
    assert list(preprocess.normalize(spoiled, n_genes=20, split=split).var_names) == list(chosen.var_names)
    assert list(preprocess.normalize(spoiled, n_genes=20).var_names) != list(chosen.var_names)


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
def test_flavors_of_scanpy(toy, flavor):
    assert preprocess.normalize(toy, n_genes=30, flavor=flavor).n_vars == 30


def test_normalized_cells_can_be_written(toy, tmp_path):
    preprocess.normalize(toy, n_genes=20).write_h5ad(tmp_path / "out.h5ad")
    assert read_h5ad(tmp_path / "out.h5ad").uns["invirtuo"]["genes"] == "seurat_v3, 20"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_genes": 0}, "n_genes is 0"),
        ({"n_genes": 5, "flavor": "best"}, "flavor is 'best'"),
        ({"keep": ["XIST"]}, "keep: 1 genes are not in the data: XIST"),
        ({"size_factor": "depth"}, "size_factor: column 'depth' is not in obs"),
        ({"size_factor": "cell_type"}, "600 cells have a depth"),
        ({"n_genes": 5, "split": pd.Series(["train"])}, "split has 1 entries"),
    ],
)
def test_normalize_refuses(toy, options, message):
    with pytest.raises(ValueError, match=message):
        preprocess.normalize(toy, **options)


def test_normalize_refuses_a_split_without_training_cells(toy):
    with pytest.raises(ValueError, match="no 'train' cells; found test"):
        preprocess.normalize(toy, n_genes=5, split=pd.Series("test", index=toy.obs_names))


def test_normalize_refuses_empty_cells_and_second_runs(toy):
    with pytest.raises(ValueError, match="expected raw counts"):
        preprocess.normalize(preprocess.normalize(toy))
    toy.X = sparse.csr_matrix(np.vstack([np.zeros((1, 100)), toy.X.toarray()[1:]]))
    with pytest.raises(ValueError, match="1 cells have no counts at all"):
        preprocess.normalize(toy)


# Gene choice ----------------------------------------------------------------------------------------------------------


def test_loess_follows_a_quadratic_exactly():
    x = np.random.default_rng(0).normal(size=300)
    np.testing.assert_allclose(loess(x, 1 + 2 * x - x**2), 1 + 2 * x - x**2, atol=1e-9)


def test_loess_agrees_with_the_authors_code():
    # skmisc.loess.loess(x, y, span=0.3, degree=2), scikit-misc 0.5.3, at every 20th point
    x = np.sin(np.arange(200) * 12.9898) * 3
    y = np.cos(x) + 0.1 * np.sin(np.arange(200) * 78.233)
    expected = [
        0.99623819213,
        -0.772240908249,
        -0.946503905345,
        0.689499831005,
        -0.317083002601,
        -0.993385177806,
        0.0116209081548,
        0.355537797256,
        -0.980136724921,
        -0.577293568483,
    ]
    np.testing.assert_allclose(loess(x, y, span=0.3)[::20], expected, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_loess_of_few_points_is_finite(n):
    assert np.isfinite(loess(np.arange(n, dtype=float), np.ones(n))).all()
    assert np.isfinite(loess(np.zeros(n), np.arange(n, dtype=float))).all()


@pytest.mark.parametrize("batched", [False, True])
def test_variable_genes_agree_with_scanpy(toy, batched):
    pytest.importorskip("skmisc", reason="scanpy's seurat_v3 needs scikit-misc")
    import scanpy

    batch = toy.obs["cell_type"] if batched else None
    theirs = scanpy.pp.highly_variable_genes(
        toy, flavor="seurat_v3", n_top_genes=30, inplace=False, batch_key="cell_type" if batched else None
    )
    ours = variable_genes(toy.X, 30, batch=batch)
    assert (ours & theirs["highly_variable"].to_numpy()).sum() >= 29


def test_variable_genes_do_not_depend_on_gene_order(toy):
    order = np.random.default_rng(0).permutation(toy.n_vars)
    np.testing.assert_array_equal(variable_genes(toy.X[:, order], 30), variable_genes(toy.X, 30)[order])


def test_variable_genes_find_planted_ones():
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(1, 1, 300))[None, :] * np.ones((400, 1))
    rate[:, 40:50] *= rng.choice([0.1, 3.0], (400, 10))
    chosen = variable_genes(rng.poisson(rate), 10)
    assert chosen[40:50].sum() >= 9


def test_more_genes_asked_for_than_there_are(toy):
    assert variable_genes(toy.X, 1000).all()


# PerturBench ----------------------------------------------------------------------------------------------------------


def test_perturbench_reference(shared):
    folder = shared("golden/perturbench")
    expected = json.loads((folder / "golden.json").read_text())["results"]["preprocess"]
    adata = read_h5ad(folder / "preprocess_counts.h5ad")
    design = iv.Design.from_adata(adata, perturbation="condition", control="control", covariates=["cell_type"])
    new = preprocess.perturbench(adata, design, n_genes=120, degs=10)
    assert sorted(new.var_names) == expected["genes_sorted"]
    assert sorted(new.var_names[new.var["highly_variable"]]) == expected["hvg_sorted"]
    assert new.uns["rank_genes_groups_cov"] == expected["degs"]
    np.testing.assert_allclose(np.asarray(new.X.sum(1)).ravel()[:5], expected["row_sums_first5"], rtol=1e-5)
    np.testing.assert_allclose(new.X.sum(), expected["total_sum"], rtol=1e-5)
    assert list(new.var_names) == [name for name in adata.var_names if name in set(new.var_names)]


def test_perturbench_on_training_cells_only(toy, design):
    split = pd.Series("train", index=toy.obs_names)
    split[toy.obs["perturbation"] == "A+B"] = "test"
    new = preprocess.perturbench(toy, design, n_genes=10, degs=3, split=split)
    assert not any(key.endswith("_A+B") for key in new.uns["rank_genes_groups_cov"])
    assert "b_cell_A" in new.uns["rank_genes_groups_cov"]
    strongest = toy.var["effect_A"].abs().nlargest(3).index
    assert len(set(strongest) & set(new.uns["rank_genes_groups_cov"]["t_cell_A"])) >= 1
    assert preprocess.perturbench(toy, design, n_genes=0).n_vars == toy.n_vars


def test_perturbench_warns_of_groups_without_control(toy, design, caplog):
    toy = toy[~((toy.obs["cell_type"] == "b_cell") & (toy.obs["perturbation"] == "control"))].copy()
    new = preprocess.perturbench(toy, design, n_genes=10, degs=3)
    assert "no differential genes for b_cell" in caplog.text
    assert not any(key.startswith("b_cell") for key in new.uns["rank_genes_groups_cov"])


# Knock-down -----------------------------------------------------------------------------------------------------------


def screen():
    """Log values of gene G: controls at 10, and cells of three perturbations, in two contexts."""
    rows = [("control", 10.0, "one")] * 20 + [("control", 20.0, "two")] * 20
    rows += [("G", 1.0, "one")] * 35 + [("G", 9.0, "one")] * 5 + [("H", 10.0, "one")] * 40 + [("drug", 1.0, "two")] * 40
    obs = pd.DataFrame(rows, columns=["perturbation", "level", "line"], index=[f"c{i}" for i in range(len(rows))])
    X = np.column_stack([np.log1p(obs["level"]), np.full(len(obs), np.log1p(3.0)), np.full(len(obs), np.log1p(500.0))])
    adata = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=["G", "H", "other"]))
    return adata, iv.Design.from_adata(adata, perturbation="perturbation", control="control", covariates=["line"])


def test_knockdown_keeps_cells_that_are_down():
    adata, design = screen()
    kept = preprocess.knockdown(adata, design)
    assert kept.obs["perturbation"].value_counts().to_dict() == {"control": 40, "G": 35}
    table = kept.uns["invirtuo"]["knockdown"].set_index("perturbation")
    assert table.loc["G", ["cells", "kept", "reason"]].tolist() == [40, 35, ""]
    assert table.loc["H", "reason"] == "1.00 of the control expression remains"
    assert table.loc["drug", "reason"] == "the label is not a gene of the data"
    assert "invirtuo" not in adata.uns


def test_knockdown_boundaries_and_contexts():
    adata, design = screen()
    # 35 cells at 1 and 5 at 9: mean 2; pooled control mean 15, that of line one 10
    at = {"perturbation_below": 2 / 10 + 1e-9, "by": "context"}
    assert preprocess.knockdown(adata, design, **at).n_obs == 75
    assert preprocess.knockdown(adata, design, perturbation_below=2 / 10 - 1e-3, by="context").n_obs == 40
    assert preprocess.knockdown(adata, design, perturbation_below=2 / 15 + 1e-9).n_obs == 75
    few = preprocess.knockdown(adata, design, min_cells=36)
    assert "only 35 cells" in few.uns["invirtuo"]["knockdown"].set_index("perturbation").loc["G", "reason"]


def test_knockdown_strict_is_below():
    adata, design = screen()
    adata.X = np.expm1(adata.X)
    adata.X[adata.obs["perturbation"] == "control", 0] = 10.0
    exact = {"scale": "as_is", "perturbation_below": 0.2, "cell_below": 0.1}
    assert preprocess.knockdown(adata, design, **exact).n_obs == 75
    assert preprocess.knockdown(adata, design, **exact, strict=True).n_obs == 40


def test_knockdown_of_a_silent_gene_leaves_controls(caplog):
    adata, design = screen()
    adata.X[:, 0] = 0
    kept = preprocess.knockdown(adata, design)
    assert set(kept.obs["perturbation"]) == {"control"}
    assert "leaves no perturbation" in caplog.text
    assert "silent" in kept.uns["invirtuo"]["knockdown"].set_index("perturbation").loc["G", "reason"]


def test_knockdown_wants_log_values(toy, design):
    with pytest.raises(ValueError, match="raw counts"):
        preprocess.knockdown(toy, design)


@pytest.mark.parametrize(
    ("name", "options"),
    [("kept_default", {}), ("kept_loose", {"perturbation_below": 0.7, "cell_below": 0.9, "min_cells": 10})],
)
def test_knockdown_reference(shared, name, options):
    folder = shared("golden/cell_eval/knockdown")
    adata = read_h5ad(folder / "in.h5ad")
    design = iv.Design.from_adata(adata, perturbation="target_gene", control="non-targeting")
    kept = preprocess.knockdown(adata, design, scale="as_is", strict=True, gene_names="gene_name", **options)
    assert set(kept.obs_names) == set(pd.read_csv(folder / f"{name}.csv")["cell"])


def test_check_knows_time_courses():
    rng = np.random.default_rng(0)
    toy = iv.datasets.toy()
    toy.obs["hours"] = rng.random(toy.n_obs)
    first = (toy.obs["cell_type"] == toy.obs["cell_type"].iloc[0]).to_numpy()
    toy.obs.loc[first, "hours"] = 0.5
    findings = iv.preprocess.check(toy, iv.Design.from_adata(toy, covariates=["cell_type"], time="hours"))
    courses = findings[findings["about"] == "courses"]
    assert "conditions" not in set(findings["about"])
    assert courses["level"].tolist() == ["warning", "warning", "note"]
    assert "one time only" in courses["finding"].iloc[0] and "begin after a quarter" in courses["finding"].iloc[1]
    assert "3 time courses by cell_type; hours from" in courses["finding"].iloc[2]

"""Data sets that are rebuilt from public originals: counts restored, differences told, files that load."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

import invirtuo as iv

rebuild = pytest.importorskip("studies.rebuild_data", reason="studies come with the repository alone")


def differing(tables, name):
    """Parts of a data set that are not the known ones."""
    return tables[name].query("not same")["part"].tolist()


def test_scaled_counts_are_restored():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, (30, 40)).astype(np.float32)
    counts[:, 0] = 1  # so that no cell has a common factor
    counts[3] = 0
    scales = rng.uniform(0.1, 20, 30)
    values = sparse.csr_matrix((counts * scales[:, None]).astype(np.float32))
    found, units = rebuild.counts_of(values)
    np.testing.assert_array_equal(found.toarray(), counts)
    full = counts.any(axis=1)
    np.testing.assert_allclose(units[full], scales[full], rtol=1e-5)


def test_values_that_are_no_scaled_counts_are_refused():
    with pytest.raises(ValueError, match="no multiples of one number"):
        rebuild.counts_of(sparse.csr_matrix([[1.0, np.pi, np.e]]))


def test_every_data_set_without_an_address_can_be_rebuilt():
    access = iv.datasets.describe()["status"]
    names = [name for name, record in iv.datasets.DATASETS.items() if record.access == "to be rebuilt"]
    assert names and set(names) <= set(access.index)
    assert all(callable(getattr(rebuild, name)) for name in names)


def test_differences_are_told_and_the_file_loads(tmp_path):
    genes = [f"g{i}" for i in range(6)]
    cells = [f"c{i}" for i in range(5)]
    raw = ad.AnnData(sparse.csr_matrix(np.arange(30.0, dtype=np.float32).reshape(5, 6)))
    raw.obs_names, raw.var_names = cells, genes
    labelled = raw[:4, :5].copy()
    labelled.raw = labelled.copy()
    labelled = labelled[:, :2].copy()
    labelled.obs["louvain"] = ["B cells", "B cells", "NK cells", "B cells"]
    labelled.obsm = {"X_pca": np.zeros((4, 2)), "X_umap": np.zeros((4, 2))}
    raw.write_h5ad(tmp_path / "raw.h5ad")
    labelled.write_h5ad(tmp_path / "processed.h5ad")
    tables = rebuild.pbmc3k(tmp_path / "raw.h5ad", tmp_path / "processed.h5ad", out=tmp_path)
    assert differing(tables, "pbmc3k") == ["shape", "cells", "genes", "values", "labels"]
    with pytest.raises(ValueError, match="other cells, genes, values, labels"):
        iv.datasets.load("pbmc3k", data_dir=tmp_path)
    back = iv.datasets.load("pbmc3k", tmp_path / "pbmc3k.h5ad")
    assert back.shape == (4, 5)
    assert back.obs["umi_total"].tolist() == [15, 51, 87, 123]
    assert back.var["highly_variable_scanpy_tutorial"].tolist() == [True, True, False, False, False]


def test_restored_cells_are_the_known_ones(shared, tmp_path):
    known = iv.datasets.load("norman_mini", data_dir=shared("data"))
    values = known.X.multiply(1e4 / known.obs["size_factor_total"].to_numpy()[:, None]).tocsr()
    devel = ad.AnnData(values.log1p().astype(np.float32), obs=known.obs.drop(columns="perturbation"), var=known.var)
    devel.obs["condition"] = known.obs["perturbation_raw"].astype(str)
    devel.obs["ncounts"] = known.obs["umi_total"]
    devel.write_h5ad(tmp_path / "devel.h5ad")
    out = tmp_path / "data"
    assert differing(rebuild.norman_mini(tmp_path / "devel.h5ad", out=out), "norman_mini") == []
    assert iv.datasets.load("norman_mini", data_dir=out).shape == known.shape


def test_trajectories_come_in_their_order(tmp_path):
    for name in ("B_36", "mono_11"):
        table = pd.DataFrame({"dpt_pseudotime": [0.5, 0.25], "A": [2.5, 0.0], "B": [7.5, 1.5]})
        table.to_csv(tmp_path / f"{name}_norm.csv", sep="\t", index=False)
    rebuild.hematopoiesis(sorted(tmp_path.glob("*.csv")), out=tmp_path)
    adata = iv.datasets.load("hematopoiesis", tmp_path / "hematopoiesis_pathreg.h5ad")
    assert adata.obs_names.tolist() == ["mono_11_0", "mono_11_1", "B_36_0", "B_36_1"]
    assert adata.obs["donor"].tolist() == ["s1d1", "s1d1", "s3d6", "s3d6"]
    assert adata.X.toarray()[:2].tolist() == [[1, 3], [0, 1]]


def test_the_strongest_guide_names_the_knock_out(tmp_path):
    io.mmwrite(tmp_path / "response.mtx", sparse.coo_matrix([[3, 0], [1, 2]]))
    io.mmwrite(tmp_path / "grna.mtx", sparse.coo_matrix([[9, 0], [1, 4]]))
    (tmp_path / "genes.txt").write_text("A\nB\n")
    (tmp_path / "grnas.txt").write_text("STAT1g1\nNTg1\n")
    targets = pd.DataFrame({"grna_id": ["NTg1", "STAT1g1"], "grna_target": ["non-targeting", "STAT1"]})
    targets.to_csv(tmp_path / "targets.csv")
    pd.DataFrame({"bio_rep": ["rep_1", "rep_2"]}).to_csv(tmp_path / "covariates.csv")
    rebuild.papalexi(tmp_path, out=tmp_path)
    adata = iv.datasets.load("papalexi", tmp_path / "papalexi_eccite_thp1.h5ad")
    assert adata.obs["perturbation"].tolist() == ["STAT1", "control"]
    assert adata.obs["grna_frac"].tolist() == [0.9, 1.0]
    assert adata.obs["umi_total_in_panel"].tolist() == [4, 2]

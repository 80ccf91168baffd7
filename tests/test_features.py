"""What is known of perturbations: files and builders of vectors, several side by side, and unseen ones predicted."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import invirtuo as iv
from invirtuo.bench.compare.gene_sets import gene_sets
from invirtuo.cells import features

NAMES = ["A", "B", "C", "D"]
TABLE = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 3)), index=NAMES, columns=["x", "y", "z"])


def as_npz(path: Path) -> None:
    np.savez(path, genes=np.array(NAMES), emb=TABLE.to_numpy())


WRITERS = {
    "a.csv": TABLE.to_csv,
    "a.tsv": lambda path: TABLE.to_csv(path, sep="\t"),
    "a.npz": as_npz,
    "a.pt": lambda path: torch.save({name: torch.tensor(row.to_numpy()) for name, row in TABLE.iterrows()}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_hold_the_same_table(name, tmp_path):
    WRITERS[name](tmp_path / name)
    found = features.read_table(tmp_path / name)
    assert list(found.index) == NAMES
    np.testing.assert_allclose(found.to_numpy(), TABLE.to_numpy())


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    for table in (TABLE, TABLE.reset_index(names="gene")):
        table.to_parquet(tmp_path / "a.parquet")
        np.testing.assert_allclose(features.read_table(tmp_path / "a.parquet").to_numpy(), TABLE.to_numpy())


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_a_file_of_tensors_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"A": Runs()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        features.read_table(tmp_path / "a.pt")
    assert not (tmp_path / "opened").exists()


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "words.csv").write_text("gene,x\nA,one\n")
    (tmp_path / "twice.csv").write_text("gene,x\nA,1\nA,2\n")
    (tmp_path / "noise.npz").write_bytes(b"noise")
    for name, said in {
        "words.csv": "holds no vectors",
        "twice.csv": "names A twice",
        "noise.npz": "holds no vectors",
    }.items():
        with pytest.raises(ValueError, match=said):
            features.read_table(tmp_path / name)


# ---- builders --------------------------------------------------------------------------------------------------------


def test_genes_of_the_same_sets_are_near(tmp_path):
    rng = np.random.default_rng(0)
    modules = [[f"g{i}" for i in range(start, start + 20)] for start in (0, 20, 40)]
    lines = []
    for number, module in enumerate(modules * 20):
        lines.append("\t".join([f"set {number}", "", *rng.choice(module, 12, replace=False)]))
    lines.append("\t".join(["all", "", *(f"g{i}" for i in range(600))]))
    with gzip.open(tmp_path / "sets.gmt.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    table = features.gene_sets(tmp_path / "sets.gmt.gz", n_components=3)
    assert set(table.index) == {gene for module in modules for gene in module}
    centres = np.stack([table.loc[module].mean() for module in modules])
    nearest = np.argmax(table.to_numpy() @ centres.T, axis=1)
    assert (nearest == [int(name[1:]) // 20 for name in table.index]).mean() > 0.95

    (tmp_path / "empty.gmt").write_text("a\tb\n")
    with pytest.raises(ValueError, match="holds no set of 5 to 500 genes"):
        features.gene_sets(tmp_path / "empty.gmt")


def test_genes_that_go_together_are_near():
    adata = iv.datasets.toy()
    rng = np.random.default_rng(0)
    programs = rng.gamma(2.0, 1.0, (adata.n_obs, 2))
    counts = rng.poisson(programs[:, np.arange(adata.n_vars) % 2] * 3)
    adata.X = counts.astype(np.float32)
    adata = iv.preprocess.normalize(adata)
    design = iv.Design.from_adata(adata, perturbation="perturbation", control="control")
    table = features.coexpression(adata, design, n_components=2)
    first, second = (table.iloc[start::2].to_numpy() for start in (0, 1))
    assert (first @ first.mean(axis=0)).min() > (second @ first.mean(axis=0)).max()

    # only control cells are looked at
    perturbed = ~design.is_control(adata.obs)
    adata.X = adata.X.toarray()
    adata.X[perturbed] = 0
    np.testing.assert_array_equal(features.coexpression(adata, design, n_components=2), table)


def test_molecules_that_are_alike_are_near():
    pytest.importorskip("rdkit", reason="needs rdkit")
    table = features.fingerprints({"ethanol": "CCO", "propanol": "CCCO", "butanol": "CCCCO", "benzene": "c1ccccc1"})
    distance = np.linalg.norm(table.to_numpy()[:, None] - table.to_numpy()[None], axis=2)
    assert distance[1, 2] < distance[1, 3]
    with pytest.raises(ValueError, match="wrong cannot be read as molecules"):
        features.fingerprints({"wrong": "not a molecule"})


# ---- several ---------------------------------------------------------------------------------------------------------


def test_sources_have_the_same_weight():
    large = TABLE * 100 + 7
    joined = features.join({"small": TABLE, "large": large}, NAMES)
    halves = np.split(joined.to_numpy(), 2, axis=1)
    np.testing.assert_allclose(halves[0], halves[1])
    np.testing.assert_allclose(np.square(halves[0]).sum(axis=1).mean(), 1)
    np.testing.assert_allclose(joined.mean(), 0, atol=1e-12)


def test_what_a_source_lacks(caplog):
    with pytest.raises(ValueError, match=r"source 1 lacks 1 of 5 perturbations: E;.*missing='mean'"):
        features.join([TABLE], [*NAMES, "E"])
    joined = features.join([TABLE, TABLE.rename({"D": "E"})], [*NAMES, "E"], missing="mean")
    assert "lacks E, which get its mean" in caplog.text
    assert not joined.loc["E"].iloc[:3].any() and joined.loc["E"].iloc[3:].any()
    with pytest.raises(ValueError, match="missing values or infinity"):
        features.join([TABLE.replace(TABLE.iloc[0, 0], np.nan)], NAMES)
    with pytest.raises(ValueError, match="expected error or mean"):
        features.join([TABLE], NAMES, missing="zero")


def test_wide_sources_are_cut():
    wide = pd.DataFrame(np.random.default_rng(0).normal(size=(80, 300)), index=[f"p{i}" for i in range(80)])
    assert features.join([wide], list(wide.index), width=10).shape == (80, 10)


# ---- from the shell --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Cells of a screen on disk, vectors of its perturbations and of one that was not done."""
    folder = tmp_path_factory.mktemp("screen")
    iv.files.write_h5ad(iv.preprocess.normalize(iv.datasets.toy()), folder / "cells.h5ad")
    names = [
        *iv.Design.from_adata(iv.datasets.toy(), perturbation="perturbation", control="control").perturbations,
        "new",
    ]
    rng = np.random.default_rng(0)
    pd.DataFrame(rng.normal(size=(len(names), 3)), index=names).to_csv(folder / "vectors.csv")
    return folder


COLUMNS = ["--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type"]


def test_an_unseen_perturbation_is_predicted(run, screen, tmp_path):
    fit = ["fit", "ridge", screen / "cells.h5ad", *COLUMNS, "--preset", "kernel", "--quiet"]
    vectors = ["--features", screen / "vectors.csv"]
    assert run(*fit, *vectors, "--unseen", "new", "--out", tmp_path / "run")[0] == 0
    wanted = ["--conditions", "monocyte|new", "-n", 5, "--quiet", "--out", tmp_path / "p.h5ad"]
    assert run("predict", tmp_path / "run", *wanted)[0] == 0
    assert iv.files.read_h5ad(tmp_path / "p.h5ad").n_obs == 5

    # a file of names does the same
    (tmp_path / "new.csv").write_text("perturbation\nnew\n")
    assert run(*fit, *vectors, "--unseen", tmp_path / "new.csv", "--out", tmp_path / "again")[0] == 0
    first, second = (iv.load(tmp_path / name).design for name in ("run", "again"))
    assert first == second and "new" in first.perturbations

    for arguments, said in (
        ([*fit, "--unseen", "new"], "--unseen new needs --features"),
        ([*fit, *vectors, "--unseen", "other"], "lacks 1 of"),
        ([*fit, "--features", "nothing.csv"], "'nothing.csv' is no file; expected one, or coexpression"),
        (["fit", "perturbation_mean", *fit[2:-3], "--quiet", *vectors], "takes no features of perturbations"),
    ):
        code, _, error = run(*arguments, "--out", tmp_path / "none")
        assert code == 2 and said in " ".join(error.split())
        assert not (tmp_path / "none").exists()


def test_sources_are_listed(run):
    code, said, _ = run("list", "features")
    assert code == 0
    assert all(source in said for source in ("FILE.npz", "coexpression"))


def test_sets_of_genes_are_tested(tmp_path):
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(60)]
    effect = rng.normal(size=60)
    effect[:10] += 3
    table = pd.DataFrame({"condition": "T|A", "gene": genes, "effect": effect, "real": -effect})
    unseen = table.assign(condition="T|B", real=np.nan)
    sets = {"up": genes[:10], "rest": genes[10:40], "few": genes[:3], "other": ["x1", "x2", "x3", "x4", "x5"]}
    path = tmp_path / "sets.gmt"
    path.write_text("".join("\t".join([name, "", *own]) + "\n" for name, own in sets.items()))
    found = gene_sets(pd.concat([table, unseen]), path)
    assert found["gene_set"].tolist() == ["up", "rest"] * 2 and found["n_genes"].tolist() == [10, 30] * 2
    first = found.iloc[0]
    test = stats.mannwhitneyu(effect[:10], effect[10:], method="asymptotic", use_continuity=False)
    rest = stats.mannwhitneyu(
        effect[10:40], np.delete(effect, range(10, 40)), method="asymptotic", use_continuity=False
    )
    assert first["q"] == pytest.approx(stats.false_discovery_control([test.pvalue, rest.pvalue])[0])
    assert first["z"] > 0 > first["z_real"] and first["effect"] == pytest.approx(effect[:10].mean())
    assert found["q_real"].isna().tolist() == [False, False, True, True]
    path.write_text("other\t\tx1\tx2\tx3\tx4\tx5\n")
    with pytest.raises(ValueError, match="no set of .* has 5 of the 60 genes"):
        gene_sets(table, path)

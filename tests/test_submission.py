"""The file of the Virtual Cell Challenge 2026: what it takes and refuses, and predictions that it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import invirtuo as iv
from invirtuo.metrics import check_submission, pack_submission, read_contract

GOLDEN = Path(__file__).parents[2] / "shared/golden/yardstick2026/submission"
CONTEXTS, PERTURBATIONS, N_CELLS, N_GENES = ("A", "B", "C"), ("ADNP", "BRD4", "MYC"), 8, 40


@pytest.fixture
def files(tmp_path):
    """The two lists of the challenge."""
    (tmp_path / "gene_names.csv").write_text("\n".join(["gene_name", *(f"GENE{i}" for i in range(N_GENES))]) + "\n")
    (tmp_path / "pert_counts.csv").write_text("\n".join(["target_gene", *PERTURBATIONS]) + "\n")
    return tmp_path / "gene_names.csv", tmp_path / "pert_counts.csv"


@pytest.fixture
def contract(files):
    return read_contract(*files, n_cells=N_CELLS)


def valid() -> anndata.AnnData:
    rng = np.random.default_rng(0)
    labels = [(name, context) for context in CONTEXTS for name in PERTURBATIONS for _ in range(N_CELLS)]
    obs = pd.DataFrame(labels, columns=["target_gene", "context"])
    obs.index = obs.index.astype(str)
    x = rng.poisson(1.5, (len(obs), N_GENES)).astype(np.float64)
    return anndata.AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))


def with_value(value, place=(0, 0)):
    def change(cells):
        x = cells.X.toarray()
        x[place] = value
        cells.X = sparse.csr_matrix(x)
        return cells

    return change


def with_total(total):
    def change(cells):
        x = cells.X.toarray()
        x[0] = 0
        x[0, 0] = total
        cells.X = sparse.csr_matrix(x)
        return cells

    return change


def labelled(column, row, label):
    def change(cells):
        labels = cells.obs[column].astype(str).to_numpy(dtype=object)
        labels[row] = label
        cells.obs[column] = labels
        return cells

    return change


def renamed(cells):
    cells.obs = cells.obs.rename(columns={"target_gene": "gene"})
    return cells


def without(label, column="target_gene", context=None):
    def change(cells):
        gone = cells.obs[column] == label
        if context is not None:
            gone &= cells.obs["context"] == context
        return cells[~gone.to_numpy()].copy()

    return change


def silent(*contexts):
    def change(cells):
        gone = (cells.obs["target_gene"] == "ADNP") & cells.obs["context"].isin(contexts)
        cells.X = sparse.csr_matrix(cells.X.toarray() * ~gone.to_numpy()[:, None])
        return cells

    return change


def mapped(column, function):
    def change(cells):
        cells.obs[column] = cells.obs[column].map(function)
        return cells

    return change


def typed(convert):
    def change(cells):
        cells.X = convert(cells.X)
        return cells

    return change


def twice_named(cells):
    cells.var_names = ["GENE1", *cells.var_names[1:]]
    return cells


def one_gene_more(cells):
    more = anndata.AnnData(np.zeros((cells.n_obs, 1)), obs=cells.obs[[]], var=pd.DataFrame(index=["MORE"]))
    return anndata.concat([cells, more], axis=1, merge="first")


def with_more(cells):
    cells.layers["l"], cells.obsm["o"] = cells.X.copy(), np.zeros((cells.n_obs, 2))
    return cells


def drop(cells, column):
    del cells.obs[column]
    return cells


def stored_zeros(x):
    rows, columns = np.nonzero(x.toarray() == 0)
    zeros = sparse.csr_matrix((np.zeros(20), (rows[:20], columns[:20])), x.shape)
    x = x.tocoo()
    zeros = zeros.tocoo()
    parts = [np.concatenate(pair) for pair in ((x.data, zeros.data), (x.row, zeros.row), (x.col, zeros.col))]
    return sparse.csr_matrix((parts[0], (parts[1], parts[2])), x.shape)


# name in the golden set: how made, and what is said; None: it is taken
CASES = {
    "valid": (lambda cells: cells, None),
    "genes_shuffled": (lambda cells: cells[:, ::-1].copy(), None),
    "gene_missing": (lambda cells: cells[:, :-1].copy(), "genes differ from the list: 1 missing (GENE39)"),
    "gene_extra": (one_gene_more, "1 further (MORE)"),
    "dup_gene": (twice_named, "genes that are there more than once: GENE1"),
    "int32": (typed(lambda x: x.astype(np.int32)), None),
    "dense_float64": (typed(lambda x: x.toarray()), None),
    "csc": (typed(sparse.csc_matrix), None),
    "fraction": (with_value(1.5), "1 values are no whole numbers"),
    "fraction_1e-7": (with_value(1 + 1e-7), None),
    "negative": (with_value(-1), "1 values are negative"),
    "nan": (with_value(np.nan), "1 values are NaN or infinite"),
    "inf": (with_value(np.inf), "1 values are NaN or infinite"),
    "total_exactly_1e6": (with_total(1e6), None),
    "total_above_1e6": (with_total(1e6 + 1), "cell 0 has 1,000,001 counts; expected at most 1,000,000"),
    "lognorm": (typed(lambda x: x.log1p()), "no whole numbers"),
    "no_context_column": (lambda cells: drop(cells, "context"), "obs has no column context"),
    "context_missing": (without("C", "context"), "no cells of the contexts C"),
    "context_unknown": (labelled("context", 0, "Z"), "unknown contexts Z"),
    "context_lower_case": (mapped("context", str.lower), "unknown contexts a, b, c"),
    "controls_present": (labelled("target_gene", 0, "non-targeting"), "1 cells labelled non-targeting"),
    "pert_missing": (without("ADNP"), "context A: perturbations differ from the list: 1 missing (ADNP)"),
    "pert_missing_one_context": (without("ADNP", context="A"), "context A: perturbations differ from the list"),
    "pert_extra": (labelled("target_gene", 0, "EXTRA"), "1 further (EXTRA)"),
    "construct_ids": (mapped("target_gene", "{}-1".format), "3 missing (ADNP, BRD4, MYC), 3 further (ADNP-1"),
    "one_cell_less": (lambda cells: cells[1:].copy(), "ADNP has 7, expected 8"),
    "one_cell_more": (lambda cells: anndata.concat([cells[:1], cells], index_unique="-"), "ADNP has 9, expected 8"),
    "zero_perturbation": (silent("A"), None),
    "zero_perturbation_all": (silent(*CONTEXTS), "perturbations without a count in any cell: ADNP"),
    "zero_cell": (typed(lambda x: sparse.csr_matrix(x.toarray() * (np.arange(x.shape[0]) > 0)[:, None])), None),
    "other_column_name": (renamed, "obs has no column target_gene; found gene, context"),
    "other_column_name_told": (renamed, None),
    "layers_and_obsm": (with_more, None),
    "empty": (lambda cells: cells[:0].copy(), "there are no cells"),
    "explicit_zeros": (typed(stored_zeros), None),
}
TOLD = {"other_column_name_told": {"perturbation": "gene"}}


@pytest.mark.filterwarnings("ignore:Variable names are not unique", "ignore:Observation names are not unique")
@pytest.mark.parametrize("name", CASES)
def test_what_the_challenge_takes(name, contract, tmp_path):
    change, said = CASES[name]
    cells = change(valid())
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for given in (cells, tmp_path / "cells.h5ad"):
        found = check_submission(given, contract, **TOLD.get(name, {}))
        assert found.is_accepted == (said is None), found.problems
        assert said is None or any(said in problem for problem in found.problems), found.problems

    # what is taken is packed and taken again; what is not is not written
    out = tmp_path / "packed.h5ad"
    if said is not None:
        with pytest.raises(ValueError, match=f"^{len(found.problems)} problems: "):
            pack_submission(cells, out, contract)
        assert not out.exists()
        return
    pack_submission(tmp_path / "cells.h5ad", out, contract, **TOLD.get(name, {}))
    packed = anndata.read_h5ad(out)
    assert list(packed.var_names) == list(contract.genes) and packed.X.dtype == np.float32
    assert list(packed.obs.columns) == ["target_gene", "context"] and not packed.layers and not packed.obsm
    expected = cells[:, list(contract.genes)].to_memory().X
    np.testing.assert_allclose(packed.X.toarray(), expected.toarray() if sparse.issparse(expected) else expected)
    assert check_submission(out, contract).is_accepted


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared")
def test_cases_are_those_of_the_official_tool():
    outcomes = {case["name"]: case for case in json.loads((GOLDEN / "outcomes.json").read_text())["outcomes"]}
    for name, (_, said) in CASES.items():
        assert outcomes[name]["accepted"] == (said is None), name
    contract = read_contract(GOLDEN / "gene_names.csv", GOLDEN / "pert_counts.csv", n_cells=8)
    found = check_submission(GOLDEN / "valid.h5ad", contract)
    assert found.is_accepted and found.facts["nnz"] == outcomes["valid"]["nnz"]


def test_bounds(contract):
    assert "72 cells; expected at most 10" in check_submission(valid(), contract, max_cells=10).problems
    assert any("stored values" in problem for problem in check_submission(valid(), contract, max_stored=10).problems)


def test_an_archive(contract, tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard")
    pack_submission(valid(), tmp_path / "a.vcc", contract)
    with tarfile.open(tmp_path / "a.vcc") as archive:
        meta = json.load(archive.extractfile("meta.json"))
        packed = zstandard.ZstdDecompressor().stream_reader(archive.extractfile("pred.h5ad.zst")).read()
    assert meta["n_obs"] == 72 and meta["contexts"] == list(CONTEXTS) and meta["schema"] == 1
    (tmp_path / "again.h5ad").write_bytes(packed)
    assert check_submission(tmp_path / "again.h5ad", contract).is_accepted
    if GOLDEN.exists():
        with tarfile.open(GOLDEN / "valid.vcc") as archive:
            theirs = json.load(archive.extractfile("meta.json"))
        assert meta.keys() == theirs.keys() and meta["perts_fingerprint"] == theirs["perts_fingerprint"]


def test_lists_that_cannot_be_read(files):
    for file, text, said in (
        (files[0], "gene\nA\nA\n", "names A more than once"),
        (files[1], "name\nA\n", "expected target_gene"),
        (files[1], "target_gene,n_cells\nA,many\n", "no whole numbers above 0 in n_cells"),
    ):
        before = file.read_text()
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_contract(*files)
        file.write_text(before)
    with pytest.raises(ValueError, match="is not a readable CSV table"):
        read_contract(files[0], files[1].with_name("none.csv"))


# ---- from a fitted model ---------------------------------------------------------------------------------------------


@pytest.fixture
def screen(tmp_path):
    """A screen in two lines, and control cells of three others as the challenge gives them."""
    rng = np.random.default_rng(0)
    genes = [f"GENE{i}" for i in range(N_GENES)]
    level = rng.gamma(2.0, 1.5, N_GENES)

    def cells(context, labels):
        counts = np.stack([rng.poisson(level * (3 if label == "MYC" else 1) * rng.uniform(0.5, 2)) for label in labels])
        obs = pd.DataFrame({"gene": labels, "line": context})
        return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs.set_index(obs.index.astype(str)),
                               var=pd.DataFrame(index=genes))  # fmt: skip

    labels = [name for name in (*PERTURBATIONS, "ctrl") for _ in range(20)]
    known = anndata.concat([cells(line, labels) for line in ("x", "y")], index_unique="-")
    controls = anndata.concat([cells(context, ["non-targeting"] * 30) for context in CONTEXTS], index_unique="-")
    controls.obs.columns = ["target_gene", "context"]
    controls.write_h5ad(tmp_path / "controls.h5ad")
    adata = iv.preprocess.normalize(known)
    design = iv.Design.from_adata(adata, perturbation="gene", control="ctrl", covariates=["line"])
    iv.models.PerturbationMean(design, adata.var_names, "move-cells").fit(adata).save(tmp_path / "run")
    return tmp_path


def test_predictions_fit_the_challenge(run, screen, files, contract):
    lists = ["--genes", files[0], "--perturbations", files[1]]
    predict = ["vcc", "predict", screen / "run", "--controls", screen / "controls.h5ad", *lists, "-n", N_CELLS]
    code, said, _ = run(*predict, "--out", screen / "pred.h5ad")
    assert code == 0 and "72 cells, 40 genes" in said
    cells = anndata.read_h5ad(screen / "pred.h5ad")
    assert check_submission(cells, contract).is_accepted
    depth = np.asarray(cells.X.sum(axis=1)).ravel()
    assert cells.obs.groupby(["context", "target_gene"], observed=True).size().eq(N_CELLS).all() and depth.min() > 0

    # check and pack say the same words
    assert run("vcc", "check", screen / "pred.h5ad", *lists, "-n", N_CELLS)[0] == 0
    assert run("vcc", "pack", screen / "pred.h5ad", *lists, "-n", N_CELLS, "--out", screen / "again.h5ad")[0] == 0
    code, said, error = run("vcc", "check", screen / "pred.h5ad", *lists)
    assert code == 2 and "ADNP has 8, expected 400" in said and "3 problems" in error

    # numbers of cells of each perturbation
    files[1].write_text("target_gene,n_cells\nADNP,3\nMYC,5\n")
    assert run(*predict, "--out", screen / "few.h5ad")[0] == 0
    found = anndata.read_h5ad(screen / "few.h5ad").obs["target_gene"].value_counts().to_dict()
    assert found == {"ADNP": 9, "MYC": 15}

    # genes and perturbations that the model does not know
    for file, word, said in ((files[1], "OTHER,4\n", "OTHER"), (files[0], "GENE99\n", "lacks 1 of the 41 genes")):
        file.write_text(file.read_text() + word)
        code, _, error = run(*predict, "--out", screen / "none.h5ad")
        assert code == 2 and said in error and not (screen / "none.h5ad").exists()


@pytest.mark.skipif(shutil.which("vcc") is None, reason="needs vcc-cli")
def test_the_official_tool_takes_it(contract, files, tmp_path):
    pack_submission(valid(), tmp_path / "pred.h5ad", contract)
    lists = ["--genes", files[0], "--perts", files[1], "--contexts", ",".join(CONTEXTS), "--cells-per-pert", N_CELLS]
    command = ["vcc", "prep", tmp_path / "pred.h5ad", *lists, "--dry-run"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

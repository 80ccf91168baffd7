"""Contract of the command line: the whole way from counts to report, and one message with exit code 2 for bad input."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import invirtuo as iv

COLUMNS = ["--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type"]
TINY = ["hidden_dim=32", "cell_width=32", "gene_width=16", "n_blocks=1", "loss_genes=0"]
SET = [part for field in TINY for part in ("--set", field)]
FAST = ["--fit-set", "steps=12", "--fit-set", "batch_size=32", "--fit-set", "val_every=6", "--quiet"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with counts.h5ad and log.h5ad of the toy cells, and a model fitted on them."""
    folder = tmp_path_factory.mktemp("cli")
    counts = iv.datasets.toy(n_cells=240, n_genes=30)
    counts.write_h5ad(folder / "counts.h5ad")
    log = iv.preprocess.normalize(counts)
    log.write_h5ad(folder / "log.h5ad")
    design = iv.Design.from_adata(log, perturbation="perturbation", control="control", covariates=["cell_type"])
    split = iv.splits.hold_out(log.obs, design, ["monocyte|A", "b_cell|A+B"])
    model = iv.models.PerturbationMean(design, log.var_names).fit(log, split=split)
    model.save(folder / "mean")
    log[(split == "test").to_numpy()].write_h5ad(folder / "real.h5ad")
    split.to_csv(folder / "split.csv", header=False)
    return folder


def test_the_whole_way(run, tmp_path):
    raw, log, model = tmp_path / "raw.h5ad", tmp_path / "log.h5ad", tmp_path / "run"
    iv.datasets.toy(n_cells=240, n_genes=30).write_h5ad(raw)
    assert run("prepare", raw, log, "--n-genes", 25)[0] == 0
    assert iv.preprocess.looks_like_counts(ad.read_h5ad(log).layers["counts"])
    assert run("check", log, *COLUMNS)[0] == 0
    held_out = ["--hold-out", "monocyte|A", "--hold-out", "b_cell|A+B"]
    assert run("fit", "primeflow", log, *COLUMNS, *held_out, *SET, *FAST, "--out", model)[0] == 0
    assert json.loads((model / "config.json").read_text())["config"]["hidden_dim"] == 32
    assert (
        run("predict", model, "-n", 20, "--steps", 3, "--solver", "euler", "--quiet", "--out", tmp_path / "p.h5ad")[0]
        == 0
    )
    predicted = ad.read_h5ad(tmp_path / "p.h5ad")
    assert predicted.shape == (40, 25)
    assert set(predicted.obs["cell_type"]) == {"monocyte", "b_cell"}
    scores = tmp_path / "results" / "scores.csv"
    assert (
        run("evaluate", tmp_path / "p.h5ad", log, *COLUMNS, "--metrics", "rmse_mean,deg_recall", "--out", scores)[0]
        == 0
    )
    table = pd.read_csv(scores)
    assert set(table["metric"]) == {"rmse_mean", "deg_recall"}
    assert set(table["condition"]) == {"monocyte|A", "b_cell|A+B"}
    assert run("report", scores.parent, "--out", tmp_path / "report.html")[0] == 0
    assert "monocyte|A" in (tmp_path / "report.html").read_text()


def test_same_words_same_numbers(run, files, tmp_path):
    run("predict", files / "mean", "-n", 7, "--seed", 3, "--quiet", "--out", tmp_path / "p.h5ad")
    predicted = iv.load(files / "mean").predict("test", n_cells=7, seed=3)
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "p.h5ad").X, predicted.X)
    run("predict", files / "mean", "-n", 7, "--output", "counts", "--quiet", "--out", tmp_path / "c.h5ad")
    counts = iv.load(files / "mean").predict("test", n_cells=7, output="counts")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "c.h5ad").X.toarray(), counts.X.toarray())


def test_resume_ends_with_the_same_weights(run, files, tmp_path):
    arguments = ["fit", "primeflow", files / "log.h5ad", *COLUMNS, *SET, "--fit-set", "precision=fp32", *FAST]
    assert run(*arguments, "--out", tmp_path / "whole")[0] == 0
    assert run(*arguments, "--out", tmp_path / "again")[0] == 0
    assert run(*arguments, "--resume", "--out", tmp_path / "again")[0] == 0
    first, second = (iv.load(tmp_path / name).state_dict() for name in ("whole", "again"))
    assert all((first[key] == second[key]).all() for key in first)


def test_files_on_disk(run, files, tmp_path):
    raw = ad.read_h5ad(files / "counts.h5ad")
    (tmp_path / "raw").mkdir()
    for i in range(3):
        raw[80 * i : 80 * i + 80].copy().write_h5ad(tmp_path / "raw" / f"{i}.h5ad")
    code, said, _ = run("prepare", *sorted((tmp_path / "raw").iterdir()), "--shuffle-to", tmp_path / "store",
                        "--n-genes", 20)  # fmt: skip
    assert code == 0 and "240 cells x 20 genes, log1p, 1 files" in " ".join(said.split())
    held_out = ["--hold-out", "monocyte|A", *SET, *FAST]
    for name, data in {"store": [tmp_path / "store"], "file": [files / "log.h5ad", "--memory", "4 MiB"]}.items():
        assert run("fit", "primeflow", *data, *COLUMNS, *held_out, "--out", tmp_path / name)[0] == 0
        assert run("predict", tmp_path / name, "-n", 5, "--quiet", "--out", tmp_path / "p.h5ad")[0] == 0
        assert ad.read_h5ad(tmp_path / "p.h5ad").n_obs == 5


def test_before_the_verb(run):
    assert run("--version")[:2] == (0, f"invirtuo {iv.__version__}\n")
    code, said, _ = run("list")
    assert code == 0 and "invirtuo list models" in said.splitlines()
    code, said, _ = run("--help")
    assert code == 0 and said.index("From a file to an answer") < said.index("Prepare") < said.index("Judge")


@pytest.mark.parametrize("what", ["models", "metrics", "datasets", "splits", "tasks"])
def test_list(run, what):
    code, out, _ = run("list", what)
    assert code == 0
    names = {
        "models": "primeflow",
        "metrics": "mmd_gex",
        "datasets": "kang",
        "splits": "transfer",
        "tasks": "kang-demo",
    }
    assert names[what] in out


def spoiled(kind: str) -> ad.AnnData:
    """The log-normalised toy cells with one thing wrong."""
    adata = iv.preprocess.normalize(iv.datasets.toy(n_cells=120, n_genes=20))
    x = adata.X.toarray()
    if kind == "nan":
        x[3, 4] = np.nan
    elif kind == "negative":
        x[3, 4] = -1
    elif kind == "linear":
        x = np.expm1(x)
    elif kind == "counts":
        x = adata.layers["counts"].toarray()
    elif kind == "twice":
        x = np.log1p(x)
    adata.X = x.astype(np.float32)
    if kind == "duplicate genes":
        adata.var_names = ["same", "same", *adata.var_names[2:]]
    if kind == "no control":
        adata = adata[(adata.obs["perturbation"] != "control").to_numpy()].copy()
    if kind == "missing label":
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(object)
        adata.obs.iloc[0, adata.obs.columns.get_loc("perturbation")] = np.nan
    if kind == "no column":
        del adata.obs["cell_type"]
    if kind == "group without control":
        keep = (adata.obs["cell_type"] != "b_cell") | (adata.obs["perturbation"] != "control")
        adata = adata[keep.to_numpy()].copy()
    return adata


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "NaN"),
        ("negative", "negative"),
        ("linear", "without logarithm"),
        ("counts", "raw counts"),
        ("twice", "taken twice"),
        ("duplicate genes", "gene names are not unique"),
        ("no control", "control label 'control' does not occur"),
        ("missing label", "missing values"),
        ("no column", "column 'cell_type' is not in"),
        ("group without control", "no control cells among the training cells of group"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_fit_refuses(run, tmp_path, kind, message):
    spoiled(kind).write_h5ad(tmp_path / "bad.h5ad")
    code, _, err = run("fit", "linear_additive", tmp_path / "bad.h5ad", *COLUMNS, *FAST, "--out", tmp_path / "run")
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "config.json").exists()


def test_judge(run, files, tmp_path):
    arguments = ["--generated", f"same={files / 'real.h5ad'}", "--covariate", "cell_type", "--metrics", "rmse_mean"]
    arguments += ["--min-cells", "5"]
    code, out, err = run("judge", files / "real.h5ad", *arguments, "--out", tmp_path / "judged")
    assert code == 0 and "rmse_mean" in out, err
    scores = pd.read_csv(tmp_path / "judged" / "scores.csv")
    assert scores.loc[scores["model"] == "same", "value"].max() < 1e-6
    assert (tmp_path / "judged" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nonsense", "LOG", *COLUMNS, "--out", "OUT"], "unknown model 'nonsense'; known: primeflow"),
        (["fit", "primeflow", "LOG", *COLUMNS, "--preset", "nope", "--out", "OUT"], "no preset 'nope'"),
        (
            ["fit", "primeflow", "LOG", *COLUMNS, "--set", "nonsense=3", "--out", "OUT"],
            "a field that `invirtuo list models primeflow` lists",
        ),
        (
            ["fit", "primeflow", "LOG", *COLUMNS, "--set", "hidden_dim=wide", "--out", "OUT"],
            "hidden_dim is 'wide'; expected a whole number, at least 1; `invirtuo list models primeflow` explains",
        ),
        (
            ["fit", "primeflow", "LOG", *COLUMNS, "--fit-set", "progress=3", "--out", "OUT"],
            "FitConfig.progress is 3; expected true or false; `invirtuo list models primeflow --fit` explains",
        ),
        (["fit", "primeflow", "LOG", *COLUMNS, "--split", "nope", "--out", "OUT"], "--split is 'nope'"),
        (["fit", "primeflow", "LOG", *COLUMNS, "--hold-out", "t_cell|Z", "--out", "OUT"], "t_cell|Z"),
        (["fit", "primeflow", "LOG", "--perturbation", "x", "--control", "y", "--out", "OUT"], "column 'x' is not in"),
        (["fit", "primeflow", "NONE", *COLUMNS, "--out", "OUT"], "does not exist"),
        (["fit", "primeflow", "CUT", *COLUMNS, "--out", "OUT"], "truncated or damaged"),
        (["prepare", "LOG", "OUT"], "expected raw counts"),
        (["prepare", "LOG"], "found 1 path(s); several files need --shuffle-to"),
        (["prepare", "LOG", "LOG", "--shuffle-to", "OUT"], "named twice"),
        (["prepare", "LOG", "--shuffle-to", "OUT", "--knockdown"], "work in memory; prepare each file"),
        (["fit", "primeflow", "LOG", "NONE", *COLUMNS, "--out", "OUT"], "does not exist"),
        (["fit", "primeflow", "LOG", "--memory", "lots", *COLUMNS, "--out", "OUT"], "memory is 'lots'"),
        (["check", "TEXT", *COLUMNS], "not an HDF5 file"),
        (["predict", "MEAN", "--conditions", "UNSEEN", "--out", "OUT"], "perturbation 'Z'"),
        (["predict", "MEAN", "--conditions", "STRANGE", "--out", "OUT"], "neuron"),
        (["predict", "MEAN", "--conditions", "NONE", "--out", "OUT"], "does not exist"),
        (["predict", "MEAN", "-n", "0", "--out", "OUT"], "n_cells is 0"),
        (["predict", "MEAN", "--output", "mean", "--out", "OUT"], "expected log or counts"),
        (["predict", "FOLDER", "--out", "OUT"], "holds no saved model"),
        (["evaluate", "LOG", "REAL", *COLUMNS, "--metrics", "nope", "--out", "OUT"], "nope"),
        (["evaluate", "COUNTS", "REAL", *COLUMNS, "--out", "OUT"], "log1p"),
        (["evaluate", "FEWER", "REAL", *COLUMNS, "--out", "OUT"], "genes"),
        (["evaluate", "LOG", "REAL", *COLUMNS, "--controls", "x", "--out", "OUT"], "controls"),
        (["evaluate", "LOG", "REAL", *COLUMNS, "--scale", "x", "--out", "OUT"], "scale"),
        (["evaluate", "LOG", "REAL", *COLUMNS, "--layer", "x", "--out", "OUT"], "'x'"),
        (["evaluate", "LOG", "REAL", *COLUMNS, "--layer", "a=x", "--out", "OUT"], "--layer a=x; expected one name"),
        (["evaluate", "LOG", "REAL", "--metrics", "cosine_logfc", "--out", "OUT"], "the design names none"),
        (["judge", "REAL", "--generated", "LOG", "--out", "OUT"], "expected attribute=value"),
        (["judge", "REAL", "--generated", "a=nowhere.h5ad", "--out", "OUT"], "does not exist"),
        (["benchmark", "nothing", "--out", "OUT"], "unknown task 'nothing'; known: kang-demo"),
        (["benchmark", "kang-demo", "--model", "nope", "--out", "OUT"], "unknown model 'nope'"),
        (["benchmark", "kang-demo", "--seeds", "0", "--out", "OUT"], "seeds is 0"),
        (["benchmark", "kang-demo", "--engine", "abacus", "--out", "OUT"], "engine is 'abacus'"),
        (["tune", "no_change", "kang-demo", "--out", "OUT"], "no_change has nothing to search"),
        (["tune", "primeflow", "kang-demo", "--objective", "x", "--out", "OUT"], "expected metric=weight"),
        (["tune", "primeflow", "kang-demo", "--search", "fit.lr=1:", "--out", "OUT"], "expected field=LOW:HIGH"),
        (["tune", "primeflow", "kang-demo", "--search", "fit.lr=wide", "--out", "OUT"], "expected field=LOW:HIGH"),
        (["tune", "primeflow", "kang-demo", "--search", "colour=1,2", "--out", "OUT"], "cannot search colour"),
        (["tune", "primeflow", "kang-demo", "--fit-set", "lr=fast", "--out", "OUT"], "FitConfig.lr is 'fast'"),
        (["report", "FOLDER", "--out", "OUT"], "scores.csv"),
        (["demo", "--minutes", "0", "--out", "OUT"], "minutes is 0"),
        (["list", "nonsense"], "cannot list 'nonsense'"),
        (["list", "models", "nobody"], "unknown model 'nobody'; known: primeflow"),
        (["list", "splits", "primeflow"], "`invirtuo list models primeflow --fit` lists"),
    ],
)
def test_bad_input_is_one_message(run, files, tmp_path, arguments, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.h5ad").write_text("not a file of cells")
    whole = (files / "log.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    pd.DataFrame({"cell_type": ["b_cell"], "perturbation": ["Z"]}).to_csv(tmp_path / "unseen.csv", index=False)
    pd.DataFrame({"cell_type": ["neuron"], "perturbation": ["A"]}).to_csv(tmp_path / "strange.csv", index=False)
    ad.read_h5ad(files / "log.h5ad")[:, :10].copy().write_h5ad(tmp_path / "fewer.h5ad")
    names = {
        "LOG": files / "log.h5ad", "REAL": files / "real.h5ad", "COUNTS": files / "counts.h5ad",
        "MEAN": files / "mean", "NONE": tmp_path / "none.h5ad", "CUT": tmp_path / "cut.h5ad",
        "TEXT": tmp_path / "text.h5ad", "FOLDER": tmp_path / "folder", "UNSEEN": tmp_path / "unseen.csv",
        "STRANGE": tmp_path / "strange.csv", "FEWER": tmp_path / "fewer.h5ad", "OUT": tmp_path / "out",
    }  # fmt: skip
    code, _, err = run(*[names.get(argument, argument) for argument in arguments])
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]


def test_a_failed_write_leaves_the_old_file(run, files, tmp_path):
    old = tmp_path / "scores.csv"
    old.write_text("precious")
    code, _, _ = run("evaluate", files / "counts.h5ad", files / "real.h5ad", *COLUMNS, "--out", old)
    assert code == 2
    assert old.read_text() == "precious"


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_every_layout_of_the_matrix(run, files, tmp_path, layout):
    adata = ad.read_h5ad(files / "log.h5ad")
    adata.X = {"csr": adata.X, "csc": sparse.csc_matrix(adata.X), "dense": adata.X.toarray()}[layout]
    adata.write_h5ad(tmp_path / "x.h5ad")
    split = ["--split", files / "split.csv"]
    assert run("fit", "context_mean", tmp_path / "x.h5ad", *COLUMNS, *split, *FAST, "--out", tmp_path / "run")[0] == 0
    predicted = iv.load(tmp_path / "run").predict("test", n_cells=3)
    assert predicted.shape == (6, 30)


def test_split_from_a_toml_file(run, files, tmp_path):
    sections = (
        "[datasets]",
        'screen = "x"',
        'v1 = "y"',
        "[training]",
        'screen = "train"',
        'v1 = "train"',
        "[zeroshot]",
    )
    text = "\n".join([*sections, '"screen.{}" = "test"'])
    adata = ad.read_h5ad(files / "log.h5ad")
    held_out = sorted(adata.obs["cell_type"].unique())[0]
    (tmp_path / "split.toml").write_text(text.format(held_out))
    command = ["fit", "context_mean", files / "log.h5ad", *COLUMNS, *FAST, "--out", tmp_path / "run", "--split"]
    code, _, err = run(*command, tmp_path / "split.toml")
    assert code == 2 and "screen" in err and not (tmp_path / "run").exists()
    code, _, err = run(*command, f"{tmp_path / 'split.toml'}:screen:cell_type")
    assert code == 0, err
    conditions = pd.DataFrame(iv.load(tmp_path / "run").card["held_out"]["test"])
    assert set(conditions["cell_type"]) == {held_out}


def test_every_split_that_is_listed_can_be_asked_for(run, files, tmp_path, monkeypatch):
    """As the list writes it; what needs groups says so, and which there are."""
    monkeypatch.setenv("COLUMNS", "300")  # lines of the list are not broken
    _, out, _ = run("list", "splits")
    asked = dict(re.findall(r"--split (\w+)(\S*)", " ".join(out.split())))
    assert {"transfer", "combine", "manual", "under_represented", "zero_shot"} <= set(asked)
    command = ["fit", "no_change", files / "log.h5ad", *COLUMNS, *FAST, "--out"]
    for name, written in asked.items():
        groups = written.replace("GROUP,GROUP", "b_cell,t_cell").replace("GROUP", "b_cell")
        code, _, err = run(*command, tmp_path / name, "--split", f"{name}{groups}")
        assert code == 0 or "obs" in err or "expected" in err, (name, err)
        if written:
            code, _, err = run(*command, tmp_path / "bare", "--split", name)
            assert code == 2
            assert f"expected {name}:GROUP" in err and "here b_cell, monocyte, t_cell" in err
    held_out = iv.load(tmp_path / "manual").card["held_out"]
    assert {row["cell_type"] for part in ("val", "test") for row in held_out[part]} == {"b_cell", "t_cell"}
    for split, message in (
        ("manual:x", "group 'x' does not occur in obs"),
        ("combine:b_cell", "expected combine"),
        ("unseen_targets:x", "below n_folds"),
        ("zero_shot:b_cell,t_cell", "holds out one group, found 2"),
        ("hold_out", "or use --hold-out"),
    ):
        code, _, err = run(*command, tmp_path / "bad", "--split", split)
        assert code == 2 and message in err, err


def test_no_traceback_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "invirtuo", "check", str(tmp_path / "none.h5ad"), *COLUMNS[:4]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"invirtuo: {tmp_path / 'none.h5ad'} does not exist; expected an h5ad file"
    ]


def test_counts_and_layers_are_scored_like_log_values(run, files, tmp_path):
    log = ad.read_h5ad(files / "real.h5ad")
    moved = log.copy()
    moved.layers["log"], moved.X = moved.X, moved.layers["counts"]
    moved.write_h5ad(tmp_path / "moved.h5ad")
    prediction, real = files / "log.h5ad", tmp_path / "moved.h5ad"
    assert run("evaluate", prediction, files / "real.h5ad", *COLUMNS, "--quiet", "--out", tmp_path / "a.csv")[0] == 0
    layer = ["--layer", "real=log", "--quiet", "--out", tmp_path / "b.csv"]
    assert run("evaluate", prediction, real, *COLUMNS, *layer)[0] == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    assert run("evaluate", real, real, *COLUMNS, "--scale", "counts", "--quiet", "--out", tmp_path / "c.csv")[0] == 0
    assert (pd.read_csv(tmp_path / "c.csv").query("metric == 'rmse_mean'")["value"] == 0).all()


def test_benchmark_of_the_bundled_cells(same_process, run, tmp_path):
    chosen = ["--model", "no_change", "--no-baselines", "--seeds", 1, "--metrics", "rmse_mean", "--n-jobs", 1]
    code, out, err = run("benchmark", "kang-demo", *chosen, "--out", tmp_path / "results")
    assert code == 0, err
    assert "kang-demo" in out and "no_change" in out and "report.html" in out
    scores = pd.read_csv(tmp_path / "results" / "scores.csv")
    assert set(scores["condition"]) == {"B cell|IFN-beta", "CD14 monocyte|IFN-beta"}
    wide = scores.pivot(index="condition", columns="model", values="value")
    assert (wide["noise_floor"] < 0.5 * wide["no_change"]).all()


@pytest.mark.slow
def test_a_failed_cell_is_exit_code_1(run, tmp_path):
    entry = {"label": "worst", "model": "linear_additive", "fit": {"steps": 3, "lr": 1e30}}
    (tmp_path / "worst.json").write_text(json.dumps(entry))
    chosen = ["--model", tmp_path / "worst.json", "--no-baselines", "--seeds", 1, "--metrics", "rmse_mean"]
    code, _, err = run("benchmark", "kang-demo", *chosen, "--quiet", "--out", tmp_path / "results")
    assert code == 1
    assert "1 cell(s) failed" in err
    assert "FloatingPointError" in (tmp_path / "results" / "costs.csv").read_text()


# ---- guards where people trip ----


def test_prepare_chooses_genes_on_training_cells_alone(run, files, tmp_path):
    counts = ad.read_h5ad(files / "counts.h5ad")
    held_out = ["--hold-out", "cell_type=b_cell"]
    done = run("prepare", files / "counts.h5ad", tmp_path / "a.h5ad", "--n-genes", 8, *held_out, *COLUMNS)
    assert done[0] == 0 and not done[2], done
    design = iv.Design.from_adata(counts, perturbation="perturbation", control="control", covariates=["cell_type"])
    split = iv.splits.hold_out(counts.obs, design, {"cell_type": "b_cell"})
    expected = iv.preprocess.normalize(counts, n_genes=8, split=split)
    made = ad.read_h5ad(tmp_path / "a.h5ad")
    assert list(made.var_names) == list(expected.var_names)
    assert made.uns["invirtuo"]["genes_chosen_on"] == "training cells"
    _, _, err = run("prepare", files / "counts.h5ad", tmp_path / "b.h5ad", "--n-genes", 8)
    assert "genes are chosen on all cells" in err


def test_prepare_keeps_the_genes_of_a_file(run, files, tmp_path):
    genes = list(iv.files.read_h5ad(files / "counts.h5ad").var_names[::7])
    (tmp_path / "tfs.txt").write_text("\n".join([*genes, "not_here"]))
    asked = ["prepare", files / "counts.h5ad", tmp_path / "k.h5ad", "--n-genes", 2, "--keep", tmp_path / "tfs.txt"]
    code, _, err = run(*asked)
    assert code == 0 and f"{len(genes)} of the {len(genes) + 1} genes" in err
    assert set(genes) <= set(iv.files.read_h5ad(tmp_path / "k.h5ad").var_names)
    code, _, err = run(*asked[:-1], tmp_path / "none.txt")
    assert code == 2 and "does not exist" in err


def knocked_down(tmp_path, level: int):
    """Counts of a screen in which G is knocked down to a level, and H is no gene of the panel."""
    obs = pd.DataFrame({"target": ["nt"] * 40 + ["G"] * 40 + ["H"] * 40}, index=[f"c{i}" for i in range(120)])
    counts = np.full((120, 5), 50, np.float32)
    counts[40:80, 0] = level
    ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=list("GABCD"))).write_h5ad(tmp_path / "screen.h5ad")
    return ["prepare", tmp_path / "screen.h5ad", tmp_path / "out.h5ad", "--knockdown", "--perturbation", "target"]


def test_prepare_prints_what_became_of_every_target(run, tmp_path):
    command = [*knocked_down(tmp_path, 5), "--control", "nt"]
    code, out, err = run(*command)
    assert code == 0, err
    rows = [line.split(maxsplit=3) for line in out.splitlines()]
    assert ["G", "40", "40"] in rows
    assert ["H", "40", "40", "the label is not a gene of the data"] in [[cell.strip() for cell in row] for row in rows]
    assert ad.read_h5ad(tmp_path / "out.h5ad").obs["target"].value_counts().to_dict() == {"nt": 40, "G": 40, "H": 40}
    assert run(*command, "--drop-unmeasured")[0] == 0
    assert "H" not in set(ad.read_h5ad(tmp_path / "out.h5ad").obs["target"])


def test_prepare_fails_when_the_filter_leaves_nothing(run, tmp_path):
    code, out, err = run(*knocked_down(tmp_path, 50), "--control", "nt", "--drop-unmeasured")
    assert code == 2
    assert "leaves no perturbed cell" in err
    assert "of the control expression remains" in out
    assert not (tmp_path / "out.h5ad").exists()


def test_intervals_after_a_fit_from_the_shell(run, files, tmp_path):
    held_out = ["--hold-out", "b_cell|A", "--hold-out-val", "cell_type=t_cell"]
    fit = run("fit", "perturbation_mean", files / "log.h5ad", *COLUMNS, *held_out, "--out", tmp_path / "run")
    assert fit[0] == 0, fit
    asked = ["--run", tmp_path / "run", "--level", "0.9", "-n", "5", "--out", tmp_path / "effects.csv"]
    code, _, err = run("effects", files / "log.h5ad", *asked)
    assert code == 0, err
    table = pd.read_csv(tmp_path / "effects.csv")
    assert set(table["condition"]) == {"b_cell|A"}
    assert (table["low"] <= table["high"]).all()
    code, _, err = run("effects", files / "log.h5ad", *asked, "--conditions", "b_cell|B", "--conditions", "monocyte|A")
    assert code == 0, err
    assert set(pd.read_csv(tmp_path / "effects.csv")["condition"]) == {"b_cell|B", "monocyte|A"}


def test_conditions_by_name(run, files, tmp_path):
    out = tmp_path / "p.h5ad"
    code, _, err = run("predict", files / "mean", "--conditions", "t_cell|A", "-n", 3, "--quiet", "--out", out)
    assert code == 0, err
    assert ad.read_h5ad(out).obs["perturbation"].tolist() == ["A"] * 3
    code, _, err = run("predict", files / "mean", "--conditions", "A", "-n", 3, "--quiet", "--out", out)
    assert code == 2 and "has 1 value(s); expected 2" in err


def test_a_fit_on_controls_alone_is_refused(run, files, tmp_path):
    everything = [part for kind in ("b_cell", "t_cell", "monocyte") for part in ("--hold-out", f"cell_type={kind}")]
    code, _, err = run("fit", "primeflow", files / "log.h5ad", *COLUMNS, *everything, "--out", tmp_path / "run")
    assert code == 2
    assert "no perturbed cell is left to train on" in err
    assert not (tmp_path / "run").exists()


def test_a_page_about_cells_of_anybody(run, files, tmp_path):
    cells, page = files / "log.h5ad", tmp_path / "page"
    command = ["evaluate", cells, cells, "--metrics", "mmd_gex,rmse_mean", "--out", tmp_path / "s.csv", "--page", page]
    code, _, err = run(*command, *COLUMNS)
    assert code == 0, err
    scores = pd.read_csv(page / "scores.csv")
    means = scores[scores["metric"] == "rmse_mean"].groupby("model")["value"].mean()
    assert means["log"] == pytest.approx(0, abs=1e-6) and min(means["noise_floor"], means["no_change"]) > 0.1
    text = (page / "report.html").read_text()
    assert "How near are the cells of log" in text and str(cells) in text
    code, _, err = run(*command[:-1], tmp_path / "other")
    assert code == 2 and "invirtuo judge" in err and not (tmp_path / "other").exists()


def test_cells_under_the_name_of_another_kind(run, files, tmp_path):
    for command in (
        ["prepare", files / "counts.h5ad", tmp_path / "out.csv"],
        ["predict", files / "mean", "--conditions", "t_cell|A", "-n", 3, "--out", tmp_path / "out.loom"],
    ):
        code, _, err = run(*command)
        assert code == 2 and "cells are written as .h5ad" in err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("root", "words"),
    [("mod", "holds no modality"), ("matrix", "not a readable 10x Genomics file"), ("col_attrs", "read_loom")],
)
def test_files_of_other_kinds_are_named(run, tmp_path, root, words):
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file.create_group(root)
    code, _, err = run("check", tmp_path / "x.h5ad")
    assert code == 2 and words in err


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_zarr_and_nullable_names(run, files, tmp_path):
    counts = ad.read_h5ad(files / "counts.h5ad")
    counts.obs.index = counts.obs.index.astype("string")
    counts.obs["note"] = pd.array(["x"] * counts.n_obs, dtype="string")
    with ad.settings.override(allow_write_nullable_strings=True):
        counts.write_h5ad(tmp_path / "nullable.h5ad")
    ad.read_h5ad(files / "counts.h5ad").write_zarr(tmp_path / "counts.zarr")
    for name in ("nullable.h5ad", "counts.zarr"):
        assert run("check", tmp_path / name, *COLUMNS)[0] == 0
        code, _, err = run("prepare", tmp_path / name, tmp_path / "log.h5ad")
        assert code == 0, err
    assert ad.read_h5ad(tmp_path / "log.h5ad").n_obs == counts.n_obs


def test_entry_points_size_threads(monkeypatch):
    from invirtuo import threads

    for name in (*threads.VARIABLES, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.setattr(threads, "n_cores", lambda: 3)
    threads.size_threads()
    assert os.environ["OMP_NUM_THREADS"] == os.environ["NUMBA_NUM_THREADS"] == "3"
    assert os.environ["MKL_NUM_THREADS"] == "7"  # what the user says stays
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


# ---- what was asked, as a file ---------------------------------------------------------------------------------------


def test_a_run_says_what_was_asked_and_can_be_asked_again(run, files, tmp_path):
    asked = ["linear_additive", files / "log.h5ad", *COLUMNS, "--hold-out", "monocyte|A", "--set", "softplus=false"]
    fit = ["--fit-set", "steps=3", "--fit-set", "batch_size=32", "--quiet"]
    assert run("fit", *asked, *fit, "--out", tmp_path / "first")[0] == 0
    written = tomllib.loads((tmp_path / "first" / "run.toml").read_text())
    assert written["model"] == "linear_additive" and written["fit-set"] == ["steps=3", "batch_size=32"]
    assert not {"out", "quiet", "unseen", "features"} & set(written)

    # the same again, but for what is given on the command line
    again = ["fit", "--config", tmp_path / "first" / "run.toml", "--quiet", "--out"]
    assert run(*again, tmp_path / "second")[0] == 0
    first, second = (iv.load(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert run(*again, tmp_path / "third", "--set", "use_covariates=false")[0] == 0
    assert not iv.load(tmp_path / "third").config.use_covariates

    for text, words in (("modl = 'ridge'", "holds modl; expected some of .*hold-out"), ("model = ", "cannot be read")):
        (tmp_path / "bad.toml").write_text(text)
        code, _, error = run("fit", "--config", tmp_path / "bad.toml", "--out", tmp_path / "none")
        assert code == 2 and re.search(words, error), error
        assert not (tmp_path / "none").exists()


def test_every_option_of_a_verb_is_read_in_it():
    """But for those that act before the verb, by their callback."""
    for file in sorted((Path(iv.__file__).parent / "cli").glob("*.py")):
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        for function in functions:
            asked = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
            read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            assert asked - read <= {"config", "version", "_"}, (file.name, function.name)

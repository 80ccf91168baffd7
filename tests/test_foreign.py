"""Contract of models of anybody: a command is asked without held-out cells, and its answer is a row like others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import invirtuo as iv
from invirtuo.bench import Entry, Task
from invirtuo.bench.entry import as_entries, as_entry
from invirtuo.bench.question import Asked, Question
from invirtuo.splits import hold_out

PAGE = Path(__file__).parents[1] / "docs" / "how-to.md"
METRICS = ("rmse_mean", "mmd_pca")
HELD_OUT = ("monocyte|A", "b_cell|A+B")

# an adapter whose answer is what the first argument says
ADAPTER = """
import sys, json, time
import anndata as ad, numpy as np, pandas as pd
what, folder = sys.argv[1:]
print("doing", what, flush=True)
train, controls = ad.read_h5ad(f"{folder}/train.h5ad"), ad.read_h5ad(f"{folder}/controls.h5ad")
wanted = pd.read_csv(f"{folder}/conditions.csv")
seed = json.load(open(f"{folder}/asked.json"))["seed"]
rng = np.random.default_rng(seed)
obs = wanted.loc[wanted.index.repeat(wanted["n_cells"])].reset_index(drop=True)
def draw(pool):
    return pool[rng.integers(0, pool.n_obs, len(obs))]
cells = draw(controls)
x, scale = cells.X.toarray(), "log1p"
noisy = np.where(x > 0, np.abs(x + rng.normal(0, .4, x.shape)), 0)
if what == "noise":
    x = noisy
elif what == "mean":
    x = np.repeat(train.X.toarray().mean(0, keepdims=True), len(obs), 0)
elif what == "training":
    x = draw(train[train.obs["perturbation"] != "control"]).X.toarray() + .001
elif what == "counts":
    x, scale = cells.layers["counts"].toarray(), "counts"
elif what == "fail":
    raise SystemExit("out of luck")
elif what == "sleep":
    time.sleep(60)
elif what == "leave nothing":
    raise SystemExit
obs.index = obs.index.astype(str)
answer = ad.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=train.var_names), uns={"scale": scale})
answer[:, rng.permutation(answer.n_vars)].copy().write_h5ad(f"{folder}/predicted.h5ad")
"""


@pytest.fixture
def task(toy, design, tmp_path) -> Task:
    path = tmp_path / "toy.h5ad"
    iv.preprocess.normalize(toy).write_h5ad(path)
    split = partial(hold_out, conditions=HELD_OUT, val=("t_cell|B", "monocyte|C"))
    return Task(
        "toy", "two conditions of the toy data", str(path), (split,), design, metrics=METRICS, n_cells=40, n_pcs=5
    )


@pytest.fixture
def adapter(tmp_path):
    """Give a function that makes an entry of a command that answers in this way."""
    (tmp_path / "adapter.py").write_text(ADAPTER, encoding="utf-8")

    def entry(what: str, label: str = "", **fields) -> Entry:
        command = ["{python}", str(tmp_path / "adapter.py"), what, "{folder}"]
        return Entry(label or what, command=command, **fields)

    return entry


def question(task: Task, folder: Path, **asked) -> Question:
    adata, design, split = task.load()
    made = Question(adata, design, split, Asked(n_cells=task.n_cells, **asked))
    made.write(folder)
    return made


# ---- the question ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controls", ["train", "evaluated"])
def test_nothing_of_held_out_cells_is_in_any_file(task, tmp_path, controls):
    """Held-out cells, also those for validation when these are asked for, carry a value that no file may have."""
    adata = anndata.read_h5ad(task.dataset)
    design = task.design
    split = task.splits[0](adata.obs, design)
    is_told = design.is_control(adata.obs) & (split == "test").to_numpy() & (controls == "evaluated")
    is_secret = (split == "test").to_numpy() & ~is_told
    marked = np.where(is_secret[:, None], 777.25, adata.X.toarray())
    adata.X, adata.layers["counts"] = sparse.csr_matrix(marked), sparse.csr_matrix(marked)
    adata.obs["total_counts"] = np.where(is_secret, 777.25, adata.obs["total_counts"])
    adata.obs["note"] = np.where(is_secret, "secret", "told")
    adata.obs_names = split.index = [f"secret_{i}" if flag else f"told_{i}" for i, flag in enumerate(is_secret)]
    adata.obsm["X_pca"] = np.full((adata.n_obs, 2), 777.25)
    adata.var["mean"] = 777.25
    adata.uns["note"] = "secret"
    Question(adata, design, split, Asked(controls=controls)).write(tmp_path / "q")

    files = {file.name for file in (tmp_path / "q").iterdir()}
    assert files == {"train.h5ad", "controls.h5ad", "conditions.csv", "design.json", "asked.json"}
    for name in ("train.h5ad", "controls.h5ad"):
        with h5py.File(tmp_path / "q" / name) as file:
            found = []
            file.visititems(lambda _, item, found=found: found.append(item) if isinstance(item, h5py.Dataset) else None)
            for item in found:
                values = np.asarray(item[()])
                if values.dtype.kind in "fiu":
                    assert not (values == 777.25).any(), item.name
                else:
                    assert "secret" not in str(values.tolist()), item.name
    for name in files - {"train.h5ad", "controls.h5ad"}:
        assert "secret" not in (tmp_path / "q" / name).read_text()
    train = anndata.read_h5ad(tmp_path / "q" / "train.h5ad")
    assert set(train.obs["split"]) == {"train", "val"}
    assert not set(design.names(train.obs)) & set(HELD_OUT)
    assert train.n_obs == int(split.isin(["train", "val"]).sum())
    start = anndata.read_h5ad(tmp_path / "q" / "controls.h5ad")
    assert set(start.obs["perturbation"]) == {"control"}
    assert set(start.obs["split"]) == {"train" if controls == "train" else "test"}


def test_validation_cells_are_left_out_when_they_are_asked_for(task, tmp_path):
    question(task, tmp_path / "q", part="val")
    assert set(anndata.read_h5ad(tmp_path / "q" / "train.h5ad").obs["split"]) == {"train"}


# ---- the answer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def answer(task, tmp_path):
    """A question, and an answer to it that would be taken."""
    asked = question(task, tmp_path / "q")
    controls = anndata.read_h5ad(tmp_path / "q" / "controls.h5ad")
    wanted = pd.read_csv(tmp_path / "q" / "conditions.csv")
    obs = wanted.loc[wanted.index.repeat(wanted["n_cells"])].reset_index(drop=True)
    obs.index = obs.index.astype(str)
    rows = np.resize(np.arange(controls.n_obs), len(obs))
    x = controls.X[rows]
    return asked, anndata.AnnData(x, obs=obs, var=controls.var, uns={"scale": "log1p"})


def read(asked: Question, cells, path: Path):
    cells.write_h5ad(path)
    return asked.read(path)


def test_counts_and_log_values_say_the_same(answer, task, tmp_path):
    asked, cells = answer
    logs = read(asked, cells, tmp_path / "logs.h5ad")
    assert list(logs.var_names) == list(task.load()[0].var_names)
    # of genes that are a half, the depth over all genes is not the sum
    controls = anndata.read_h5ad(tmp_path / "q" / "controls.h5ad")
    rows = np.resize(np.arange(controls.n_obs), cells.n_obs)
    counts = cells.copy()
    counts.X, counts.uns["scale"] = sparse.csr_matrix(controls.layers["counts"][rows]), "counts"
    counts.obs["total_counts"] = controls.obs["total_counts"].to_numpy()[rows]
    np.testing.assert_allclose(read(asked, counts, tmp_path / "c.h5ad").X.toarray(), logs.X.toarray(), rtol=1e-5)
    del counts.obs["total_counts"]
    np.testing.assert_allclose(read(asked, counts, tmp_path / "c.h5ad").X.toarray(), logs.X.toarray(), rtol=1e-5)


def test_what_is_wrong_with_an_answer_is_said(answer, tmp_path):
    asked, cells = answer

    def refused(words: str, **changes) -> None:
        wrong = cells.copy()
        for name, value in changes.items():
            setattr(wrong, name, value)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a.h5ad"))) as error:
            read(asked, wrong, tmp_path / "a.h5ad")
        assert words in str(error.value), error.value

    x = cells.X.toarray()
    refused("uns[\"scale\"] is 'not there'", uns={})
    refused("negative", X=x - 1)
    refused("NaN or infinite", X=np.where(x > 0, np.nan, 0))
    refused("looks like raw counts", X=np.rint(np.expm1(x)))
    refused("expected raw counts", uns={"scale": "counts"})
    refused(": not asked for, b_cell|A+B has 0 cells", obs=cells.obs.assign(perturbation="B"))
    refused("column 'cell_type' is not in the table", obs=cells.obs[["perturbation"]])
    refused("genes are missing: gene_0", var_names=["another", *cells.var_names[1:]])
    with pytest.raises(ValueError, match=r"b_cell\|A\+B has 39 cells, not 40; expected n_cells"):
        read(asked, cells[1:].copy(), tmp_path / "a.h5ad")


# ---- in a benchmark --------------------------------------------------------------------------------------------------


def test_a_command_is_a_row_like_others(same_process, task, adapter, tmp_path):
    seeds = iv.benchmark(task, adapter("noise"), 2, tmp_path / "out", baselines=False)
    of_seeds = seeds[(seeds["model"] == "noise") & (seeds["metric"] == "mmd_pca")].groupby("seed")["value"].mean()
    assert of_seeds[0] != of_seeds[1]
    record = json.loads((tmp_path / "out" / "cells" / "toy" / "noise" / "1.json").read_text())
    assert record["logs"] == [{"fold": 0, "text": "doing noise\n"}]
    assert not list((tmp_path / "out" / "work").iterdir())

    # all that can go wrong is a row as well
    entries = [adapter(what) for what in ("noise", "counts", "fail", "leave nothing")]
    entries.append(adapter("sleep", minutes=0.05))
    scores = iv.benchmark(task, entries, 1, tmp_path / "out", baselines=False)
    assert set(scores["model"]) == {"noise", "counts", "noise_floor"}
    costs = pd.read_csv(tmp_path / "out" / "costs.csv").set_index(["model", "seed"])
    errors = costs["error"]
    assert "ended with exit code 1" in errors["fail", 0] and "out of luck" in errors["fail", 0]
    assert "left no predicted.h5ad" in errors["leave nothing", 0]
    assert "did not end within 0.05 minutes" in errors["sleep", 0]
    ours = costs.loc[("noise", 0)]
    assert ours["status"] == "ok" and ours["cpu_seconds"] > 0.1 and 20 < ours["peak_memory_mib"] < 2000
    assert ours["fit_seconds"] > 0.1 and np.isnan(ours["parameters"])


def test_a_second_run_computes_nothing_unless_the_script_changed(same_process, task, adapter, tmp_path):
    entry = adapter("noise")
    iv.benchmark(task, entry, 1, tmp_path / "out", baselines=False)
    file = tmp_path / "out" / "cells" / "toy" / "noise" / "0.json"
    before = file.stat().st_mtime_ns
    iv.benchmark(task, entry, 1, tmp_path / "out", baselines=False)
    assert file.stat().st_mtime_ns == before
    with (tmp_path / "adapter.py").open("a") as script:
        script.write("# another\n")
    with pytest.raises(ValueError, match="made with other settings: entry"):
        iv.benchmark(task, entry, 1, tmp_path / "out", baselines=False)


def test_cheats_are_flagged(same_process, task, adapter, tmp_path):
    """Controls handed on, training cells with a little noise, one mean, and the held-out cells themselves."""
    adata, design, split = task.load()
    is_real = ((split == "test") & ~design.is_control(adata.obs)).to_numpy()
    real = adata[is_real]
    rows = [np.resize(np.flatnonzero(design.names(real.obs) == name), 40) for name in HELD_OUT]
    taken = np.concatenate(rows)
    x = real.X.toarray()[taken] + np.random.default_rng(0).uniform(0, 0.02, (len(taken), real.n_vars))
    obs = real.obs.iloc[taken].set_index(pd.Index([f"mine_{i}" for i in range(len(taken))]))
    stolen = anndata.AnnData(x, obs=obs, var=real.var, uns={"scale": "log1p"})
    stolen.write_h5ad(tmp_path / "stolen.h5ad")
    entries = [adapter(what) for what in ("noise", "controls", "training", "mean")]
    entries.append(as_entry(f"predicted:{tmp_path / 'stolen.h5ad'}"))
    iv.benchmark(task, entries, 1, tmp_path / "out", baselines=False)
    flags = pd.read_csv(tmp_path / "out" / "flags.csv").groupby("model")["flag"].agg(set)
    assert "control_cells" in flags["controls"]
    assert "training_cells" in flags["training"]
    assert "no_spread" in flags["mean"]
    assert "held_out_cells" in flags["stolen"]
    copies = {"control_cells", "training_cells", "held_out_cells"}
    assert not flags.get("noise", set()) & copies and not flags["mean"] & copies


def test_in_a_comparison(toy, design, adapter, tmp_path):
    cells = iv.preprocess.normalize(toy)
    split = iv.splits.hold_out(cells.obs, design, ["monocyte|A"])
    entries = [adapter("noise"), Entry("none", "no_change")]
    options = {"split": split, "n_cells": 30, "metrics": ["rmse_mean"], "baselines": False, "progress": False}
    scores = iv.compare(cells, design, entries, out=tmp_path / "out", **options)
    assert set(scores["model"]) == {"noise", "none", "noise_floor"}
    assert anndata.read_h5ad(tmp_path / "out" / "predicted.h5ad").n_obs == 30
    assert (tmp_path / "out" / "models" / "noise" / "log.txt").read_text() == "doing noise\n"
    assert not list((tmp_path / "out" / "rows").rglob("train.h5ad"))
    done = (tmp_path / "out" / "rows" / "noise" / "record.json").stat().st_mtime_ns
    iv.compare(cells, design, entries, out=tmp_path / "out", **options)
    assert (tmp_path / "out" / "rows" / "noise" / "record.json").stat().st_mtime_ns == done


def test_entries_say_what_is_wrong(tmp_path, adapter):
    with pytest.raises(ValueError, match="expected a list of strings"):
        Entry("mine", command="python adapter.py {folder}")
    with pytest.raises(ValueError, match="expected one of model, command and predicted"):
        Entry("mine")
    with pytest.raises(ValueError, match="expected one of model, command and predicted"):
        Entry("mine", "ridge", command=["a", "{folder}"])
    with pytest.raises(ValueError, match="does not name the folder"):
        as_entry(Entry("mine", command=["python", "adapter.py"]))
    with pytest.raises(ValueError, match="'no-such-program' is no program here"):
        as_entry(Entry("mine", command=["no-such-program", "{folder}"]))
    with pytest.raises(ValueError, match="takes no config"):
        as_entry(replace(adapter("noise"), config={"width": 3}))
    with pytest.raises(ValueError, match="so that steps of the fit would have no effect"):
        as_entry(replace(adapter("noise"), fit={"steps": 3, "seed": 1}))
    with pytest.raises(ValueError, match=r"takes no options of predict \(guidance\)"):
        as_entry(replace(adapter("noise"), predict={"guidance": 3}))
    with pytest.raises(ValueError, match="cannot forecast"):
        as_entries(adapter("noise"), "forecast")
    with pytest.raises(ValueError, match="command has nothing to search"):
        iv.bench.tune(adapter("noise"), "kang-demo", 1, tmp_path / "tuned")
    facts = Entry("ridge", "ridge").describe()
    assert not {"command", "minutes", "predicted", "files"} & set(facts)  # as before there were commands


# ---- as the how-to has it --------------------------------------------------------------------------------------------


def test_the_adapter_of_the_how_to(same_process, run, tmp_path, monkeypatch):
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# adapter\.py\n.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r"```json\n(\{\"label\".*?)```", page, re.DOTALL)
    (tmp_path / "adapter.py").write_text(code, encoding="utf-8")
    (tmp_path / "mine.json").write_text(entry, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    command = "benchmark kang-demo --model command:mine.json --seeds 1 --no-baselines --metrics rmse_mean --out results"
    code, said, error = run(*command.split())
    assert code == 0, error
    assert "mine" in said
    costs = pd.read_csv("results/costs.csv").set_index("model")
    assert costs.loc["mine", "status"] == "ok" and costs.loc["mine", "cpu_seconds"] > 0
    flags = pd.read_csv("results/flags.csv")
    assert not set(flags["flag"]) & {"control_cells", "training_cells", "held_out_cells"}


# ---- several groups --------------------------------------------------------------------------------------------------


def test_predictions_of_others_and_one_table(same_process, run, tmp_path, monkeypatch):
    """Ask, answer, score, and join the folder with that of another group."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("invirtuo.bench.run.BASELINES", iv.bench.entry.BASELINES[:1])
    code, said, error = run("arena", "ask", "kang-demo", "--seed", 5, "--out", "question")
    assert code == 0 and "question/predicted.h5ad" in said, error
    assert json.loads(Path("question/asked.json").read_text())["seed"] == 5
    controls = anndata.read_h5ad("question/controls.h5ad")
    wanted = pd.read_csv("question/conditions.csv")
    obs = wanted.loc[wanted.index.repeat(wanted["n_cells"])].reset_index(drop=True)
    obs.index = obs.index.astype(str)
    x = controls.X[np.random.default_rng(0).integers(controls.n_obs, size=len(obs))]
    anndata.AnnData(x, obs=obs, var=controls.var, uns={"scale": "log1p"}).write_h5ad("question/predicted.h5ad")
    theirs = ["--model", "predicted:question/predicted.h5ad", "--out", "theirs"]
    options = ["--seeds", "1", "--metrics", "rmse_mean", "--quiet"]
    code, _, error = run("benchmark", "kang-demo", *theirs, *options)
    assert code == 0, error
    assert "control_cells" in set(pd.read_csv("theirs/flags.csv")["flag"])
    assert run("benchmark", "kang-demo", "--model", "context_mean", "--out", "ours", *options)[0] == 0

    code, said, error = run("arena", "merge", "ours", "theirs", "--out", "both")
    assert code == 0 and "predicted" in said, error
    scores = pd.read_csv("both/scores.csv")
    models = list(dict.fromkeys(scores["model"]))
    assert models[0] == "predicted" and models[-1] == "noise_floor" and len(models) == 4
    for folder in ("ours", "theirs"):
        own = pd.read_csv(f"{folder}/scores.csv")
        both = scores.merge(own, on=["model", "condition", "metric"])
        assert len(both) == len(own)
        np.testing.assert_array_equal(both["value_x"], both["value_y"])
    assert Path("both/report.html").is_file()

    # what must not stand in one table
    assert "holds a benchmark already" in run("arena", "merge", "ours", "--out", "both")[2]
    assert "holds no cells of a benchmark" in run("arena", "merge", "question", "--out", "new")[2]
    file = next(Path("theirs/cells").rglob("noise_floor/0.json"))
    record = json.loads(file.read_text())
    for change, words in (({"metrics": ["mmd_pca"]}, "metrics differs in kang-demo"), ({"version": "0"}, "version")):
        file.write_text(json.dumps(record | {"settings": record["settings"] | change}))
        assert words in run("arena", "merge", "ours", "theirs", "--out", "new")[2]
    other = json.loads(json.dumps(record))
    other["scores"]["rows"][0][other["scores"]["columns"].index("value")] *= 1.1
    file.write_text(json.dumps(other))
    code, _, error = run("arena", "merge", "ours", "theirs", "--out", "new")
    assert code == 2 and "have other scores of 'noise_floor'" in error


# ---- populations ----------------------------------------------------------------------------------------------------

GENERATOR = """
import sys, json
import anndata as ad, numpy as np, pandas as pd
what, folder = sys.argv[1:]
train, wanted = ad.read_h5ad(f"{folder}/train.h5ad"), pd.read_csv(f"{folder}/conditions.csv")
asked = json.load(open(f"{folder}/asked.json"))
assert asked["verb"] == "generate", asked
rng = np.random.default_rng(asked["seed"])
obs = wanted.loc[wanted.index.repeat(wanted["n_cells"])].reset_index(drop=True)
obs.index = obs.index.astype(str)
x = train.X.toarray()
rows = rng.integers(0, train.n_obs, len(obs))
if what == "hand on":
    x = x[rows]
elif what == "draw":
    x = rng.poisson(np.maximum(x.mean(0), .01) * x[rows].sum(1, keepdims=True) / x.sum(1).mean())
else:
    obs, x = (obs[1:], x[rows[1:]]) if what == "too few" else (obs, x[rows])
answer = ad.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=train.var_names), uns={"scale": "counts"})
if what == "logs":
    answer.X, answer.uns["scale"] = np.log1p(x), "log1p"
answer.write_h5ad(f"{folder}/generated.h5ad")
"""


@pytest.fixture
def population(toy):
    """Counts without perturbation, their design, and a split of the cells."""
    design = iv.Design.from_adata(toy, covariates=["cell_type"])
    return toy, design, iv.splits.cells(toy.obs, design)


@pytest.fixture
def generator(tmp_path):
    """Give a function that makes an entry of a command that draws a population in this way."""
    (tmp_path / "generator.py").write_text(GENERATOR, encoding="utf-8")

    def entry(what: str) -> Entry:
        return Entry(what, command=["{python}", str(tmp_path / "generator.py"), what, "{folder}"])

    return entry


def test_a_population_is_asked_for_without_cells_that_are_held_out(population, tmp_path):
    toy, design, split = population
    is_secret = (split == "test").to_numpy()
    toy.X = sparse.csr_matrix(np.where(is_secret[:, None], 777, toy.X.toarray()))
    Question(toy, design, split, Asked(labels=toy.obs[is_secret])).write(tmp_path / "q")
    assert {file.name for file in (tmp_path / "q").iterdir()} == {
        "train.h5ad",
        "conditions.csv",
        "design.json",
        "asked.json",
    }
    train = anndata.read_h5ad(tmp_path / "q" / "train.h5ad")
    assert train.n_obs == (~is_secret).sum() and train.X.max() < 777
    wanted = pd.read_csv(tmp_path / "q" / "conditions.csv").set_index("cell_type")["n_cells"]
    assert wanted.to_dict() == toy.obs["cell_type"][is_secret].value_counts().to_dict()


def test_a_command_that_generates_is_judged_like_others(population, generator, tmp_path):
    toy, design, split = population
    options = {"split": split, "metrics": ["rmse_mean", "zeros_distance"], "progress": False}
    entries = [generator("draw"), generator("hand on")]
    scores = iv.compare(toy, design, entries, out=tmp_path / "out", **options)
    assert {"draw", "hand on", "independent_nb", "training cells", "noise_floor"} == set(scores["model"])
    assert np.isfinite(scores["value"]).all()
    flags = pd.read_csv(tmp_path / "out" / "flags.csv")
    assert set(zip(flags["model"], flags["flag"], strict=True)) == {("hand on", "training_cells")}
    made = anndata.read_h5ad(tmp_path / "out" / "models" / "draw" / "generated.h5ad")
    assert made.n_obs == (split == "test").sum()
    for what, words in (("too few", "expected n_cells of each"), ("logs", "expected 'counts'")):
        with pytest.raises(ValueError, match=words):
            iv.compare(toy, design, generator(what), out=tmp_path / what, **options)


def test_held_out_cells_handed_on_as_a_population_are_flagged(population, tmp_path):
    toy, design, split = population
    stolen = toy[(split == "test").to_numpy()].copy()
    stolen.uns["scale"] = "counts"
    stolen.write_h5ad(tmp_path / "stolen.h5ad")
    options = {"split": split, "metrics": ["rmse_mean"], "progress": False, "baselines": False}
    iv.compare(toy, design, f"predicted:{tmp_path / 'stolen.h5ad'}", out=tmp_path / "out", **options)
    assert "held_out_cells" in set(pd.read_csv(tmp_path / "out" / "flags.csv")["flag"])


# ---- what is left behind ---------------------------------------------------------------------------------------------

SCRIPT = """
import pickle, sys
import invirtuo as iv
task, entry = pickle.loads(open(sys.argv[1], "rb").read())
iv.benchmark(task, entry, 1, sys.argv[2], n_jobs=1, baselines=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_command_ends_with_a_benchmark_that_is_stopped(task, adapter, tmp_path, number):
    """The first process killed, or interrupted, or all of them stopped, as `timeout` and schedulers do."""
    import cloudpickle

    with (tmp_path / "adapter.py").open("a") as script:
        script.write("# and says so\n")
    text = (tmp_path / "adapter.py").read_text()
    (tmp_path / "adapter.py").write_text(text.replace("time.sleep(60)", "time.sleep(5); open(folder + '/late', 'w')"))
    (tmp_path / "what").write_bytes(cloudpickle.dumps((task, adapter("sleep"))))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "what"), str(tmp_path / "out")]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any("doing" in log.read_text() for log in (tmp_path / "out").rglob("log.txt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    (os.killpg if number == signal.SIGTERM else os.kill)(process.pid, number)
    process.wait()
    time.sleep(8)
    assert not list((tmp_path / "out").rglob("late")) and not list((tmp_path / "out").rglob("predicted.h5ad"))


# ---- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = Path(__file__).parents[1] / "adapters"


def test_adapters_read_and_write_what_the_contract_says(task, tmp_path, monkeypatch):
    """Starting cells are controls of the wanted covariates, and the answer would be taken."""
    monkeypatch.syspath_prepend(ADAPTERS)
    folder = pytest.importorskip("folder", reason="adapters come with the repository alone")
    asked = question(task, tmp_path / "q")
    found = folder.read(str(tmp_path / "q"))
    assert set(found.validation.obs["split"]) == {"val"} and set(found.train.obs["split"]) == {"train"}
    obs, start = folder.starting_cells(found)
    assert (obs["cell_type"].astype(str).to_numpy() == start.obs["cell_type"].astype(str).to_numpy()).all()
    assert found.is_control(start.obs).all()
    obs["total_counts"] = start.obs["total_counts"].to_numpy()
    folder.write(found, start.layers["counts"], obs, "counts")
    answer = asked.read(tmp_path / "q" / "predicted.h5ad")
    np.testing.assert_allclose(answer.X.toarray(), start.X.toarray(), rtol=1e-5)


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*_*.py")), ids=lambda path: path.name)
def test_adapters_are_short_and_name_what_they_need(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first = text.splitlines()[0]
    package, version, licence = re.search(r"\((\S+) (\S+), (.+?)\)", first).groups()
    assert f'"{package}=={version}"' in text and "# /// script" in text
    row = f"| `{path.name}` | {package} {version} | {licence}"
    assert row in (ADAPTERS / "README.md").read_text(encoding="utf-8")

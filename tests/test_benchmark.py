"""Contract of the benchmark: every cell a file, killed and resumed the same table, engines the same table."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad
from tests.published_files import published_file  # by this name in other processes, too

import invirtuo as iv
from invirtuo.bench import TASKS, Entry, Task, paired_differences, tune
from invirtuo.bench.cell import Cell, compute, launch
from invirtuo.bench.entry import as_entries, as_entry
from invirtuo.bench.published import published_numbers
from invirtuo.bench.run import chosen_entries
from invirtuo.cells.packed import Unpacked
from invirtuo.models import MODELS
from invirtuo.splits import hold_out, unseen_targets

KEEPS_TABLES = ("scores.csv", "summary.csv", "comparisons.csv")
METRICS = ("rmse_mean", "rmse_mean_rank", "mmd_pca")


@pytest.fixture
def task(toy, design, tmp_path) -> Task:
    path = tmp_path / "toy.h5ad"
    iv.preprocess.normalize(toy).write_h5ad(path)
    split = partial(hold_out, conditions=("monocyte|A", "b_cell|A+B"), val=("t_cell|B", "monocyte|C"))
    return Task(
        "toy", "two conditions of the toy data", str(path), (split,), design, metrics=METRICS, n_cells=20, n_pcs=5
    )


@pytest.fixture
def entries() -> list[Entry]:
    fit = {"steps": 6, "batch_size": 32, "val_every": 3, "checkpoint_every": 2}
    tiny = {"hidden_dim": 16, "cell_width": 16, "gene_width": 8, "n_blocks": 1, "steps": 2}
    flow = Entry("flow", "primeflow", tiny, fit, variants={"flow, guided": {"guidance": 2.0}})
    return [flow, Entry("none", "no_change")]


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in KEEPS_TABLES]


def test_every_cell_is_a_file_and_every_table_is_there(same_process, task, entries, tmp_path, caplog):
    broken = Entry("broken", "linear_additive", None, {"steps": 3, "lr": 1e30, "batch_size": 32})
    scores = iv.benchmark([task], [*entries, broken], 2, tmp_path / "out", n_jobs=1, baselines=False)
    cells = {str(file.relative_to(tmp_path / "out" / "cells")) for file in (tmp_path / "out" / "cells").rglob("*.json")}
    costs = pd.read_csv(tmp_path / "out" / "costs.csv").set_index(["model", "seed"])
    assert len(cells) == 2 * 4  # two of ours, a broken one, the floor
    assert len(costs) == 2 * 5  # and the variant
    assert (costs["status"] == "failed").groupby("model").all().to_dict()["broken"]
    assert (costs["status"] == "failed").sum() == 2
    assert "broken/0 failed: FloatingPointError" in caplog.text
    assert costs.loc[("flow", 0), "peak_memory_mib"] > 100
    assert costs.loc[("flow", 0), "fit_seconds"] == costs.loc[("flow, guided", 0), "fit_seconds"] > 0
    assert set(scores["model"]) == {"flow", "flow, guided", "none", "noise_floor"}
    assert set(scores["condition"]) == {"monocyte|A", "b_cell|A+B"}
    assert set(scores["metric"]) == set(METRICS)
    pd.testing.assert_frame_equal(scores, pd.read_csv(tmp_path / "out" / "scores.csv"), check_dtype=False)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv").set_index(["model", "metric"])
    flow = scores[(scores["model"] == "flow") & (scores["metric"] == "mmd_pca")]
    of_seeds = flow.groupby("seed")["value"].mean()
    assert summary.loc[("flow", "mmd_pca"), "mean"] == pytest.approx(of_seeds.mean())
    assert summary.loc[("flow", "mmd_pca"), "sd"] == pytest.approx(of_seeds.std())
    assert of_seeds.std() > 0
    assert not list((tmp_path / "out" / "cells").rglob(".*.part*"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "broken" in page


def test_a_second_run_computes_nothing(same_process, task, entries, tmp_path):
    iv.benchmark(task, entries[1], 1, tmp_path / "out", baselines=False)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").rglob("*.json")}
    before = tables(tmp_path / "out")
    iv.benchmark(task, entries[1], 1, tmp_path / "out", baselines=False)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "cells").rglob("*.json")}
    assert tables(tmp_path / "out") == before
    with pytest.raises(ValueError, match="made with other settings: task was"):
        iv.benchmark(replace(task, n_cells=21), entries[1], 1, tmp_path / "out", baselines=False)
    with pytest.raises(ValueError, match="begun with threads=1"):
        iv.benchmark(task, entries[1], 1, tmp_path / "out", threads=2)
    next(iter(files)).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        iv.benchmark(task, entries[1], 1, tmp_path / "out", baselines=False)


SCRIPT = """
import pickle, sys
import invirtuo as iv
task, entries = pickle.loads(open(sys.argv[1], "rb").read())
iv.benchmark(task, entries, 2, sys.argv[2], n_jobs=1, baselines=False)
"""


@pytest.mark.slow
def test_killed_and_restarted_equals_uninterrupted(task, entries, tmp_path):
    import cloudpickle

    (tmp_path / "what").write_bytes(cloudpickle.dumps((task, entries)))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "what"), str(tmp_path / "killed")]
    for n_cells in (1, 3):  # killed once these many cells are there, in the midst of the next
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "killed").rglob("cells/**/*.json"))) < n_cells and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.5)
    left = list((tmp_path / "killed").rglob("cells/**/*.json"))
    assert 3 <= len(left) < 6
    iv.benchmark(task, entries, 2, tmp_path / "killed", n_jobs=1, baselines=False)
    iv.benchmark(task, entries, 2, tmp_path / "whole", n_jobs=2, baselines=False)
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")


@pytest.mark.slow
def test_ray_gives_the_same_tables(task, entries, tmp_path):
    pytest.importorskip("ray", reason="needs ray")
    iv.benchmark(task, entries, 1, tmp_path / "local", baselines=False)
    iv.benchmark(task, entries, 1, tmp_path / "ray", engine="ray", n_jobs=2, baselines=False)
    assert tables(tmp_path / "local") == tables(tmp_path / "ray")


def test_models_start_from_the_controls_that_are_asked_for(same_process, task, tmp_path):
    """Evaluated controls without change have no effect on genes but noise; training controls differ by theirs."""
    entries = [Entry("none", "no_change"), Entry("profile", "ridge")]
    tables = {}
    for controls in ("train", "evaluated"):
        folder = tmp_path / controls
        scores = iv.benchmark(task, entries, 1, folder, controls=controls, baselines=False, metrics=["rmse_mean"])
        tables[controls] = scores.groupby(["model", "condition"])["value"].mean()
    adata, design, split = task.load()
    real = adata[(split == "test").to_numpy()]
    own = real[design.is_control(real.obs)].copy()
    model = iv.models.NoChange(design, adata.var_names).fit(adata, split)
    by_hand = iv.evaluate(model.predict("test", 20, controls=own), real.copy(), design, metrics=["rmse_mean"])
    by_hand = by_hand.set_index("condition")["value"]
    for condition, value in tables["evaluated"]["none"].items():
        if condition in by_hand:
            assert value == pytest.approx(by_hand[condition])
    assert (tables["evaluated"]["none"] != tables["train"]["none"]).any()
    assert tables["evaluated"]["noise_floor"].equals(tables["train"]["noise_floor"])
    with pytest.raises(ValueError, match="other settings"):
        iv.benchmark(task, entries, 1, tmp_path / "train", controls="evaluated", baselines=False, metrics=["rmse_mean"])
    with pytest.raises(ValueError, match="controls is 'real'; expected one of train, evaluated"):
        iv.benchmark(task, entries, 1, tmp_path / "x", controls="real")


def suicide(obs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_a_failed_cell(task, entries):
    record = launch(Cell(replace(task, keep=suicide), entries[1], 0))
    assert record["status"] == "failed"
    assert "killed by signal 9" in record["error"], record["traceback"]


@pytest.mark.slow
def test_several_splits_are_scored_together(task, entries):
    other = partial(hold_out, conditions=("t_cell|C",), val=("t_cell|B",))
    record = launch(Cell(replace(task, splits=(*task.splits, other)), entries[1], 0))
    names = {row[record["scores"]["columns"].index("condition")] for row in record["scores"]["rows"]}
    assert names == {"monocyte|A", "b_cell|A+B", "t_cell|C"}


def test_perturbations_never_trained_on_are_not_scored(task):
    split = partial(
        hold_out,
        conditions=({"perturbation": "A"}, {"perturbation": "A+B"}, "t_cell|C"),
        val=({"perturbation": "A+C"},),
    )
    _, design, parts = replace(task, splits=(split,)).load()
    adata, _, whole = replace(task, splits=(split,), unseen=True).load()
    of = lambda parts: set(design.conditions(adata.obs[(parts == "test").to_numpy()])["perturbation"])  # noqa: E731
    assert of(parts) == {"C"}
    assert of(whole) == {"A", "A+B", "C"}


def test_targets_that_were_seen_nowhere(task, tmp_path, same_process):
    """Features are those of the task; baselines that cannot say anything are left out."""
    pd.DataFrame(np.eye(3), index=["A", "B", "C"]).to_csv(tmp_path / "vectors.csv")
    split = partial(unseen_targets, n_folds=3)
    new = replace(task, splits=(split,), unseen=True, features=("vectors.csv",), metrics=("rmse_mean",))
    scores = iv.benchmark(new, Entry("ridge", "ridge", "kernel"), 1, tmp_path / "out", data_dir=tmp_path)
    assert set(scores["model"]) == {"ridge", "context_mean", "no_change", "noise_floor"}
    costs = pd.read_csv(tmp_path / "out/costs.csv")
    assert set(costs["status"]) == {"ok"}
    with pytest.raises(ValueError, match="reads features from other.csv"):
        iv.benchmark(replace(new, features=("other.csv",)), "ridge", 1, tmp_path / "none", data_dir=tmp_path)


def test_bad_requests(task, entries, tmp_path):
    for arguments, message in (
        ({"tasks": "nothing"}, "unknown task 'nothing'; known: kang-demo"),
        ({"tasks": []}, "no task is named"),
        ({"models": "nothing"}, "unknown model 'nothing'"),
        ({"models": "primeflow:nothing"}, "no preset 'nothing'"),
        ({"models": [entries[1], entries[1]]}, "named more than once: none"),
        ({"models": "nothing.json"}, "does not exist"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"engine": "abacus"}, "engine is 'abacus'; expected one of local, ray"),
        ({"metrics": ["nothing"]}, "unknown metrics"),
    ):
        with pytest.raises(ValueError, match=message):
            iv.benchmark(**{"tasks": task, "models": entries, "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected a short name"):
        replace(task, name="a b")
    with pytest.raises(ValueError, match="give design= as well"):
        replace(task, design=None).load()


def test_simple_baselines_are_added_once():
    labels = [entry.label for entry in chosen_entries(["no_change", "primeflow:small"], baselines=True)]
    assert labels[:2] == ["no_change", "primeflow:small"]
    assert labels[-1] == "noise_floor"
    assert sorted(labels).count("no_change") == 1
    assert {"perturbation_mean", "perturbation_mean:shift-cells", "context_mean"} <= set(labels)
    assert {entry.label for entry in chosen_entries(None, baselines=False)} == {
        *(name for name, kind in iv.models.MODELS.items() if kind.verb == "predict"),
        "noise_floor",
    }


def test_an_entry_may_be_for_one_task():
    entries = [Entry("a", "no_change", task="one"), Entry("a", "context_mean", task="two")]
    assert len(chosen_entries(entries, baselines=False)) == 3
    with pytest.raises(ValueError, match="named more than once: a"):
        chosen_entries([*entries, Entry("a", "no_change", task="two")], baselines=False)
    with pytest.raises(ValueError, match="named more than once: a"):
        chosen_entries([*entries, Entry("a", "no_change")], baselines=False)


def test_entry_from_a_file_is_the_entry(entries, tmp_path):
    path = tmp_path / "best.json"
    path.write_text(json.dumps(entries[0].describe()))
    again = as_entry(str(path))
    assert again.describe() == entries[0].describe()
    assert again.settings() == entries[0].settings()
    path.write_text(json.dumps([entry.describe() for entry in entries]))
    assert [entry.label for entry in chosen_entries(path, baselines=False)] == ["flow", "none", "noise_floor"]
    with pytest.raises(ValueError, match="holds 2 entries; expected one"):
        as_entry(path)
    path.write_text('{"model": "primeflow", "config": {"colour": 1}}')
    with pytest.raises(ValueError, match="entry 'best': unknown field"):
        as_entry(path)
    path.write_text('{"model": "primeflow", "colour": 1}')
    with pytest.raises(ValueError, match="not the JSON of entries"):
        as_entry(path)


@pytest.mark.slow
def test_named_tasks_hold_out_what_they_say(shared):
    missing = {name for name, task in TASKS.items() if task.published}
    assert missing == {"srivatsan20", "norman19", "jiang24"}
    for name in set(TASKS) - missing:
        for fold in range(len(TASKS[name].splits)):
            adata, design, split = TASKS[name].load(fold, data_dir=shared("data"))
            parts = {part: adata.obs[(split == part).to_numpy()] for part in ("train", "val", "test")}
            tested = parts["test"][~design.is_control(parts["test"])]
            known = set(design.names(parts["train"]))
            assert len(tested) >= 20
            assert not set(design.names(tested)) & known, name
            assert set(design.groups(tested)) <= set(design.groups(parts["test"][design.is_control(parts["test"])])), (
                name
            )
            assert set(design.groups(tested)) <= set(design.groups(parts["train"])), name


@pytest.mark.slow
def test_a_search_resumes_and_ends_with_the_same_best(task, tmp_path):
    pytest.importorskip("optuna", reason="needs optuna")
    entry = Entry("linear", "linear_additive", None, {"steps": 5, "batch_size": 32, "val_every": 5})
    search = {"fit.lr": (1e-4, 1e-1), "softplus": [True, False]}
    best = tune(entry, task, 3, tmp_path / "whole", search=search)
    tune(entry, task, 1, tmp_path / "parts", search=search)
    again = tune(entry, task, 3, tmp_path / "parts", search=search)
    assert again.describe() == best.describe()
    columns = ["trial", "state", "value", "fit.lr", "softplus", "rmse_mean"]
    whole, parts = (pd.read_csv(tmp_path / name / "trials.csv")[columns] for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole, parts)
    assert whole["value"].nunique() == 3
    assert whole["fit.lr"][0] == entry.settings()[1].lr  # the entry's own setting is the first candidate
    chosen = whole.loc[whole["value"].idxmin()]
    assert best.fit["lr"] == pytest.approx(chosen["fit.lr"])
    assert as_entry(tmp_path / "whole" / "best.json").settings() == best.settings()
    with pytest.raises(ValueError, match="search with another space"):
        tune(entry, task, 3, tmp_path / "parts", search={"fit.lr": (1e-4, 1e-2)})


@pytest.mark.parametrize(
    ("config", "search"),
    [({"penalty": 0.0}, None), ({"penalty": 0.0, "width": 8}, {"penalty": (1e-6, 1.0), "width": [16, 32]})],
)
def test_the_first_trial_is_the_entry_itself_whatever_the_ranges(same_process, task, tmp_path, config, search):
    pytest.importorskip("optuna", reason="needs optuna")
    entry = Entry("b", "biolord", config, {"steps": 2, "batch_size": 32, "val_every": 2, "lr": 3e-7})
    best = tune(entry, task, 1, tmp_path, search=search)
    assert best.settings() == entry.settings()


def test_entries_beside_each_other_draw_different_settings(same_process, task, tmp_path):
    pytest.importorskip("optuna", reason="needs optuna")
    rates = {}
    for label in ("one", "other"):
        entry = Entry(label, "linear_additive", None, {"steps": 2, "batch_size": 32, "val_every": 2})
        tune(entry, task, 3, tmp_path / label)
        rates[label] = pd.read_csv(tmp_path / label / "trials.csv")["fit.lr"].tolist()
    assert rates["one"][0] == rates["other"][0]
    assert not set(rates["one"][1:]) & set(rates["other"][1:])


@pytest.mark.parametrize("model", [model for model in MODELS.values() if model.SEARCH], ids=lambda model: model.name)
def test_searches_hold_the_published_settings(model):
    from invirtuo.bench.tune import _settings, _space

    for preset in model.PRESETS:
        entry = Entry("row", model.name, preset)
        own = _settings(entry)
        for name, choice in _space(entry, None).items():
            if own[name] is None:  # chosen by another setting
                continue
            fits = own[name] in choice if isinstance(choice, list) else choice[0] <= own[name] <= choice[1]
            assert fits or own[name] <= 0, (preset, name)  # a weight of 0 has no place on a log scale


def test_a_search_looks_at_the_entry_alone_not_at_its_variants(same_process, task, tmp_path):
    pytest.importorskip("optuna", reason="needs optuna")
    values = []
    for variants in ({}, {"guided": {"guidance": 5.0}}):
        entry = Entry("fm", "fm_pca", {"hidden_dim": 16, "n_pcs": 5}, {"steps": 5, "val_every": 5}, variants=variants)
        best = tune(entry, task, 1, tmp_path / str(len(values)), search={"fit.lr": (1e-4, 1e-2)})
        assert best.variants == variants
        values.append(pd.read_csv(tmp_path / str(len(values)) / "trials.csv")["value"][0])
    assert values[0] == values[1]


def test_bad_searches(same_process, task, tmp_path):
    pytest.importorskip("optuna", reason="needs optuna")
    with pytest.raises(ValueError, match="cannot search colour"):
        tune("linear_additive", task, 1, tmp_path, search={"colour": [1]})
    with pytest.raises(ValueError, match="unknown metrics"):
        tune("linear_additive", task, 1, tmp_path, objective={"nothing": 1.0})
    for choice in ((1, 1), (1, 2, 3), [], 3):
        with pytest.raises(ValueError, match="expected .low, high. or a list"):
            tune("linear_additive", task, 1, tmp_path, search={"fit.lr": choice})
    with pytest.raises(ValueError, match="nothing to search"):
        tune("no_change", task, 1, tmp_path)
    worst = Entry("linear", "linear_additive", None, {"steps": 3, "lr": 1e30, "batch_size": 32})
    with pytest.raises(ValueError, match="no trial ended with a value; the last said: FloatingPointError"):
        tune(worst, task, 1, tmp_path, search={"softplus": [True]})


def test_paired_intervals_cover_what_they_promise():
    """Of 200 experiments with a known difference, about 95 % have it in their interval."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        hard = rng.normal(0, 3, 30)  # shared by both models: pairing takes it out
        values = {"a": hard + rng.normal(0.5, 1, 30), "b": hard + rng.normal(0, 1, 30)}
        rows = [("t", m, 0, str(i), "m", v) for m, x in values.items() for i, v in enumerate(x)]
        table = paired_differences(
            pd.DataFrame(rows, columns=["task", "model", "seed", "condition", "metric", "value"]), n_resamples=400
        )
        row = table.iloc[0]
        covered += row["low"] <= 0.5 <= row["high"]
        assert row["high"] - row["low"] < 2
    assert 0.87 < covered / 200 <= 0.99


def test_paired_differences_leave_out_what_one_model_lacks():
    rows = [
        ("t", "a", 0, "x", "m", 1.0),
        ("t", "a", 0, "y", "m", np.nan),
        ("t", "b", 0, "x", "m", 3.0),
        ("t", "b", 0, "y", "m", 9.0),
    ]
    table = paired_differences(pd.DataFrame(rows, columns=["task", "model", "seed", "condition", "metric", "value"]))
    assert table["difference"].tolist() == [-2.0, 2.0]
    assert table["n_conditions"].tolist() == [1, 1]
    assert table[["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize("name", ["norman19", "srivatsan20", "jiang24"])
def test_published_files_give_the_published_tasks(name, tmp_path):
    published_file(name, tmp_path)
    adata, design, split = TASKS[name].load(data_dir=tmp_path)
    raw = iv.datasets.load(name, data_dir=tmp_path)
    assert adata.var_names.tolist() == sorted(adata.var_names)
    assert not adata.layers and not raw.layers
    np.testing.assert_allclose(adata.obs["total_counts"], np.asarray(raw.X.sum(axis=1)).ravel())
    assert adata.X.max() < 5 and not np.allclose(adata.X.data, np.round(adata.X.data))
    held = adata.obs[split.isin(["val", "test"]) & ~design.is_control(adata.obs)]
    assert {"val", "test"} <= set(split)
    if name == "norman19":
        assert held["condition"].str.contains(r"\+").all()
    if name == "jiang24":
        assert list(design.covariates) == ["cell_type", "treatment"]
        assert "a549" not in set(held["cell_type"])
    record = compute(
        Cell(replace(TASKS[name], n_cells=10, n_pcs=4), Entry("none", "no_change"), 0, data_dir=str(tmp_path))
    )
    assert record["status"] == "ok", record["traceback"]
    metrics = {row[record["scores"]["columns"].index("metric")] for row in record["scores"]["rows"]}
    assert {"mmd_gex", "deg_recall_rank"} <= metrics


def test_the_published_split_is_taken_where_it_lies(tmp_path, caplog):
    published_file("jiang24", tmp_path)
    task = TASKS["jiang24"]
    adata, design, drawn = task.load(data_dir=tmp_path)
    assert [record.message for record in caplog.records if "jiang24_split.csv" in record.message] == [
        f"jiang24: the published split jiang24_split.csv is not in {tmp_path}; the split is drawn by the same rules, "
        "with other conditions in validation and test"
    ]
    cell = Cell(task, Entry("none", "no_change"), 0, data_dir=str(tmp_path))
    of_drawn = cell.settings()

    # another draw, saved as PerturBench saves it
    saved = TASKS["jiang24"].splits[0](adata.obs, design, stratum_order=sorted(design.groups(adata.obs).unique())[::-1])
    assert (saved != drawn).any()
    saved.to_csv(tmp_path / "jiang24_split.csv", header=False)
    caplog.clear()
    _, _, split = task.load(data_dir=tmp_path)
    assert (split == saved).all() and "jiang24_split.csv" not in caplog.text
    assert cell.settings()["task"] != of_drawn["task"]
    assert cell.settings()["task"]["splits"] == of_drawn["task"]["splits"]

    (tmp_path / "jiang24_split.csv").write_text("cell,split\n")
    with pytest.raises(ValueError, match="jiang24_split.csv: split values must be train, val, test"):
        task.load(data_dir=tmp_path)


def test_a_file_of_one_split_is_for_one_split(task):
    with pytest.raises(ValueError, match="has 2 splits and a file of one"):
        replace(task, splits=task.splits * 2, split_file="split.csv")
    assert "split_file" not in task.describe()


@pytest.mark.parametrize("wrong", ["missing", "truncated", "column", "layer", "control", "split"])
def test_wrong_data_are_refused_before_a_process_starts(run, monkeypatch, tmp_path, wrong):
    published_file("norman19", tmp_path / "data")
    path = tmp_path / "data" / "norman19_processed.h5ad"
    adata = read_h5ad(path)
    if wrong == "missing":
        path.unlink()
    elif wrong == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    else:
        if wrong == "column":
            del adata.obs["cell_type"]
        elif wrong == "layer":
            del adata.layers["counts"]
        elif wrong == "control":
            adata = adata[adata.obs["condition"] != "control"].copy()
        else:
            adata.obs["condition"] = adata.obs["condition"].str.replace("+", "&")  # nothing to hold out
        adata.write_h5ad(path)
    monkeypatch.setattr("invirtuo.bench.engine.launch", lambda cell: pytest.fail("a process starts"))
    words = {
        "missing": "norman19_processed.h5ad or norman19_processed.h5ad.gz",
        "truncated": "is truncated or damaged",
        "column": "obs lacks cell_type",
        "layer": "no layer 'counts'",
        "control": "control",
        "split": "nothing to test",
    }
    out = tmp_path / "out"
    code, _, err = run("benchmark", "norman19", "--model", "no_change", "--data-dir", tmp_path / "data", "--out", out)
    assert code == 2
    assert words[wrong] in err and err.count("\n") == 1, err
    assert not (out / "cells").exists()


@pytest.mark.slow
def test_packed_data_are_unpacked_once_for_all_cells(same_process, monkeypatch, tmp_path):
    published_file("jiang24", tmp_path / "data")
    path = tmp_path / "data" / "jiang24_processed.h5ad"
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    read, unpacked = [], []
    unpack = Unpacked._unpack
    monkeypatch.setattr(Unpacked, "_unpack", lambda self: (unpacked.append(self), unpack(self))[1])

    def launched(cell):
        read.append(cell.file)
        return compute(cell)

    monkeypatch.setattr("invirtuo.bench.engine.launch", launched)
    task = replace(TASKS["jiang24"], metrics=("rmse_mean",), n_cells=10)
    scores = iv.benchmark(task, "no_change", 2, tmp_path / "out", baselines=False, data_dir=tmp_path / "data")
    assert len(scores) and len(read) == 4 and len(set(read)) == 1
    assert len(unpacked) == 1
    unpacked.clear()
    assert not Path(read[0]).exists()
    iv.benchmark(task, "no_change", 2, tmp_path / "out", baselines=False, data_dir=tmp_path / "elsewhere")
    assert not unpacked  # all cells are there


# Numbers of a paper ---------------------------------------------------------------------------------------------------


PAPER = Path(__file__).parents[1] / "studies" / "paper"


@pytest.mark.parametrize("name", ["srivatsan20", "norman19", "jiang24"])
def test_published_numbers_are_of_rows_and_metrics_that_the_benchmark_has(name):
    numbers = published_numbers()
    own = numbers[numbers["task"] == name]
    rows = {label for entry in as_entries(PAPER / f"{name}.json") for label in entry.rows}
    assert rows - set(own["model"]) == {"ridge"}  # which is not in the paper
    # with the settings of table 12 the null condition is never trained, and guidance away from it is refused
    guided = {"primeflow-mlp, guidance 3", "primeflow-mlp, guidance 5"}
    assert set(own["model"]) - rows == (set() if name == "norman19" else guided)
    assert set(own["metric"]) <= set(TASKS[name].metrics)
    assert not own.duplicated(["model", "metric"]).any()
    assert own["mean"].notna().all() and (own["source"].str.fullmatch(r"table \d")).all()


def test_published_numbers_are_those_of_the_paper():
    """A few that were read in the tables."""
    means = published_numbers().set_index(["task", "model", "metric"])[["mean", "sd"]]
    for key, mean, sd in (
        (("srivatsan20", "primeflow", "mmd_gex"), 0.13, 4e-3),
        (("srivatsan20", "biolord", "deg_recall"), 4.7e-5, 1e-4),
        (("norman19", "primeflow, guidance 3", "deg_recall"), 0.61, 8e-3),
        (("norman19", "linear_additive", "rmse_mean_rank"), 0.016, 8e-4),
        (("jiang24", "fm_pca-ot, guidance 5", "rmse_mean"), 0.11, 2e-3),
        (("jiang24", "decoder_only", "cosine_logfc"), 0.64, np.nan),  # the exponent cannot be read
    ):
        np.testing.assert_equal(means.loc[key].to_numpy(), [mean, sd])
    assert ("norman19", "decoder_only", "deg_recall") not in means.index  # N/A there


def test_ours_stand_beside_the_published_numbers(tmp_path, same_process):
    published_file("norman19", tmp_path / "data")
    task = replace(TASKS["norman19"], metrics=("rmse_mean", "rmse_mean_rank", "mmd_gex"), n_cells=10)
    fit = {"steps": 3, "val_every": 3, "batch_size": 16}
    entries = [Entry("linear_additive", "linear_additive", None, fit), Entry("mine", "no_change")]
    out = tmp_path / "out"
    iv.benchmark(task, entries, 2, out, baselines=False, data_dir=tmp_path / "data")
    table = pd.read_csv(out / "published.csv")
    assert len(table) == (published_numbers()["task"] == "norman19").sum()
    met = table[table["ours"].notna()].set_index("metric")
    assert set(met["model"]) == {"linear_additive"} and set(met.index) == set(task.metrics)
    summary = pd.read_csv(out / "summary.csv").set_index(["model", "metric"])
    ours = summary.loc[("linear_additive", "rmse_mean")]
    assert met.loc["rmse_mean", "published"] == 0.057
    assert met.loc["rmse_mean", "difference"] == pytest.approx(ours["mean"] - 0.057)
    assert met.loc["rmse_mean", "n_seeds"] == 2
    page = (out / "report.html").read_text()
    assert "Beside the paper" in page and "0.057" in page and "table 3, table 5" in page
    assert "PRiMeFlow CFG1" not in page  # was not run


def test_a_task_of_no_paper_has_no_such_table(same_process, task, entries, tmp_path):
    iv.benchmark(task, entries[1], 1, tmp_path / "out", baselines=False)
    assert not (tmp_path / "out" / "published.csv").exists()
    assert "Beside the paper" not in (tmp_path / "out" / "report.html").read_text()


# Cells that are drawn -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chosen_conditions_are_drawn_beside_every_model(task, tmp_path, same_process, caplog):
    task = replace(task, metrics=("mmd_gex", "mmd_pca", "deg_recall"), figures=("b_cell|A+B", "b_cell|gone"))
    entries = [Entry(f"none {i}", "no_change") for i in range(8)]
    out = tmp_path / "out"
    scores = iv.benchmark(task, entries, 2, out, baselines=False, panels=["paper", "monocyte|A"])
    assert "not tested here, so not drawn: b_cell|gone" in caplog.text
    table = pd.read_csv(out / "panels.csv", keep_default_na=False)
    assert set(table["seed"]) == {0} and set(table["task"]) == {"toy"}
    assert set(table["condition"]) == {"b_cell|A+B", "monocyte|A"}
    assert set(table.loc[table["kind"] == "predicted", "model"]) == {entry.label for entry in entries}
    assert set(table.loc[table["kind"] != "predicted", "model"]) == {""}
    kept = read_h5ad(next((out / "predicted" / "toy").glob("none_3-*/0.h5ad")))
    assert kept.n_obs == 2 * task.n_cells
    assert len(list((out / "predicted").rglob("*.h5ad"))) == 8
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "more models" not in page

    # scores do not depend on what is drawn, and cells that are there are not computed again
    again = iv.benchmark(task, entries, 2, tmp_path / "plain", baselines=False)
    pd.testing.assert_frame_equal(scores, again)
    caplog.clear()
    iv.benchmark(task, entries, 2, tmp_path / "plain", baselines=False, panels="monocyte|A")
    assert "nothing to draw of toy/none_0" in caplog.text
    assert not (tmp_path / "plain" / "panels.csv").exists()


def test_a_condition_that_is_not_tested_cannot_be_drawn(task, entries, tmp_path, same_process):
    with pytest.raises(ValueError, match=r"'monocyte\|a' is no tested condition; found .*did you mean 'monocyte\|A'"):
        iv.benchmark(task, entries, 1, tmp_path / "out", panels="monocyte|a")
    assert not (tmp_path / "out" / "cells").exists()

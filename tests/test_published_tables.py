"""The documented commands of tables 2 to 6 and figures 1 to 5, on look-alikes of the files and with tiny networks."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
from published_files import published_file
from small_models import SMALL

from invirtuo.bench import TASKS
from invirtuo.bench.published import published_numbers
from invirtuo.splits import from_csv

ROOT = Path(__file__).parents[1]
FIT = {"steps": 3, "batch_size": 16, "val_every": 3, "warmup": 0, "precision": "fp32", "progress": False}


def documented() -> dict[str, list[str]]:
    """Task to its command in docs/reproduce.md."""
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    return {words.split()[1]: words.split() for words in re.findall(r"`invirtuo (benchmark [^`]+)`", page)}


def tiny(name: str, path: Path) -> None:
    """The rows of the paper with networks that are fitted in a moment."""
    rows = json.loads((ROOT / "studies" / "paper" / f"{name}.json").read_text(encoding="utf-8"))
    for row in rows:
        row["fit"] = FIT
        if row["model"] in SMALL:
            row["config"] = asdict(SMALL[row["model"]])
    path.write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["srivatsan20", "norman19", "jiang24"])
def test_tables_and_figures_from_packed_files(run, same_process, monkeypatch, tmp_path, name):
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], n_cells=8, n_pcs=4))
    data = tmp_path / "data"
    published_file(name, data, packed=True)
    if name == "jiang24":
        save_split(data)
    _, tested = TASKS[name].look(data)
    drawn = [condition for condition in TASKS[name].figures if condition in tested]
    assert len(drawn) == 4 or name != "jiang24"

    # as documented, with the tiny rows, one seed, and folders of this test
    tiny(name, tmp_path / "rows.json")
    given = {"--model": tmp_path / "rows.json", "--seeds": 1, "--data-dir": data, "--out": tmp_path / "out"}
    command = documented()[name]
    for option, value in given.items():
        command[command.index(option) + 1] = str(value)
    code, _, err = run(*command, "--panels", tested[0], "--n-jobs", 1)
    assert code == 0, err
    costs = pd.read_csv(tmp_path / "out" / "costs.csv")
    assert (costs["status"] == "ok").all()

    # every published number that the benchmark can meet is met
    table = pd.read_csv(tmp_path / "out" / "published.csv")
    assert len(table) == (published_numbers()["task"] == name).sum()
    guided = table["model"].str.startswith("primeflow-mlp, guidance") & (name != "norman19")
    assert table.loc[~guided, "ours"].notna().all()

    # a picture for each condition, with all models
    points = pd.read_csv(tmp_path / "out" / "panels.csv", keep_default_na=False)
    assert set(points["condition"]) == {*drawn, tested[0]}
    models = set(costs["model"]) - {"noise_floor"}
    for condition in (*drawn, tested[0]):
        own = points[points["condition"] == condition]
        assert set(own.loc[own["kind"] == "predicted", "model"]) == models
        assert {"background", "real"} < set(own["kind"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == len({*drawn, tested[0]})
    assert "Beside the paper" in page


def save_split(data: Path) -> None:
    """A published split that tests the conditions of the figures."""
    adata, design, split = TASKS["jiang24"].load(data_dir=data)
    split[design.names(adata.obs).isin(TASKS["jiang24"].figures)] = "test"
    split.to_csv(data / "jiang24_split.csv", header=False)
    assert (from_csv(data / "jiang24_split.csv", adata.obs) == split).all()

"""The report: what stands in it, what must not, damaged input, and that writing is all or nothing."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import invirtuo as iv
from invirtuo.report import write_report
from invirtuo.report.tables import condition_tables, headline, number, score_table

SOURCE = Path(__file__).parents[1] / "src"
CONDITIONS = ["T cell|IFN-beta", "B cell|IFN-beta"]
VALUES = {  # model: rmse (lower is better), cosine (higher), rank (says nothing)
    "ours": (0.2, 0.9, 0.0),
    "other": (0.3, 0.95, 0.0),
    "no_change": (0.5, np.nan, 0.0),
    "ridge": (0.4, 0.5, 0.0),
    "noise_floor": (0.1, 0.99, 0.0),
}
METRICS = {"rmse_mean": "lower", "cosine_logfc": "higher", "rmse_mean_rank": "lower"}


@pytest.fixture
def scores():
    rows = [
        (condition, "IFN-beta", metric, values[i] * (1 + 0.1 * j), model, METRICS[metric])
        for model, values in VALUES.items()
        for i, metric in enumerate(METRICS)
        for j, condition in enumerate(CONDITIONS)
    ]
    return pd.DataFrame(rows, columns=["condition", "perturbation", "metric", "value", "model", "direction"])


@pytest.fixture
def results(scores, tmp_path):
    """A folder with every table the report knows."""
    folder = tmp_path / "results"
    folder.mkdir()
    scores.to_csv(folder / "scores.csv", index=False)
    rng = np.random.default_rng(0)
    cells = [(*rng.normal(size=2), "background", "", "") for _ in range(50)]
    for condition in CONDITIONS:
        cells += [(*rng.normal(size=2), "real", "", condition) for _ in range(20)]
        cells += [
            (*rng.normal(size=2), "predicted", model, condition) for model in ("ours", "other") for _ in range(20)
        ]
    pd.DataFrame(cells, columns=["pc1", "pc2", "kind", "model", "condition"]).to_csv(folder / "panels.csv", index=False)
    history = [(model, step, 1 / (step + 1), 1.1 / (step + 1)) for model in ("ours", "other") for step in range(5)]
    history = pd.DataFrame(history, columns=["model", "step", "train_total", "val_total"])
    history.to_csv(folder / "history.csv", index=False)
    run = {
        "title": "IFN-beta <in> unseen types",
        "dataset": "kang",
        "split": "two cell types held out",
        "seed": 7,
        "models": {"ours": {"lr": 0.001, "widths": [64, 128]}},
        "notes": ["half the width of the paper"],
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the text, of a page; fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def render(results, **options):
    out = results.parent / "report.html"
    assert iv.report(results, out, **options) == out
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_holds_everything(results):
    text, page = render(results)
    for expected in (
        "IFN-beta <in> unseen types",
        "kang · two cell types held out",
        *CONDITIONS,
        *VALUES,
        "Simple baselines",
        "2 of 2 missing",
        "models.ours.lr",
        "64, 128",
        "half the width of the paper",
        "Training",
    ):
        assert expected in page.text, expected
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in images)
    assert '<span class="best">0.210</span>' in text
    assert '<span class="second">0.315</span>' in text


def test_page_asks_nothing_of_the_network(results):
    text, page = render(results)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base", "form")]
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", text)


def test_page_for_the_phone_the_night_and_paper(results):
    text, page = render(results)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert text.count("<table") == text.count('<div class="scroll"') == 4  # every table scrolls
    assert text.count('<div class="scroll wide"') == 2  # and both pictures


def test_labels_cannot_become_markup(results, scores):
    evil = "<script>alert(1)</script>"
    scores.loc[0, ["condition", "model"]] = [evil, '"><img src=x>']
    scores.to_csv(results / "scores.csv", index=False)
    (results / "run.json").write_text(json.dumps({"title": evil, "notes": [evil], evil: evil}))
    text, page = render(results)
    assert "<script" not in text
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert evil in page.text


def test_scores_alone_are_enough(results):
    for name in ("panels.csv", "history.csv", "run.json"):
        (results / name).unlink()
    _, page = render(results)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "What was run" not in page.text
    assert "Training" not in page.text


def test_title_can_be_given(results):
    assert "My title" in render(results, title="My title")[1].text


def test_panels_from_npz(results):
    table = pd.read_csv(results / "panels.csv", keep_default_na=False)
    (results / "panels.csv").unlink()
    np.savez(
        results / "panels.npz",
        **{name: table[name].to_numpy(str if table[name].dtype == object else float) for name in table},
    )
    assert sum(tag == "img" for tag, _ in render(results)[1].tags) == 2


def test_tasks_have_sections_and_seeds_a_spread(results, scores):
    seeds = [scores.assign(seed=seed, value=scores["value"] * (1 + seed / 10)) for seed in range(3)]
    both = pd.concat([part.assign(task=task) for task in ("transfer", "combine") for part in seeds])
    both.to_csv(results / "scores.csv", index=False)
    text, page = render(results)
    assert text.count('class="headline"') == 2
    assert "3 seeds" in page.text
    # rmse of ours: mean over conditions 0.21, times 1, 1.1, 1.2: standard deviation 0.021
    assert "± 0.0210" in page.text


# Tables ---------------------------------------------------------------------------------------------------------------


def test_best_and_second_leave_the_floor_out(scores):
    table = score_table(scores)
    marks = {row.name: [cell.mark for cell in row.cells] for row in table.rows}
    assert marks["ours"] == ["best", "second"]
    assert marks["other"] == ["second", "best"]
    assert marks["noise_floor"] == marks["no_change"] == ["", ""]
    assert [row.name for row in table.rows] == ["other", "ours", "no_change", "ridge", "noise_floor"]
    assert table.rows[-1].cells[0].text == "0.105"
    assert [column.n for column in table.columns] == [2, 2]
    assert len(table.equal) == 1


def test_direction_of_known_metrics_comes_from_their_registry(scores):
    table = score_table(scores.drop(columns="direction"))
    assert {row.name: row.cells[0].mark for row in table.rows}["ours"] == "best"
    unknown = score_table(scores.drop(columns="direction").replace("rmse_mean", "wonder"))
    column = [c.name for c in unknown.columns].index("wonder")
    assert unknown.columns[column].direction is None
    assert {row.cells[column].mark for row in unknown.rows} == {""}


def test_ties_are_best_together(scores):
    scores.loc[scores["model"] == "other", "value"] = scores.loc[scores["model"] == "ours", "value"].to_numpy()
    table = score_table(scores)
    marks = {row.name: row.cells[0].mark for row in table.rows}
    assert marks["ours"] == marks["other"] == "best"
    assert "second" not in marks.values()
    assert headline(table).startswith("No model is ahead")


def test_headline_names_winner_baseline_and_floor(scores):
    scores.loc[(scores["model"] == "ours") & (scores["metric"] == "cosine_logfc"), "value"] = 1.0
    text = headline(score_table(scores))
    assert text.startswith("ours is best in 2 of 2 scores (")
    assert "it reaches 0.210, the best baseline (ridge) 0.420 and real cells against real cells 0.105." in text


def test_headline_admits_that_baselines_win(scores):
    scores.loc[scores["model"] == "ridge", "value"] = scores["metric"].map(
        {"rmse_mean": 0.11, "cosine_logfc": 1.0, "rmse_mean_rank": 0.0}
    )
    text = headline(score_table(scores))
    assert text.startswith("ridge is best in 2 of 2 scores")
    assert "No model beats the simple baselines overall." in text
    assert "the best other baseline (no_change)" in text


def test_headline_of_one_model(scores):
    assert headline(score_table(scores[scores["model"] == "ours"])) == "ours was scored on 2 conditions."


def test_condition_tables_keep_the_order_of_models(scores):
    table = score_table(scores)
    first = condition_tables(scores, table)[0]
    assert first["models"] == [row.name for row in table.rows]
    assert [row.name for row in first["rows"]] == sorted(CONDITIONS)
    assert first["rows"][0].cells[first["models"].index("ours")].text == "0.220"
    many = pd.concat([scores.assign(condition=f"c{i:03}") for i in range(250)])
    assert condition_tables(many, score_table(many))[0]["left_out"] == 50


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (0, "0.00"),
        (1e-9, "1.00e-09"),
        (np.nan, "n/a"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.csv", None, "scores.csv does not exist; expected a table with the columns condition, metric, value"),
        ("scores.csv", "", "not a readable CSV"),
        ("scores.csv", "condition,metric\na,b\n", "lacks the columns value; found condition, metric"),
        ("scores.csv", "condition,metric,value\n", "has no rows"),
        ("scores.csv", "condition,metric,value\na,b,high\n", "1 values are not numbers, for example 'high'"),
        ("scores.csv", b"\xff\xfe\x00", "not a readable CSV"),
        ("run.json", "{", "run.json is not JSON"),
        ("run.json", "[]", "holds a list"),
        ("panels.csv", "x,y\n1,2\n", "panels.csv lacks the columns pc1, pc2, kind"),
        ("panels.npz", "no archive", "panels.npz is not a readable npz"),
        ("history.csv", "a\n1\n", "history.csv lacks the columns step"),
    ],
)
def test_damaged_results(results, name, content, message):
    out = results.parent / "report.html"
    out.write_text("the old report")
    (results / name).unlink(missing_ok=True)
    if content is not None:
        (results / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        write_report(results, out)
    assert out.read_text() == "the old report"
    assert sorted(file.name for file in results.parent.iterdir()) == ["report.html", "results"]


@pytest.mark.parametrize(
    "first",
    [
        "import invirtuo.report",
        "from invirtuo.report import write_report",
        "iv.report",
        "import invirtuo.report as r; r",
    ],
)
def test_report_is_a_function_and_a_module(first):
    code = (
        f"import invirtuo as iv; {first}; import invirtuo.report; from invirtuo.report import report;"
        "assert callable(iv.report) and iv.report.write_report and callable(report);"
        "assert iv.report.__call__.__doc__ == iv.report.write_report.__doc__;"
        "import invirtuo.report.tables as t; print(t.number(1))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=SOURCE)
    assert run.stdout.strip() == "1.00", run.stderr

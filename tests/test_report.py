"""The report: what stands in it, what must not, damaged input, and that writing is all or nothing."""

from __future__ import annotations

import base64
import gzip
import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import invirtuo as iv
from invirtuo.reports import benchmark, charts, report
from invirtuo.reports.tables import condition_tables, headline, number, score_table
from invirtuo.reports.verdict import directions_right, verdict

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
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


def asks_nothing_of_the_network(text, page):
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base", "form", "use")]
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#task-")), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", text)


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
    asks_nothing_of_the_network(text, page)


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


def test_effects_are_drawn_with_how_often_intervals_hold(results):
    assert "Effects" not in render(results)[1].text
    table = pd.DataFrame({"condition": "T|A", "gene": list("abcd"), "effect": [1.0, -2.0, 0.5, 0.0]})
    table = table.assign(low=table["effect"] - 0.5, high=table["effect"] + 0.5, real=[1.2, -1.0, 0.6, 0.1])
    table.to_csv(results / "effects.csv", index=False)
    (results / "run.json").write_text(json.dumps({"effect level": 0.9}))
    page = render(results)[1]
    assert "cover 90% of all genes" in page.text and "75% of the changes seen lie within" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 3
    table.drop(columns=["low", "high"]).to_csv(results / "effects.csv", index=False)
    text = render(results)[1].text
    assert "largest predicted changes" in text and "lie within" not in text


def looked_up(text):
    """What the script of a page reads."""
    packed = re.search(r'id="gene-data">([^<]*)<', text).group(1)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_every_gene_can_be_looked_up(results):
    assert 'id="genes"' not in render(results)[0]
    table = pd.DataFrame({"condition": ["T|A"] * 3 + ["B|A"] * 3, "gene": list("abc") * 2})
    table = table.assign(effect=[1.0, -2.0, 0.123456, 0.0, 0.0, 0.0], low=np.nan, high=np.nan, real=1.0, q=0.01)
    table.to_csv(results / "effects.csv", index=False)
    data = looked_up(render(results)[0])
    assert data["genes"] == ["a", "b", "c"] and [own["name"] for own in data["conditions"]] == ["T|A", "B|A"]
    first = data["conditions"][0]
    assert first["effect"] == [1.0, -2.0, 0.123] and first["low"] == [None] * 3 == first["q_real"]
    assert "shares" not in first

    # with distributions, of which those of real cells are not known
    shares = np.full((2, 3, 4), 0.25, np.float32)
    arrays = {"condition": np.array(["T|A", "B|A"]), "gene": np.array(list("abc")), "top": np.ones(3)}
    arrays |= {"control": shares, "real": np.full_like(shares, np.nan), "predicted": shares}
    np.savez(results / "distributions.npz", **arrays)
    text, page = render(results)
    own = looked_up(text)["conditions"][1]["shares"]
    assert own["control"] == own["predicted"] == [[25] * 4] * 3 and own["real"] is None
    assert not [attributes for tag, attributes in page.tags if tag == "script" and "src" in attributes]

    # files that do not belong together
    np.savez(results / "distributions.npz", **{**arrays, "gene": np.array(list("abx"))})
    with pytest.raises(ValueError, match="different cells"):
        render(results)
    np.savez(results / "distributions.npz", gene=np.array(list("abc")))
    with pytest.raises(ValueError, match="lacks condition"):
        render(results)


def test_a_page_in_its_folder_names_the_files(results):
    page = iv.report(results, results / "report.html").read_text()
    assert '<a href="scores.csv">' in page and "predicted.h5ad" not in page
    assert "<h2>Files</h2>" not in render(results)[0]


@pytest.mark.slow
def test_a_page_with_many_genes_is_small(results):
    genes, conditions = [f"gene{i}" for i in range(2000)], [f"type{i}|drug" for i in range(12)]
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"condition": np.repeat(conditions, 2000), "gene": genes * 12})
    numbers = {name: rng.normal(size=len(table)) for name in ("effect", "low", "high", "real", "q", "q_real")}
    table.assign(**numbers).to_csv(results / "effects.csv", index=False)
    shares = rng.dirichlet(np.geomspace(3, 0.01, 16), (12, 2000)).astype(np.float32)
    arrays = {"condition": np.array(conditions), "gene": np.array(genes), "top": np.ones(2000)}
    np.savez(results / "distributions.npz", **arrays, control=shares, real=shares, predicted=shares)
    cells = [pd.DataFrame({"kind": "background", "model": "", "condition": ""}, index=range(3000))]
    for condition in conditions:
        for model in ("", *"abcde"):
            kind = "predicted" if model else "real"
            cells.append(pd.DataFrame({"kind": kind, "model": model, "condition": condition}, index=range(300)))
    panels = pd.concat(cells)
    panels.assign(pc1=rng.normal(size=len(panels)), pc2=rng.normal(size=len(panels))).to_csv(
        results / "panels.csv", index=False
    )
    assert len(render(results)[0]) < 3_000_000


def test_tasks_have_sections_and_seeds_a_spread(results, scores):
    seeds = [scores.assign(seed=seed, value=scores["value"] * (1 + seed / 10)) for seed in range(3)]
    both = pd.concat([part.assign(task=task) for task in ("transfer", "combine") for part in seeds])
    both.to_csv(results / "scores.csv", index=False)
    text, page = render(results)
    assert text.count('class="headline"') == 2
    assert "3 seeds" in page.text
    # rmse of ours: mean over conditions 0.21, times 1, 1.1, 1.2: standard deviation 0.021
    assert "±\u00a00.021" in page.text


# Tables ---------------------------------------------------------------------------------------------------------------


def test_best_and_second_leave_the_floor_out(scores):
    table = score_table(scores)
    marks = {row.name: [cell.mark for cell in row.cells] for row in table.rows}
    assert marks["ours"] == ["best", "second"]
    assert marks["other"] == ["second", "best"]
    assert marks["noise_floor"] == marks["no_change"] == ["", ""]
    assert [row.name for row in table.rows] == ["other", "ours", "ridge", "no_change", "noise_floor"]
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


# A benchmark ----------------------------------------------------------------------------------------------------------

QUALITY = {  # how far from the real cells: 0 is right
    "good": 0.3, "fair": 0.5, "poor": 0.9, "lost": 0.65, "shaky": 0.6, "cheap": 0.8,
    "no_change": 1.0, "ridge": 0.7, "noise_floor": 0.1,
}  # fmt: skip
BENCHMARK_METRICS = ("rmse_mean", "rmse_mean_rank", "cosine_logfc", "mmd_gex", "de_recall")
TASKS = {"transfer": 12, "combine": 12, "single": 1}  # task: conditions


@pytest.fixture(scope="module")
def benchmark_tables():
    """Scores, costs and comparisons: `lost` fails in transfer, `shaky` with one seed; combine has no noise floor."""
    rng = np.random.default_rng(0)
    rows, costs, compared = [], [], []
    for task, n_conditions in TASKS.items():
        for model, quality in QUALITY.items():
            if (task, model) == ("combine", "noise_floor"):
                continue
            for seed in range(3):
                fails = (task, model) == ("transfer", "lost") or (model, seed) == ("shaky", 1)
                status = ("failed", f"out of memory: {model}") if fails else ("ok", np.nan)
                if model != "noise_floor":
                    numbers = [np.nan] * 5 if fails else [10 * quality, 1 + seed, 2.0, 500.0, 1e6]
                    costs.append([task, model, seed, *status, *numbers])
                for metric in BENCHMARK_METRICS if not fails else ():
                    values = quality * (1 + 0.1 * rng.random(n_conditions))
                    if metric.endswith("_rank"):
                        values = values / 2 if n_conditions > 1 else np.zeros(1)
                    elif metric in ("cosine_logfc", "de_recall"):
                        values = 1 - values / 2
                    if metric == "de_recall":
                        values[0] = np.nan
                    cell_type = [f"type{i % 2}" for i in range(n_conditions)]
                    rows += [
                        [
                            task,
                            model,
                            seed,
                            f"{cell_type[i]}|drug{i}",
                            f"drug{i}",
                            cell_type[i],
                            metric,
                            values[i],
                            9,
                            9,
                        ]
                        for i in range(n_conditions)
                    ]
        for metric in BENCHMARK_METRICS:
            sign = -1 if metric in ("cosine_logfc", "de_recall") else 1
            for model, quality in QUALITY.items():
                gap = sign * (quality - QUALITY["ridge"])
                ends = (gap - 0.15, gap + 0.15) if n_conditions > 1 else (np.nan, np.nan)
                compared.append([task, metric, model, "ridge", gap, *ends, n_conditions, 3])
    scores = ["task", "model", "seed", "condition", "perturbation", "cell_type", "metric", "value", "n_pred", "n_real"]
    costs_of = ["fit_seconds", "predict_seconds", "score_seconds", "peak_memory_mib", "parameters"]
    differences = ["task", "metric", "model", "against", "difference", "low", "high", "n_conditions", "n_seeds"]
    return (
        pd.DataFrame(rows, columns=scores),
        pd.DataFrame(costs, columns=["task", "model", "seed", "status", "error", *costs_of]),
        pd.DataFrame(compared, columns=differences),
    )


@pytest.fixture
def benchmark_results(benchmark_tables, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for name, table in zip(("scores", "costs", "comparisons"), benchmark_tables, strict=True):
        table.to_csv(folder / f"{name}.csv", index=False)
    run = {
        "title": "Three tasks",
        "tasks": {task: f"what {task} asks" for task in TASKS},
        "baselines": ["no_change", "ridge"],
        "floor": "noise_floor",
        "notes": ["a small machine"],
        "software": {"torch": "2.13"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def tables_of(scores):
    return {
        task: score_table(part, ["no_change", "ridge"], "noise_floor")
        for task, part in scores.groupby("task", sort=False)
    }


def numbers_in(svg, *names):
    return [float(value) for name in names for value in re.findall(rf' {name}="(-?[0-9.e+]+)"', svg)]


def test_benchmark_page_holds_everything(benchmark_results):
    text, page = render(benchmark_results)
    asks_nothing_of_the_network(text, page)
    for expected in (
        "Overview", "All metrics at a glance", "Against the best simple baseline", "Ranks", "Quality and cost",
        "What failed", "What was run", "software.torch", "a small machine", "good, condition by condition",
        "failed: out of memory: lost", "1 of 3 seeds failed", "out of memory: shaky", "3 of 36 missing",
        *(f"what {task} asks" for task in TASKS),
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "1 is the best row (there is no noise floor)" in page.text
    assert not re.search(r"\bnan\b|\binf\b", text)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert [link.removeprefix("#") for link in links] == [f"task-{i}" for i in (1, 2, 3)]
    assert {attributes["id"] for _, attributes in page.tags if "id" in attributes} == {f"task-{i}" for i in (1, 2, 3)}
    assert text.count("<table") == text.count('<div class="scroll"')  # every table scrolls in its own box


def test_benchmark_charts_are_drawn_where_they_say_something(benchmark_results):
    text, _ = render(benchmark_results)
    sections = dict(zip(TASKS, re.split(r'<section id="task-\d">', text)[1:], strict=True))
    sections["single"] = sections["single"].split("Condition by condition")[0]
    charts = {task: section.count('<svg viewBox="0 0 320') for task, section in sections.items()}
    # 5 differences, 4 scatters (no rank), 1 rank; one condition, no de_recall: no rank, no scatter
    assert charts == {"transfer": 10, "combine": 10, "single": 3}
    assert sections["transfer"].count("ahead in 12 of 12 (below the line)") == 2
    assert sections["transfer"].count("ahead in 11 of 11 (above the line)") == 1  # one condition has no de_recall
    assert text.count("seconds to fit and predict</text>") == 3


def test_benchmark_page_without_the_other_tables(benchmark_results):
    for name in ("costs.csv", "comparisons.csv", "run.json"):
        (benchmark_results / name).unlink()
    _, page = render(benchmark_results)
    assert "Overview" in page.text
    for absent in ("Quality and cost", "What failed", "Against the best simple baseline", "failed"):
        assert absent not in page.text


def test_one_task_with_costs_is_a_benchmark_and_a_comparison_is_not(benchmark_results, benchmark_tables):
    scores, *_ = benchmark_tables
    scores[scores["task"] == "transfer"].to_csv(benchmark_results / "scores.csv", index=False)
    text, page = render(benchmark_results)
    assert "Overview" in page.text and "<nav" not in text
    assert "Nothing could be scored of: combine, single." in page.text
    for name in ("costs.csv", "comparisons.csv"):
        (benchmark_results / name).unlink()
    text, page = render(benchmark_results)
    assert "Overview" not in page.text and "<svg" not in text


def test_benchmark_labels_cannot_become_markup(benchmark_results, benchmark_tables):
    evil = '"><script>alert(1)</script>&<img src=x>'
    scores, costs, comparisons = (
        table.replace({"good": evil, "transfer": f"t {evil}", "ridge": f"r {evil}"}) for table in benchmark_tables
    )
    scores["condition"] = scores["condition"] + evil
    scores["metric"] = scores["metric"].replace("mmd_gex", f"m {evil}")
    costs["error"] = costs["error"].where(costs["error"].isna(), evil)
    for name, table in (("scores", scores), ("costs", costs), ("comparisons", comparisons)):
        table.to_csv(benchmark_results / f"{name}.csv", index=False)
    run = {"tasks": {f"t {evil}": evil}, "baselines": [f"r {evil}", "no_change"], "directions": {f"m {evil}": "lower"}}
    (benchmark_results / "run.json").write_text(json.dumps(run))
    text, page = render(benchmark_results)
    asks_nothing_of_the_network(text, page)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count("<script>alert(1)</script>") > 20
    assert f"m {evil}" in page.text and "2 missing" not in page.text


def test_direction_of_unknown_metrics_comes_from_the_run(benchmark_results, benchmark_tables):
    scores, *_ = benchmark_tables
    scores.replace("mmd_gex", "wonder").to_csv(benchmark_results / "scores.csv", index=False)
    assert "wonder\u00a0↑" not in render(benchmark_results)[1].text
    run = json.loads((benchmark_results / "run.json").read_text()) | {"directions": {"wonder": "higher"}}
    (benchmark_results / "run.json").write_text(json.dumps(run))
    assert "wonder\u00a0↑" in render(benchmark_results)[1].text


def test_many_conditions_are_charts_only(benchmark_results, benchmark_tables, monkeypatch):
    assert "type0|drug0" in render(benchmark_results)[1].text
    monkeypatch.setattr("invirtuo.reports.page.MAX_CELLS", 100)
    text, page = render(benchmark_results)
    table_heads = re.findall(r'<tr><th scope="row">(type\d\|drug\d+)</th>', text)
    assert set(table_heads) == {"type0|drug0"}  # the task of one condition
    assert "type1|drug1: " in page.text  # a dot tells its name


def test_wide_tables_are_printed_across(benchmark_results, benchmark_tables):
    assert 'class="scroll many"' not in render(benchmark_results)[0]
    scores = benchmark_tables[0].query("task == 'transfer' and metric == 'mmd_gex'")
    wide = pd.concat([scores.assign(metric=f"m{i}") for i in range(13)])
    wide.to_csv(benchmark_results / "scores.csv", index=False)
    run = {"directions": {f"m{i}": "lower" for i in range(13)}, "baselines": ["no_change", "ridge"]}
    (benchmark_results / "run.json").write_text(json.dumps(run))
    text, _ = render(benchmark_results)
    assert text.count('class="scroll many"') == 2  # the scores and their positions
    assert "size: A4 landscape" in text


def test_damaged_costs(benchmark_results):
    (benchmark_results / "costs.csv").write_text("model,seed\na,0\n")
    with pytest.raises(ValueError, match="costs.csv lacks the columns task; found model, seed"):
        render(benchmark_results)


def test_costs_may_lack_numbers(benchmark_results):
    (benchmark_results / "costs.csv").write_text("task,model\ntransfer,good\n")
    text, page = render(benchmark_results)
    assert "Quality and cost" in page.text and "n/a" in page.text
    assert "seconds to fit and predict</text>" not in text and "What failed" not in page.text


def small_table(values, kinds=("baseline", "baseline", "model", "floor"), metric="rmse_mean"):
    names = {"baseline": "ridge no_change", "model": "ours theirs", "floor": "noise_floor"}
    given = {kind: iter(text.split()) for kind, text in names.items()}
    models = [next(given[kind]) for kind in kinds]
    frame = pd.DataFrame({"condition": "c", "metric": metric, "value": values, "model": models})
    return score_table(frame, ["ridge", "no_change"], "noise_floor")


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("rmse_mean", [0.5, 0.9, 0.3, 0.1], {"ridge": 0.5, "no_change": 0, "ours": 0.75, "noise_floor": 1}),
        ("cosine_logfc", [0.5, 0.1, 0.7, 0.9], {"ridge": 0.5, "no_change": 0, "ours": 0.75, "noise_floor": 1}),
        ("rmse_mean", [0.5, 0.9, 2.0, 0.1], {"ours": 0}),
        ("rmse_mean", [0.5, 0.9, 0.05, 0.1], {"ours": 1}),
        ("rmse_mean", [0.5, 0.9, np.nan, 0.1], {"ridge": 0.5, "ours": np.nan}),
        ("rmse_mean", [0.5, 0.9, 0.3, 0.95], {"ridge": np.nan, "ours": np.nan, "noise_floor": np.nan}),
        ("wonder", [0.5, 0.9, 0.3, 0.1], {"ridge": np.nan, "ours": np.nan}),
    ],
)
def test_positions(metric, values, expected):
    found = benchmark.positions(small_table(values, metric=metric))[metric]
    np.testing.assert_allclose([found[name] for name in expected], list(expected.values()), atol=1e-12)


def test_positions_without_floor_or_baselines():
    found = benchmark.positions(small_table([0.5, 0.9, 0.1], ("baseline", "baseline", "model")))["rmse_mean"]
    np.testing.assert_allclose(found[["ridge", "no_change", "ours"]], [0.5, 0, 1], atol=1e-12)
    found = benchmark.positions(small_table([0.5, 0.9, 0.1], ("model", "model", "floor")))["rmse_mean"]
    np.testing.assert_allclose(found[["ours", "theirs", "noise_floor"]], [0.5, 0, 1], atol=1e-12)


def test_places(scores):
    frame = scores[scores["metric"] != "rmse_mean_rank"]
    placed = benchmark.places({"t": score_table(frame, failed={"broken": "failed: no"})})
    wide = placed.pivot(index="model", columns="metric", values="place")
    assert "noise_floor" not in wide.index
    assert wide["rmse_mean"].to_dict() == {"ours": 1, "other": 2, "ridge": 3, "no_change": 4, "broken": 5}
    assert wide["cosine_logfc"].to_dict() == {"other": 1, "ours": 2, "ridge": 3, "no_change": 4.5, "broken": 4.5}


def test_overview_orders_by_mean_place(benchmark_tables):
    tables = tables_of(benchmark_tables[0])
    found = benchmark.overview(tables)
    assert [row["name"] for row in found["rows"]][:2] == ["good", "fair"]
    assert found["rows"][-1]["name"] == "no_change"
    assert found["n_places"] == 5 + 5 + 3  # of one condition, ranks say nothing and de_recall is missing
    lost = next(row for row in found["rows"] if row["name"] == "lost")
    assert [cell["text"] == "n/a" for cell in lost["cells"]] == [True, False, False]


@pytest.mark.parametrize(
    ("metric", "low", "high", "verdict"),
    [
        ("rmse_mean", -0.3, -0.1, "better"),
        ("rmse_mean", 0.1, 0.3, "worse"),
        ("rmse_mean", -0.1, 0.3, "open"),
        ("rmse_mean", 0.0, 0.3, "open"),
        ("rmse_mean", np.nan, np.nan, "open"),
        ("cosine_logfc", -0.3, -0.1, "worse"),
        ("cosine_logfc", 0.1, 0.3, "better"),
    ],
)
def test_verdicts(metric, low, high, verdict):
    values = [0.5, 0.9, 0.3, 0.1] if metric == "rmse_mean" else [0.5, 0.1, 0.7, 0.9]
    frame = pd.DataFrame(
        {"condition": "c", "metric": metric, "value": values, "model": ["ridge", "no_change", "ours", "noise_floor"]}
    )
    line = {"metric": metric, "model": "ours", "difference": 0.2, "low": low, "high": high, "n_conditions": 9.0}
    other = line | {"against": "no_change", "low": -9.0, "high": 9.0}
    compared = pd.DataFrame([other, line | {"against": "ridge"}])
    section = benchmark.task_section(frame, score_table(frame), compared)
    assert [line["verdict"] for line in section["differences"]] == [verdict]  # of the best baseline alone
    assert section["verdicts"] == [{"model": "ours", "better": 0, "worse": 0, "open": 0} | {verdict: 1}]
    assert f'class="difference {verdict}"' in section["forests"][0]["chart"]


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_marks_lie_inside_their_charts(factor, spread):
    rng = np.random.default_rng(0)
    x, y = factor * (1 + spread * rng.random((2, 50)))
    spreads = [charts.Spread(f"m{i}", "model", part) for i, part in enumerate(np.split(x, 5))]
    intervals = [charts.Interval("m", v, v - abs(v) / 2, v + abs(v) / 2) for v in x[:5]]
    dots = [charts.Dot(i, "m", "model", abs(a), b) for i, (a, b) in enumerate(zip(x, y, strict=True))]
    drawn = [
        charts.spreads(spreads, min(x) - factor, max(x), reference=None, axis="a"),
        charts.forest(intervals, axis="a", lower_is_better=True),
        charts.scatter(x, y, ["c"] * 50, x_axis="a", y_axis="b"),
        charts.quality_by_cost(dots, floor=float(y[0]), x_axis="a", y_axis="b"),
    ]
    for chart in drawn:
        height = float(re.search(r'viewBox="0 0 320 ([0-9.]+)"', chart)[1])
        across, up = numbers_in(chart, "cx", "x", "x1", "x2"), numbers_in(chart, "cy", "y", "y1", "y2")
        assert across and min(across) >= 0 and max(across) <= 320
        assert up and min(up) >= 0 and max(up) <= height
        assert "nan" not in chart and 'class="tick' in chart


def test_scatter_puts_values_on_equal_axes():
    chart = charts.scatter(np.array([0.0, 1.0]), np.array([1.0, 0.0]), ["a", "b"], x_axis="x", y_axis="y")
    (x0, x1), (y0, y1) = numbers_in(chart, "cx"), numbers_in(chart, "cy")
    assert x0 < x1 and y0 < y1  # y grows downwards
    diagonal = re.search(r'<line x1="(\S+)" y1="(\S+)" x2="(\S+)" y2="(\S+)" class="reference"', chart)
    start_x, start_y, end_x, end_y = map(float, diagonal.groups())
    assert start_x < x0 and start_y > y1 and end_x > x1 and end_y < y0
    many = charts.scatter(*np.random.default_rng(0).random((2, 301)), ["c"] * 301, x_axis="x", y_axis="y")
    assert "<circle" not in many and many.count("h0") == 301


def test_spread_shows_mean_and_percentiles():
    values = np.arange(101) / 100
    chart = charts.spreads([charts.Spread("m", "model", values)], 0.0, 1.0, reference=0.5, axis="a")
    left, right = numbers_in(chart.split("reference")[0].rsplit("<line", 1)[1], "x1", "x2")
    assert left == right == numbers_in(chart, "cx")[0]  # the mean of 0.5 is on the line at 0.5
    width = 2 * numbers_in(chart, "width")[0]  # of 0 to 1: the bar holds the middle half
    whisker = re.search(r'x1="(\S+)" y1="\S+" x2="(\S+)" y2="\S+" class="whisker"', chart)
    assert float(whisker[2]) - float(whisker[1]) == pytest.approx(0.8 * width, abs=0.3)


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
        ("effects.csv", "a\n1\n", "effects.csv lacks the columns condition, gene"),
    ],
)
def test_damaged_results(results, name, content, message):
    out = results.parent / "report.html"
    out.write_text("the old report")
    (results / name).unlink(missing_ok=True)
    if content is not None:
        (results / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        report(results, out)
    assert out.read_text() == "the old report"
    assert sorted(file.name for file in results.parent.iterdir()) == ["report.html", "results"]


def test_metrics_that_do_not_discriminate_are_grey_and_crown_nobody(scores, results):
    pd.DataFrame({"metric": ["rmse_mean", "cosine_logfc"], "drf": [0.12, 0.8]}).to_csv(
        results / "discrimination.csv", index=False
    )
    page = report(results, results / "report.html").read_text()
    assert "Grey, and nobody is best: RMSE mean (0.12)" in page and page.count('class="weak"') == len(VALUES)
    table = score_table(scores, discrimination={"rmse_mean": 0.12, "cosine_logfc": 0.8})
    assert table.weak == ["RMSE mean (0.12)"] and table.wins["ours"] == []
    assert table.rows[0].cells[0].mark == ""
    assert score_table(scores).weak == [] and score_table(scores).wins["ours"] == ["RMSE mean"]


def test_flags_are_said_below_the_table(results):
    flags = pd.DataFrame({"model": ["other", "other"], "flag": ["no_spread"] * 2, "text": ["cells <are> alike"] * 2})
    flags.to_csv(results / "flags.csv", index=False)
    page = report(results, results / "report.html").read_text()
    assert page.count("cells &lt;are&gt; alike") == 1 and "<strong>other</strong>" in page


def test_nobody_is_best_for_making_no_mistakes(scores):
    """A prediction that calls nothing has no false discovery."""
    calls = pd.DataFrame(
        {"condition": CONDITIONS * 2, "metric": "de_fdr", "value": [0, 0, 0.3, 0.2], "direction": "lower"}
    )
    calls["model"] = ["no_change"] * 2 + ["ours"] * 2
    table = score_table(pd.concat([scores, calls]))
    column = next(i for i, column in enumerate(table.columns) if column.name == "de_fdr")
    marks = [row.cells[column].mark for row in table.rows]
    assert not any(marks) and "DE FDR" not in table.wins["no_change"] and table.columns[column].arrow == "↓"


# ---- the verdict -----------------------------------------------------------------------------------------------------


def verdict_of(ours, baseline, effects=None, metric="mmd_gex"):
    rows = [(f"c{i}", metric, value, "ours") for i, value in enumerate(ours)]
    rows += [(f"c{i}", metric, value, "ridge") for i, value in enumerate(baseline)]
    table = pd.DataFrame(rows, columns=["condition", "metric", "value", "model"])
    return verdict(table, score_table(table), effects)


def test_the_verdict_counts_conditions_and_directions():
    effects = pd.DataFrame({"condition": "c0", "gene": list("abcd"), "effect": [3.0, -2.0, 1.0, 0.1]})
    effects["real"] = [1.0, -1.0, -1.0, np.nan]
    text = verdict_of([0.1, 0.4, 0.2], [0.2, 0.3, 0.3], effects)
    assert text.startswith("Of 3 held-out conditions ours is better than the simple baseline in 2 (")
    assert text.endswith("Of the 3 genes that it changes most, the direction is right for 67%.")
    assert "direction" not in verdict_of([0.1], [0.2])


def test_no_verdict_where_nothing_stands_beside():
    alone = pd.DataFrame({"condition": ["c"], "metric": "mmd_gex", "value": 0.1, "model": "ours"})
    assert verdict(alone, score_table(alone), None) == ""
    assert directions_right(pd.DataFrame({"condition": ["c"], "effect": [1.0], "real": [np.nan]})) is None

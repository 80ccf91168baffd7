"""Studies: the list and the help of each, rows that are kept, processes that are measured."""

import inspect
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import invirtuo as iv
from invirtuo.models import PRiMeFlow

cli = pytest.importorskip("studies.__main__", reason="studies come with the repository alone")
from studies import ablations, harness, state_ablation, velocity  # noqa: E402

for module in cli.modules():
    cli.import_module(module)


@pytest.mark.parametrize("name", sorted(harness.STUDIES))
def test_a_study_is_listed_and_has_help(name, capsys):
    study = harness.STUDIES[name]
    assert f"  {name} " in cli.listed()
    assert inspect.getdoc(study.run)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert cli.summary(study.run) in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(harness.STUDIES))
def test_options_are_described_and_quick_names_some(name):
    study = harness.STUDIES[name]
    known = inspect.signature(study.run).parameters
    assert set(study.quick) <= set(known)
    assert set(cli.described(study.run)) <= set(known)


def test_every_module_has_a_study():
    shared = {"studies.__main__", "studies.ablations", "studies.harness", "studies.rivals"}
    assert {study.run.__module__ for study in harness.STUDIES.values()} == set(cli.modules()) - shared


def quoted():
    """Commands that pages quote: in fenced blocks, a line each, and in spans of code, which may be broken."""
    root = Path(__file__).parents[1]
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        for i, text in enumerate(page.read_text(encoding="utf-8").split("```")):
            fenced = text.replace("\\\n", " ").splitlines()
            spans = [" ".join(span.split()) for span in text.split("`")[1::2]]
            for line in fenced if i % 2 else spans:
                if line.startswith("python -m studies ") and "NAME" not in line:
                    words = shlex.split(line, comments=True)[3:]
                    if words:
                        yield pytest.param(words, id=f"{page.name} {words[0]}")


@pytest.mark.parametrize("words", list(quoted()))
def test_commands_of_the_pages_are_understood(words):
    name, *options = words
    assert cli.parsed(name, harness.STUDIES[name], options)


def test_an_unknown_study_is_refused():
    with pytest.raises(SystemExit, match="no study 'hausdorff'"):
        cli.main(["hausdorff"])


class Killed(BaseException):
    """What ends a study half-way."""


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on(tmp_path, monkeypatch, capsys):
    judged, calls = state_ablation.wrong, []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed
        return judged(*arguments)

    monkeypatch.setattr(state_ablation, "wrong", counted)
    command = ["state-ablation", "--quick", "--out"]
    with pytest.raises(Killed):
        cli.main([*command, str(tmp_path / "killed")])
    assert len(pd.read_csv(tmp_path / "killed" / "rows.csv")) == 2
    cli.main([*command, str(tmp_path / "killed")])
    assert len(calls) == 6  # the third case twice
    cli.main([*command, str(tmp_path / "killed")])
    assert len(calls) == 6
    assert "5 of 5 cases are in" in capsys.readouterr().out
    cli.main([*command, str(tmp_path / "whole")])
    once, twice = (pd.read_csv(tmp_path / folder / "rows.csv") for folder in ("whole", "killed"))
    pd.testing.assert_frame_equal(once.drop(columns="fit_cpu_seconds"), twice.drop(columns="fit_cpu_seconds"))
    assert (tmp_path / "whole" / "state-ablation.csv").exists()


def test_rows_of_other_settings_are_refused(tmp_path):
    cli.keep_settings("toy", {"out": tmp_path, "steps": 2, "seeds": 1, "models": ["a"]})
    cli.keep_settings("toy", {"out": tmp_path, "steps": 2, "seeds": 3, "models": ["a", "b"]})
    with pytest.raises(SystemExit, match="holds rows of steps 2"):
        cli.keep_settings("toy", {"out": tmp_path, "steps": 3, "seeds": 1, "models": ["a"]})


def test_options_given_beat_those_of_quick():
    study = harness.STUDIES["state-ablation"]
    options = cli.parsed("state-ablation", study, ["--quick", "--steps", "7", "--sizes", "2", "3"])
    assert (options["steps"], options["sizes"]) == (7, [2, 3])
    assert options["contexts"] == study.quick["contexts"]


def test_rows_are_added_case_by_case(tmp_path):
    def one(model, seed):
        if model == "broken":
            raise harness.Failed("no such package")
        return [{"metric": metric, "value": 0.1 * seed + 1 / 3} for metric in ("a", "b")]

    path = tmp_path / "new" / "rows.csv"
    table = harness.filled(path, one, seed=range(2), model=("x", "broken"))
    assert table["seed"].tolist() == [0, 0, 1, 1]
    again = harness.filled(path, None, seed=range(2), model=["x"])
    pd.testing.assert_frame_equal(again, table)
    more = harness.filled(path, lambda model, seed: pd.DataFrame({"value": [3.0]}), seed=[0], model=["y"])
    assert len(more) == 5
    assert harness.over_seeds(table, ["model"])["mean"].tolist() == pytest.approx([0.05 + 1 / 3])


def test_a_process_is_measured_and_its_failure_is_told():
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint('done')"
    output, cost = harness.process([sys.executable, "-c", busy])
    assert output == "done\n"
    assert 0.3 <= cost["cpu_seconds"] < 3
    assert cost["wall_seconds"] > 0.2
    assert cost["peak_gib"] > 0
    with pytest.raises(harness.Failed, match="ended with 3"):
        harness.process([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(harness.Failed, match="not done after 0.2 s"):
        harness.process([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.2)


def test_functions_take_turns():
    seen = []
    ways = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    assert harness.in_turn(ways, 2).shape == (2, 2)
    assert seen == ["a", "b"] * 3


# ---- velocity networks taken apart -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment():
    cells = iv.preprocess.normalize(iv.datasets.toy(n_cells=120, n_genes=14))
    return cells, iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.mark.parametrize("variant", velocity.VARIANTS)
def test_ablated_networks_learn_and_know_time_and_condition(variant, experiment):
    cells, design = experiment
    dataset = iv.CellDataset(cells, design)
    model = PRiMeFlow(design, cells.var_names, PRiMeFlow.Config(**velocity.VARIANTS[variant]))
    model.prepare(dataset)
    batch = dataset.take(range(20))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.velocity.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.loss(batch)["total"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.velocity.parameters())
    model.eval()
    with torch.no_grad():
        x, t = batch.target, torch.full((20,), 0.5)
        v = model.evaluate(x, t, batch.condition, size_factor=batch.size_factor)
        null = model.evaluate(x, t, batch.condition, torch.ones(20, dtype=torch.bool), batch.size_factor)
        later = model.evaluate(x, t + 0.1, batch.condition, size_factor=batch.size_factor)
    assert v.shape == x.shape
    assert not torch.allclose(v, null, atol=1e-3) and not torch.allclose(v, later, atol=1e-3)


def test_parts_of_a_u_net_are_changed(experiment):
    cells, design = experiment
    names = ["unet", *(name for name in ablations.ABLATIONS if name.startswith("unet"))]
    configs = {name: PRiMeFlow.Config(**velocity.UNET | {"velocity": name}) for name in names}
    networks = {name: PRiMeFlow(design, cells.var_names, config).velocity for name, config in configs.items()}
    narrow = networks["unet, kernel 1"].unet
    assert narrow.stem.kernel_size == narrow.head.kernel_size == narrow.middle[0].conv_in.kernel_size == (1, 1)
    n = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert n["unet, kernel 1"] < n["unet"] < n["unet, FiLM"]
    assert n["unet"] == n["unet, no long skips"] == n["unet, x1-prediction"]
    plain, cut = networks["unet"].unet, networks["unet, no long skips"].unet
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    cut.load_state_dict(plain.state_dict())
    x, embedding = torch.randn(2, 8, 16, generator=generator), torch.randn(2, 64, generator=generator)
    assert not torch.allclose(plain(x, embedding), cut(x, embedding), atol=1e-4)


def test_an_order_of_genes():
    x = np.random.default_rng(0).normal(size=(50, 3))
    x = np.concatenate([x, x + 0.01 * np.random.default_rng(1).normal(size=x.shape)], axis=1)
    assert sorted(ablations.random_order(x)) == list(range(6))
    order = list(ablations.correlated_order(x))
    assert all(abs(order.index(i) - order.index(i + 3)) == 1 for i in range(3))


@pytest.mark.slow
def test_a_function_is_measured_apart(tmp_path):
    cli.main(["generate", "--quick", "--cells", "100", "--out", str(tmp_path)])
    (row,) = pd.read_csv(tmp_path / "rows.csv").to_dict("records")
    assert row["cpu_seconds"] < row["wall_seconds"] + 1
    assert row["peak_gib"] > 0.1

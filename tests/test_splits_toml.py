"""Splits from TOML files: what every section does, and the messages for files that do not fit."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from invirtuo import Design
from invirtuo.splits import from_toml

FILE = """
[datasets]
screen = "/nowhere/screen/"
"v1.other" = "/nowhere/other/"

[training]
screen = "train"
"v1.other" = "train"

[zeroshot]
"screen.k" = "test"
"v1.other.h" = "val"

[fewshot]
[fewshot."screen.h"]
val = ["A"]
test = ["B", "C"]
"""


def cells(source: str = "screen") -> pd.DataFrame:
    """Obs of three lines with 8 cells of each of A, B, C and the control."""
    rows = [(gene, line) for line in ("k", "h", "j") for gene in ("A", "B", "C", "ntc")] * 8
    obs = pd.DataFrame(rows, columns=["gene", "line"]).assign(source=source)
    return obs.set_axis([f"{source}{i}" for i in obs.index])


@pytest.fixture
def obs():
    return cells()


@pytest.fixture
def design(obs):
    return Design.from_adata(obs, perturbation="gene", control="ntc", covariates=["line"])


@pytest.fixture
def write(tmp_path):
    def to(text: str):
        path = tmp_path / "split.toml"
        path.write_text(text)
        return path

    return to


def parts(obs, split) -> dict[str, set[str]]:
    """Condition to the parts that its cells lie in."""
    names = obs["line"] + "|" + obs["gene"]
    return {name: set(values) for name, values in split.groupby(names.to_numpy())}


def test_every_section(obs, design, write):
    split = from_toml(write(FILE), obs, design, dataset="screen")
    found = parts(obs, split)
    for gene in "ABC":
        assert found[f"k|{gene}"] == {"test"} and found[f"j|{gene}"] == {"train"}
    assert (found["h|A"], found["h|B"], found["h|C"]) == ({"val"}, {"test"}, {"test"})
    assert split.name == "split" and split.index.equals(obs.index)


def test_controls_of_every_context_train(obs, design, write):
    """Also those of a context that is held out completely; shares as asked for."""
    split = from_toml(write(FILE), obs, design, dataset="screen")
    control = (obs["gene"] == "ntc").to_numpy()
    for line in "khj":
        counts = split[control & (obs["line"] == line).to_numpy()].value_counts().to_dict()
        assert counts == {"train": 4, "val": 2, "test": 2}
    all_train = from_toml(write(FILE), obs, design, dataset="screen", control_fractions=(1.0, 0.0, 0.0))
    assert set(all_train[control]) == {"train"}
    again, other = (from_toml(write(FILE), obs, design, dataset="screen", seed=seed) for seed in (0, 1))
    assert again.equals(split) and not other.equals(split)


def test_several_data_sets_in_one_table(obs, write):
    """Names may hold dots; a data set that is not in [training] is unassigned but for its named contexts."""
    both = pd.concat([obs, cells("v1.other")])
    design = Design.from_adata(both, perturbation="gene", control="ntc", covariates=["line"])
    split = from_toml(write(FILE), both, design, dataset="source")
    second = both["source"] == "v1.other"
    assert parts(both[second], split[second])["h|A"] == {"val"}
    assert parts(both[second], split[second])["k|A"] == {"train"}
    assert parts(both[~second], split[~second])["k|A"] == {"test"}
    without = FILE.replace('"v1.other" = "train"', "")
    split = from_toml(write(without), both, design, dataset="source")
    found = parts(both[second], split[second])
    assert found["h|A"] == {"val"} and found["k|A"] == {""} and found["j|ntc"] == {""}


def test_the_order_of_cells_does_not_matter(obs, design, write):
    split = from_toml(write(FILE), obs, design, dataset="screen")
    shuffled = obs.sample(frac=1, random_state=0)
    again = from_toml(write(FILE), shuffled, design, dataset="screen")
    perturbed = (obs["gene"] != "ntc").to_numpy()
    assert again.loc[obs.index][perturbed].equals(split[perturbed])


def test_a_perturbation_in_both_lists_is_test(obs, design, write, caplog):
    text = FILE.replace('val = ["A"]', 'val = ["A", "B"]')
    with caplog.at_level(logging.WARNING):
        split = from_toml(write(text), obs, design, dataset="screen")
    assert "B are val and test in screen.h" in caplog.text
    assert parts(obs, split)["h|B"] == {"test"}


def test_one_data_set_needs_no_name_and_several_covariates_a_context(obs, write):
    text = FILE.replace('"v1.other" = "/nowhere/other/"', "").replace('"v1.other" = "train"', "")
    text = text.replace('"v1.other.h" = "val"', "")
    obs = obs.assign(batch=np.where(np.arange(len(obs)) % 2, "x", "y"))
    design = Design.from_adata(obs, perturbation="gene", control="ntc", covariates=["line", "batch"])
    with pytest.raises(ValueError, match="context is None; expected the covariate.*line, batch"):
        from_toml(write(text), obs, design)
    assert parts(obs, from_toml(write(text), obs, design, context="line"))["k|B"] == {"test"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"screen.k" = "test"', '"screen.x" = "test"', "screen has no cells of context 'x'; found h, j, k"),
        ('"screen.k" = "test"', '"screen.k" = "train"', "screen.k is 'train'; expected 'val' or 'test'"),
        ('"screen.k" = "test"', 'screen.k = "test"', "'screen' is not \"data set.context\", in quotes"),
        ('"screen.k" = "test"', '"screen.h" = "test"', "screen.h stands in zeroshot and in fewshot"),
        ('screen = "train"', 'screen = "yes"', "screen is 'yes'; expected 'train'"),
        ('screen = "train"', 'screens = "train"', r"\[training\] names screens, not in \[datasets\]"),
        ('test = ["B", "C"]', 'test = ["B", "Z"]', "that this context does not have: Z; found A, B, C"),
        ('test = ["B", "C"]', 'holdout = ["B"]', "must hold lists named val and test"),
        ("[zeroshot]", "[zero_shot]", "expected the tables datasets, training, zeroshot, fewshot"),
        ("[datasets]", "[datasets", "is not a TOML file"),
        (FILE, "", "expected data sets under"),
        (FILE, "datasets = 3", "expected the tables"),
        (FILE[FILE.index("[zeroshot]") :], "", "leaves perturbed cells for train; expected some to train on"),
    ],
)
def test_files_that_do_not_fit(old, new, message, obs, design, write):
    assert old in FILE
    with pytest.raises(ValueError, match=message):
        from_toml(write(FILE.replace(old, new)), obs, design, dataset="screen")


def test_tables_that_do_not_fit(obs, design, write, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        from_toml(tmp_path / "none.toml", obs, design)
    with pytest.raises(ValueError, match="has 2 data sets: screen, v1.other; say with dataset="):
        from_toml(write(FILE), obs, design)
    with pytest.raises(ValueError, match="'nobody' is neither in"):
        from_toml(write(FILE), obs, design, dataset="nobody")
    with pytest.raises(ValueError, match=r"obs\['line'\] holds h, j, k, which"):
        from_toml(write(FILE), obs, design, dataset="line")

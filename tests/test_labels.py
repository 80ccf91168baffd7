"""Property: whichever way labels are written, everything that is made of them is the same."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import invirtuo as iv
from invirtuo import splits
from invirtuo.cells import preprocess
from invirtuo.cells.conditions import as_table
from invirtuo.cells.dataset import CellDataset
from invirtuo.verbs.draw import control_pool

LABELS = ("ctrl", "A", "B", "C", "A+B", "A+C", "B+C")
FIT = iv.FitConfig(steps=2, batch_size=64, warmup=0, precision="fp32", accelerator="cpu", progress=False, val_every=0)


def screen() -> anndata.AnnData:
    """Three lines, seven labels, ten cells of each."""
    rows = [(label, line) for line in ("K562", "HeLa", "RPE1") for label in LABELS for _ in range(10)]
    obs = pd.DataFrame(rows, columns=["gene", "line"], index=[f"c{i}" for i in range(len(rows))])
    counts = np.random.default_rng(0).poisson(3, (len(rows), 25)).astype(np.float32) + 1
    adata = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(25)]))
    return preprocess.normalize(adata)


CELLS = screen()


def design_of(obs: pd.DataFrame) -> iv.Design:
    return iv.Design.from_adata(obs, perturbation="gene", control="ctrl", covariates=["line"])


@st.composite
def spelling(draw, label: str) -> str:
    """A way in which people write a perturbation label."""
    parts = list(draw(st.permutations(label.split("+"))))
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), "ctrl")
    space = st.sampled_from(["", " ", "  "])
    return "+".join(draw(space) + part + draw(space) for part in parts)


@st.composite
def respelt(draw) -> pd.DataFrame:
    """The labels of the screen, every cell's written in one of up to three ways."""
    obs = CELLS.obs.copy()
    choice = np.random.default_rng(draw(st.integers(0, 99)))
    for column, way in (("gene", spelling), ("line", lambda label: st.sampled_from([label, f" {label}", f"{label} "]))):
        ways = {label: draw(st.lists(way(label), min_size=1, max_size=3)) for label in obs[column].unique()}
        obs[column] = [ways[label][choice.integers(len(ways[label]))] for label in obs[column]]
    return obs.astype({"gene": draw(st.sampled_from(["object", "category"]))})


SPLITS = {
    "hold_out": lambda obs, design: splits.hold_out(obs, design, ["K562|B+A"], val=[{"gene": "C ", "line": "HeLa"}]),
    "transfer": splits.transfer,
    "combine": splits.combine,
    "combine_inverse": splits.combine_inverse,
    "manual": lambda obs, design: splits.manual(obs, design, groups=["K562"]),
    "under_represented": lambda obs, design: splits.under_represented(obs, design, contexts=["HeLa"], support=["A+C"]),
    "zero_shot": lambda obs, design: splits.zero_shot(obs, design, context={"line": "RPE1"}),
    "unseen_targets": lambda obs, design: splits.unseen_targets(obs, design, contexts=["HeLa"], n_folds=2),
}


def made_of(obs: pd.DataFrame) -> dict:
    """All that is made of labels."""
    design = design_of(obs)
    adata = CELLS.copy()
    adata.obs = obs
    split = SPLITS["hold_out"](obs, design)
    dataset = CellDataset(adata, design, split)
    model = iv.models.PerturbationMean(design, adata.var_names).fit(adata, split, config=FIT)
    predicted = model.predict("test", 5, seed=0)
    scores = iv.evaluate(predicted, adata[split == "test"].copy(), design, ["rmse_mean", "cosine_logfc"])
    return {
        "design": design.to_json(),
        "names": design.names(obs).tolist(),
        "codes": design.encode(obs).perturbation.tolist(),
        "splits": {name: function(obs, design).tolist() for name, function in SPLITS.items()},
        "pools": {group: cells.expression.toarray().tolist() for group, cells in control_pool(dataset).items()},
        "card": model.card,
        "asked": as_table("K562|B+ctrl+A", design).to_dict("list"),
        "scores": scores.to_dict("list"),
    }


EXPECTED = made_of(CELLS.obs)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(respelt())
def test_one_meaning_however_labels_are_written(obs):
    found = made_of(obs)
    for name, expected in EXPECTED.items():
        assert found[name] == expected, name


def test_the_property_can_fail():
    """Another label is another condition."""
    obs = CELLS.obs.copy()
    obs.loc[obs["gene"] == "A+B", "gene"] = "A+C"
    assert design_of(obs).names(obs).tolist() != EXPECTED["names"]


def test_control_label_of_several_parts():
    obs = pd.DataFrame({"guide": ["NT_NT", "A_NT", "NT_A", "A_B", "B_A"]})
    design = iv.Design.from_adata(obs, perturbation="guide", control="NT_NT", separator="_")
    assert design.names(obs).tolist() == ["NT_NT", "A", "A", "A_B", "A_B"]
    assert design.perturbations == ("A", "B")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "category", object])
def test_numbers_are_told_apart_and_their_type_does_not_matter(dtype):
    doses = np.array([0.1, 1000000.1, 1000000.4], np.float64)
    if dtype is np.float32:
        doses = np.array([0.1, 0.25, 1e-8], np.float32)
    obs = pd.DataFrame({"drug": ["dmso", "x", "x"], "dose": pd.Series(doses).astype(dtype)})
    design = iv.Design.from_adata(obs, perturbation="drug", control="dmso", dose="dose")
    names = design.names(obs)
    assert names.is_unique
    assert names[0] == "dmso|0.1"


@pytest.mark.parametrize("column", ["gene", "line"])
def test_a_bar_in_a_label_is_refused_wherever_it_is_met(column):
    obs = CELLS.obs.copy()
    obs[column] = obs[column].replace({"A": "A|x", "K562": "K562|x"})
    with pytest.raises(ValueError, match=r"labels with '\|': .*\|x"):
        design_of(obs)
    design = design_of(CELLS.obs)
    for call in (design.names, design.encode, design.conditions, lambda o: splits.transfer(o, design)):
        with pytest.raises(ValueError, match=r"labels with '\|'"):
            call(obs)


FINDINGS = {  # how every second cell of a label is written, and what is said of it
    "space": ({"A": " A"}, ["space", "' A'"]),
    "case": ({"A": "a"}, ["case", "'A' and 'a'"]),
    "inner space": ({"A": "A 1", "B": "A1"}, ["spaces or signs", "'A 1' and 'A1'"]),
    "number": ({"A": "1", "B": "1.0"}, ["digits", "'1' and '1.0'"]),
    "missing": ({"A": "nan"}, ["nan"]),
    "order": ({"A+B": "B+A"}, ["read as one", "'A+B' and 'B+A'"]),
    "separator": ({"A+B": "(+)-JQ1"}, ["never occur alone", "separator"]),
    "other control": ({"A": "non-targeting"}, ["sounds like a control", "'non-targeting'"]),
}


@pytest.mark.parametrize("kind", FINDINGS)
def test_check_names_labels_that_may_be_meant_otherwise(kind):
    written, words = FINDINGS[kind]
    adata = CELLS.copy()
    every_second = np.arange(adata.n_obs) % 2 == 0
    adata.obs["gene"] = adata.obs["gene"].where(~every_second, adata.obs["gene"].replace(written))
    findings = preprocess.check(adata, design_of(adata.obs))
    told = " ".join(findings.loc[findings["about"] == "labels", "finding"])
    for word in words:
        assert word in told


def test_check_has_nothing_to_say_of_clear_labels():
    findings = preprocess.check(CELLS, design_of(CELLS.obs), expect="log")
    assert not (findings["about"] == "labels").any()


def test_check_names_undosed_cells_and_reserved_columns():
    adata = CELLS.copy()
    adata.obs["dose"] = np.where(adata.obs["gene"] == "A", 0.0, 1.0)
    adata.obs["model"] = adata.obs["line"]
    design = iv.Design.from_adata(adata, perturbation="gene", control="ctrl", covariates=["model"], dose="dose")
    told = " ".join(preprocess.check(adata, design)["finding"])
    assert "is 0 for 30 perturbed cells (A)" in told
    assert "columns model have names that tables" in told
    with pytest.raises(ValueError, match="columns model clash"):
        iv.evaluate(adata, adata, design, ["rmse_mean"])


def test_numbers_as_labels():
    obs = CELLS.obs.assign(gene=pd.Categorical(CELLS.obs["gene"]).codes)
    number = int(obs["gene"][CELLS.obs["gene"] == "ctrl"].iloc[0])
    design = iv.Design.from_adata(obs, perturbation="gene", control=number, covariates=["line"])
    assert design.is_control(obs).sum() == 30


GRAMMAR = [
    "K562|A+B",
    ["K562|A+B", "HeLa|C"],
    {"line": "K562", "gene": "B+A"},
    [{"line": "K562", "gene": "A+B"}, "HeLa|C"],
    pd.DataFrame({"gene": ["A+B"], "line": ["K562"], "other": [1]}),
    ("K562|A+B",),
]


@pytest.mark.parametrize("given", GRAMMAR, ids=str)
def test_one_grammar_of_a_condition(given):
    design = design_of(CELLS.obs)
    model = iv.models.NoChange(design, CELLS.var_names).fit(CELLS)
    asked = set(design.names(model.predict(given, 2).obs))
    held_out = splits.hold_out(CELLS.obs, design, given, val_fraction=0.0)
    control = design.is_control(CELLS.obs)
    assert asked == set(design.names(CELLS.obs)[(held_out == "test").to_numpy() & ~control])
    assert "K562|A+B" in asked


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("K562|A|B", "has 3 value"),
        (["A"], "has 1 value"),
        ({"line": "K562"}, "lacks gene"),
        ({"cell": "K562"}, "must name columns of the design; expected line, gene"),
        ([], "at least one condition"),
        (3, "is a int"),
        ([3], "is a int"),
    ],
    ids=str,
)
def test_conditions_that_cannot_be_read(given, words):
    model = iv.models.NoChange(design_of(CELLS.obs), CELLS.var_names).fit(CELLS)
    with pytest.raises(ValueError, match=words):
        model.predict(given, 2)

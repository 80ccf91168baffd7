"""Formula tests of Design: roles and levels, labels to tensors, messages."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import invirtuo as iv
from invirtuo.batch import Condition


def table(perturbation, **columns) -> pd.DataFrame:
    n = len(perturbation)
    index = [f"c{i}" for i in range(n)]
    return pd.DataFrame({"p": perturbation, "cell": ["x"] * n} | columns, index=index)


def make(obs, **options) -> iv.Design:
    return iv.Design.from_adata(obs, perturbation="p", control="ctrl", **options)


def test_from_adata_and_from_table_agree():
    obs = table(["ctrl", "b", "a+b"], cell=["t", "m", "t"])
    adata = anndata.AnnData(np.ones((3, 2), np.float32), obs=obs.copy())
    design = make(obs, covariates=["cell"])
    assert make(adata, covariates=["cell"]) == design
    assert design.perturbations == ("a", "b")
    assert design.covariates == {"cell": ("m", "t")}
    assert design.columns == ["cell", "p"]
    assert make(obs, covariates="cell") == design


def test_levels_do_not_depend_on_the_order_of_cells_or_categories():
    obs = table(pd.Categorical(["b", "ctrl", "a"], categories=["b", "unused", "ctrl", "a"]), cell=["y", "x", "z"])
    design = make(obs, covariates=["cell"])
    assert design == make(obs[::-1], covariates=["cell"])
    assert design.perturbations == ("a", "b")  # no "unused"


def test_unused_covariate_categories_are_no_levels():
    obs = table(["ctrl", "a"], cell=pd.Categorical(["x", "x"], categories=["w", "x"]))
    assert make(obs, covariates=["cell"]).covariates == {"cell": ("x",)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"perturbation": "guide"}, ["perturbation", "'guide'", "p, cell"]),
        ({"covariates": ["donor"]}, ["covariates", "'donor'"]),
        ({"dose": "um"}, ["dose", "'um'"]),
        ({"time": "hours"}, ["time", "'hours'"]),
        ({"control": "DMSO"}, ["'DMSO'", "a, b, ctrl", "control="]),
    ],
)
def test_wrong_names_are_named(options, words):
    obs = table(["ctrl", "a", "b"])
    with pytest.raises(ValueError) as error:
        iv.Design.from_adata(obs, **({"perturbation": "p", "control": "ctrl"} | options))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options", [{"covariates": ["p"]}, {"covariates": ["cell", "cell"]}, {"dose": "um", "time": "um"}]
)
def test_a_column_has_one_role(options):
    with pytest.raises(ValueError, match="more than one role"):
        make(table(["ctrl", "a"], um=[0.0, 1.0]), **options)


@pytest.mark.parametrize("column", ["p", "cell"])
def test_missing_values_are_counted(column):
    obs = table(["ctrl", "a", "b", "a"])
    obs.loc[["c1", "c2"], column] = None
    with pytest.raises(ValueError, match=f"'{column}' has 2 missing values"):
        make(obs, covariates=["cell"])


@pytest.mark.parametrize("label", ["a+", "+a", "a++b", "+"])
def test_empty_parts_are_refused(label):
    with pytest.raises(ValueError, match="empty part around the separator"):
        make(table(["ctrl", label]))


def test_parts_of_a_combination():
    design = make(table(["ctrl", "a", "b+a", "c+ctrl"]))
    assert design.perturbations == ("a", "b", "c")
    assert design.parts("b+a") == ("a", "b")
    assert design.parts("a + b") == ("a", "b")
    assert design.parts("c+ctrl") == ("c",)
    assert design.parts("a+a") == ("a",)
    assert design.parts("ctrl") == ()


def test_control_may_contain_the_separator_and_no_separator_splits_nothing():
    obs = pd.DataFrame({"p": ["non+target", "a+b"]})
    design = iv.Design.from_adata(obs, perturbation="p", control="non+target")
    assert design.perturbations == ("a", "b")
    whole = iv.Design.from_adata(obs, perturbation="p", control="non+target", separator="")
    assert whole.perturbations == ("a+b",)


def test_encode():
    obs = table(["ctrl", "b", "a+b", "a+ctrl", "a+a", "b+a"], cell=list("xyxyxy"))
    condition = make(obs, covariates=["cell"]).encode(obs)
    expected = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0], [1, 0], [1, 1]], dtype=torch.float32)
    assert torch.equal(condition.perturbation, expected)
    assert condition.covariates["cell"].tolist() == [0, 1, 0, 1, 0, 1]
    assert condition.covariates["cell"].dtype == torch.int64
    assert condition.is_control.tolist() == [True, False, False, False, False, False]
    assert condition.continuous == {}


def test_dose_scales_the_multi_hot():
    obs = table(["ctrl", "a", "a", "a+b"], um=[0.0, 1.0, 9.0, 99.0])
    design = make(obs, dose="um")
    assert design.dose_max == 99.0
    scale = np.log1p([0, 1, 9, 99]) / np.log1p(99)
    expected = torch.tensor([[0, 0], [scale[1], 0], [scale[2], 0], [1, 1]], dtype=torch.float32)
    torch.testing.assert_close(design.encode(obs).perturbation, expected)
    assert design.columns == ["p", "um"]


@pytest.mark.parametrize("bad", [-1.0, np.inf, "much"])
def test_bad_doses_are_refused(bad):
    with pytest.raises(ValueError, match=r"obs\['um'\] must hold finite numbers >= 0"):
        make(table(["ctrl", "a"], um=pd.Series([0.0, bad], index=["c0", "c1"], dtype=object)), dose="um")


def test_doses_may_be_categories_of_text():
    obs = table(["ctrl", "a"], um=pd.Categorical(["0", "10"]))
    assert make(obs, dose="um").dose_max == 10.0


def test_time_is_continuous():
    obs = table(["ctrl", "a"], hours=[0, 6])
    condition = make(obs, time="hours").encode(obs)
    assert condition.continuous["hours"].tolist() == [0.0, 6.0]
    assert condition.continuous["hours"].dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"covariates": ["cell"], "dose": "um", "time": "hours", "separator": "_"}])
def test_json_round_trip(options):
    obs = table(["ctrl", "a_b", "µ"], um=[0.0, 2.5, 5.0], hours=[0, 1, 2])
    design = make(obs, **options)
    again = iv.Design.from_json(design.to_json())
    assert again == design
    assert torch.equal(again.encode(obs).perturbation, design.encode(obs).perturbation)
    assert json.loads(design.to_json())["control"] == "ctrl"


def test_unknown_labels_are_named():
    obs = table(["ctrl", "a", "b"], cell=["x", "y", "x"])
    design = make(obs, covariates=["cell"])
    with pytest.raises(ValueError, match=r"'zzz'.*known: a, b and the control 'ctrl'"):
        design.encode(table(["a", "a+zzz"], cell=["x", "x"]))
    with pytest.raises(ValueError, match=r"obs\['cell'\].*neuron.*known: x, y"):
        design.encode(table(["a"], cell=["neuron"]))
    with pytest.raises(ValueError, match="'cell' is not in the table"):
        design.encode(obs[["p"]])
    with pytest.raises(ValueError, match="1 missing values"):
        design.encode(obs.assign(cell=["x", None, "x"]))


def test_groups_names_and_conditions():
    obs = table(["ctrl", "b", "a", "b", "ctrl"], cell=list("yxyxx"), donor=[1, 2, 1, 2, 2])
    design = make(obs, covariates=["cell", "donor"])
    assert design.groups(obs).tolist() == ["y|1", "x|2", "y|1", "x|2", "x|2"]
    assert design.names(obs).tolist() == ["y|1|ctrl", "x|2|b", "y|1|a", "x|2|b", "x|2|ctrl"]
    assert design.names(design.conditions(obs)).tolist() == ["x|2|b", "y|1|a"]
    assert len(design.conditions(obs, control=True)) == 4
    assert design.is_control(obs).tolist() == [True, False, False, False, True]
    assert make(obs).groups(obs).unique().tolist() == ["all"]


def test_obs_is_not_written_to():
    obs = table(pd.Categorical(["ctrl", "a"]), um=[0.0, 1.0])
    before = obs.copy(deep=True)
    design = make(obs, covariates=["cell"], dose="um")
    design.encode(obs), design.names(obs), design.conditions(obs, control=True)
    pd.testing.assert_frame_equal(obs, before)


labels = st.sampled_from(["ctrl", "a", "b", "c", "a+b", "b+a", "a+ctrl", "a+b+c", "c+c"])
rows = st.lists(
    st.tuples(labels, st.sampled_from(["x", "y"]), st.just(0.0) | st.floats(0.01, 50)), min_size=1, max_size=12
)
KNOWN = make(
    table(["ctrl", "a", "b", "c"], cell=["x", "y", "x", "y"], um=[0.0, 1.0, 2.0, 50.0]), covariates=["cell"], dose="um"
)


@settings(max_examples=40, deadline=None)
@given(rows=rows, seed=st.integers(0, 99))
def test_encoding_is_row_by_row(rows, seed):
    """Rows encoded together, apart, or in another order are the same rows."""
    p, cell, um = (list(column) for column in zip(*rows, strict=True))
    obs = table(p, cell=cell, um=um)
    together: Condition = KNOWN.encode(obs)
    order = np.random.default_rng(seed).permutation(len(obs))
    shuffled = KNOWN.encode(obs.iloc[order])
    assert torch.equal(shuffled.perturbation, together[torch.from_numpy(order)].perturbation)
    for i in range(len(obs)):
        alone = KNOWN.encode(obs.iloc[[i]])
        assert torch.equal(alone.perturbation[0], together.perturbation[i])
        assert alone.covariates["cell"][0] == together.covariates["cell"][i]
        parts = set(p[i].split("+")) - {"ctrl"}
        on = {name for j, name in enumerate(KNOWN.perturbations) if together.perturbation[i, j] != 0}
        assert on == (parts if um[i] > 0 else set())  # dose 0 is no perturbation


def test_features_take_the_place_of_one_hots(toy):
    vectors = pd.DataFrame({"x": [1.0, 0.0, 2.0, 5.0], "y": [0.5, -1.0, 0.0, 0.0]}, index=["A", "B", "C", "D"])
    design = iv.Design.from_adata(toy, perturbation="perturbation", control="control", features=vectors)
    assert design.perturbations == ("A", "B", "C", "D")
    assert design.code_width == 2
    condition = design.encode(pd.DataFrame({"perturbation": ["control", "A", "A+B", "D"]}))
    assert condition.code.tolist() == [[0, 0], [1, 0.5], [1, -0.5], [5, 0]]
    assert condition.is_control.tolist() == [True, False, False, False]
    assert condition[1:2].to("cpu").features.tolist() == [[1, 0.5]]
    again = iv.Design.from_json(design.to_json())
    assert again == design
    for table, message in (
        (vectors.drop(index="B"), "lack 1 of the 3 perturbations: B"),
        (vectors.rename(index={"D": "A"}), "named more than once: A"),
        (vectors.assign(y=["a", "b", "c", "d"]), "finite numbers"),
        (vectors[[]], "finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            iv.Design.from_adata(toy, perturbation="perturbation", control="control", features=table)


# ---- data without perturbation, labels that are not known ------------------------------------------------------------


def test_without_perturbation():
    obs = table(["x", "y", "x"], cell=["t", "m", "t"])
    design = iv.Design.from_adata(obs, covariates=["cell"])
    assert design.perturbation is None and design.columns == design.attributes == ["cell"]
    condition = design.encode(obs)
    assert condition.perturbation.shape == (3, 0) and condition.covariates["cell"].tolist() == [1, 0, 1]
    assert not design.is_control(obs).any()
    assert design.names(obs).tolist() == ["t", "m", "t"]
    assert design.conditions(obs).to_dict("list") == {"cell": ["m", "t"]}
    assert iv.Design.from_json(design.to_json()) == design
    bare = iv.Design.from_adata(obs)
    assert bare.columns == [] and bare.names(obs).tolist() == ["all"] * 3


@pytest.mark.parametrize("options", [{"perturbation": "p"}, {"control": "x"}])
def test_perturbation_and_control_come_together(options):
    with pytest.raises(ValueError, match="give both, or neither"):
        iv.Design.from_adata(table(["x", "y"]), **options)


def test_unknown_labels():
    obs = table(["ctrl", "a", "a", "a"], cell=pd.Series(["t", None, "?", "m"], dtype=object).to_numpy())
    with pytest.raises(ValueError, match="1 missing values.*unknown="):
        make(obs, covariates=["cell"])
    design = make(obs, covariates=["cell"], unknown="?")
    assert design.covariates == {"cell": ("m", "t")}
    assert design.encode(obs).covariates["cell"].tolist() == [1, -1, -1, 0]
    assert design.names(obs).tolist() == ["t|ctrl", "?|a", "?|a", "m|a"]
    assert iv.Design.from_json(design.to_json()) == design
    with pytest.raises(ValueError, match="not known to this design: z"):
        design.encode(obs.assign(cell="z"))
    with pytest.raises(ValueError, match="has no known label"):
        make(obs.assign(cell="?"), covariates=["cell"], unknown="?")


def test_a_design_shows_itself(toy):
    design = iv.Design.from_adata(toy, perturbation="perturbation", control="control", covariates=["cell_type"])
    known = design.with_features(pd.DataFrame(np.eye(3), index=["A", "B", "C"]))
    assert "cell_type" in str(design) and "perturbations  A, B, C" in str(design)
    assert "3 numbers for each perturbation" in known._repr_html_() and len(repr(known)) < 400
    odd = iv.Design(perturbation="<b>", control="no", perturbations=("x",))
    assert "&lt;b&gt;" in odd._repr_html_() and "<b>" not in odd._repr_html_()

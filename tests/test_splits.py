"""Splits: what each promises, exact draws that must not move, and the messages for bad input."""

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from invirtuo import Design, splits
from invirtuo.splits import SPLITS, combine, combine_inverse, from_csv, hold_out, manual, transfer

LABELS = ["A", "B", "C", "D", "E", "F", "A+B", "C+D", "A+E", "B+F", "control"]
PARTS = {"train", "val", "test"}


def table(*, n=8):
    """Obs of two lines x two treatments, all labels in each, rows shuffled with a fixed seed."""
    rows = [(label, line, drug) for label in LABELS for line in ("k", "h") for drug in ("no", "yes")]
    obs = pd.DataFrame(rows * n, columns=["gene", "line", "drug"])
    obs = obs.sample(frac=1, random_state=0, ignore_index=True)
    return obs.set_axis([f"c{i}" for i in obs.index])


OBS = table()
LINE = Design.from_adata(OBS, perturbation="gene", control="control", covariates=["line"])
BOTH = Design.from_adata(OBS, perturbation="gene", control="control", covariates=["line", "drug"])
CALLS = {
    "transfer": {},
    "manual": {"groups": ["k|no", "h|yes"]},
    "combine": {},
    "combine_inverse": {},
    "hold_out": {"conditions": [{"line": "k", "gene": "A"}, {"gene": "C+D"}]},
}


def parts_by_condition(split, design, obs=OBS):
    """Parts in which the perturbed cells of each condition lie."""
    perturbed = ~design.is_control(obs)
    return split[perturbed].groupby(design.names(obs)[perturbed]).agg(frozenset)


# contract


def test_every_split_is_called_here():
    assert set(CALLS) == set(SPLITS)


@pytest.mark.parametrize("name", SPLITS)
def test_contract(name):
    before = OBS.copy()
    split = SPLITS[name](OBS, BOTH, **CALLS[name])
    assert split.name == "split"
    assert split.index.equals(OBS.index)
    assert set(split) <= PARTS | {""} and set(split) >= PARTS
    pd.testing.assert_series_equal(split, SPLITS[name](OBS, BOTH, **CALLS[name]))
    assert not split.equals(SPLITS[name](OBS, BOTH, **CALLS[name], seed=7))
    pd.testing.assert_frame_equal(OBS, before)
    assert set(split[BOTH.is_control(OBS)]) == PARTS


@pytest.mark.parametrize("name", SPLITS)
def test_categories_and_unused_levels_do_not_matter(name):
    levels = ["zz", *OBS["gene"].unique()[::-1]]
    coded = OBS.assign(gene=pd.Categorical(OBS["gene"], categories=levels), line=OBS["line"].astype("category"))
    split = SPLITS[name](coded, BOTH, **CALLS[name])
    pd.testing.assert_series_equal(split, SPLITS[name](OBS, BOTH, **CALLS[name]))


@pytest.mark.parametrize("name", ["transfer", "manual", "combine", "combine_inverse"])
def test_a_held_out_condition_lies_in_one_part(name):
    parts = parts_by_condition(SPLITS[name](OBS, BOTH, **CALLS[name]), BOTH)
    assert (parts.map(len) == 1).all()


def test_hash_seed_does_not_matter():
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); import test_splits as t\n"
        "for name in t.SPLITS: print(name, t.digest(t.SPLITS[name](t.OBS, t.BOTH, **t.CALLS[name])))"
    )
    here = Path(__file__).parent
    outputs = set()
    for hash_seed in ("0", "12345"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(here.parent / "src"), "OMP_NUM_THREADS": "1"}
        call = [sys.executable, "-c", code, str(here)]
        outputs.add(subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout)
    expected = "".join(f"{name} {digest(SPLITS[name](OBS, BOTH, **CALLS[name]))}\n" for name in SPLITS)
    assert outputs == {expected}


def digest(split):
    return hashlib.sha256(",".join(split).encode()).hexdigest()


# the PerturBench tasks

DIGESTS = {
    "transfer": "7f423a9d4a2677ce",
    "manual": "7424e4d22d598aca",
    "combine": "5eff96a934a7fb24",
    "combine_inverse": "d1ac6859bdc9e8b1",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_draws_do_not_move(name):
    """Kept from the version that agreed with the official code cell by cell (see tests/reference)."""
    assert digest(SPLITS[name](OBS, BOTH, **CALLS[name]))[:16] == DIGESTS[name]


def test_transfer_trains_each_perturbation_somewhere():
    split = transfer(OBS, BOTH, max_heldout=2)
    held = parts_by_condition(split, BOTH)
    held = held[held.map(lambda parts: parts <= {"val", "test", ""})]
    perturbation = held.index.str.rsplit("|", n=1).str[1]
    assert len(held) >= 6
    assert pd.Series(perturbation).value_counts().max() <= 3  # of four states
    assert held.index.str.rsplit("|", n=1).str[0].value_counts().max() <= 0.3 * len(LABELS) + 1


def test_transfer_needs_more_than_min_train_states():
    one_state = OBS[(OBS["gene"] != "A") | ((OBS["line"] == "k") & (OBS["drug"] == "no"))]
    split = transfer(one_state, BOTH, fraction=0.9)
    assert set(split[one_state["gene"] == "A"]) == {"train"}
    assert set(transfer(OBS, BOTH, min_train=4)[~BOTH.is_control(OBS)]) == {"train"}


def test_transfer_downsample_leaves_cells_out():
    split = transfer(OBS, BOTH, downsample=0.5)
    empty = parts_by_condition(split, BOTH).map(lambda parts: parts == {""})
    gone = empty.groupby(empty.index.str.rsplit("|", n=1).str[1]).all()
    assert gone.sum() == 5
    assert (split[BOTH.is_control(OBS)] != "").all()


def test_exclude_control_lowers_the_cap():
    few = OBS[OBS["gene"].isin(["control", "A", "B", "C"])]
    held = []
    for exclude in (False, True):  # caps 0.3 * 4 and 0.3 * 3: a line takes labels until it has two, or one
        split = transfer(few, LINE, fraction=0.3, exclude_control=exclude, keep_singletons=True)
        held.append((parts_by_condition(split, LINE, few).map(min) != "train").sum())
    assert held == [3, 2]


def test_singletons_are_reported_and_may_be_kept(caplog):
    options = {"groups": ["k|no", "h|yes"], "fraction": 0.1}  # one of ten in each
    with caplog.at_level(logging.WARNING):
        split = manual(OBS, BOTH, **options)
    assert (split == "").sum() == 16 and "alone in their group" in caplog.text
    kept = manual(OBS, BOTH, **options, keep_singletons=True)
    assert (kept[split == ""] == "test").all()
    pd.testing.assert_series_equal(kept[split != ""], split[split != ""])


def test_manual_touches_only_the_listed_groups():
    split = manual(OBS, BOTH, groups=[{"drug": "yes", "line": "k"}])
    held = split.isin(["val", "test"]) & ~BOTH.is_control(OBS)
    assert set(BOTH.groups(OBS)[held]) == {"k|yes"}
    assert OBS.loc[held, "gene"].nunique() == 7  # int(0.7 * 10)
    assert OBS.loc[held & (split == "test"), "gene"].nunique() == 4
    pd.testing.assert_series_equal(split, manual(OBS, BOTH, groups=[("k", "yes")]))
    pd.testing.assert_series_equal(split, manual(OBS, BOTH, groups="k|yes"))


def test_combine_holds_out_combinations_only():
    split = combine(OBS, LINE, fraction=0.5)
    held = split.isin(["val", "test"]) & ~LINE.is_control(OBS)
    assert OBS.loc[held, "gene"].str.contains("+", regex=False).all()
    assert OBS.loc[held].groupby("line")["gene"].nunique().tolist() == [2, 2]


def test_combine_inverse_never_holds_out_partners():
    for seed in range(20):
        split = combine_inverse(OBS, LINE, seed=seed, fraction=0.9, exclude_control=True)
        held = split.isin(["val", "test"]) & ~LINE.is_control(OBS)
        for _, genes in OBS.loc[held].groupby("line")["gene"]:
            singles = set(genes)
            assert len(singles) >= 2 and not any("+" in gene for gene in singles)
            assert not any(set(combo.split("+")) <= singles for combo in LABELS if "+" in combo)


def test_stratum_order_changes_the_draw_only():
    order = ["h|no", "k|no", "h|yes", "k|yes"]
    plain, ordered = (transfer(OBS, BOTH, fraction=0.9, max_heldout=3, stratum_order=o) for o in (None, order))
    assert not plain.equals(ordered)
    for split in (plain, ordered):
        counts = parts_by_condition(split, BOTH).map(min).value_counts()
        assert abs(counts["val"] - counts["test"]) <= 1
    assert (plain.isin(["val", "test"]) == ordered.isin(["val", "test"])).all()
    pd.testing.assert_series_equal(plain, transfer(OBS, BOTH, fraction=0.9, max_heldout=3, stratum_order=sorted(order)))
    with pytest.raises(ValueError, match="leaves out groups"):
        transfer(OBS, BOTH, fraction=0.9, max_heldout=3, stratum_order=order[:1])


def test_controls_are_half_train_and_a_group_without_is_reported(caplog):
    split = combine(OBS, LINE)
    counts = split[LINE.is_control(OBS)].value_counts()
    assert counts.to_dict() == {"train": 16, "val": 8, "test": 8}
    of_h = OBS.index[(OBS["line"] == "h") & (OBS["gene"] == "control")]
    lonely = OBS.drop(index=of_h[1:])
    with caplog.at_level(logging.WARNING):
        combine(lonely, LINE)
    assert "group h has no control cells in" in caplog.text


def test_no_covariates():
    design = Design.from_adata(OBS, perturbation="gene", control="control")
    split = combine(OBS, design, fraction=0.5)
    assert OBS.loc[split.isin(["val", "test"]), "gene"].nunique() == 2 + 1  # two combinations and the control
    assert set(hold_out(OBS, design, ["A"])[OBS["gene"] == "A"]) == {"test"}


# plain hold-out


def test_hold_out_shares():
    big = table(n=40)
    split = hold_out(big, BOTH, ["k|no|A", "h|yes|C+D"], val_fraction=0.25)
    names = BOTH.names(big)
    held = names.isin(["k|no|A", "h|yes|C+D"])
    assert (split[held] == "test").all()
    control = BOTH.is_control(big)
    shares = split[~held & ~control].groupby(names).value_counts().unstack()
    assert list(shares.columns) == ["train", "val"] and (shares == [30, 10]).all(axis=None)
    shares = split[control].groupby(BOTH.groups(big)).value_counts().unstack()
    assert (shares[["train", "val", "test"]] == [20, 10, 10]).all(axis=None)


def test_hold_out_ways_of_naming():
    expected = hold_out(OBS, BOTH, ["k|no|A", "k|yes|A"])
    frame = pd.DataFrame({"line": ["k", "k"], "drug": ["no", "yes"], "gene": ["A", "A"], "n_cells": [1, 2]})
    for conditions in (
        frame,
        frame[["line", "gene"]],
        {"line": "k", "gene": "A"},
        frame.iloc[:, :3].to_dict("records"),
    ):
        pd.testing.assert_series_equal(hold_out(OBS, BOTH, conditions), expected)
    assert set(hold_out(OBS, BOTH, {"line": "h"})[(OBS["line"] == "h") & (OBS["gene"] != "control")]) == {"test"}


def test_hold_out_draws_each_condition_by_itself():
    full = hold_out(OBS, BOTH, ["k|no|A"], val_fraction=0.3)
    less = OBS[OBS["gene"] != "D"]
    pd.testing.assert_series_equal(hold_out(less, BOTH, ["k|no|A"], val_fraction=0.3), full[less.index])


def test_hold_out_does_not_repeat_one_draw():
    split = hold_out(OBS, BOTH, ["k|no|A"], val_fraction=0.3)
    names = BOTH.names(OBS)
    patterns = {tuple(split[names == name]) for name in names.unique() if "control" not in name}
    assert len(patterns) > 10


def test_hold_out_by_dose():
    obs = OBS.assign(dose=np.where(OBS["gene"] == "control", 0.0, 1.0 + (np.arange(len(OBS)) % 2)))
    design = Design.from_adata(obs, perturbation="gene", control="control", covariates=["line"], dose="dose")
    split = hold_out(obs, design, {"gene": "A", "dose": 2})
    assert (split[(obs["gene"] == "A") & (obs["dose"] == 2)] == "test").all()
    assert "test" not in set(split[(obs["gene"] == "A") & (obs["dose"] == 1)])


@pytest.mark.parametrize(
    ("conditions", "options", "message"),
    [
        (["k|no|Z"], {}, r"'k\|no\|Z' is no perturbed condition.*found h\|no\|A"),
        (["k|no|control"], {}, "no perturbed condition"),
        ([{"line": "zz"}], {}, "no perturbed condition"),
        ([{"cell": "k"}], {}, "must name columns of the design; expected line, drug, gene"),
        (pd.DataFrame({"x": [1]}), {}, "conditions is empty.*line, drug, gene"),
        ([], {}, "conditions is empty"),
        (["k|no|A"], {"val_fraction": 1.5}, "val_fraction"),
        (["k|no|A"], {"control_fractions": (0.5, 0.5, 0.5)}, "sum to 1"),
    ],
)
def test_hold_out_messages(conditions, options, message):
    with pytest.raises(ValueError, match=message):
        hold_out(OBS, BOTH, conditions, **options)


@pytest.mark.parametrize("name", SPLITS)
def test_missing_columns_and_labels(name):
    with pytest.raises(ValueError, match="no column 'drug'"):
        SPLITS[name](OBS.drop(columns="drug"), BOTH, **CALLS[name])
    with pytest.raises(ValueError, match="missing values"):
        SPLITS[name](OBS.assign(gene=OBS["gene"].where(OBS["gene"] != "A")), BOTH, **CALLS[name])


def test_unknown_group():
    with pytest.raises(ValueError, match=r"'k\|maybe' does not occur.*h\|no"):
        manual(OBS, BOTH, groups=["k|maybe"])


# files


def test_file_comes_back(tmp_path):
    split = transfer(OBS, BOTH)
    split.to_csv(tmp_path / "split.csv", header=False)
    pd.testing.assert_series_equal(from_csv(tmp_path / "split.csv", OBS), split)
    part = from_csv(tmp_path / "split.csv", pd.concat([OBS, OBS.iloc[:2].set_axis(["x", "y"])]))
    assert part[["x", "y"]].tolist() == ["", ""]


def test_unassigned_cells_come_back(tmp_path):
    split = pd.Series(["train", "", "NA"[:0], "test"], index=OBS.index[:4])
    split.to_csv(tmp_path / "split.csv", header=False)
    assert from_csv(tmp_path / "split.csv", OBS.iloc[:4]).tolist() == ["train", "", "", "test"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c0,train\nc999999,test\n", "not in obs: c999999"),
        ("c0,train\nc1,holdout\n", "found holdout in line 2"),
        ("cell,split\nc0,train\n", "found split in line 1.*no header"),
        ("c0,train\nc0,test\n", "more than once: c0"),
        ("c0,train,1\n", "found 3 columns"),
        ("", "empty"),
    ],
)
def test_file_messages(tmp_path, text, message):
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_csv(path, OBS)


def test_file_needs_unique_cells(tmp_path):
    (tmp_path / "split.csv").write_text("c0,train\n")
    with pytest.raises(ValueError, match="not unique"):
        from_csv(tmp_path / "split.csv", pd.concat([OBS, OBS]))
    with pytest.raises(ValueError, match="does not exist"):
        from_csv(tmp_path / "none.csv", OBS)


def test_public_names():
    assert set(splits.__all__) == {"SPLITS", "from_csv", *SPLITS}

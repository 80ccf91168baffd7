"""Splits: what each promises, exact draws that must not move, and the messages for bad input."""

import hashlib
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from invirtuo import Design, splits
from invirtuo.splits import (
    SPLITS,
    combine,
    combine_inverse,
    from_csv,
    hold_out,
    imbalanced,
    manual,
    regimes,
    scaling,
    transfer,
    under_represented,
    unseen_targets,
    zero_shot,
)

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
    "scaling": {"core": 8, "n": 9},
    "imbalanced": {"entropy": 0.9, "fraction": 0.5, "max_heldout": 2},
    "under_represented": {"contexts": ["k|no"]},
    "zero_shot": {"context": "k|no"},
    "unseen_targets": {"n_folds": 3},
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


@pytest.mark.parametrize("name", sorted({*SPLITS} - {"hold_out"}))
def test_a_held_out_condition_lies_in_one_part(name):
    parts = parts_by_condition(SPLITS[name](OBS, BOTH, **CALLS[name]), BOTH)
    assert (parts.map(len) == 1).all()


@pytest.mark.slow
def test_hash_seed_does_not_matter():
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); import test_splits as t\n"
        "for name in t.SPLITS: print(name, t.digest(t.SPLITS[name](t.OBS, t.BOTH, **t.CALLS[name])))"
    )
    here = Path(__file__).parent
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(here.parent / "src"), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", code, str(here)]
    other = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
    assert other == "".join(f"{name} {digest(SPLITS[name](OBS, BOTH, **CALLS[name]))}\n" for name in SPLITS)


def digest(split):
    return hashlib.sha256(",".join(split).encode()).hexdigest()


# the PerturBench tasks

DIGESTS = {
    "transfer": "7f423a9d4a2677ce",
    "manual": "7424e4d22d598aca",
    "combine": "5eff96a934a7fb24",
    "combine_inverse": "d1ac6859bdc9e8b1",
    "hold_out": "f8246f76ab55e8c1",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_draws_do_not_move(name):
    """Those of PerturBench are kept from the version that agreed with its code cell by cell (see tests/reference)."""
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


# how much and how balanced the training data are


def test_scaling_grows_the_training_part_only():
    steps = [scaling(OBS, BOTH, core=6, n=n) for n in (6, 8, 10)]
    for by_n, n in zip(steps, (6, 8, 10), strict=True):
        assert OBS.loc[(by_n != "") & (OBS["gene"] != "control"), "gene"].nunique() == n
        held = by_n.isin(["val", "test"])
        assert held.equals(steps[0].isin(["val", "test"])) and by_n[held].equals(steps[0][held])
    for smaller, larger in itertools.pairwise(steps):
        assert set(larger.index[larger == "train"]) > set(smaller.index[smaller == "train"])
    pd.testing.assert_series_equal(scaling(OBS, BOTH, core=6), steps[-1])


def test_scaling_by_groups():
    steps = [scaling(OBS, BOTH, by="groups", core=2, n=n) for n in (2, 3, 4)]
    groups = BOTH.groups(OBS)
    perturbed = ~BOTH.is_control(OBS)
    for step, n in zip(steps, (2, 3, 4), strict=True):
        assert groups[step != ""].nunique() == n
        held = step.isin(["val", "test"]) & perturbed
        assert held.equals(steps[0].isin(["val", "test"]) & perturbed) and step[held].equals(steps[0][held])
        assert groups[held].nunique() == 2
        assert OBS[held].groupby(groups)["gene"].nunique().tolist() == [7, 7]  # int(0.7 * 10)
    assert not (step == "").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 11}, "0 < core <= n <= 10, the perturbations of obs; found core=2, n=11"),
        ({"core": 5, "n": 4}, "found core=5, n=4"),
        ({"core": 0}, "found core=0"),
        ({"by": "groups", "n": 5}, "n <= 4, the groups of obs; found core=3, n=5"),
        ({"by": "cells"}, "by must be"),
    ],
)
def test_scaling_messages(options, message):
    with pytest.raises(ValueError, match=message):
        scaling(OBS, BOTH, **options)


def many(n_labels=189, lines=("a", "b", "c")):
    rows = [(label, line) for line in lines for label in ["control", *(f"p{i}" for i in range(n_labels))]]
    return pd.DataFrame(rows * 4, columns=["gene", "line"])


def balance(counts):
    share = np.asarray(counts) / np.sum(counts)
    return -(share * np.log(share)).sum() / np.log(len(share))


@pytest.mark.parametrize("entropy", [0.3, 0.6, 0.8, 0.95, 1.0])
def test_imbalanced_meets_the_entropy(entropy):
    obs = many()
    design = Design.from_adata(obs, perturbation="gene", control="control", covariates="line")
    split = imbalanced(obs, design, entropy=entropy, order=["b", "c", "a"])
    used = obs[(split != "") & (obs["gene"] != "control")].groupby("line")["gene"].nunique()
    assert abs(balance(used) - entropy) < 0.015  # whole perturbations
    assert used["b"] == 189 and used["b"] >= used["c"] >= used["a"]
    assert (split[obs["gene"] == "control"] != "").all()


def test_imbalanced_keeps_the_same_perturbations_first():
    obs = many(n_labels=60)
    design = Design.from_adata(obs, perturbation="gene", control="control", covariates="line")
    kept = []
    for entropy in (0.5, 0.7, 0.9):
        split = imbalanced(obs, design, entropy=entropy)
        kept.append({*obs.loc[(split != "") & (obs["line"] == "c"), "gene"]})
    assert kept[0] < kept[1] < kept[2]


def test_imbalanced_counts_what_is_there():
    obs = many(n_labels=30)
    obs = obs[(obs["line"] != "b") | obs["gene"].isin(["control", "p1", "p2", "p3"])].reset_index(drop=True)
    design = Design.from_adata(obs, perturbation="gene", control="control", covariates="line")
    split = imbalanced(obs, design, entropy=0.7)
    used = obs[(split != "") & (obs["gene"] != "control")].groupby("line")["gene"].nunique()
    assert used["a"] == 30 and used["b"] <= 3
    with pytest.raises(ValueError, match=r"entropy must be in \(0, 0.775"):
        imbalanced(obs, design, entropy=0.99)
    with pytest.raises(ValueError, match=r"two or more covariate groups.*obs has a, b, c"):
        imbalanced(obs, design, order=["a", "b"])
    with pytest.raises(ValueError, match=r"two or more covariate groups"):
        imbalanced(OBS, Design.from_adata(OBS, perturbation="gene", control="control"))


# contexts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("fraction", "size"), [(0.3, 3), (0.39, 3), (0.75, 7)])
def test_under_represented_support_and_target(seed, fraction, size):
    split = under_represented(OBS, BOTH, contexts=["k|no", ("h", "yes")], seed=seed, fraction=fraction)
    parts = parts_by_condition(split, BOTH)
    groups = parts.index.str.rsplit("|", n=1).str[0]
    for context in ("k|no", "h|yes"):
        of_context = parts[groups == context].map(set)
        assert (of_context == {"train"}).sum() == size
        assert (of_context == {"test"}).sum() == 10 - size
    others = parts[~groups.isin(["k|no", "h|yes"])]
    assert (others == {"val"}).sum() == 1  # 5 % of 20 conditions
    assert (others == {"train"}).sum() == 19
    control = BOTH.is_control(OBS)
    shares = split[control].groupby(BOTH.groups(OBS)).value_counts().unstack()
    assert (shares[["train", "val", "test"]] == [4, 2, 2]).all(axis=None)


def test_each_context_draws_by_itself():
    one, both = (under_represented(OBS, BOTH, contexts=contexts) for contexts in (["k|no"], ["h|yes", "k|no"]))
    inside = BOTH.groups(OBS) == "k|no"
    pd.testing.assert_series_equal(one[inside], both[inside])
    supports = [OBS.loc[(both == "train") & (BOTH.groups(OBS) == g), "gene"].unique() for g in ("k|no", "h|yes")]
    assert set(supports[0]) != set(supports[1])


def test_a_mapping_is_one_context():
    split = under_represented(OBS, BOTH, contexts=[{"line": "k"}])
    k = OBS["line"] == "k"
    trained = OBS[k & (split == "train") & (OBS["gene"] != "control")]
    assert trained["gene"].nunique() == 3
    assert trained.groupby("gene")["drug"].nunique().tolist() == [2, 2, 2]  # the same in both its groups
    assert "test" not in set(split[~k & (OBS["gene"] != "control")])


def test_support_can_be_named():
    split = under_represented(OBS, BOTH, contexts="k|no", support=["A", "C+D"])
    trained = OBS[(BOTH.groups(OBS) == "k|no") & (split == "train")]
    assert set(trained["gene"]) == {"A", "C+D", "control"}


@pytest.mark.parametrize("seed", range(10))
def test_validation_leaves_every_perturbation_in_training(seed):
    rare = OBS[(OBS["gene"] != "A") | (BOTH.groups(OBS) == "k|yes")]  # A in one context only
    for split in (
        under_represented(rare, BOTH, contexts=["k|no"], val_fraction=0.9, seed=seed),
        zero_shot(rare, BOTH, context="k|no", val_fraction=0.9, seed=seed),
    ):
        assert set(rare.loc[split == "train", "gene"]) == set(LABELS)
        val = (split == "val") & ~BOTH.is_control(rare)
        assert len(set(BOTH.names(rare)[val])) >= 15
        assert "k|no" not in set(BOTH.groups(rare)[val])


def test_perturbations_that_nobody_trains_are_reported(caplog):
    alone = OBS[(OBS["gene"] != "A") | (BOTH.groups(OBS) == "k|no")]
    with caplog.at_level(logging.WARNING):
        under_represented(alone, BOTH, contexts=["k|no"], support=["B", "C"])
    assert "trained on in no context: A" in caplog.text
    with pytest.raises(ValueError, match=r"other contexts lack 1 perturbations of k\|no: A; zero-shot needs"):
        zero_shot(alone, BOTH, context="k|no")


def test_zero_shot_holds_out_all_of_one_context():
    split = zero_shot(OBS, BOTH, context={"line": "h"}, val_fraction=0)
    perturbed, h = ~BOTH.is_control(OBS), OBS["line"] == "h"
    assert set(split[perturbed & h]) == {"test"}
    assert set(split[perturbed & ~h]) == {"train"}
    assert set(split[~perturbed & h]) == PARTS


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (under_represented, {"contexts": ["k|maybe"]}, r"'k\|maybe' does not occur in obs; found h\|no"),
        (under_represented, {"contexts": [{"cell": "k"}]}, "must name covariates of the design; found line, drug"),
        (under_represented, {"contexts": []}, "at least one context"),
        (under_represented, {"contexts": [{"line": "k"}, "k|no"]}, "shares cells with another"),
        (under_represented, {"contexts": [{"line": "k"}, {"line": "h"}]}, "are all there is"),
        (under_represented, {"contexts": ["k|no"], "fraction": 0.05}, "has 10 perturbations .* of which 0 would train"),
        (under_represented, {"contexts": ["k|no"], "support": ["Z"]}, "among them the unknown Z"),
        (under_represented, {"contexts": ["k|no"], "support": LABELS[:-1]}, "of which 10 would train"),
        (under_represented, {"contexts": ["k|no"], "fraction": 1.0}, r"fraction must be in \[0, 1\)"),
        (under_represented, {"contexts": ["k|no"], "val_fraction": -1}, "val_fraction"),
        (zero_shot, {"context": "k|maybe"}, "does not occur"),
        (zero_shot, {"context": "k|no", "control_fractions": (1, 1, 1)}, "control_fractions must be three numbers"),
    ],
)
def test_context_messages(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(OBS, BOTH, **options)


def test_zero_shot_needs_perturbed_cells():
    bare = OBS[(BOTH.groups(OBS) != "k|no") | (OBS["gene"] == "control")]
    with pytest.raises(ValueError, match="no perturbed cells"):
        zero_shot(bare, BOTH, context="k|no")


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


def test_hold_out_of_a_group_with_its_controls():
    split = hold_out(OBS, BOTH, [{"line": "k"}], unseen_control_fractions=(0, 0, 1))
    assert set(split[OBS["line"] == "k"]) == {"test"}
    plain = hold_out(OBS, BOTH, [{"line": "k"}])
    pd.testing.assert_series_equal(split[OBS["line"] == "h"], plain[OBS["line"] == "h"])
    # a group that keeps a condition in training is not unseen
    kept = hold_out(OBS, BOTH, [{"line": "k", "gene": "A"}], unseen_control_fractions=(0, 0, 1))
    pd.testing.assert_series_equal(kept, hold_out(OBS, BOTH, [{"line": "k", "gene": "A"}]))


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
        (["k|no|A"], {"unseen_control_fractions": (1, 1, 0)}, "unseen_control_fractions must be"),
    ],
)
def test_hold_out_messages(conditions, options, message):
    with pytest.raises(ValueError, match=message):
        hold_out(OBS, BOTH, conditions, **options)


@pytest.mark.parametrize("name", SPLITS)
def test_missing_columns_and_labels(name):
    with pytest.raises(ValueError, match="'drug' is not in the table"):
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
    assert set(splits.__all__) == {
        "SPLITS",
        "cells",
        "courses",
        "from_csv",
        "from_toml",
        "regimes",
        *SPLITS,
    }  # cells, courses: of a design without perturbation


# cells at random


def test_cells_are_held_out_class_by_class():
    obs = pd.DataFrame({"line": ["h"] * 100 + ["k"] * 10})
    design = Design.from_adata(obs, covariates="line")
    split = splits.cells(obs, design, test_fraction=0.2, val_fraction=0.1)
    counts = pd.crosstab(obs["line"], split)
    assert counts.loc["h"].to_dict() == {"test": 20, "train": 70, "val": 10}
    assert counts.loc["k"].to_dict() == {"test": 2, "train": 7, "val": 1}
    assert not split.equals(splits.cells(obs, design, seed=1))
    with pytest.raises(ValueError, match="add up to below 1"):
        splits.cells(obs, design, test_fraction=0.9, val_fraction=0.1)


# unseen targets


def singles(labels):
    return {part for label in labels for part in label.split("+")} - {"control"}


def test_every_target_is_tested_once():
    tested = []
    for fold in range(3):
        split = unseen_targets(OBS, BOTH, fold=fold, n_folds=3)
        parts = {part: singles(OBS.loc[split == part, "gene"]) for part in PARTS}
        alone = {
            part: {label for label in OBS.loc[split == part, "gene"] if "+" not in label} - {"control"}
            for part in PARTS
        }
        assert not parts["train"] & (alone["test"] | alone["val"]) and not alone["val"] & alone["test"]
        tested += alone["test"]
        assert set(regimes(OBS, BOTH, split).str.split(",").str[0]) == {"target"}
    assert sorted(tested) == list("ABCDEF")


def test_targets_and_contexts_are_both_new():
    split = unseen_targets(OBS, BOTH, contexts=[{"line": "k"}], n_folds=3)
    perturbed = OBS["gene"] != "control"
    assert set(OBS.loc[(split == "test") & perturbed, "line"]) == {"k"}
    assert set(OBS.loc[(split == "train") & perturbed, "line"]) == {"h"}
    train, test = (singles(OBS.loc[(split == part) & perturbed, "gene"]) for part in ("train", "test"))
    assert {label for label in OBS.loc[(split == "test") & perturbed, "gene"] if "+" not in label}.isdisjoint(
        train
    ) and test
    assert set(regimes(OBS, BOTH, split).str.split(",").str[0]) == {"both"}
    assert set(split[OBS["line"] == "k"]) == PARTS | {""}  # what is known of the new context are its control cells


def test_what_a_tested_condition_has_been_seen_of():
    found = regimes(OBS, BOTH, hold_out(OBS, BOTH, [{"line": "k", "drug": "no"}]))
    assert set(found) == {"context"} and len(found) == 10
    found = regimes(OBS, BOTH, hold_out(OBS, BOTH, ["k|no|A", "k|no|A+B", "h|no|A+B", "k|yes|A+B", "h|yes|A+B"]))
    assert found["k|no|A"] == "pair" and found["h|no|A+B"] == "pair, 2 of 2 parts"
    split = hold_out(OBS, BOTH, [{"gene": "A"}, {"gene": "A+B"}, {"gene": "A+E"}])
    found = regimes(OBS, BOTH, split)
    assert found["k|no|A"] == "target" and found["k|no|A+B"] == "target, 1 of 2 parts"


def test_folds_that_do_not_exist():
    for options in ({"fold": 3, "n_folds": 3}, {"n_folds": 9}):
        with pytest.raises(ValueError, match="expected a fold below n_folds, and at least as many perturbations"):
            unseen_targets(OBS, BOTH, **options)

"""Reference: numbers of perturb-hd 0.1.0 on a made-up table."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from invirtuo import metrics

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "yardstick2026" / "hits"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden files are not at {GOLDEN}")


def tables():
    return pd.read_csv(GOLDEN / "label.csv"), pd.read_csv(GOLDEN / "pred.csv")


def found(rule):
    truth, pred = tables()
    options = json.loads((GOLDEN / "case.json").read_text())
    table = metrics.hit_recall(truth, pred, options["budgets"], options["target_fdrs"])
    chosen = (table["rule"] == rule) & (table["ranking"] == "prediction")
    return table[chosen].set_index(["pheno", "target"])


def test_recall_at_budget():
    ours, theirs = found("budget"), pd.read_csv(GOLDEN / "recall_at_budget.csv").set_index(["pheno", "target_budget"])
    assert set(ours.index) == set(theirs.index)
    ours = ours.loc[theirs.index]
    np.testing.assert_allclose(ours["recall"], theirs["recall"], atol=1e-12)
    np.testing.assert_allclose(ours["realised"], theirs["budget"], atol=1e-12)
    np.testing.assert_array_equal(ours[["n", "n_hits"]], theirs[["total_perts", "total_hits"]])


def test_recall_at_fdr():
    """Exact without ties; with them both are means over 100 orders."""
    ours, theirs = found("fdr"), pd.read_csv(GOLDEN / "recall_at_fdr.csv").set_index(["pheno", "target_fdr"])
    assert set(ours.index) == set(theirs.index)
    ours = ours.loc[theirs.index]
    columns = {"recall": "recall", "realised": "realized_fdr", "n_selected": "n_selected"}
    plain = theirs.index.get_level_values("pheno").isin(["sig", "allhits"])
    for own, their in columns.items():
        np.testing.assert_allclose(ours.loc[plain, own], theirs.loc[plain, their], atol=1e-12)
    spread = {"recall": 0.05, "realised": 0.02, "n_selected": 1.0}  # 3 standard errors of a difference of two means
    for own, their in columns.items():
        np.testing.assert_allclose(ours.loc[~plain, own], theirs.loc[~plain, their], atol=spread[own], err_msg=own)


def test_prospective():
    theirs = pd.read_csv(GOLDEN / "recall_at_fdr_prospective.csv").set_index(["pheno", "target_fdr"])
    ours = found("prospective")
    assert set(ours.index) == set(theirs.index)
    ours = ours.loc[theirs.index]
    for own, their in {"recall": "recall", "realised": "realized_fdr", "n_selected": "n_selected"}.items():
        np.testing.assert_allclose(ours[own], theirs[their], atol=1e-12)


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_hits_from_effects(end):
    truth, _ = tables()
    theirs = pd.read_csv(GOLDEN / f"rank_hits_{end}10pct.csv")
    ours = metrics.hits_from_effects(truth, 0.1, largest=end == "top")
    keys = ["pert", "pheno"]
    merged = ours.merge(theirs, on=keys, suffixes=("", "_there"))
    assert len(merged) == len(theirs) and (merged["hit"] == merged["hit_there"]).all()


@pytest.mark.parametrize("distance", ["cosine", "l1"])
def test_retrieval(distance):
    """There the phenotype with equal predictions is left out, and the perturbation without a pair."""
    truth, pred = (table[table["pheno"] != "rare"] for table in tables())
    theirs = pd.read_csv(GOLDEN / f"retrieval_{distance}.csv").set_index("pert")["retrieval_score"]
    ours = metrics.retrieval(truth, pred, distance)
    assert set(ours.index) == set(theirs.index)
    np.testing.assert_allclose(ours[theirs.index], theirs, atol=1e-12)

"""Hits: recall by three rules against brute force, what is missing, baselines, and phenotypes of cells."""

import itertools
import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from invirtuo import Design
from invirtuo.metrics import hit_recall, hits_from_effects, phenotype, retrieval


def made(n=12, seed=0, *, ties=False):
    rng = np.random.default_rng(seed)
    score = rng.normal(size=n)
    perts = [f"P{i:02d}" for i in range(n)]
    truth = pd.Series((score + rng.normal(0, 0.7, n) > 0.3).astype(int), perts)
    return truth, pd.Series(np.round(score) if ties else score, perts)


def row(table, rule="budget", target=None, ranking="prediction"):
    chosen = (table["rule"] == rule) & (table["ranking"] == ranking)
    if target is not None:
        chosen &= np.isclose(table["target"], target)
    return table[chosen].iloc[0]


# recall


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_budget_is_the_mean_over_all_orders_of_ties(budget):
    truth, scores = made(7, ties=True)
    k = min(int(np.ceil(budget * 7)), 7)
    recalls = []
    for order in itertools.permutations(range(7)):
        values = scores.to_numpy()[list(order)]
        if (np.diff(values) <= 0).all():
            recalls.append(truth.to_numpy()[list(order[:k])].sum() / truth.sum())
    found = row(hit_recall(truth, scores, budget))
    assert found["recall"] == pytest.approx(np.mean(recalls)) and found["realised"] == pytest.approx(k / 7)


def test_a_share_of_a_number_is_not_rounded_up():
    truth, scores = made(100)
    assert row(hit_recall(truth, scores, 0.07))["n_selected"] == 7  # 0.07 * 100 is a little more in floating point


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1.0])
def test_fdr_takes_the_deepest_place_that_is_allowed(rate):
    truth, scores = made(30)
    order = scores.sort_values(ascending=False).index
    deepest = 0
    for k in range(1, 31):
        if (truth[order[:k]] == 0).mean() <= rate:
            deepest = k
    found = row(hit_recall(truth, scores, fdr=rate), "fdr")
    assert found["n_selected"] == deepest
    assert found["recall"] == pytest.approx(truth[order[:deepest]].sum() / truth.sum())
    assert deepest == 0 or found["realised"] == pytest.approx((truth[order[:deepest]] == 0).mean())


def test_fdr_of_ties_is_a_mean_over_orders():
    truth = pd.Series([1, 0], ["A", "B"])
    table = hit_recall(truth, pd.Series([1.0, 1.0], ["A", "B"]), fdr=0.0, n_orders=2000)
    found = row(table, "fdr")
    assert found["recall"] == pytest.approx(0.5, abs=0.05) and found["n_selected"] == 1 and found["realised"] == 0
    again = hit_recall(truth, pd.Series([1.0, 1.0], ["A", "B"]), fdr=0.0, n_orders=2000)
    pd.testing.assert_frame_equal(table, again)


def test_prospective_takes_the_q_values_at_their_word():
    truth = pd.DataFrame({"pert": list("ABCD"), "hit": [1, 1, 0, 0]})
    scores = pd.DataFrame({"pert": list("ABCD"), "qv": [0.01, 0.5, 0.02, 0.9]})
    table = hit_recall(truth, scores, None, [0.005, 0.05])
    some, none = row(table, "prospective", 0.05), row(table, "prospective", 0.005)
    assert (some["recall"], some["realised"], some["n_selected"]) == (0.5, 0.5, 2)
    assert none["recall"] == 0 and np.isnan(none["realised"]) and none["n_selected"] == 0
    assert set(table["rule"]) == {"fdr", "prospective"}


def test_a_hit_without_a_score_is_missed(caplog):
    truth, scores = made(20)
    lost = truth.index[truth == 1][0]
    with caplog.at_level(logging.WARNING):
        table = hit_recall(truth, pd.concat([scores.drop(lost), pd.Series({"new": 1.0})]), 1.0, 1.0)
    n = truth.sum()
    for rule in ("budget", "fdr"):
        found = row(table, rule)
        assert found["recall"] == pytest.approx((n - 1) / n) and found["n_unscored_hits"] == 1 and found["n"] == 19
    assert table.attrs == {"only_in_truth": [(lost, "")], "only_in_scores": [("new", "")]}
    assert "2 pairs are in one of truth and scores only" in caplog.text


def test_a_phenotype_that_nobody_predicted_has_recall_zero():
    truth = pd.DataFrame({"pert": list("ABAB"), "pheno": list("xxyy"), "hit": [1, 0, 1, 0]})
    scores = pd.DataFrame({"pert": list("AB"), "pheno": "x", "hit_score": [1.0, 0.0]})
    table = hit_recall(truth, scores, 0.5, 0.1).query("pheno == 'y'")
    assert (table["recall"] == 0).all() and (table["n"] == 0).all()


def test_a_phenotype_without_hits():
    truth, scores = made()
    table = hit_recall(truth * 0, scores, [0.0, 0.5], 0.1)
    assert set(table["rule"]) == {"budget"}
    assert row(table, target=0.0)["recall"] == 0 and np.isnan(row(table, target=0.5)["recall"])


def test_baselines_stand_beside():
    truth, scores = made(40)
    frame = scores.rename("hit_score").rename_axis("pert").reset_index()
    frame["effect"] = -3.0 * frame["hit_score"]
    table = hit_recall(truth, frame, [0.1, 0.5])
    assert list(table["ranking"].unique()) == ["prediction", "magnitude", "random"]
    assert row(table, target=0.1, ranking="random")["recall"] == pytest.approx(0.1)
    alone = hit_recall(truth, scores.abs(), [0.1, 0.5])
    magnitude, plain = (row(t, target=0.5, ranking=r) for t, r in ((table, "magnitude"), (alone, "prediction")))
    assert magnitude["recall"] == plain["recall"]
    given = hit_recall(truth, scores, 0.5, magnitude=scores)
    assert row(given, ranking="magnitude")["recall"] == plain["recall"]


def test_every_form_of_table_gives_the_same():
    truth, scores = made()
    as_frame = scores.rename("hit_score").rename_axis("perturbation").reset_index().sample(frac=1, random_state=0)
    by_pair = {(pert, "x"): value for pert, value in scores.items()}
    truth_by_pair = {(pert, "x"): value for pert, value in truth.items()}
    expected = hit_recall(truth, scores, [0.2, 0.5], 0.2)
    for labels, values in ((truth.to_dict(), scores.to_dict()), (truth == 1, as_frame), (truth_by_pair, by_pair)):
        found = hit_recall(labels, values, [0.2, 0.5], 0.2)
        pd.testing.assert_frame_equal(found.drop(columns="pheno"), expected.drop(columns="pheno"))


@pytest.mark.parametrize(
    ("truth", "scores", "options", "message"),
    [
        ({"A": 2}, {"A": 1.0}, {}, "hit must be 0 or 1; found 2.0"),
        ({"A": 1}, {"B": 1.0}, {}, "no pair of pert and pheno in common"),
        ({"A": 1}, {"A": np.nan}, {}, "1 rows without a number in hit_score; leave them out"),
        ({"A": 1}, {"A": 1.0}, {"budget": 1.5}, "budget: expected shares from 0 to 1; found 1.5"),
        ({"A": 1}, {"A": 1.0}, {"fdr": [-0.1]}, "fdr: expected shares from 0 to 1"),
        (pd.DataFrame({"pert": ["A", "A"], "hit": [1, 0]}), {"A": 1.0}, {}, "occur more than once: A"),
        ({"A": 1}, pd.DataFrame({"pert": ["A"], "effect": [1.0]}), {}, "expected .* hit_score .* found columns"),
        (pd.DataFrame({"gene": ["A"], "hit": [1]}), {"A": 1.0}, {}, "truth: expected a column pert or condition"),
    ],
)
def test_what_cannot_be_compared(truth, scores, options, message):
    with pytest.raises(ValueError, match=message):
        hit_recall(truth, scores, **options)


# hits


def test_hits_from_effects_take_ties_in():
    effects = pd.Series([3.0, 2.0, 2.0, 1.0, 0.0, -5.0], list("ABCDEF"))
    assert hits_from_effects(effects, 0.34)["hit"].tolist() == [True, True, True, False, False, False]
    assert hits_from_effects(effects, 0.0)["hit"].tolist() == [True] + [False] * 5
    assert hits_from_effects(effects, 0.2, largest=False)["pert"][5] == "F"
    assert hits_from_effects(effects, 0.2, largest=False)["hit"].tolist() == [False] * 5 + [True]
    table = pd.DataFrame({"pert": list("ABAB"), "pheno": list("xxyy"), "effect": [1.0, 2.0, 4.0, 3.0]})
    assert hits_from_effects(table, 0.5)["hit"].tolist() == [False, True, True, False]


def test_retrieval():
    rng = np.random.default_rng(0)
    truth = {(f"P{i}", f"x{j}"): rng.normal() for i in range(5) for j in range(4)}
    assert (retrieval(truth, truth, "l2") == 1).all()
    other = dict.fromkeys(truth, 1.0)
    assert retrieval(truth, other, "l1").between(0, 1).all()
    with pytest.raises(ValueError, match="distance must be 'cosine', 'l1' or 'l2'; found 'l3'"):
        retrieval(truth, truth, "l3")
    with pytest.raises(ValueError, match="must have the same phenotypes"):
        retrieval(truth, {("P0", "other"): 1.0})


# phenotypes

N_GENES = 20


def screen(seed=0, *, labels=("control", "A", "B"), kinds=("t1", "t2"), n=15):
    rng = np.random.default_rng(seed)
    blocks, rows = [], []
    for kind in kinds:
        for label in labels:
            mu = np.full(N_GENES, 2.0)
            mu[:5] += 4.0 * (label == "A")
            blocks.append(np.log1p(rng.poisson(mu, (n, N_GENES))))
            rows += [(label, kind)] * n
    obs = pd.DataFrame(rows, columns=["gene", "kind"], index=[f"c{i}" for i in range(len(rows))])
    names = [f"G{i:02d}" for i in np.random.default_rng(3).permutation(N_GENES)]
    return anndata.AnnData(sparse.csr_matrix(np.concatenate(blocks).astype(np.float32)), obs, pd.DataFrame(index=names))


REAL = screen()
DESIGN = Design.from_adata(REAL, perturbation="gene", control="control", covariates=["kind"])
SET = list(REAL.var_names[:5])


def of(adata, label, kind):
    return adata[((adata.obs["gene"] == label) & (adata.obs["kind"] == kind)).to_numpy()].X.toarray().astype(float)


def test_gene_set():
    table = phenotype(REAL, DESIGN, genes=SET, name="set").set_index("condition")
    value, control = (of(REAL, label, "t2") for label in ("A", "control"))
    score = [cells[:, :5].mean() - cells.mean() for cells in (value, control)]
    assert table.loc["t2|A", "value"] == pytest.approx(score[0])
    assert table.loc["t2|A", "effect"] == pytest.approx(score[0] - score[1])
    assert table.loc["t2|A", ["perturbation", "kind", "pheno", "n_cells"]].tolist() == ["A", "t2", "set", 15]
    assert list(table.index) == ["t1|A", "t1|B", "t2|A", "t2|B"]


def test_signature():
    signature = {SET[0]: 3.0, SET[1]: -4.0}
    table = phenotype(REAL, DESIGN, signature=signature).set_index("condition")
    mean = of(REAL, "B", "t1").mean(axis=0)
    assert table.loc["t1|B", "value"] == pytest.approx((3 * mean[0] - 4 * mean[1]) / 5)


@pytest.mark.parametrize("named", [True, False])
def test_classifier(named):
    cells = REAL.X.toarray()
    features = pd.DataFrame(cells, columns=REAL.var_names) if named else cells
    label = np.where(REAL.obs["gene"] == "A", "hit", "none")
    model = LogisticRegression(max_iter=1000).fit(features, label)
    table = phenotype(REAL, DESIGN, classifier=model, label="hit").set_index("condition")
    chosen = ((REAL.obs["gene"] == "A") & (REAL.obs["kind"] == "t1")).to_numpy()
    expected = model.predict_proba(features[chosen])[:, 0].mean()
    assert table.loc["t1|A", "value"] == pytest.approx(expected, abs=1e-6)
    assert table.loc["t1|A", "effect"] > 0.5 > table.loc["t1|B", "effect"]
    with pytest.raises(ValueError, match="label 'other' is no class of the classifier; its classes: hit, none"):
        phenotype(REAL, DESIGN, classifier=model, label="other")


def test_predictions_take_the_control_cells_of_another_file():
    pred = screen(1, labels=("A", "B"))
    pred = pred[:, ::-1].copy()
    table = phenotype(pred, DESIGN, genes=SET, controls=REAL)
    real = phenotype(REAL, DESIGN, genes=SET)
    np.testing.assert_allclose(table["control"], real["control"])
    assert table["effect"].iloc[0] > 0.5
    with pytest.raises(ValueError, match="no control cells .* of t1, t2; pass the cells that hold them as controls="):
        phenotype(pred, DESIGN, genes=SET)


def test_phenotypes_of_cells_become_hits():
    truth = hits_from_effects(phenotype(REAL, DESIGN, genes=SET), 0.5)
    scores = phenotype(screen(1), DESIGN, genes=SET).assign(hit_score=lambda table: table["effect"])
    table = hit_recall(truth, scores, 0.5)
    assert truth.loc[truth["hit"], "pert"].tolist() == ["t1|A", "t2|A"]
    assert row(table)["recall"] == 1 and row(table, ranking="random")["recall"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of genes, signature and classifier; found none"),
        ({"genes": SET, "signature": {SET[0]: 1.0}}, "found genes and signature"),
        ({"genes": ["nowhere"]}, "1 of 1 genes are not in the cells: nowhere"),
        ({"genes": []}, "the gene set is empty"),
        ({"signature": {SET[0]: 0.0}}, "all weights of the signature are 0"),
        ({"genes": SET, "design": Design()}, "the design names no perturbation"),
    ],
)
def test_what_is_no_phenotype(options, message):
    with pytest.raises(ValueError, match=message):
        phenotype(REAL, **({"design": DESIGN} | options))


def test_a_classifier_of_other_genes():
    model = LogisticRegression().fit(np.random.default_rng(0).normal(size=(10, 3)), [0, 1] * 5)
    with pytest.raises(ValueError, match="the classifier takes 3 genes; the cells have 20"):
        phenotype(REAL, DESIGN, classifier=model, label=1)

"""Formulas of the cell-eval metrics against scipy, small tables by hand, edge cases, profiles, scores of a baseline."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from scipy.spatial.distance import cdist

from invirtuo import Design
from invirtuo.metrics import (
    METRICS,
    PROFILES,
    Pair,
    evaluate,
    mean,
    noise_floor,
    score,
    score_against,
    summarize,
    wilcoxon,
)
from invirtuo.metrics.challenge.baseline import relative
from invirtuo.metrics.measures.discrimination import discrimination
from invirtuo.metrics.measures.distribution import distance_correlation
from invirtuo.metrics.measures.wilcoxon import DETable, de_overlap, de_precision, log2_fold_change, rank_sum

LABELS = ("control", "G01", "G02", "G03+G04", "other")
GENES = [f"G{i:02d}" for i in range(40)]


def screen(seed=0, *, effect=1.0, n=30):
    """Log1p cells of one type under four perturbations."""
    truth = np.random.default_rng(7)
    base = truth.gamma(1.0, 2.0, len(GENES))
    shifts = truth.normal(0, 3, (len(LABELS), len(GENES))) * (truth.random((len(LABELS), len(GENES))) < 0.3)
    shifts[0] = 0
    rng = np.random.default_rng(seed)
    blocks = [
        rng.poisson(np.clip(base + effect * shift, 0, None), (n + i, len(GENES))) for i, shift in enumerate(shifts)
    ]
    obs = pd.DataFrame({"gene": np.repeat(LABELS, [len(block) for block in blocks])})
    obs.index = obs.index.astype(str)
    values = np.log1p(np.concatenate(blocks)).astype(np.float32)
    return anndata.AnnData(sparse.csr_matrix(values), obs=obs, var=pd.DataFrame(index=GENES))


REAL, PRED = screen(), screen(1)
DESIGN = Design.from_adata(REAL, perturbation="gene", control="control")


def values(table):
    return table.pivot(index="condition", columns="metric", values="value")


def cells(adata, label):
    return adata[(adata.obs["gene"] == label).to_numpy()].X.toarray().astype(float)


def filled(adata, label, content):
    """A dense copy in which the cells of a label are all the same."""
    copy = anndata.AnnData(sparse.csr_matrix(adata.X).toarray(), obs=adata.obs, var=adata.var)
    copy.X[(copy.obs["gene"] == label).to_numpy()] = content
    return copy


def made(lfc, fdr=None):
    lfc = np.array(lfc, dtype=float)
    fdr = np.full(len(lfc), 0.01) if fdr is None else np.array(fdr, dtype=float)
    return DETable(lfc, fdr, np.zeros(len(lfc)), fdr)


# the test


FORMS = {
    "dense": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "csr": sparse.csr_matrix,
    "csr array": sparse.csr_array,
    "columns shuffled and back": lambda x: sparse.csr_matrix(x[:, ::-1])[:, ::-1],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_rank_sum_against_scipy(form, lowest):
    rng = np.random.default_rng(0)
    groups = [rng.poisson(1.5 + 0.3 * i, (n, 30)).astype(np.float32) + lowest for i, n in enumerate((8, 25, 1))]
    control = rng.poisson(1.5, (40, 30)).astype(np.float32) + lowest
    for block in (*groups, control):
        block[:, 0] = 2  # all values tied
    p, u = rank_sum([FORMS[form](group) for group in groups], FORMS[form](control))
    for i, group in enumerate(groups):
        x, c = group[:, 1:].astype(float), control[:, 1:].astype(float)
        expected = stats.mannwhitneyu(x, c, method="asymptotic", use_continuity=True)
        np.testing.assert_allclose(u[i, 1:], expected.statistic, rtol=0, atol=1e-9)
        np.testing.assert_allclose(p[i, 1:], expected.pvalue, rtol=1e-10, atol=1e-14)
        assert p[i, 0] == 1 and u[i, 0] == len(group) * 20


def test_rank_sum_at_its_centre_and_of_mixed_storage():
    x, c = np.array([[1.0], [4.0]]), np.array([[2.0], [3.0]])
    p, u = rank_sum([sparse.csr_matrix(x), x], c)
    np.testing.assert_array_equal(p, 1.0)
    np.testing.assert_array_equal(u, 2.0)


def test_ties_do_not_depend_on_storage():
    single = np.log1p(np.arange(12.0).reshape(6, 2) % 5).astype(np.float32)
    double = np.log1p(np.arange(12.0).reshape(6, 2) % 5)
    np.testing.assert_array_equal(rank_sum([single], double), rank_sum([single], single))


def test_rank_sum_is_silent(capfd):
    rank_sum([np.eye(3)], np.eye(3))
    assert capfd.readouterr() == ("", "")


def test_log2_fold_change():
    change = log2_fold_change(np.log1p([2.0, 0, 0, 1, -0.5]), np.log1p([1.0, 0, 1, 0, 1]))
    np.testing.assert_allclose(change, [1, 0, -np.inf, np.inf, -np.inf])


def test_view_holds_the_tests_of_a_condition():
    tests = Pair(PRED, REAL, DESIGN).see("wilcoxon", "pred", "G03+G04")
    x, c = cells(PRED, "G03+G04"), cells(REAL, "control")
    expected = stats.mannwhitneyu(x, c, method="asymptotic")
    np.testing.assert_allclose(tests.p_value, expected.pvalue, rtol=1e-10)
    np.testing.assert_allclose(tests.fdr, stats.false_discovery_control(expected.pvalue), rtol=1e-10)
    np.testing.assert_allclose(tests.lfc, log2_fold_change(x.mean(0), c.mean(0)), atol=1e-5)


def test_each_condition_is_tested_once(monkeypatch):
    sizes = []
    original = rank_sum
    monkeypatch.setattr(wilcoxon, "rank_sum", lambda groups, c: sizes.append(len(groups)) or original(groups, c))
    pair = Pair(PRED, REAL, DESIGN)
    table = values(score(pair, "cell_eval"))
    assert sizes == [4, 4]
    score(pair.against(screen(2)), "cell_eval")
    assert sizes == [4, 4, 4]  # the real side is not tested again
    monkeypatch.setattr(wilcoxon, "CELLS_AT_ONCE", 100)
    pd.testing.assert_frame_equal(values(evaluate(PRED, REAL, DESIGN, "cell_eval")), table)
    assert sizes[3:] == [3, 1, 3, 1]


# metrics on tables


def test_top_genes_and_their_ties():
    table = made([1, -np.inf, 3, np.inf, -3, 9], [0.01, 0.02, 0.03, 0.01, 0.01, 0.2])
    assert table.top().tolist() == [3, 1, 4, 2, 0]
    assert table.top(2).tolist() == [3, 1]


def test_overlap_and_precision_by_hand():
    real = made([5, 4, 3, 2, 1, 0.5], [0.01] * 4 + [0.5] * 2)
    pred = made([5, 1, 4, 0.1, 3, 2], [0.01, 0.5, 0.01, 0.5, 0.01, 0.01])  # 0, 2, 4, 5
    assert de_overlap(pred, real) == 2 / 4 and de_precision(pred, real) == 2 / 4
    assert de_overlap(pred, real, 2) == 1 / 2 and de_overlap(pred, real, 1) == 1 and de_overlap(pred, real, 99) == 0.5
    short = made(pred.lfc, [0.01, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert de_overlap(short, real) == 1 / 4  # a short prediction does not shorten the list
    assert de_precision(short, real) == 1
    long = made(np.arange(60.0), None)
    assert de_overlap(long, long, 50) == 1 and len(long.top(50)) == 50
    none = made(np.ones(6), np.ones(6))
    for metric in (de_overlap, de_precision):
        assert metric(none, real) == metric(pred, none) == metric(none, none) == 0


def test_direction_recall_and_correlation_by_hand():
    real = made([2, -1, np.inf, 3, 1], [0.01, 0.01, 0.01, 0.01, 0.9])
    pred = made([1, 1, 5, 0, -1], [0.01, 0.9, 0.01, 0.9, 0.01])
    assert wilcoxon.de_direction_match(pred, real) == 2 / 4
    assert wilcoxon.de_recall(pred, real) == 2 / 4
    expected = stats.spearmanr([1, 1, 5, 0], [2, -1, 99, 3]).statistic
    assert wilcoxon.de_spearman_lfc(pred, real) == pytest.approx(expected)
    none = made(np.ones(5), np.ones(5))
    for metric in ("de_direction_match", "de_recall", "de_spearman_lfc", "de_pr_auc", "de_roc_auc"):
        assert np.isnan(getattr(wilcoxon, metric)(pred, none))
    assert np.isnan(wilcoxon.de_spearman_lfc(none, real))  # a constant side
    assert np.isnan(wilcoxon.de_pr_auc(pred, made(np.ones(5))))  # all genes are DE


def test_areas_by_hand():
    real = made(np.ones(4), [0.01, 0.5, 0.01, 0.5])
    pred = made(np.ones(4), [1e-30, 0.5, 0.2, 0.1])
    assert wilcoxon.de_roc_auc(pred, real) == pytest.approx(3 / 4)
    assert wilcoxon.de_pr_auc(pred, real) == pytest.approx((1 + 2 / 3) / 2)


def test_size_correlation_edges():
    size = wilcoxon.size_correlation
    assert size(np.array([9, 1, 5]), np.array([0, 2, 3])) == pytest.approx(1)
    assert size(np.array([9, 1]), np.array([0, 0])) == 1
    assert np.isnan(size(np.array([9, 1]), np.array([0, 3]))) and np.isnan(size(np.ones(3), np.arange(3)))


# discrimination and distances


def test_discrimination_by_hand():
    real = np.array([[3.0, 0.0, 1.0], [0.0, 2.0, 1.0], [1.0, 1.0, 9.0]])
    pred = np.array([[2.5, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.9, 1.0]])
    for distance, name in (("l1", "cityblock"), ("l2", "euclidean"), ("cosine", "cosine")):
        matrix = cdist(pred, real, name)
        expected = [1 - (matrix[i] < matrix[i, i]).sum() / 3 for i in range(3)]
        np.testing.assert_allclose(discrimination(pred, real, distance), expected)
    without = discrimination(pred, real, "l1", left_out=[np.array([], int), np.array([0]), np.array([2])])
    np.testing.assert_allclose(without, [1, 1 - 1 / 3, 1 - 1 / 3])


def test_discrimination_edges():
    flat, real = np.zeros((3, 2)), np.array([[1.0, 0], [0, 1], [2, 0]])
    np.testing.assert_allclose(discrimination(flat, real, "l1"), [1, 1, 1 / 3])
    np.testing.assert_allclose(discrimination(flat, real, "l1", ties="mid"), [1 - 1 / 6, 1 - 1 / 6, 1 / 3])
    assert np.isnan(discrimination(flat, real, "cosine")).all()  # no direction, no place
    np.testing.assert_array_equal(discrimination(real[:1], real[1:2], "l2"), [1.0])
    with pytest.raises(ValueError, match="'l3'"):
        discrimination(flat, real, "l3")


def test_target_genes_do_not_count():
    target = REAL.var_names.get_indexer(["G03", "G04"])
    pred = filled(PRED, "nothing", 0)
    pred.X[np.ix_((pred.obs["gene"] == "G03+G04").to_numpy(), target)] = 15.0
    pd.testing.assert_frame_equal(*(values(evaluate(p, REAL, DESIGN, ["pds_l1", "pds_l2"])) for p in (pred, PRED)))


def test_distance_to_control_in_double_precision():
    def distance(x, c):
        return 2 * cdist(x, c).mean() - cdist(x, x).mean() - cdist(c, c).mean()

    control = cells(REAL, "control")
    sides = [np.array([distance(cells(a, label), control) for label in LABELS[1:]]) for a in (PRED, REAL)]
    expected = stats.pearsonr(*sides).statistic
    got = evaluate(PRED, REAL, DESIGN, "edistance_pearson")["value"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
    assert np.isnan(distance_correlation(np.array([1.0, 1.0 + 1e-7]), np.array([1.0, 2.0])))
    assert np.isnan(distance_correlation(np.ones(1), np.ones(1)))


# edges of whole files


def test_no_effect_is_not_defined_and_counted():
    nothing = filled(PRED, "G01", cells(REAL, "control").mean(axis=0))
    table = evaluate(nothing, REAL, DESIGN, ["pearson_delta", "mae", "pds_cosine"])
    wide = values(table)
    assert wide["pearson_delta"].isna().tolist() == wide["pds_cosine"].isna().tolist() == [True, False, False, False]
    assert table.attrs["n_nan"] == {"pearson_delta": 1, "mae": 0, "pds_cosine": 1}
    assert summarize(table).loc["pearson_delta", "n_scored"] == 3
    assert mean.effect(np.ones(3) + 1e-8, np.ones(3)).tolist() == [0, 0, 0]


def test_constant_prediction_and_single_cell():
    constant = PRED
    for label in LABELS[1:]:
        constant = filled(constant, label, cells(REAL, "control").mean(axis=0) + 0.1)
    table = values(evaluate(constant, REAL, DESIGN, "cell_eval"))
    assert table["edistance_pearson"].isna().all()
    assert table["de_overlap_n"].between(0, 1).all() and table["de_roc_auc"].between(0, 1).all()
    one = constant[~constant.obs.duplicated("gene").to_numpy()]
    one = one[np.argsort(one.obs["gene"].to_numpy() == "control")]
    single = evaluate(one, REAL[~REAL.obs.duplicated("gene") | (REAL.obs["gene"] == "control")], DESIGN, "cell_eval")
    assert (single["n_pred"] == 1).all() and np.isfinite(values(single)["mae"]).all()


def test_no_de_genes():
    still = screen(3, effect=0.0)
    table = evaluate(PRED, still, DESIGN, "cell_eval")
    wide = values(table)
    assert (wide[["de_overlap_n", "de_overlap_50", "de_precision_n"]] == 0).all(axis=None)
    assert wide[["de_recall", "de_direction_match", "de_pr_auc"]].isna().all(axis=None)
    assert (wide["de_spearman_size"] == 1).all() and table.attrs["n_scored"]["de_recall"] == 0


def test_real_controls_stand_on_both_sides():
    bare = PRED[(PRED.obs["gene"] != "control").to_numpy()]
    pd.testing.assert_frame_equal(*(values(evaluate(p, REAL, DESIGN, "cell_eval")) for p in (bare, PRED)))
    with pytest.raises(ValueError, match="pred: .*no control cells"):
        evaluate(bare, REAL, DESIGN, "vcc", controls="pred")
    own = values(evaluate(PRED, REAL, DESIGN, "cell_eval", controls="pred"))
    shared = values(evaluate(PRED, REAL, DESIGN, "cell_eval"))
    assert (own["pearson_delta"] != shared["pearson_delta"]).all()
    pd.testing.assert_series_equal(own["mae"], shared["mae"])


def test_noise_floor_of_the_profile():
    floor = values(noise_floor(REAL, DESIGN, "cell_eval"))
    assert (floor["pds_l2"] == 1).all() and floor["pearson_delta"].between(0.5, 1).all()


# profiles and baselines


def test_profiles_stand_for_their_metrics():
    assert all(name in METRICS for names in PROFILES.values() for name in names) and not set(PROFILES) & set(METRICS)
    assert len(PROFILES["cell_eval"]) == 27 and not any(METRICS[name].default for name in PROFILES["cell_eval"])
    table = evaluate(PRED, REAL, DESIGN, ["vcc", "mae", "rmse_mean"])
    assert table["metric"].unique().tolist() == ["mae", "pds_l1", "de_overlap_n", "rmse_mean"]
    default = evaluate(PRED, REAL, DESIGN)
    assert set(default["metric"]) - set(PROFILES["perturbench"]) == {"de_false_calls", "de_fdr", "de_recall_at_fdr"}
    with pytest.raises(ValueError, match=r"unknown metrics: vc2; known: .*vcc"):
        evaluate(PRED, REAL, DESIGN, "vc2")


def test_score_against_a_baseline():
    base = evaluate(screen(4, effect=0.0), REAL, DESIGN, "vcc")
    best, good, bad = (
        score_against(evaluate(p, REAL, DESIGN, "vcc"), base) for p in (REAL, PRED, screen(4, effect=-1))
    )
    np.testing.assert_allclose(best[["score", "clipped"]], 1.0)
    assert best.index.tolist() == ["mae", "pds_l1", "de_overlap_n", "average"] and best.index.name == "metric"
    assert 0 < good.loc["average", "score"] < 1
    means = [summarize(table).loc["mae", "mean"] for table in (evaluate(PRED, REAL, DESIGN, "vcc"), base)]
    assert good.loc["mae", "score"] == pytest.approx(1 - means[0] / means[1])
    assert bad.loc["mae", "score"] < 0 and bad.loc["mae", "clipped"] == 0
    assert good.loc["mae", ["n_user", "n_base"]].tolist() == [4, 4]


def test_relative_scores_that_are_not_defined():
    names = ["a", "b", "c"]
    user, base, best = (pd.Series(x, index=names) for x in ([0.5, 0.2, np.nan], [0.0, 1.0, 0.3], [0.0, 1.0, 1.0]))
    table = relative(user, base, best)
    assert table.loc[names, "score"].isna().all() and (table["clipped"] == 0).all()


def test_score_against_messages():
    table = evaluate(PRED, REAL, DESIGN, "vcc")
    with pytest.raises(ValueError, match="same metrics.*: mae"):
        score_against(table[table["metric"] != "mae"], table)
    with pytest.raises(ValueError, match="same conditions.*: G01"):
        score_against(table, table[table["condition"] != "G01"])
    with pytest.raises(ValueError, match="more than once"):
        score_against(pd.concat([table, table]), table)
    odd = table.replace("mae", "largest_gap")
    with pytest.raises(ValueError, match="finite best value: largest_gap"):
        score_against(odd, odd)

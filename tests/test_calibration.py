"""Calibration: controls of a metric, DRF and BDS by formula, groups, small conditions; metrics beside others."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import r2_score

from invirtuo import Design
from invirtuo.metrics import METRICS, Pair, calibration, evaluate, metric, others, scperteval
from invirtuo.metrics.trust.calibration import controls_of, drf
from invirtuo.metrics.trust.halves import halves
from invirtuo.metrics.trust.scperteval import PROTOCOLS

N_GENES = 60


def screen(sizes, *, kinds=("t1",), strength=1.0, seed=0):
    """Log1p cells; every label shifts genes of its own, and all shift some genes alike."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(7).normal(0, 0.7, N_GENES)
    blocks, rows = [], []
    for kind in kinds:
        base = np.random.default_rng([ord(letter) for letter in kind]).gamma(2.0, 1.0, N_GENES)
        for label, n in sizes.items():
            own = np.random.default_rng([ord(letter) for letter in label]).normal(0, 1, N_GENES)
            change = np.zeros(N_GENES) if label == "control" else shared + strength * own
            blocks.append(np.log1p(rng.poisson(3 * base * np.exp(change), (n, N_GENES))))
            rows += [(label, kind)] * n
    obs = pd.DataFrame(rows, columns=["gene", "kind"], index=[f"c{i}" for i in range(len(rows))])
    names = [f"G{i:02d}" for i in range(N_GENES)]
    return anndata.AnnData(np.concatenate(blocks).astype(np.float32), obs=obs, var=pd.DataFrame(index=names))


def design_of(adata):
    return Design.from_adata(adata, perturbation="gene", control="control", covariates=["kind"])


SIZES = {"control": 60, "A": 50, "B": 44, "C": 40, "D": 36}
REAL = screen(SIZES)
DESIGN = design_of(REAL)
TWO = screen(SIZES, kinds=("t1", "t2"))
JUDGING = [name for name, record in METRICS.items() if record.direction and np.isfinite(record.best)]


def cells_of(label, kind="t1", adata=REAL):
    chosen = (adata.obs["gene"] == label) & (adata.obs["kind"] == kind)
    return np.asarray(adata[chosen].X, dtype=float)


@pytest.fixture(scope="module")
def every():
    return calibration(TWO, design_of(TWO), list(METRICS), n_pcs=5)


# the table


def test_every_metric_that_judges_is_calibrated(every):
    assert list(every["metric"]) == JUDGING
    assert every["bds"].between(0, 1).all() and every["drf"].dropna().between(-1, 1).all()
    assert (every["n"] + every["n_nan"] == 8).all()
    conditions = every.attrs["conditions"]
    assert len(conditions) == 8 * len(every) and set(conditions["group"]) == {"t1", "t2"}
    assert (conditions.loc[conditions["condition"] == "t1|A", "n_truth"] == 25).all()


def test_metrics_tell_strong_effects_apart(every):
    table = every.set_index("metric")
    for name in ("mse", "wmse", "pearson_delta", "pearson_perturbed_mean", "mmd_gex", "rmse_mean_rank"):
        assert table.loc[name, "drf"] > 0.4 and table.loc[name, "bds"] == 1, name
    assert table.loc["pds_l1", "drf"] > 0.9 and table.loc["de_recall", "bds"] == 1


def test_metrics_do_not_tell_perturbations_without_an_effect_of_their_own_apart():
    real = screen(SIZES, strength=0.0)
    table = calibration(real, design_of(real), ["mse", "pearson_delta", "mmd_gex", "rmse_mean_rank"])
    assert (table["drf"] < 0.3).all()


def test_controls_follow_what_a_metric_sees(every):
    kinds = every.set_index("metric")[["positive", "negative"]]
    assert tuple(kinds.loc["mse"]) == ("interpolated duplicate", "mean of the other perturbations")
    assert tuple(kinds.loc["pds_l1"]) == ("interpolated duplicate", "mean of all perturbations")
    assert tuple(kinds.loc["pearson_perturbed_mean"]) == ("interpolated duplicate", "mean of the control cells")
    assert tuple(kinds.loc["mmd_gex"]) == ("other half of the cells", "cells of the other perturbations")
    assert tuple(kinds.loc["mmd_gex_rank"]) == ("other half of the cells", "cells of all perturbations")
    assert tuple(kinds.loc["de_recall"]) == ("other half of the cells", "cells of the other perturbations")


def test_scores_of_both_controls_by_hand():
    table = calibration(REAL, DESIGN, ["mse", "rmse_mean"], seed=3).attrs["conditions"]
    divided = halves(REAL, DESIGN, seed=3, min_cells=30)
    x = np.asarray(REAL.X, dtype=float)
    truth, duplicate = x[divided.truth_rows["t1|B"]], x[divided.duplicate_rows["t1|B"]]
    rest = np.concatenate([cells_of(label) for label in "ACD"])
    mean = np.mean([cells_of(label).mean(axis=0) for label in "ACD"], axis=0)
    p_adj = stats.false_discovery_control(stats.ttest_ind(duplicate, rest, equal_var=False).pvalue)
    interpolated = (1 - p_adj) * duplicate.mean(axis=0) + p_adj * mean
    good, bad = (np.square(answer - truth.mean(axis=0)).mean() for answer in (interpolated, mean))
    row = table[(table["condition"] == "t1|B") & (table["metric"] == "mse")].iloc[0]
    assert row["positive_value"] == pytest.approx(good) and row["negative_value"] == pytest.approx(bad)
    assert row["drf"] == pytest.approx((bad - good) / (bad + 1e-6)) and row["wins"] == (good < bad)


def test_halves_are_disjoint_and_all_cells():
    divided = halves(TWO, design_of(TWO), seed=0, min_cells=30)
    for name, rows in divided.cells.rows.items():
        both = np.concatenate([divided.truth_rows[name], divided.duplicate_rows[name]])
        assert sorted(both) == sorted(rows) and 0 <= len(rows) - 2 * len(divided.truth_rows[name]) <= 1


def test_negative_cells_are_those_of_other_perturbations_of_the_group():
    divided = halves(TWO, design_of(TWO), seed=0, min_cells=30)
    names = design_of(TWO).names(TWO.obs).to_numpy()
    for name, rows in divided._other_cells.items():
        found = set(names[rows])
        assert len(rows) == len(divided.duplicate_rows[name]) == len(set(rows))
        assert name not in found and {other[:2] for other in found} == {name[:2]}
        assert not any(other.endswith("control") for other in found)


def test_groups_do_not_see_each_other():
    names = ["mse", "wmse", "pearson_perturbed_mean", "centroid_accuracy"]
    both = calibration(TWO, design_of(TWO), names).attrs["conditions"]
    one = TWO[TWO.obs["kind"] == "t1"].copy()
    alone = calibration(one, design_of(TWO), names).attrs["conditions"]
    shared = both[both["group"] == "t1"].reset_index(drop=True)
    pd.testing.assert_frame_equal(shared, pd.DataFrame(alone))


def test_the_seed_decides_and_the_input_stays():
    before = REAL.copy()
    first, again, other = (calibration(REAL, DESIGN, ["mse", "mmd_gex"], seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first["drf"], other["drf"])
    assert (REAL.X == before.X).all() and REAL.obs.equals(before.obs)


def test_small_conditions_are_left_out_and_counted():
    real = screen(SIZES | {"E": 12})
    table = calibration(real, design_of(real), ["mse"])
    assert table.attrs["left_out"] == {"t1|E": "12 cells, fewer than 30"} and table.loc[0, "n"] == 4
    divided = halves(real, design_of(real), seed=0, min_cells=30)
    mean = np.mean([cells_of(label, adata=real).mean(axis=0) for label in "BCD"], axis=0)
    np.testing.assert_allclose(divided.others["t1|A"].mean, mean)
    assert divided.others["t1|A"].moments[2] == 44 + 40 + 36 + 12
    assert calibration(real, design_of(real), ["mse"], min_cells=12).loc[0, "n"] == 5


def test_one_perturbation_in_a_group_is_held_against_control_cells():
    real = screen({"control": 70, "A": 60}, kinds=("t1", "t2"))
    names = ["mse", "wmse", "pearson_delta", "mmd_gex", "pds_l1", "pearson_perturbed_mean", "mse_degs", "r2_weighted"]
    table = calibration(real, design_of(real), names).set_index("metric")
    assert (table.loc[["mse", "wmse", "pearson_delta", "mmd_gex"], "negative"] == "control cells").all()
    assert (table.loc[["mse", "wmse", "pearson_delta", "mmd_gex", "mse_degs"], "drf"] > 0.5).all()
    # these set perturbations against each other
    assert (table.loc[["pds_l1", "pearson_perturbed_mean"], "n"] == 0).all()


def test_few_control_cells_are_drawn_again():
    real = screen({"control": 10, "A": 60})
    table = calibration(real, design_of(real), ["mse", "mmd_gex"])
    assert (table["n"] == 1).all()


def test_a_metric_without_a_value_does_not_win():
    @metric(
        "half_known",
        label="x",
        direction="higher",
        range=(0.0, 1.0),
        best=1.0,
        definition="known for one side only",
        reference="this test",
    )
    def half_known(pair, group):
        return np.where(np.arange(len(pair.names(group))) < 2, np.nan, 0.5)

    try:
        row = calibration(REAL, DESIGN, "half_known").iloc[0]
    finally:
        del METRICS["half_known"]
    assert row["bds"] == 0 and row["drf"] == 0 and (row["n"], row["n_nan"]) == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["variance_ratio"]}, "none of variance_ratio has a direction"),
        ({"metrics": ["nonsense"]}, "unknown metrics: nonsense"),
        ({"min_cells": 1000}, "no condition has 1000 cells or more to divide; the largest has 50"),
        ({"min_cells": 1}, "min_cells is 1; expected a whole number, at least 2"),
        ({"design": Design()}, "the design names no perturbation"),
    ],
)
def test_what_cannot_be_calibrated(change, message):
    options = {"design": DESIGN, "metrics": ["mse"]} | change
    with pytest.raises(ValueError, match=message):
        calibration(REAL, **options)


def test_control_cells_are_asked_for_where_they_are_needed():
    real = REAL[REAL.obs["gene"].isin(["A", "B"])].copy()
    assert calibration(real, DESIGN, ["mse", "mmd_gex"])["n"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="has no control cells"):
        calibration(real, DESIGN, ["pearson_delta"])


def test_the_table_can_be_printed_and_joined(every):
    with pd.option_context("display.max_columns", 4, "display.width", 80):
        assert "..." in repr(every)
    joined = pd.concat([every, every])
    assert len(joined.attrs["conditions"]) == len(every.attrs["conditions"])


# formulas


def test_drf():
    good, bad = np.array([0.2, 0.9, 0.1, 0.5, np.nan, 3.0]), np.array([0.4, 0.3, np.nan, -0.1, 0.3, 0.5])
    found = drf(good, bad, 0.0, "lower")
    np.testing.assert_allclose(found, [0.5, -1.0, np.nan, np.nan, np.nan, -1.0], atol=1e-5)
    higher = drf(np.array([0.7, 0.2]), np.array([0.4, 0.6]), 1.0, "higher")
    np.testing.assert_allclose(higher, [0.5, -1.0], atol=1e-5)


def test_metrics_of_means_see_nothing_else():
    """The same scores if every cell is the mean of its condition; and the flag is set wherever this holds."""
    pred = screen(SIZES, seed=1)
    flat = pred.copy()
    flat.X = flat.X.astype(float)
    for label in SIZES:
        chosen = (pred.obs["gene"] == label).to_numpy()
        flat.X[chosen] = flat.X[chosen].mean(axis=0)
    names = [name for name, record in METRICS.items() if record.of_means]
    assert {"mse", "rmse_mean_rank", "pearson_delta", "cosine_logfc", "pds_l2", "deg_recall_lfc", "wmse"} <= set(names)
    values = [evaluate(side, REAL, DESIGN, names)["value"] for side in (pred, flat)]
    np.testing.assert_allclose(*values, atol=1e-6)
    pair = Pair(pred, REAL, DESIGN)
    known = pair.against_means({name: pair.moments("pred", name)[0] for name in pair.names("t1")})
    for name in names:
        np.testing.assert_allclose(METRICS[name].values(known, "t1"), METRICS[name].values(pair, "t1"))


@pytest.mark.parametrize("name", JUDGING)
def test_every_metric_has_two_controls(name):
    positive, negative = controls_of(METRICS[name])
    assert ("cells" in positive) == (not METRICS[name].of_means) and positive != negative


def test_others_and_their_test():
    pair = Pair(REAL, REAL, DESIGN)
    rest = np.concatenate([cells_of(label) for label in ("A", "B", "D")])
    found = others.others_of(pair, "t1|C")
    mean, var, n = found.moments
    np.testing.assert_allclose(mean, rest.mean(axis=0))
    np.testing.assert_allclose(var, rest.var(axis=0, ddof=1))
    assert n == len(rest) and not found.are_controls
    expected = stats.ttest_ind(cells_of("C"), rest, equal_var=False)
    tests = others.tests_of(pair, "t1|C")
    np.testing.assert_allclose(tests.statistic, expected.statistic)
    np.testing.assert_allclose(tests.p_adj, stats.false_discovery_control(expected.pvalue))


def test_a_gene_that_does_not_vary_has_no_test():
    real = REAL.copy()
    real.X[:, 3] = 0.0
    real.X[(real.obs["gene"] == "A").to_numpy(), 4] = 1.0
    real.X[(real.obs["gene"] != "A").to_numpy(), 4] = 0.0
    tests = others.tests_of(Pair(real, real, DESIGN), "t1|A")
    assert (tests.statistic[[3, 4]] == 0).all() and (tests.p_adj[[3, 4]] == 1).all()


def test_weights():
    weight = others.weights(np.array([-4.0, 0.0, np.nan, 2.0]))
    np.testing.assert_allclose(weight, [0.8, 0.0, 0.0, 0.2])
    np.testing.assert_allclose(others.weights(np.ones(4)), 0.25)
    np.testing.assert_allclose(others.weights(np.full(4, np.nan)), 0.25)


def test_metrics_beside_others_by_formula():
    pred = screen(SIZES, seed=1)
    names = ["wmse", "r2_weighted", "mse_degs", "pearson_degs", "pearson_perturbed_mean", "centroid_accuracy"]
    table = evaluate(pred, REAL, DESIGN, names).pivot(index="condition", columns="metric", values="value").loc["t1|A"]
    x, y, c = (cells_of("A", adata=pred).mean(0), cells_of("A").mean(0), cells_of("control").mean(0))
    rest = np.concatenate([cells_of(label) for label in "BCD"])
    test = stats.ttest_ind(cells_of("A"), rest, equal_var=False)
    weight = others.weights(test.statistic)
    degs = stats.false_discovery_control(test.pvalue) < 0.05
    centre = np.mean([cells_of(label).mean(axis=0) for label in "BCD"], axis=0)
    assert table["wmse"] == pytest.approx((weight * (x - y) ** 2).sum())
    assert table["r2_weighted"] == pytest.approx(r2_score(y - centre, x - centre, sample_weight=weight))
    assert table["mse_degs"] == pytest.approx(np.square(x - y)[degs].mean())
    assert table["pearson_degs"] == pytest.approx(stats.pearsonr((x - c)[degs], (y - c)[degs]).statistic)
    assert table["pearson_perturbed_mean"] == pytest.approx(stats.pearsonr(x - centre, y - centre).statistic)
    assert table["centroid_accuracy"] == 1


def test_the_mean_of_the_others_gains_nothing():
    pair = Pair(REAL, REAL, DESIGN)
    means = {name: others.others_of(pair, name).mean for name in pair.names("t1")}
    bland = pair.against_means(means)
    assert (METRICS["r2_weighted"].values(bland, "t1") <= 0).all()
    one = pair.against_means(dict.fromkeys(means, np.mean([*means.values()], axis=0)))
    assert METRICS["centroid_accuracy"].values(one, "t1").mean() == pytest.approx(0.5)


def test_without_de_genes_there_is_no_value():
    real = screen(SIZES, strength=0.0)
    table = evaluate(real, real, design_of(real), ["mse_degs", "pearson_degs"])
    assert table["value"].isna().any()


# the protocols


def test_every_protocol_runs():
    table = scperteval(REAL, DESIGN, k=20)
    assert list(table["metric"]) == list(PROTOCOLS) and (table["n"] == 4).all()
    assert table.set_index("metric").loc["nir", "negative"] == "mean of all perturbations"
    alike = scperteval(REAL, DESIGN, ["mse_top_k", "r2_ctrl_top_k", "mse", "wmse_exp2"], k=N_GENES)
    ours = calibration(REAL, DESIGN, ["mse", "wmse"], seed=42)
    np.testing.assert_allclose(alike["drf"].iloc[[0, 2, 3]], ours["drf"].iloc[[0, 0, 1]])


def test_rank_sum_tests_serve_too():
    table = scperteval(REAL, DESIGN, ["mse", "wmse_exp2", "de_auroc"], test="rank-sum")
    assert (table["drf"] > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": "mse_top"}, "unknown protocol 'mse_top'.*did you mean 'mse_top_k'"),
        ({"test": "welch"}, "test must be 't-test' or 'rank-sum'; found 'welch'"),
        ({"k": 0}, "k is 0; expected a whole number, at least 1"),
    ],
)
def test_what_is_no_protocol(change, message):
    with pytest.raises(ValueError, match=message):
        scperteval(REAL, DESIGN, **change)

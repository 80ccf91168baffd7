"""Reference: numbers of cell-eval 0.8.2 with pdex 0.3.0 on deterministic synthetic screens."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from invirtuo import Design
from invirtuo.metrics import PROFILES, Pair, ceiling, evaluate, score, summarize
from invirtuo.metrics.challenge.baseline import relative
from invirtuo.metrics.measures.wilcoxon import DETable, de_overlap, de_precision

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "cell_eval"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden files are not at {GOLDEN}")

CASES = [
    *("good_sparse", "good_dense", "counts", "half_effect"),
    *("permuted", "shifted_controls", "mean_baseline", "null_no_de"),
]
THEIRS = {
    "pearson_delta": "pearson_delta",
    "mae": "mae",
    "mse": "mse",
    "mae_delta": "mae_delta",
    "mse_delta": "mse_delta",
    "pds_l1": "discrimination_score_l1",
    "pds_l2": "discrimination_score_l2",
    "pds_cosine": "discrimination_score_cosine",
    "de_overlap_n": "overlap_at_N",
    "de_overlap_50": "overlap_at_50",
    "de_overlap_100": "overlap_at_100",
    "de_overlap_200": "overlap_at_200",
    "de_overlap_500": "overlap_at_500",
    "de_precision_n": "precision_at_N",
    "de_precision_50": "precision_at_50",
    "de_precision_100": "precision_at_100",
    "de_precision_200": "precision_at_200",
    "de_precision_500": "precision_at_500",
    "de_nsig_real": "de_nsig_counts_real",
    "de_nsig_pred": "de_nsig_counts_pred",
    "de_direction_match": "de_direction_match",
    "de_spearman_lfc": "de_spearman_lfc_sig",
    "de_spearman_size": "de_spearman_sig",
    "de_recall": "de_sig_genes_recall",
    "de_pr_auc": "pr_auc",
    "de_roc_auc": "roc_auc",
    "edistance_pearson": "pearson_edistance",
}
TOLERANCE = {
    "edistance_pearson": 2e-6,
    "pearson_delta": 1e-6,
    **dict.fromkeys(("mae", "mse", "mae_delta", "mse_delta"), 1e-6),
}
# all others 1e-12
# the golden E-distances are means in float32; ours are those in float64 to 1e-9 (tests/test_cell_eval.py)
ROUNDED = {("half_effect", "edistance_pearson"): 4e-6}
SAME_CONTROLS = ["good_sparse", "good_dense", "half_effect", "permuted", "mean_baseline"]


def read(case, side):
    folder = GOLDEN / case
    file = json.loads((folder / "case.json").read_text())["real_file"] if side == "real" else "pred.h5ad"
    return anndata.read_h5ad(folder / file)


def design_of(real):
    return Design.from_adata(real, perturbation="target_gene", control="non-targeting")


@pytest.fixture(scope="module")
def pair_of():
    made = {}

    def make(case, controls="pred"):
        if (case, controls) not in made:
            real, scale = read(case, "real"), "counts" if case == "counts" else "log1p"
            made[case, controls] = Pair(read(case, "pred"), real, design_of(real), controls=controls, scale=scale)
        return made[case, controls]

    return make


def table_of(pair):
    return score(pair, "cell_eval").pivot(index="condition", columns="metric", values="value")


@pytest.mark.parametrize("case", CASES)
def test_every_value(case, pair_of):
    assert set(THEIRS) == set(PROFILES["cell_eval"])
    table = table_of(pair_of(case))
    golden = pd.read_csv(GOLDEN / case / "results.csv", index_col="perturbation").loc[table.index]
    for name, column in THEIRS.items():
        ours, theirs = table[name].to_numpy(), golden[column].to_numpy(dtype=float)
        if case == "mean_baseline" and name == "edistance_pearson":
            assert np.isnan(ours).all() and np.isnan(theirs).all()
        elif case == "shifted_controls" and name.startswith("de_overlap"):
            off = np.abs(ours - theirs) > 1e-12  # 20-30 genes tie at an infinite fold change
            assert off.sum() <= 1 and np.abs(ours - theirs).max() <= 1 / 12 + 1e-12
        else:
            atol = ROUNDED.get((case, name), TOLERANCE.get(name, 1e-12))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=f"{case} {name}")


@pytest.mark.parametrize("scale", ["counts", "auto"])
def test_counts_through_the_front_door(scale):
    folder = GOLDEN / "counts"
    real = read("counts", "real")
    scores = evaluate(folder / "pred.h5ad", real, design_of(real), "cell_eval", scale=scale, controls="pred")
    table = scores.pivot(index="condition", columns="metric", values="value")
    golden = pd.read_csv(folder / "results.csv", index_col="perturbation").loc[table.index]
    for name, column in THEIRS.items():
        atol = TOLERANCE.get(name, 1e-12)
        np.testing.assert_allclose(table[name], golden[column].astype(float), rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_means_under_its_rule_for_nan(case, pair_of):
    golden = pd.read_csv(GOLDEN / case / "agg_results.csv", index_col="statistic").loc["mean"].astype(float)
    ours = summarize(score(pair_of(case), "cell_eval"), compat=True)["mean"]
    for name, column in THEIRS.items():
        ties = case == "shifted_controls" and name.startswith("de_overlap")  # see test_every_value
        atol = 1 / 144 + 1e-12 if ties else max(ROUNDED.get((case, name), TOLERANCE.get(name, 0)), 1e-12)
        np.testing.assert_allclose(ours[name], golden[column], rtol=0, atol=atol, err_msg=f"{case} {name}")


def test_halves_and_ceiling():
    real = read("good_sparse", "real")
    table = table_of(Pair.equal_halves(real, design_of(real), seed=0))
    golden = pd.read_csv(GOLDEN / "good_sparse" / "ceiling_results.csv", index_col="perturbation").loc[table.index]
    for name, column in THEIRS.items():
        atol = TOLERANCE.get(name, 1e-12)
        np.testing.assert_allclose(table[name], golden[column].astype(float), rtol=0, atol=atol, err_msg=name)
    wanted = pd.read_csv(GOLDEN / "good_sparse" / "agg_ceiling_results.csv").iloc[0].astype(float)
    ours = ceiling(real, design_of(real), compat=True)["ceiling"]
    for name, column in THEIRS.items():
        np.testing.assert_allclose(ours[name], wanted[column], rtol=0, atol=TOLERANCE.get(name, 1e-12), err_msg=name)


@pytest.mark.parametrize("case", SAME_CONTROLS)
def test_real_controls_on_both_sides_change_nothing_where_they_are_the_same(case, pair_of):
    pd.testing.assert_frame_equal(table_of(pair_of(case, "real")), table_of(pair_of(case)), rtol=0, atol=1e-9)


def test_real_controls_undo_shifted_controls(pair_of):
    pd.testing.assert_frame_equal(table_of(pair_of("shifted_controls", "real")), table_of(pair_of("good_sparse")))
    assert not table_of(pair_of("shifted_controls")).equals(table_of(pair_of("good_sparse")))


def both_tables(pair, side, golden, condition):
    """Our table and the golden one of a condition, genes in our order."""
    rows = golden[golden["target"] == condition].set_index("feature").loc[list(pair.genes)]
    fields = {"lfc": "log2_fold_change", "p_value": "p_value", "statistic": "statistic", "fdr": "fdr"}
    return pair.see("wilcoxon", side, condition), DETable(*(rows[column].to_numpy() for column in fields.values()))


@pytest.mark.parametrize("case", CASES)
def test_tables_of_tests(case, pair_of):
    pytest.importorskip("pyarrow", reason="reading the golden tables takes pyarrow; results.csv is compared anyway")
    pair = pair_of(case)
    frames = {side: pd.read_parquet(GOLDEN / case / f"{side}_de.parquet") for side in ("pred", "real")}
    golden = pd.read_csv(GOLDEN / case / "results.csv", index_col="perturbation")
    for condition in pair.conditions.index:
        stored = {}
        for side, frame in frames.items():
            ours, theirs = both_tables(pair, side, frame, condition)
            for name in ("p_value", "statistic", "fdr"):
                np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-12)
            np.testing.assert_allclose(ours.lfc, theirs.lfc, rtol=0, atol=1e-5)  # infinities must agree
            stored[side] = theirs
        if case != "shifted_controls":
            overlap = [de_overlap(**stored, k=k) for k in (None, 50, 100, 200, 500)]
            columns = [f"overlap_at_{k}" for k in ("N", 50, 100, 200, 500)]
            np.testing.assert_allclose(overlap, golden.loc[condition, columns].astype(float), atol=1e-12)
        precision = [de_precision(**stored, k=k) for k in (None, 50, 100, 200, 500)]
        columns = [f"precision_at_{k}" for k in ("N", 50, 100, 200, 500)]
        np.testing.assert_allclose(precision, golden.loc[condition, columns].astype(float), atol=1e-12)


@pytest.mark.parametrize("profile", ["", "_vcc"])
def test_score_against_baseline(profile):
    user, base = (
        pd.read_csv(GOLDEN / "score" / f"agg_{side}{profile}.csv", index_col="statistic").loc["mean"].astype(float)
        for side in ("user", "base")
    )
    golden = pd.read_csv(GOLDEN / "score" / f"score{profile}.csv", index_col="metric")["from_baseline"]
    names = golden.index.drop("avg_score")
    best = pd.Series([0.0 if name.startswith(("mse", "mae")) else 1.0 for name in names], index=names)
    table = relative(user, base, best)
    np.testing.assert_allclose(table["clipped"], golden, rtol=0, atol=1e-12)

"""Reference: numbers of scPertEval 0.2.0 on two screens and a panel of strong perturbations."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from invirtuo import Design, metrics
from invirtuo.metrics.measures.others import tests_of as real_tests
from invirtuo.metrics.trust.halves import Control, halves

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "yardstick2026" / "calibration"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden files are not at {GOLDEN}")

DATA = ["papalexi", "norman", "papalexi_strong"]
TESTS = {"t-test": "t-test", "MWU": "rank-sum"}
TOLERANCE = 2e-5
OURS = {  # protocol to the metric of ours that is the same
    "mse": "mse",
    "wmse_exp2": "wmse",
    "pearson_ctrl": "pearson_delta",
    "pearson_pert": "pearson_perturbed_mean",
    "mse_degs_padj=0.05": "mse_degs",
    "rank": "rmse_mean_rank",
    "nir": "centroid_accuracy",
}


def opened(data):
    real = anndata.read_h5ad(GOLDEN / f"{data}.h5ad")
    return real, Design.from_adata(real, perturbation="perturbation", control="control")


def expected(data, method):
    table = pd.read_csv(GOLDEN / f"{data}_per_perturbation.csv")
    return table[(table["calibrator"] == "drf") & (table["de_method"] == method)]


def compared(conditions, theirs):
    """Scores of both controls and DRF; the negative control of ranks is noise there."""
    theirs = theirs.set_index("perturbation")
    ours = conditions.set_index("condition").loc[theirs.index]
    np.testing.assert_allclose(ours["positive_value"], theirs["raw_positive"], rtol=0, atol=TOLERANCE)
    if theirs["negative"].iloc[0] != "global_mean":
        np.testing.assert_allclose(ours["negative_value"], theirs["raw_negative"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(ours["drf"], theirs["value"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("data", DATA)
def test_halves_and_interpolated_duplicate(data):
    real, design = opened(data)
    divided = halves(real, design, seed=42, min_cells=30)
    names = json.loads((GOLDEN / f"{data}_halves.json").read_text())
    for condition, rows in divided.truth_rows.items():
        assert list(real.obs_names[rows]) == names[condition]["first_half_truth"]
        other = real.obs_names[divided.duplicate_rows[condition]]
        assert list(other) == names[condition]["second_half_duplicate"]

    with np.load(GOLDEN / f"{data}_interpolated.npz", allow_pickle=True) as file:
        genes = pd.Index(divided.duplicate.genes).get_indexer(file["genes"])
        control = divided.prediction(Control.INTERPOLATED)
        for i, condition in enumerate(file["perturbations"]):
            truth, duplicate = real_tests(divided.duplicate, condition), divided.tests[condition]
            # variances are differences of float32 numbers there
            np.testing.assert_allclose(truth.statistic[genes], file["t_first_half"][i], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(truth.p_adj[genes], file["padj_first_half"][i], atol=1e-4)
            np.testing.assert_allclose(duplicate.p_adj[genes], file["padj_second_half"][i], atol=1e-4)
            mean = control.see("mean", "pred", condition)
            np.testing.assert_allclose(mean[genes], file["interpolated"][i], atol=TOLERANCE)


@pytest.mark.parametrize("method", TESTS)
@pytest.mark.parametrize("data", DATA)
def test_protocols(data, method):
    real, design = opened(data)
    theirs = expected(data, method)
    if theirs.empty:
        pytest.skip("no such test in this file")
    means = pd.read_csv(GOLDEN / f"{data}_aggregate.csv").set_index(["de_method", "calibrator", "protocol"])
    for protocol, one in theirs.groupby("protocol"):
        name, _, value = protocol.partition("=")
        k = int(value) if name.endswith("top_k") else 50
        table = metrics.scperteval(real, design, name, k=k, test=TESTS[method])
        compared(table.attrs["conditions"], one)
        if name not in ("rank", "nir"):
            found, of_drf = table.iloc[0], means.loc[(method, "drf", protocol)]
            assert found["drf"] == pytest.approx(of_drf["median"], abs=TOLERANCE)
            assert found["drf_mean"] == pytest.approx(of_drf["mean"], abs=TOLERANCE)
            assert found["bds"] == pytest.approx(means.loc[(method, "bds", protocol), "bds"])


@pytest.mark.parametrize("data", DATA)
def test_calibration_gives_the_same_for_metrics_of_ours(data):
    real, design = opened(data)
    theirs = expected(data, "t-test").groupby("protocol")
    table = metrics.calibration(real, design, list(OURS.values()), seed=42)
    conditions = table.attrs["conditions"].groupby("metric")
    for protocol, name in OURS.items():
        compared(conditions.get_group(name), theirs.get_group(protocol))

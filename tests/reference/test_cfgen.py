"""Reference: distances between generated and real cells made by the code of CFGen and what it imports."""

import json
from pathlib import Path

import numpy as np
import pytest

from invirtuo.metrics import generation

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "cfgen"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden files are not at {GOLDEN}")

CASES = ["tiny", "same_size", "unequal", "identical", "far", "collapsed_gen", "lowdim_small_bw"]
DISTANCES = {
    "w1": generation.wasserstein1,
    "w2": generation.wasserstein2,
    "linear_mmd2": generation.mmd_linear,
    "rbf_mmd2_mix5_biased": generation.mmd_rbf,
    "rbf_mmd2_mix5_unbiased": generation.mmd_rbf_unbiased,
}
NEIGHBOURS = {
    "precision": generation.knn_precision,
    "recall": generation.knn_recall,
    "density": generation.knn_density,
    "coverage": generation.knn_coverage,
}


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "metric_expected.json").read_text())["cases"]


def cells(case, dtype=np.float64):
    """Generated and real; which file holds which matters to the neighbourhoods only."""
    with np.load(GOLDEN / "metric_inputs.npz") as file:
        return file[f"{case}_X"].astype(dtype), file[f"{case}_Y"].astype(dtype)


def test_all_cases_are_here(expected):
    assert set(expected) == set(CASES)


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_distances(case, dtype, expected):
    golden = expected[case][dtype]
    x, y = cells(case, {"f64": np.float64, "f32": np.float32}[dtype])
    rtol, atol = {"f64": (1e-6, 1e-9), "f32": (1e-4, 1e-5)}[dtype]
    for name, distance in DISTANCES.items():
        same = case == "identical" and name in ("w1", "w2")  # rounding there, exactly 0 here
        limits = {"rtol": 0, "atol": {"f64": 1e-6, "f32": 1e-3}[dtype]} if same else {"rtol": rtol, "atol": atol}
        np.testing.assert_allclose(distance(x, y), golden[name], **limits, err_msg=name)
    for sigma in (0.01, 0.1, 1, 10, 100):
        wanted = golden[f"rbf_mmd2_sigma{sigma}_biased"]
        np.testing.assert_allclose(generation.mmd_rbf(x, y, sigmas=[sigma]), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("k", [5, 10])
@pytest.mark.parametrize("case", CASES[1:])
def test_neighbourhoods(case, k, expected):
    real, generated = cells(case)
    for name, share in NEIGHBOURS.items():
        np.testing.assert_allclose(
            share(generated, real, k=k), expected[case][f"prdc_L1_k{k}"][name], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("case", CASES)
def test_all_distances_at_once(case, expected):
    names = {
        "1-Wasserstein": "w1",
        "2-Wasserstein": "w2",
        "Linear_MMD": "linear_mmd2",
        "RBF_MMD": "rbf_mmd2_mix5_biased",
    }
    x, y = cells(case, np.float32)
    for column, wanted in expected[case]["compute_distribution_distances_f32"].items():
        np.testing.assert_allclose(DISTANCES[names[column]](x, y), wanted, rtol=1e-4, atol=1e-3)

"""Formula tests of time courses, baselines, synthetic systems, solutions between steps, and recovery of edges."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import invirtuo as iv
from invirtuo.cells import courses, preparation
from invirtuo.flow import trajectory
from invirtuo.metrics.applications import network
from invirtuo.models import sparse_ode
from invirtuo.verbs import naive_forecasts

F64 = {"dtype": torch.float64}


def course(n=200, g=3, noise=0.0, name="a", seed=0):
    rng = np.random.default_rng(seed)
    time = np.sort(rng.random(n))
    values = np.stack([np.sin((k + 1) * time) for k in range(g)], axis=1) + noise * rng.normal(size=(n, g))
    return courses.Course(name, {"lineage": name}, time, values, np.arange(n))


# ---- solutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_order_between_the_steps(solver, order):
    """Halve the step: the error at times between the nodes falls with the order (of the cubic: at most 4)."""
    turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]], **F64)
    x0, times = torch.tensor([[1.0, 0.0]], **F64), torch.linspace(0, 1, 23)
    exact = torch.stack([torch.cos(2 * times.double()), torch.sin(2 * times.double())], dim=1)
    errors = []
    for n in (16, 32, 64):
        found = trajectory(lambda x, t: x @ turn, x0, n, solver).at(times)[:, 0]
        errors.append(float((found - exact).abs().max()))
    slope = np.polyfit(np.log([16, 32, 64]), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.35)


def test_dopri5_holds_its_tolerance_between_the_steps():
    x0 = torch.ones(1, 1, **F64)
    way = trajectory(lambda x, t: -3 * x, x0, torch.tensor([0.0, 2.0]), "dopri5", tolerance=1e-8)
    times = torch.linspace(0, 2, 101, **F64)
    torch.testing.assert_close(way.at(times)[:, 0, 0], torch.exp(-3 * times), atol=3e-6, rtol=0)


def test_evaluations_do_not_depend_on_the_times_asked_for():
    calls = []
    way = trajectory(lambda x, t: calls.append(1) or -x, torch.ones(2, 3), 8, "rk4")
    assert len(calls) == 4 * 8 + 1
    assert way.at(torch.linspace(0, 1, 800)).shape == (800, 2, 3)


def test_own_times_for_each_row():
    x0 = torch.tensor([[1.0], [2.0]], **F64).expand(3, 2, 1)
    way = trajectory(lambda x, t: -x, x0, 16, "rk4")
    times = torch.tensor([[0.0, 0.25], [0.5, 1.0]], **F64)
    found = way.at(times)
    assert found.shape == (2, 3, 2, 1)
    wanted = torch.tensor([1.0, 2.0], **F64) * torch.exp(-times.T)
    torch.testing.assert_close(found[:, 0, :, 0], wanted, atol=1e-6, rtol=0)


# ---- courses -------------------------------------------------------------------------------------------------------


def test_courses_of_cells():
    obs = pd.DataFrame({"t": [3.0, 1.0, 2.0, 5.0], "donor": ["a", "a", "b", "b"]}, index=list("wxyz"))
    design = iv.Design.from_adata(obs, covariates=["donor"], time="t")
    first, second = courses.courses(np.arange(4.0)[:, None], obs, design)
    assert first.name == "a" and first.labels == {"donor": "a"}
    np.testing.assert_array_equal(first.rows, [1, 0])
    np.testing.assert_array_equal(second.values[:, 0], [2, 3])
    with pytest.raises(ValueError, match="need a Design with time="):
        courses.courses(np.zeros((4, 1)), obs, iv.Design.from_adata(obs, covariates=["donor"]))


def test_bins_are_means_with_errors():
    cells = course(300, noise=0.5)
    bins = courses.binned(cells, 20, 10)
    assert bins.n_cells.min() >= 10 and bins.n_cells.sum() == 300
    begin = np.r_[0, np.cumsum(bins.n_cells)]
    for k in (0, 3, len(bins.time) - 1):
        part = cells.values[begin[k] : begin[k + 1]]
        np.testing.assert_allclose(bins.values[k], part.mean(axis=0))
        np.testing.assert_allclose(bins.error[k], part.std(axis=0, ddof=1) / np.sqrt(len(part)))
    repeated = cells._replace(time=np.repeat([0.0, 1.0, 2.0], 100))
    assert courses.binned(repeated, 0).n_cells.tolist() == [100, 100, 100]


def test_local_fit_is_exact_for_parabolas_and_gives_slopes():
    time = np.sort(np.random.default_rng(0).random(40))
    values = (1 + 2 * time - 3 * time**2)[:, None]
    fit, slope, leverage = courses.local_fit(time, values, 0.1)
    np.testing.assert_allclose(fit, values, atol=1e-6)
    np.testing.assert_allclose(slope[:, 0], 2 - 6 * time, atol=1e-4)
    assert 0 < leverage.min() and leverage.max() <= 1 + 1e-9


def test_a_noisy_course_gets_a_wider_bandwidth():
    assert courses.best_bandwidth([course(60)]) < courses.best_bandwidth([course(60, noise=0.7)])


def test_a_noisy_course_gets_a_wider_kernel():
    chosen = []
    for noise in (0.0, 0.7):
        cells = course(80, noise=noise)
        chosen.append(courses.kernel_bandwidth(cells.time, cells.values, np.ones(80)))
    assert chosen[0] < chosen[1]
    # as by leaving out each point in turn
    errors = []
    for bandwidth in courses.BANDWIDTHS:
        means = []
        for k in range(80):
            rest = np.arange(80) != k
            means.append(courses.smoothed(cells.time[rest], cells.values[rest], cells.time[[k]], bandwidth)[0])
        errors.append(((np.stack(means) - cells.values) ** 2).mean())
    assert chosen[1] == courses.BANDWIDTHS[int(np.argmin(errors))]


def test_genes_apart_keep_their_own_slopes():
    cells = course(200)
    rows, moved = (preparation.PREPARATIONS[name](20, 5) for name in ("bins", "apart"))
    bins, apart = rows.rows(cells), moved.rows(cells)
    np.testing.assert_allclose(np.sort(bins.values, axis=0), np.sort(apart.values, axis=0))
    before, after = rows.curve(bins, 0.1), moved.curve(apart, 0.1)
    for gene in range(3):
        shift = int(np.flatnonzero(bins.values[:, gene] == apart.values[0, gene])[0])
        np.testing.assert_allclose(np.roll(before[1][:, gene], -shift), after[1][:, gene])
    assert not np.allclose(np.corrcoef(bins.values.T), np.corrcoef(apart.values.T), atol=0.1)


def test_time_is_a_share_of_the_range():
    cells = course(50)
    moved = cells._replace(time=3 + 7 * cells.time)
    scaled = courses.rescaled(moved, *courses.anchors(moved.time))
    assert scaled.time[0] == 0 and scaled.time[-1] == pytest.approx(1)
    np.testing.assert_allclose(scaled.time, (cells.time - cells.time[0]) / np.ptp(cells.time), atol=1e-9)


# ---- baselines -----------------------------------------------------------------------------------------------------


def test_baselines_by_hand():
    train, other, test = course(name="a"), course(name="b", seed=1), course(30, name="a", seed=2)._replace(name="new")
    found = naive_forecasts.baselines([train, other], test, test.values[0], alike="lineage")
    np.testing.assert_allclose(found["training_mean"][5], train.values.mean(axis=0))
    np.testing.assert_allclose(found["pooled_mean"][5], np.concatenate([train.values, other.values]).mean(axis=0))
    np.testing.assert_allclose(found["initial_state"][7], test.values[0])
    line = [np.polyval(np.polyfit(train.time, train.values[:, k], 1), test.time) for k in range(3)]
    np.testing.assert_allclose(found["linear_in_time"], np.stack(line, axis=1), atol=1e-9)
    assert (found["zero"] == 0).all()
    assert ((found["smoother"] - test.values) ** 2).mean() < 1e-3
    assert "last_value" not in found
    # its bandwidth is its own, and the offset of the first state decays
    moved = naive_forecasts.baselines([train], test, test.values[0] + 2.0, pull=3.0)
    offset = moved["smoother_offset"] - moved["smoother"]
    np.testing.assert_allclose(offset / offset[0], np.exp(-3 * (test.time - test.time[0]))[:, None] * np.ones(3))
    np.testing.assert_allclose(moved["smoother_offset"][0], test.values[0] + 2.0)


def test_bins_with_numbers_of_cells_have_the_mean_of_their_cells():
    cells = course(300, noise=0.5)
    bins, test = courses.binned(cells, 10), course(20)._replace(name="t")
    found = [naive_forecasts.baselines([c], test, test.values[0]) for c in (cells, bins)]
    np.testing.assert_allclose(found[0]["training_mean"], found[1]["training_mean"])


def test_later_times_of_a_training_course_know_its_end():
    cells = course(100)
    train = cells._replace(time=cells.time[:70], values=cells.values[:70])
    later = cells._replace(time=cells.time[70:], values=cells.values[70:])
    found = naive_forecasts.baselines([train], later, train.values[-1])
    np.testing.assert_allclose(found["last_value"][3], train.values[-1])
    straight = train._replace(values=np.stack([train.time] * 3, axis=1))
    found = naive_forecasts.baselines([straight], later, straight.values[-1])
    np.testing.assert_allclose(found["linear_extrapolation"], np.stack([later.time] * 3, axis=1), atol=1e-9)


def test_linear_ode_recovers_a_linear_system():
    adata = sparse_ode.simulate("oscillators", 5, 6, 40, duration=3)
    design = iv.Design.from_adata(adata, covariates=["course"], time="time")
    parts = courses.courses(adata.X, adata.obs, design)
    found = naive_forecasts.baselines(parts[1:], parts[0], parts[0].values[0])
    assert ((found["linear_ode"] - parts[0].values) ** 2).mean() < 0.15 * parts[0].values.var()


# ---- synthetic systems ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", sparse_ode.SYSTEMS)
def test_the_graph_is_the_support_of_the_jacobian(system):
    velocity, graph, start = sparse_ode.SYSTEMS[system](7, np.random.default_rng(3))
    x = np.abs(start(20, np.random.default_rng(0))) + 0.1
    size, sign = np.zeros((7, 7)), np.zeros((7, 7))
    for i in range(7):
        step = np.zeros(7)
        step[i] = 1e-5
        slope = (velocity(x + step) - velocity(x - step)) / 2e-5
        size[i], sign[i] = np.abs(slope).max(axis=0), np.sign(slope.mean(axis=0))
    np.testing.assert_array_equal(size > 1e-6, graph != 0)
    if system != "lorenz96":  # whose signs change along the way
        np.testing.assert_array_equal(np.where(graph != 0, sign, 0), graph)


def test_simulations_are_seeded_noisy_and_irregular():
    same = [sparse_ode.simulate("hill_grn", 6, 3, 20, noise=0.1, drop=0.4, seed=5) for _ in range(2)]
    np.testing.assert_array_equal(same[0].X, same[1].X)
    other = sparse_ode.simulate("hill_grn", 6, 3, 20, noise=0.1, drop=0.4, seed=5, draw=1)
    np.testing.assert_array_equal(other.varp["regulates"], same[0].varp["regulates"])
    assert other.n_obs < 60 and (other.obs.groupby("course")["time"].min() == 0).all()
    assert not np.allclose(other.X[:5], same[0].X[:5])
    noise = same[0].X - same[0].layers["clean"]
    np.testing.assert_allclose(noise.std(), 0.1 * same[0].layers["clean"].std(axis=0).mean(), rtol=0.4)


def test_a_clamped_variable_stays_and_acts_on_its_targets_alone():
    free, held = (sparse_ode.simulate("oscillators", 6, 2, 30, clamp=c) for c in (None, {"x0": 2.0}))
    assert np.allclose(held.layers["clean"][:, 0], 2.0)
    np.testing.assert_allclose(held.layers["clean"][:, 2:4], free.layers["clean"][:, 2:4], atol=1e-4)
    assert np.abs(held.layers["clean"][:, 4] - free.layers["clean"][:, 4]).max() > 0.1
    with pytest.raises(ValueError, match="cannot clamp y"):
        sparse_ode.simulate("linear_grn", 4, clamp={"y": 1.0})
    with pytest.raises(ValueError, match="no system 'pendulum'"):
        sparse_ode.simulate("pendulum")


# ---- recovery of edges ---------------------------------------------------------------------------------------------


def test_edge_recovery():
    rng = np.random.default_rng(0)
    truth = (rng.random((12, 12)) < 0.2).astype(int)
    perfect = network.edge_recovery(truth + 0.01 * rng.random((12, 12)), truth)
    assert [perfect["auroc"], perfect["auprc"], perfect["epr"] * perfect["density"]] == pytest.approx([1, 1, 1])
    chance = [network.edge_recovery(network.random_scores(truth, rng), truth)["auroc"] for _ in range(50)]
    assert np.mean(chance) == pytest.approx(0.5, abs=0.05)
    flat = network.edge_recovery(np.zeros((12, 12)), truth)
    assert flat["auroc"] == 0.5 and flat["epr"] == pytest.approx(1)
    with_self = network.edge_recovery(truth, truth, diagonal=True)
    assert with_self["n_edges"] == truth.sum()
    some = network.edge_recovery(truth, truth, regulators=[0, 1])
    assert some["n_edges"] == truth[:2].sum() - truth[0, 0] - truth[1, 1]
    with pytest.raises(ValueError, match="expected some that are and some that are not"):
        network.edge_recovery(truth, np.zeros((12, 12)))


def test_degree_matched_scores_know_hubs():
    truth = np.zeros((30, 30), dtype=int)
    truth[:3, 3:] = 1
    rng = np.random.default_rng(1)
    matched = [network.edge_recovery(network.random_scores(truth, rng, degree_matched=True), truth)["auroc"]
               for _ in range(10)]  # fmt: skip
    assert np.mean(matched) > 0.85


def test_sets_of_edges():
    truth = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 1]])
    found = np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0]])
    scores = network.edge_sets(found, truth)
    assert scores == {"tpr": 0.5, "fpr": 0.25, "hamming": 2, "n_found": 2}


def test_correlations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    np.testing.assert_allclose(network.correlation_scores(x), np.abs(np.corrcoef(x.T)), atol=1e-12)
    lagged = network.correlation_scores(x, later=x[:, [1, 2, 0]])
    assert lagged[1, 0] == pytest.approx(1)
    assert network.column_auroc(np.array([3.0, 2, 1]), np.array([1, 1, 0])) == 1


def test_splits_of_courses():
    obs = pd.DataFrame({"t": np.tile(np.arange(10.0), 2), "lineage": ["a"] * 10 + ["b"] * 10, "donor": "d"})
    design = iv.Design.from_adata(obs, covariates=["lineage", "donor"], time="t")
    split = iv.splits.courses(obs, design, ["a|d"], later=0.2, val_fraction=0.25)
    assert (split[:10] == "test").all()
    assert split[10:].value_counts().to_dict() == {"train": 6, "val": 2, "test": 2} and (split[18:] == "test").all()
    with pytest.raises(ValueError, match="no cells match"):
        iv.splits.courses(obs, design, [{"donor": "e"}])
    with pytest.raises(ValueError, match="cannot hold out by batch"):
        iv.splits.courses(obs, design, [{"batch": "e"}])


@pytest.mark.slow
def test_pseudotime_finds_the_order():
    rng = np.random.default_rng(0)
    time = rng.permutation(np.linspace(0, 1, 300))
    centres = np.linspace(-0.2, 1.2, 25)
    x = np.log1p(rng.poisson(30 * np.exp(-((time[:, None] - centres) ** 2) / 0.05)).astype(np.float32))
    obs = pd.DataFrame({"stage": np.where(time < 0.05, "first", "later"), "donor": np.where(time > 2, "b", "a")})
    obs.index = [f"cell_{i}" for i in range(300)]
    adata = AnnData(x, obs=obs)
    found = iv.preprocess.pseudotime(adata, {"stage": "first"}, by="donor")
    assert "pseudotime" not in adata.obs
    assert pd.Series(time).corr(found.obs["pseudotime"].reset_index(drop=True), method="spearman") > 0.95
    from_cell = iv.preprocess.pseudotime(adata, f"cell_{time.argmin()}", column="t")
    assert from_cell.obs["t"].iloc[time.argmin()] == 0
    for root, message in (
        (("nobody"), "no cell 'nobody'"),
        ({"stage": "x"}, "no cell has stage"),
        ({"y": "x"}, "column"),
    ):
        with pytest.raises(ValueError, match=message):
            iv.preprocess.pseudotime(adata, root)


def test_motion_capture(shared, tmp_path):
    """Errors of simple forecasts of the published file, validation and test sequences."""
    adata = sparse_ode.motion_capture(shared("data/cmu_mocap35.mat"))
    assert adata.shape == (23 * 300, 50)
    assert list(np.flatnonzero(adata.var["constant"])) == [24, 25, 31, 32]
    x = {
        part: adata[(adata.obs["split"] == part).to_numpy()].X.reshape(-1, 300, 50) for part in ("train", "val", "test")
    }
    mean = x["train"].mean(axis=0)
    for part, zero, first, training, ahead in (
        ("val", 31.905, 67.250, 38.377, 13.89),
        ("test", 33.619, 62.976, 38.502, 15.64),
    ):
        errors = [x[part], x[part] - x[part][:, :1], x[part] - mean, x[part][:, 10:] - x[part][:, :-10]]
        np.testing.assert_allclose([(e**2).mean() for e in errors], [zero, first, training, ahead], rtol=1e-3)
    (tmp_path / "x.mat").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not the file of motion capture"):
        sparse_ode.motion_capture(tmp_path / "x.mat")

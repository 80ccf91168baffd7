"""Formula tests of flow matching: paths, closed-form velocity, solvers, guidance, coupling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from invirtuo import flow
from invirtuo.flow.path import COEFFICIENTS

F64 = {"dtype": torch.float64}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ends(n: int = 6, g: int = 4):
    return torch.randn(n, g, generator=gen(1), **F64), torch.randn(n, g, generator=gen(2), **F64)


# ---- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", flow.PATHS)
def test_path_ends(name):
    x0, x1 = ends()
    path = flow.PATHS[name]
    torch.testing.assert_close(path(x0, x1, torch.zeros(6, **F64)).xt, x0)
    torch.testing.assert_close(path(x0, x1, torch.ones(6, **F64)).xt, x1)


def test_linear_path_by_hand():
    x0, x1 = ends()
    t = torch.linspace(0, 1, 6, **F64)
    point = flow.linear_path(x0, x1, t)
    torch.testing.assert_close(point.xt, (1 - t[:, None]) * x0 + t[:, None] * x1)
    torch.testing.assert_close(point.ut, x1 - x0)


def test_trigonometric_path_by_hand():
    x0, x1 = ends()
    t = torch.linspace(0, 1, 6, **F64)
    angle = t[:, None] * math.pi / 2
    point = flow.trigonometric_path(x0, x1, t)
    torch.testing.assert_close(point.xt, angle.cos() * x0 + angle.sin() * x1)
    torch.testing.assert_close(point.ut, math.pi / 2 * (angle.cos() * x1 - angle.sin() * x0))


@pytest.mark.parametrize("name", flow.PATHS)
def test_velocity_is_the_time_derivative(name):
    """By automatic and by numerical differentiation of the path."""
    x0, x1 = ends()
    t = torch.linspace(0.05, 0.95, 6, **F64)
    path = flow.PATHS[name]
    free = t.clone().requires_grad_()
    xt = path(x0, x1, free).xt
    derivative = torch.stack([torch.autograd.grad(x.sum(), free, retain_graph=True)[0] for x in xt.T], dim=1)
    torch.testing.assert_close(path(x0, x1, t).ut, derivative)
    h = 1e-5
    numerical = (path(x0, x1, t + h).xt - path(x0, x1, t - h).xt) / (2 * h)
    torch.testing.assert_close(path(x0, x1, t).ut, numerical, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", flow.PATHS)
def test_path_noise(name):
    """The noise has the stated level, comes from the generator, and does not enter the velocity."""
    x0, x1 = torch.zeros(4000, 5), torch.ones(4000, 5)
    t = torch.rand(4000, generator=gen())
    path = flow.PATHS[name]
    plain, noisy = path(x0, x1, t), path(x0, x1, t, 0.3, gen(5))
    assert torch.equal(noisy.ut, plain.ut)
    assert torch.equal(noisy.xt, path(x0, x1, t, 0.3, gen(5)).xt)
    residual = noisy.xt - plain.xt
    assert float(residual.std()) == pytest.approx(0.3, rel=0.03)
    assert abs(float(residual.mean())) < 0.01


@pytest.mark.parametrize("name", flow.PATHS)
def test_path_broadcasts_over_more_axes(name):
    x0, x1 = torch.randn(3, 4, 5, generator=gen()), torch.randn(3, 4, 5, generator=gen(1))
    t = torch.rand(3, generator=gen(2))
    point = flow.PATHS[name](x0, x1, t)
    for i in range(3):
        one = flow.PATHS[name](x0[i : i + 1], x1[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(point.xt[i : i + 1], one.xt)
        torch.testing.assert_close(point.ut[i : i + 1], one.ut)


@pytest.mark.parametrize("sigma", [0.0, 0.4])
@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("name", flow.PATHS)
def test_gaussian_velocity_is_the_regression_of_ut_on_xt(name, time, sigma):
    """Least squares on 200,000 drawn pairs finds slope, offset and residual."""
    mean, sd = torch.tensor([1.5, -0.5], **F64), torch.tensor([0.3, 2.0], **F64)
    n = 200_000
    x0 = torch.randn(n, 2, generator=gen(3), **F64)
    x1 = mean + sd * torch.randn(n, 2, generator=gen(4), **F64)
    point = flow.PATHS[name](x0, x1, torch.full((n,), time, **F64), sigma, gen(5))
    probes = torch.tensor([[-1.0, -1.0], [2.0, 2.0]], **F64)
    velocity, left = flow.gaussian_velocity(probes, torch.full((2,), time, **F64), mean, sd, name, sigma)
    for gene in range(2):
        x, u = point.xt[:, gene], point.ut[:, gene]
        slope = ((x - x.mean()) * (u - u.mean())).mean() / x.var(correction=0)
        fitted = u.mean() + slope * (probes[:, gene] - x.mean())
        residual = (u - u.mean() - slope * (x - x.mean())).std()
        torch.testing.assert_close(velocity[:, gene], fitted, atol=0.04, rtol=0.02)
        torch.testing.assert_close(left[:, gene], residual.expand(2), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize("name", flow.PATHS)
def test_gaussian_velocity_is_exact_in_single_precision(name, sigma):
    """Genes that hardly vary must not lose their residual to cancellation."""
    t = torch.tensor([0.0, 1e-4, 0.01, 0.5, 0.99, 1.0])
    mean, sd = torch.tensor([3.0, 0.1]), torch.tensor([1e-3, 0.7])
    xt = torch.randn(6, 2, generator=gen())
    single = flow.gaussian_velocity(xt, t, mean, sd, name, sigma)
    double = flow.gaussian_velocity(xt.double(), t.double(), mean.double(), sd.double(), name, sigma)
    torch.testing.assert_close(single[1].double(), double[1], rtol=1e-4, atol=0)


# ---- solvers -------------------------------------------------------------------------------------------------------

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "rk4": 4}


def problem(x, t):
    """Non-linear, and with time in it."""
    return torch.cos(3 * t) - x**2


def warped(steps: int) -> torch.Tensor:
    """Steps that change in size from one to the next, the same in proportion at every number of steps."""
    s = torch.linspace(0, 1, steps + 1, **F64)
    return s + 0.12 * torch.sin(2 * math.pi * s)


@pytest.mark.parametrize("grid", [flow.time_grid, warped], ids=["uniform", "warped"])
@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_solver_order(solver, grid):
    """Halve the step, fit the slope of the error, compare with the order of the solver."""
    steps = np.array([16, 32, 64, 128])
    start = torch.tensor([0.3], **F64)
    exact = solve_ivp(lambda t, x: np.cos(3 * t) - x**2, (0, 1), [0.3], rtol=1e-12, atol=1e-13).y[0, -1]
    errors = [abs(float(flow.solve(problem, start, grid(int(k)), solver)) - exact) for k in steps]
    order = -np.polyfit(np.log2(steps), np.log2(errors), 1)[0]
    assert order == pytest.approx(ORDER[solver], abs=0.25)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_solver_evaluations_and_times(solver):
    times = []

    def velocity(x, t):
        times.append(float(t))
        return torch.ones_like(x)

    assert float(flow.solve(velocity, torch.zeros(1, **F64), 8, solver)) == pytest.approx(1.0)
    assert len(times) == 8 * flow.EVALUATIONS[solver]
    assert min(times) == 0 and max(times) <= 1 + 1e-12


def test_euler_is_the_paper_s_sum():
    start = torch.rand(3, 2, generator=gen(), **F64)
    x = start
    for k in range(100):
        x = x + problem(x, torch.tensor(k / 100, **F64)) / 100
    torch.testing.assert_close(flow.solve(problem, start, 100, "euler"), x)


def test_ab2_by_hand_on_unequal_steps():
    """x += h ((1 + h / 2 h') v - h / 2h' v'): exact for a velocity that is linear in time."""
    grid = torch.tensor([0.0, 0.1, 0.4, 1.0], **F64)
    x = flow.solve(lambda x, t: t.expand_as(x), torch.zeros(1, **F64), grid, "ab2")
    assert float(x) == pytest.approx(0.0 * 0.1 + (0.4**2 - 0.1**2) / 2 + (1 - 0.4**2) / 2)


def test_solve_keeps_the_type_and_the_start():
    start = torch.ones(2, 3)
    out = flow.solve(lambda x, t: x, start, 4)
    assert out.dtype == torch.float32
    assert torch.equal(start, torch.ones(2, 3))


@pytest.mark.parametrize("grid", [[0.0], [0.0, 0.0, 1.0], [1.0, 0.0], [[0.0, 1.0]], 0])
def test_bad_grids(grid):
    with pytest.raises(ValueError, match="rising times|at least 1"):
        flow.solve(lambda x, t: x, torch.ones(1), grid)


def test_unknown_solver():
    with pytest.raises(ValueError, match="unknown solver 'dopri'; known: euler"):
        flow.solve(lambda x, t: x, torch.ones(1), 4, "dopri")


# ---- sampling a Gaussian with its analytic velocity ------------------------------------------------------------------

MEAN = torch.tensor([1.0, -2.0, 0.5], **F64)
SD = torch.tensor([0.5, 1.5, 0.2], **F64)


def pushed(solver: str, steps: int, path: str = "linear") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of what the solver makes of N(0, 1), exactly: the velocity is linear in x."""

    def velocity(x, t):
        return flow.gaussian_velocity(x, t.expand(len(x)), MEAN, SD, path)[0]

    x = flow.solve(velocity, torch.tensor([[0.0], [1.0]], **F64).expand(2, 3), steps, solver)
    return x[0], (x[1] - x[0]).abs()


@pytest.mark.parametrize(("solver", "power"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("ab2", 2), ("rk4", 4)])
def test_variance_error_falls_with_the_order(solver, power):
    steps = np.array([20, 40, 80])
    errors = np.stack([((pushed(solver, int(k))[1] ** 2 - SD**2) / SD**2).abs().numpy() for k in steps])
    slopes = -np.polyfit(np.log2(steps), np.log2(errors), 1)[0]
    assert (slopes > power - 0.35).all()  # midpoint does better than its order here
    assert solver != "euler" or (slopes < 1.1).all()


def test_euler_shrinks_the_variance_and_second_order_does_not():
    """At 100 steps Euler loses a few per cent of the variance; AB2 and midpoint keep it at 20 evaluations."""
    ratio = {
        name: float((pushed(name, k)[1] ** 2 / SD**2)[0]) for name, k in [("euler", 100), ("ab2", 20), ("midpoint", 10)]
    }
    assert 0.9 < ratio["euler"] < 0.99
    assert abs(ratio["ab2"] - 1) < 1 - ratio["euler"]
    assert abs(ratio["midpoint"] - 1) < 1 - ratio["euler"]


@pytest.mark.parametrize("path", flow.PATHS)
def test_samples_have_the_mean_and_covariance_of_a_correlated_target(path):
    """The analytic velocity of a Gaussian with full covariance, E[ut | xt] = mean + C_ux C_xx^-1 (xt - mean_x)."""
    a = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.4, 0.7]], **F64)
    covariance = a @ a.T

    def velocity(x, t):
        c, d, dc, dd = (float(value) for value in COEFFICIENTS[path](t))
        xx = c**2 * torch.eye(3, **F64) + d**2 * covariance
        ux = c * dc * torch.eye(3, **F64) + d * dd * covariance
        return dd * MEAN + (x - d * MEAN) @ torch.linalg.solve(xx, ux)

    n = 40_000
    noise = torch.randn(n, 3, generator=gen(7), **F64)
    x = flow.solve(velocity, noise, 40, "midpoint")
    torch.testing.assert_close(x.mean(0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), covariance, atol=0.03, rtol=0)


# ---- guidance --------------------------------------------------------------------------------------------------------


class Recorder:
    """A velocity that notes its calls: conditional 1, null 0, plus x."""

    def __init__(self):
        self.calls: list[tuple[float, list[bool]]] = []

    def __call__(self, x, t, is_null):
        self.calls.append((float(t), is_null.tolist()))
        return x + torch.where(is_null[:, None], 0.0, 1.0)


def test_weight_one_never_evaluates_the_null_branch():
    recorder, x = Recorder(), torch.zeros(3, 2)
    flow.solve(flow.guided(recorder, 1.0), x, 5, "euler")
    assert len(recorder.calls) == 5
    assert all(mask == [False] * 3 for _, mask in recorder.calls)


def test_weight_zero_is_the_null_velocity_alone():
    recorder, x = Recorder(), torch.randn(3, 2, generator=gen())
    torch.testing.assert_close(flow.guided(recorder, 0.0)(x, torch.tensor(0.5)), x)
    assert recorder.calls == [(0.5, [True] * 3)]


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_other_weights_make_one_doubled_call(weight):
    recorder, x = Recorder(), torch.randn(3, 2, generator=gen())
    out = flow.guided(recorder, weight)(x, torch.tensor(0.5))
    assert recorder.calls == [(0.5, [False] * 3 + [True] * 3)]
    torch.testing.assert_close(out, x + weight)  # null x, conditional x + 1


def test_guidance_interval():
    recorder = Recorder()
    flow.solve(flow.guided(recorder, 2.0, (0.2, 0.6)), torch.zeros(1, 1), 10, "euler")
    assert [len(mask) for _, mask in recorder.calls] == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_guidance_without_interval_acts_at_the_last_time_too(solver):
    """Solvers that evaluate at t = 1 must not fall back to the unguided field there."""
    recorder = Recorder()
    out = flow.solve(flow.guided(recorder, 2.0), torch.zeros(1, 1), 7, solver)
    assert {len(mask) for _, mask in recorder.calls} == {2}
    torch.testing.assert_close(out, flow.solve(lambda x, t: x + 2, torch.zeros(1, 1), 7, solver))


@pytest.mark.parametrize(
    ("weights", "branches"), [((1, 1), [2]), ((1, 2), [2, 1]), ((3, 3), [2, 0]), ((2, 0.5), [2, 1, 0])]
)
def test_nested_guidance(weights, branches):
    """v_0 + w_1 (v_1 - v_0) + w_2 (v_2 - v_1); branches without weight are not evaluated."""
    shift, calls = torch.tensor([0.0, 10.0, 100.0]), []

    def velocity(x, t, branch):
        calls.append(branch.unique_consecutive().tolist())
        return x + shift[branch][:, None]

    x = torch.randn(4, 2, generator=gen())
    out = flow.nested(velocity, weights)(x, torch.tensor(0.5))
    torch.testing.assert_close(out, x + weights[0] * 10 + weights[1] * 90)
    assert calls == [branches]
    assert flow.nested(velocity, weights, (0.0, 0.4))(x, torch.tensor(0.5)).equal(x + 100)


# ---- coupling --------------------------------------------------------------------------------------------------------


def test_exact_coupling_is_the_optimal_assignment():
    x0, x1 = ends(40, 3)
    which = flow.exact_coupling(x0, x1)
    cost = cdist(x0.numpy(), x1.numpy(), "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    assert sorted(which.tolist()) == list(range(40))
    assert cost[range(40), which].sum() == pytest.approx(cost[rows, columns].sum())
    assert cost[range(40), which].sum() < 0.8 * cost[range(40), range(40)].sum()


def test_exact_coupling_finds_a_permutation():
    x0 = torch.randn(20, 5, generator=gen())
    order = torch.randperm(20, generator=gen(1))
    assert torch.equal(x0[order][flow.exact_coupling(x0, x0[order])], x0)


def test_exact_coupling_needs_equal_numbers():
    with pytest.raises(ValueError, match="found 3 and 2"):
        flow.exact_coupling(torch.zeros(3, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("epsilon", [0.05, 1.0])
def test_sinkhorn_marginals(epsilon):
    """Balanced: rows and columns hold equal mass, for every problem of a stack."""
    cost = torch.rand(3, 12, 8, generator=gen(), **F64)
    plan = flow.sinkhorn(cost, epsilon, iterations=5000, tolerance=1e-10)
    torch.testing.assert_close(plan.sum(2), torch.full((3, 12), 1 / 12, **F64), atol=1e-7, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((3, 8), 1 / 8, **F64), atol=1e-7, rtol=0)
    torch.testing.assert_close(flow.sinkhorn(cost[1], epsilon, iterations=5000, tolerance=1e-10), plan[1])


def test_sinkhorn_of_two_points_in_closed_form():
    """Cost 0 on and c off the diagonal: the plan is 1 / (2 (1 + exp(-c / epsilon))) on it."""
    c, epsilon = 0.7, 0.4
    cost = torch.tensor([[0.0, c], [c, 0.0]], **F64)
    on = 0.5 / (1 + math.exp(-c / epsilon))
    expected = torch.tensor([[on, 0.5 - on], [0.5 - on, on]], **F64)
    torch.testing.assert_close(flow.sinkhorn(cost, epsilon), expected)


def test_sinkhorn_comes_to_the_exact_assignment():
    x0, x1 = ends(30, 3)
    cost = torch.cdist(x0, x1).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    best = float(cost[rows, columns].mean())
    costs = [float((flow.sinkhorn(cost, e, iterations=20_000) * cost).sum()) for e in (1.0, 0.1, 0.01)]
    assert costs[0] > costs[1] > costs[2] >= best - 1e-6
    assert costs[2] == pytest.approx(best, rel=0.02)


def test_sinkhorn_unbalanced_meets_its_optimality_conditions():
    """plan 1 = a exp(-f / rho) with rho = epsilon tau / (1 - tau), and the same for columns; less mass goes far."""
    cost = torch.rand(10, 6, generator=gen(), **F64)
    cost[0] += 5  # a source that is far from all targets
    epsilon, tau_a, tau_b = 0.2, 0.7, 0.9
    plan = flow.sinkhorn(cost, epsilon, tau_a, tau_b, iterations=5000, tolerance=1e-12)
    rho_a, rho_b = (epsilon * tau / (1 - tau) for tau in (tau_a, tau_b))
    f = -rho_a * (plan.sum(1) * 10).log()
    g = -rho_b * (plan.sum(0) * 6).log()
    torch.testing.assert_close(plan, ((f[:, None] + g - cost) / epsilon).exp(), atol=1e-8, rtol=1e-6)
    assert plan.sum(1)[0] < 0.02 / 10  # the marginal is relaxed
    balanced = flow.sinkhorn(cost, epsilon, iterations=5000)
    assert float(balanced.sum(1)[0]) == pytest.approx(0.1, rel=1e-2)
    near = flow.sinkhorn(cost, epsilon, 0.9999, 0.9999, iterations=20_000, tolerance=1e-12)
    torch.testing.assert_close(near, balanced, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("epsilon", "tau"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_sinkhorn_refuses(epsilon, tau):
    with pytest.raises(ValueError, match=r"epsilon > 0 and tau in \(0, 1\], found"):
        flow.sinkhorn(torch.zeros(2, 2), epsilon, tau)


def test_pairs_are_drawn_by_their_mass():
    plan = torch.tensor([[[0.0, 0.5, 0.1], [0.3, 0.0, 0.1]], [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    rows, columns = flow.plan_pairs(plan, 20_000, gen())
    assert rows.shape == columns.shape == (2, 20_000)
    share = torch.zeros(2, 3).index_put_((rows[0], columns[0]), torch.tensor(1 / 20_000), accumulate=True)
    torch.testing.assert_close(share, plan[0], atol=0.02, rtol=0)
    assert (rows[1] == 1).all() and (columns[1] == 2).all()

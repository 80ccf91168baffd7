"""Reference: gates, penalties, proximal steps, network, trajectories of the code of PathReg, NGM and LassoNet.

Made once with theislab/PathReg at 46263bb (MIT), alexisbellot/Graphical-modelling-continuous-time at 6020e68 (MIT) and
lassonet; absolute 1e-6, relative 1e-5 in float32.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from invirtuo.flow import trajectory
from invirtuo.nn import sparsity
from invirtuo.nn.sparse_field import SharedField

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "sparse_ode"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden files are not at {GOLDEN}")
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "golden.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def numbers():
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture
def network(arrays):
    field = SharedField(6, 0, (4, 5), 1, activate_all=False)
    with torch.no_grad():
        for k in range(3):
            for name, parameter in (("W", field.weight), ("b", field.bias), ("loga", field.log_alpha)):
                parameter[k].copy_(arrays[f"net_{name}{k}"][None])
    return field


def gates(network, arrays, kind):
    if kind == "e":
        return network.mode()
    return [sparsity.gate_from_uniform(a, arrays[f"net_u{k}"]) for k, a in enumerate(network.log_alpha)]


def test_gates(arrays):
    log_alpha, u = arrays["hc_log_alpha"], arrays["hc_u"]
    torch.testing.assert_close(
        sparsity.gate_from_uniform(log_alpha, u[:, None]), arrays["hc_gate[u,log_alpha]"], **CLOSE
    )
    torch.testing.assert_close(sparsity.gate_mode(log_alpha), arrays["hc_gate_eval(mode)"], **CLOSE)
    torch.testing.assert_close(sparsity.p_open(log_alpha), arrays["hc_p_open(=1-cdf(0))"], **CLOSE)
    for x in ("0", "0.1", "0.5", "0.9"):
        torch.testing.assert_close(sparsity.gate_cdf(float(x), log_alpha), arrays[f"hc_cdf_at_{x}"], **CLOSE)


def test_pathreg_and_its_gradients(network, arrays, numbers):
    drawn = gates(network, arrays, "u")
    torch.testing.assert_close(network.gate_path(drawn)[0], arrays["gate_path_matrix[in,out]"], **CLOSE)
    torch.testing.assert_close(network.weight_path()[0], arrays["weight_path_matrix[in,out]"], **CLOSE)
    assert float(network.weight_path().detach().mean()) == pytest.approx(
        numbers["penalty"]["L1(weight path norm)"], 1e-5
    )
    assert float(network.gate_path(drawn).detach().mean()) == pytest.approx(numbers["penalty"]["PathReg(gates)"], 1e-5)
    total = 0.01 * sparsity.PENALTIES["pathreg"].value(network, drawn).sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(numbers["penalty"]["total = lam*L1 + 0.1*lam*PathReg"], 1e-5)
    for k in range(3):
        torch.testing.assert_close(network.weight[k].grad[0], arrays[f"grad_total_W{k}"], **CLOSE)
        torch.testing.assert_close(network.log_alpha[k].grad[0], arrays[f"grad_total_loga{k}"], **CLOSE)


def test_expected_l0(network, numbers):
    layers = list(zip(network.weight, network.bias, network.log_alpha, strict=True))
    for setting, wanted in numbers["L0"].items():
        if setting.startswith("wd="):
            decay, lam = (float(part.split("=")[1]) for part in setting.split(","))
            found = [float(sparsity.expected_l0(*layer, lam, decay).detach()) for layer in layers]
            np.testing.assert_allclose(found, wanted, rtol=1e-5)
    found = [[float(x.detach()) for x in sparsity.expected_flops(a, w.shape[-1])] for w, _, a in layers]
    np.testing.assert_allclose(found, numbers["L0"]["expected_flops,expected_l0 per layer"], rtol=1e-5)
    assert float(network.l0().detach()) == pytest.approx(sum(numbers["L0"]["wd=0.0,lamba=1.0"]), 1e-5)


def test_sparsity_of_drawn_gates(network, arrays, numbers):
    """A third of the inputs, and 14 of 74 weights, are closed by the draw."""
    drawn = gates(network, arrays, "u")
    closed = (network.gate_path(drawn) < 1e-5).float().mean()
    assert float(closed) == pytest.approx(numbers["sparsity"]["feature"])
    weights = torch.cat([w.flatten() for w in network.prepared(drawn)])
    assert float((weights.abs() < 1e-5).float().mean()) == pytest.approx(numbers["sparsity"]["model"])


@pytest.mark.parametrize(("kind", "name"), [("u", "u"), ("e", "eval")])
def test_velocity_jacobian_and_trajectories(kind, name, network, arrays):
    drawn = [gate.detach() for gate in gates(network, arrays, kind)]
    x0 = arrays["x0"][None]
    torch.testing.assert_close(
        network(x0, None, network.prepared(drawn))[0].detach(), arrays[f"f(x0)|gates {name}"], **CLOSE
    )
    network = network.double()
    weights = network.prepared([gate.double() for gate in drawn])
    jacobian = network.jacobian(x0[:, :1].double(), None, weights)[0, 0].T.detach()
    torch.testing.assert_close(jacobian, arrays[f"jacobian[j,i]|{kind}"], **CLOSE)
    for tolerance, key, atol in ((1e-10, "float64_tol1e-10", 1e-7), (1e-3, "dopri5_tol1e-3", 5e-3)):
        way = trajectory(lambda x, t: network(x, None, weights), x0.double(), 1, "dopri5", tolerance=tolerance)
        found = way.at(arrays["t"])[:, 0].detach()
        torch.testing.assert_close(found, arrays[f"traj_{key}|{kind}"].double(), atol=atol, rtol=0)
    coarse = trajectory(lambda x, t: network(x, None, weights), x0.double(), 16, "rk4").at(arrays["t"])[:, 0].detach()
    torch.testing.assert_close(coarse, arrays[f"traj_float64_tol1e-10|{kind}"], atol=1e-5, rtol=0)


def test_group_lasso(arrays):
    def stacked(w):  # (target, input, unit) -> (target * unit, input)
        return w.transpose(1, 2).reshape(15, 5)

    groups = arrays["ngm_w_in[j*m1,i]"].reshape(5, 3, 5).transpose(1, 2)
    once = sparsity.group_prox(groups, 0.1 * 0.01)
    torch.testing.assert_close(stacked(once), arrays["ngm_w_prox(lam=.1,eta=.01)"], **CLOSE)
    twice = sparsity.group_prox(once, 30 * 0.01)
    torch.testing.assert_close(stacked(twice), arrays["ngm_w_prox_then(lam=30,eta=.01)"], **CLOSE)
    torch.testing.assert_close(twice.norm(dim=-1), arrays["ngm_graph[j,i](after)"], **CLOSE)
    assert int((twice == 0).all(dim=-1).sum()) == 3


@pytest.mark.parametrize(("lam", "bound"), [(0.1, 10.0), (0.5, 1.0), (1.5, 0.1)])
def test_lassonet(lam, bound, arrays):
    theta, weight = sparsity.lasso_prox(arrays["lasso_skip_in[out,in]"].T, arrays["lasso_W1_in[h,in]"].T, lam, bound)
    torch.testing.assert_close(theta.T, arrays[f"lasso_skip_out|lam={lam},M={bound}"], **CLOSE)
    torch.testing.assert_close(weight.T, arrays[f"lasso_W1_out|lam={lam},M={bound}"], **CLOSE)

"""Velocity fields dx/dt = f(x, labels) with gates, for an ensemble of m members at once.

States are (m, n, d), labels (n, c) of one-hots, weights (m, in, out). Gates are drawn outside and handed in, so that a
solver sees one field; both fields do what :class:`invirtuo.models.sparse_ode.gates.Penalised` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invirtuo.models.sparse_ode.gates import (
    BETA,
    expected_l0,
    gate_mode,
    gate_path,
    gate_sample,
    group_prox,
    lasso_prox,
    p_open,
    weight_path,
)

__all__ = ["ACTIVATIONS", "OwnField", "SharedField", "TargetField"]

Gates = Sequence[Tensor]
Size = Callable[[nn.Parameter], Tensor]  # running size of the gradient of every element
WIDEST = 1.0  # largest location of a gate of a single connection
SPEED = 10.0  # gates of single connections move so many times faster than weights


def _tanh_slope(x: Tensor, a: Tensor) -> Tensor:
    return 1 - a.square()


def _elu_slope(x: Tensor, a: Tensor) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), a + 1)


def _silu_slope(x: Tensor, a: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + a * (1 - s)


Activation = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], Tensor]  # from input and output of the activation
ACTIVATIONS: dict[str, tuple[Activation, Slope]] = {
    "tanh": (torch.tanh, _tanh_slope),
    "elu": (F.elu, _elu_slope),
    "silu": (F.silu, _silu_slope),
}


def _scaled(threshold: float, size: Size | None, parameter: nn.Parameter, *, of_units: bool = True) -> float | Tensor:
    """(..., 1), threshold of each group of a parameter (last axis, or single elements) in the scale of Adam's step.

    Adam divides the gradient by its size, and so must the proximal step: else no group stays at zero.
    """
    if size is None:
        return threshold
    square = size(parameter).square()
    mean = square.mean(dim=-1, keepdim=True) if of_units else square[..., None]
    return threshold / mean.sqrt()


class SharedField(nn.Module):
    """One network for all targets, a gate on every input unit of every layer (the field of PathReg).

    Parameters
    ----------
    n_genes, n_labels
        Widths of state and labels; labels enter the first layer and are not gated.
    hidden
        Widths of the hidden layers.
    n_members
        Networks side by side.
    activation
        "elu", "silu" or "tanh".
    activate_all
        After every hidden layer; False: after the first one alone, as in the public code of PathReg.
    decay
        Whether a decay delta_j x_j, delta_j > 0, is taken off.
    skip
        Whether there is a linear connection beside the network (LassoNet).
    temperature
        Of the gates.

    References
    ----------
    Aliee et al. 2022, arXiv:2210.14672.
    """

    def __init__(
        self,
        n_genes: int,
        n_labels: int = 0,
        hidden: Sequence[int] = (100, 100),
        n_members: int = 1,
        *,
        activation: str = "elu",
        activate_all: bool = True,
        decay: bool = False,
        skip: bool = False,
        temperature: float = BETA,
    ):
        super().__init__()
        widths = [n_genes, *hidden, n_genes]
        self.activation, self.activate_all, self.temperature = activation, activate_all, temperature

        # layers; Kaiming, fan-out
        m = n_members
        pairs = list(pairwise(widths))
        self.weight = nn.ParameterList()
        for i, o in pairs:
            self.weight.append(torch.randn(m, i, o) * (2 / i) ** 0.5)
        self.bias = nn.ParameterList(torch.zeros(m, o) for _, o in pairs)

        # gates: probability 0.2 of a closed one in the first layer, 0.5 in later ones
        self.log_alpha = nn.ParameterList()
        for k, width in enumerate(widths[:-1]):
            start = 0.0 if k else 1.3862943611198906
            self.log_alpha.append(nn.Parameter(start + 0.01 * torch.randn(m, width)))

        self.label = nn.Parameter(torch.zeros(m, n_labels, widths[1])) if n_labels else None
        self.raw_decay = nn.Parameter(torch.zeros(m, n_genes)) if decay else None
        self.skip = nn.Parameter(torch.zeros(m, n_genes, n_genes)) if skip else None
        for k, width in enumerate(widths[:-1]):
            self.register_buffer(f"mask_{k}", torch.ones(m, width))
        self.register_buffer("is_frozen", torch.tensor(False))

    mask_0: Tensor
    is_frozen: Tensor

    @property
    def masks(self) -> list[Tensor]:
        """Open input units of each layer; all of them until :meth:`freeze`."""
        return [getattr(self, f"mask_{k}") for k in range(len(self.weight))]

    def draw(self) -> list[Tensor]:
        """Gates with noise."""
        if bool(self.is_frozen):
            return self.masks
        gates = [gate_sample(log_alpha, self.temperature) for log_alpha in self.log_alpha]
        return [gate * mask for gate, mask in zip(gates, self.masks, strict=True)]

    def mode(self) -> list[Tensor]:
        """Gates for evaluation."""
        if bool(self.is_frozen):
            return self.masks
        gates = [gate_mode(log_alpha) for log_alpha in self.log_alpha]
        return [gate * mask for gate, mask in zip(gates, self.masks, strict=True)]

    def open(self) -> list[Tensor]:
        """Gates of networks that have none."""
        return self.masks

    def prepared(self, gates: Gates) -> list[Tensor]:
        """Weights behind their gates; computed once for all evaluations with these gates."""
        return [z[..., None] * w for z, w in zip(gates, self.weight, strict=True)]

    def full(self, gates: Gates) -> list[Tensor]:
        """The same, for :meth:`jacobian`."""
        return self.prepared(gates)

    def forward(self, x: Tensor, labels: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """Velocity (m, n, d) at states (m, n, d), with weights from :meth:`prepared`."""
        activate = ACTIVATIONS[self.activation][0]
        h, last = x, len(weights) - 1
        for k, (weight, bias) in enumerate(zip(weights, self.bias, strict=True)):
            h = torch.baddbmm(bias[:, None], h, weight)
            if k == 0 and self.label is not None:
                h = h + labels @ self.label
            if k < last and (k == 0 or self.activate_all):
                h = activate(h)
        return h + self._linear(x)

    def _linear(self, x: Tensor) -> Tensor | float:
        """Skip connection and decay."""
        out: Tensor | float = 0.0
        if self.skip is not None:
            out = out + x @ self.skip
        if self.raw_decay is not None:
            out = out - F.softplus(self.raw_decay)[:, None] * x
        return out

    def jacobian(self, x: Tensor, labels: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """(m, n, in, out), derivative of every velocity by every state."""
        activate, slope = ACTIVATIONS[self.activation]
        h, last = x, len(weights) - 1
        # forward mode: the derivative is carried through the layers beside the state
        tangent = torch.eye(x.shape[-1], dtype=x.dtype).expand(*x.shape, x.shape[-1])
        for k, (weight, bias) in enumerate(zip(weights, self.bias, strict=True)):
            h = torch.baddbmm(bias[:, None], h, weight)
            tangent = tangent @ weight[:, None]
            if k == 0 and self.label is not None:
                h = h + labels @ self.label
            if k < last and (k == 0 or self.activate_all):
                a = activate(h)
                tangent = tangent * slope(h, a)[..., None, :]
                h = a
        if self.skip is not None:
            tangent = tangent + self.skip[:, None]
        if self.raw_decay is not None:
            tangent = tangent - torch.diag_embed(F.softplus(self.raw_decay))[:, None]
        return tangent

    def weights(self) -> list[Tensor]:
        return [*self.weight, *([] if self.skip is None else [self.skip])]

    def weight_path(self) -> Tensor:
        path = weight_path(list(self.weight))
        return path if self.skip is None else path + self.skip.abs()

    def gate_path(self, gates: Gates) -> Tensor:
        return gate_path(gates, self.weight[-1].shape[-1])

    def spread(self, rows: Tensor) -> Tensor:
        """Numbers (..., in, out), which are those of all genes here."""
        return rows

    def l0(self) -> Tensor:
        layers = zip(self.weight, self.bias, self.log_alpha, strict=True)
        sizes = [expected_l0(*layer, beta=self.temperature) for layer in layers]
        return torch.stack(sizes).sum(dim=0)

    def n_regulators(self) -> Tensor:
        n_open = p_open(self.log_alpha[0], self.temperature).sum(dim=-1, keepdim=True)
        return n_open.expand(-1, self.weight[-1].shape[-1])  # the same for all targets

    def gate_parameters(self) -> list[nn.Parameter]:
        """Locations of the gates, as they are trained."""
        return list(self.log_alpha)

    def p_open(self) -> Tensor:
        """(m, in, out), probability that an input is open for an output: the same for all outputs."""
        n_out = self.weight[-1].shape[-1]
        p = self.mask_0 if bool(self.is_frozen) else p_open(self.log_alpha[0], self.temperature)
        return p[..., None].expand(*p.shape, n_out)

    @torch.no_grad()
    def shrink(self, kind: str, threshold: float, bound: float, size: Size | None = None) -> None:
        """Proximal step: "groups" are the weights of one input; "lasso" is LassoNet's on the skip connection.

        With `size`, the running size of gradients, thresholds are those of a step that was divided by it.
        """
        if kind == "groups":
            self.weight[0].copy_(group_prox(self.weight[0], _scaled(threshold, size, self.weight[0])))
        else:
            each = _scaled(threshold, size, self.skip)
            theta, weight = lasso_prox(self.skip, self.weight[0], each, bound)
            self.skip.copy_(theta)
            self.weight[0].copy_(weight)

    def keep_movable(self) -> None:
        """Do nothing: gates are not bounded, as in the public code."""

    @torch.no_grad()
    def freeze(self, gated: bool) -> None:
        """Fix the mask: gates with a probability above 0.5 of being open, or inputs with a weight that is not zero."""
        for k, mask in enumerate(self.masks):
            if gated:
                mask.copy_(p_open(self.log_alpha[k], self.temperature) > 0.5)
            elif k == 0:
                used = self.weight[0].abs().amax(dim=-1) > 0
                mask.copy_(used if self.skip is None else used | (self.skip.abs().amax(dim=-1) > 0))
        self.is_frozen.fill_(True)


class TargetField(nn.Module):
    """A small network for every target, with a gate on every (regulator, target) and a decay.

    f_j(x) = sum_h v_jh act(sum_i M_ij w_ijh x_i + b_jh + labels) + c_j + labels - delta_j x_j, delta_j > 0. With tanh,
    production is bounded, and so are solutions.

    Parameters
    ----------
    n_genes, n_labels
        Widths of state and labels.
    hidden
        Units of each network.
    n_members
        Ensemble members.
    regulators
        Positions of the genes that may regulate; None: all.
    allowed
        (r, d) bool, connections that may exist; None: all. Each gene may regulate itself, without gate.
    activation, skip, temperature
        As in :class:`SharedField`.
    log_alpha
        First location of the gates; 1 is open.
    """

    regulators: Tensor
    allowed: Tensor
    own: Tensor
    mask: Tensor
    is_frozen: Tensor

    def __init__(
        self,
        n_genes: int,
        n_labels: int = 0,
        hidden: int = 16,
        n_members: int = 1,
        *,
        regulators: Sequence[int] | None = None,
        allowed: Tensor | None = None,
        activation: str = "tanh",
        skip: bool = False,
        temperature: float = BETA,
        log_alpha: float = 1.0,
    ):
        super().__init__()
        self.activation, self.temperature = activation, temperature

        # which connections there may be
        chosen = list(range(n_genes)) if regulators is None else list(regulators)
        m, r = n_members, len(chosen)
        self.register_buffer("regulators", torch.tensor(chosen, dtype=torch.int64), persistent=False)
        own = torch.zeros(r, n_genes)
        own[torch.arange(r), self.regulators] = 1.0
        allowed = torch.ones(r, n_genes) if allowed is None else allowed.float()
        self.register_buffer("own", own, persistent=False)
        self.register_buffer("allowed", torch.maximum(own, allowed), persistent=False)

        # networks, decay, gates
        self.weight = nn.Parameter(torch.randn(m, r, n_genes, hidden) / max(r, 1) ** 0.5)
        self.bias = nn.Parameter(0.5 * torch.randn(m, n_genes, hidden))
        self.out = nn.Parameter(torch.randn(m, n_genes, hidden) / hidden**0.5)
        self.constant = nn.Parameter(torch.zeros(m, n_genes))
        self.raw_decay = nn.Parameter(torch.zeros(m, n_genes))
        self.slow_alpha = nn.Parameter((log_alpha + 0.01 * torch.randn(m, r, n_genes)) / SPEED)

        # what labels and a skip connection add
        self.label = nn.Parameter(torch.zeros(m, n_labels, n_genes, hidden)) if n_labels else None
        self.label_constant = nn.Parameter(torch.zeros(m, n_labels, n_genes)) if n_labels else None
        self.skip = nn.Parameter(torch.zeros(m, r, n_genes)) if skip else None

        self._open_rows: Tensor | None = None  # of a frozen mask
        self.register_buffer("mask", torch.ones(m, r, n_genes))
        self.register_buffer("is_frozen", torch.tensor(False))

    @property
    def log_alpha(self) -> Tensor:
        """(m, r, d), location of the gates."""
        return SPEED * self.slow_alpha

    def draw(self) -> list[Tensor]:
        """Gates with noise, (m, r, d)."""
        if bool(self.is_frozen):
            return self.open()
        return [self._gated(gate_sample(self.log_alpha, self.temperature))]

    def mode(self) -> list[Tensor]:
        """Gates for evaluation."""
        if bool(self.is_frozen):
            return self.open()
        return [self._gated(gate_mode(self.log_alpha))]

    def open(self) -> list[Tensor]:
        """Connections that may exist, and were not closed by :meth:`freeze`."""
        return [self.mask * self.allowed]

    def _gated(self, gates: Tensor) -> Tensor:
        """Gates, with that of a gene to itself open, of connections that may exist."""
        return torch.where(self.own > 0, torch.ones_like(gates), gates) * self.mask * self.allowed

    def prepared(self, gates: Gates) -> list[Tensor]:
        """First layer (m, r, d h) and skip connection (m, r, d) behind the gates.

        Of a frozen field with few open connections, those alone: (m, d, k, h) and their positions (m, d, k).
        """
        if (rows := self._few_rows()) is not None and self.skip is None:
            members = torch.arange(len(self.weight))[:, None, None]
            targets = torch.arange(self.weight.shape[2])[None, :, None]
            gate = gates[0][members, rows, targets]
            weight = self.weight[members, rows, targets]
            return [gate[..., None] * weight, self.regulators[rows]]
        return self.full(gates)

    def full(self, gates: Gates) -> list[Tensor]:
        """First layer (m, r, d h) and skip connection (m, r, d) behind the gates."""
        weight = (gates[0][..., None] * self.weight).flatten(2)
        return [weight] if self.skip is None else [weight, gates[0] * self.skip]

    def forward(self, x: Tensor, labels: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """Velocity (m, n, d) at states (m, n, d), with weights from :meth:`prepared`."""
        regulators = x if weights[0].ndim == 4 else self._regulators(x)
        activate, _ = ACTIVATIONS[self.activation]
        a = activate(self._units(regulators, labels, weights))
        production = (a * self.out[:, None]).sum(dim=-1) + self.constant[:, None]
        f = production - F.softplus(self.raw_decay)[:, None] * x
        if self.label_constant is not None:
            f = f + labels @ self.label_constant
        return f if self.skip is None else f + regulators @ weights[1]

    def _few_rows(self) -> Tensor | None:
        """(m, d, k), rows of the connections that a frozen mask left, if k is below a third of all."""
        if not bool(self.is_frozen):
            return None
        if self._open_rows is None:
            is_open = self.mask * self.allowed
            most = max(int(is_open.sum(dim=1).max()), 1)
            self._open_rows = is_open.transpose(1, 2).topk(most, dim=-1).indices
        return self._open_rows if self._open_rows.shape[-1] < len(self.regulators) / 3 else None

    def _regulators(self, x: Tensor) -> Tensor:
        return x if len(self.regulators) == x.shape[-1] else x[..., self.regulators]

    def spread(self, rows: Tensor) -> Tensor:
        """Numbers (..., r, d) of connections from regulators as (..., d, d), 0 from other genes."""
        full = rows.new_zeros(*rows.shape[:-2], rows.shape[-1], rows.shape[-1])
        full[..., self.regulators, :] = rows
        return full

    def _units(self, regulators: Tensor, labels: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """(m, n, d, h), what enters the activation."""
        pre = self._inputs(regulators, weights)
        if self.label is not None:
            pre = pre + (labels @ self.label.flatten(2)).unflatten(-1, self.bias.shape[1:])
        return pre

    def _inputs(self, regulators: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """(m, n, d, h), the same without labels."""
        if weights[0].ndim == 4:
            first, positions = weights
            m, n = regulators.shape[:2]
            # positions are those among all genes, and so `regulators` holds the state of all genes here
            index = positions.flatten(1)[:, None].expand(m, n, -1)
            inputs = regulators.gather(2, index).unflatten(-1, positions.shape[1:])
            pre = self.bias[:, None] + (inputs[..., None] * first[:, None]).sum(dim=3)
        else:
            pre = torch.baddbmm(self.bias.flatten(1)[:, None], regulators, weights[0])
            pre = pre.unflatten(-1, self.bias.shape[1:])
        return pre

    def jacobian(self, x: Tensor, labels: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """(m, n, in, out), derivative of every velocity by every state; weights from :meth:`full`."""
        activate, slope = ACTIVATIONS[self.activation]
        pre = self._units(self._regulators(x), labels, weights)
        gain = slope(pre, activate(pre)) * self.out[:, None]
        first = weights[0].unflatten(-1, self.bias.shape[1:])
        partial = torch.einsum("mnjh,mijh->mnij", gain, first)
        if self.skip is not None:
            partial = partial + weights[1][:, None]
        return self.spread(partial) - torch.diag_embed(F.softplus(self.raw_decay))[:, None]

    def weights(self) -> list[Tensor]:
        return [self.weight, self.out, *([] if self.skip is None else [self.skip])]

    def weight_path(self) -> Tensor:
        path = (self.weight.abs() * self.out.abs()[:, None]).sum(dim=-1)
        return path if self.skip is None else path + self.skip.abs()

    def gate_path(self, gates: Gates) -> Tensor:
        return gates[0] * self.bias.shape[-1]

    def gate_parameters(self) -> list[nn.Parameter]:
        """Locations of the gates, as they are trained."""
        return [self.slow_alpha]

    def l0(self) -> Tensor:
        return self._p_open().flatten(1).sum(dim=1) * self.bias.shape[-1]

    def n_regulators(self) -> Tensor:
        return self._p_open().sum(dim=1)

    def _p_open(self) -> Tensor:
        """(m, r, d), a gene's connection to itself left out."""
        return p_open(self.log_alpha, self.temperature) * self.allowed * (1 - self.own)

    def p_open(self) -> Tensor:
        """(m, in, out), probability that a connection is open; 0 for genes that may not regulate."""
        if bool(self.is_frozen):
            p = self.open()[0]
        else:
            p = self._gated(p_open(self.log_alpha, self.temperature))
        return self.spread(p)

    @torch.no_grad()
    def shrink(self, kind: str, threshold: float, bound: float, size: Size | None = None) -> None:
        """Proximal step on the weights of every connection: "groups" as in NGM, "lasso" as in LassoNet.

        With `size` as in :class:`SharedField`; then the penalty is a mean over targets, as the loss is.
        """
        if size is not None:
            threshold = threshold / self.weight.shape[2]
        if kind == "groups":
            shrunk = group_prox(self.weight, _scaled(threshold, size, self.weight))
        else:
            each = _scaled(threshold, size, self.skip, of_units=False)
            theta, shrunk = lasso_prox(self.skip[..., None], self.weight, each, bound)
            self.skip.copy_(torch.where(self.own > 0, self.skip, theta[..., 0]))
        self.weight.copy_(torch.where(self.own[..., None] > 0, self.weight, shrunk))

    @torch.no_grad()
    def keep_movable(self) -> None:
        """Keep gates where their penalty has a slope: wide open ones would never close again."""
        self.slow_alpha.clamp_(-5.0 / SPEED, WIDEST / SPEED)

    @torch.no_grad()
    def freeze(self, gated: bool) -> None:
        """Fix the mask: gates with a probability above 0.5 of being open, or connections with a weight."""
        if gated:
            self.mask.copy_(self._gated(p_open(self.log_alpha, self.temperature)) > 0.5)
        else:
            used = self.weight.abs().amax(dim=-1) > 0
            self.mask.copy_(used if self.skip is None else used | (self.skip != 0))
        self._open_rows = None
        self.is_frozen.fill_(True)


class OwnField(TargetField):
    """A small network for every target that is told of its own gene alone: the field without connections.

    Parameters
    ----------
    n_genes, n_labels, hidden, n_members, activation
        As in :class:`TargetField`.
    """

    def __init__(
        self, n_genes: int, n_labels: int = 0, hidden: int = 16, n_members: int = 1, *, activation: str = "tanh"
    ):
        super().__init__(n_genes, n_labels, hidden, n_members, regulators=[0], activation=activation)
        # the one row of weights is that of each gene to itself
        self.own.fill_(1.0)
        self.allowed.fill_(1.0)

    def _regulators(self, x: Tensor) -> Tensor:
        return x

    def _inputs(self, regulators: Tensor, weights: Sequence[Tensor]) -> Tensor:
        first = weights[0].unflatten(-1, self.bias.shape[1:])  # (m, 1, d, h)
        return self.bias[:, None] + regulators[..., None] * first

    def spread(self, rows: Tensor) -> Tensor:
        return torch.diag_embed(rows[..., 0, :])

"""What pseudobulk regression knows of a condition, as features for every gene.

Control cells of the covariates, and the effects that the perturbation had elsewhere, tell much of a condition that was
never seen. The regression is closed form; for a condition of the training data it leaves that condition out, so that a
network trained on these features meets errors of the same size as it will for new conditions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from invirtuo.batch import Condition

__all__ = ["PseudobulkAnchor"]

FLOOR = 0.01  # weight of a group that is not like the target at all
RIDGE = 1e-3
LEFT_OUT = 200  # most conditions that are left out, one at a time, to choose the bandwidth


class PseudobulkAnchor(nn.Module):
    """Per gene: control mean, control standard deviation, expected mean, and expected effect of a condition.

    The expected effect of perturbations m (multi-hot) in a group k is a ridge regression on the effects Y (c, g) of the
    training conditions with multi-hots Z (c, p), weighted by how alike the groups are::

        effect = m^T (Z^T S Z + ridge I)^-1 Z^T S Y,  S = diag(exp(-|control_k - control_i|^2 / bandwidth) + floor)

    with the condition itself left out of Z and Y. The bandwidth is chosen by leave-one-out error on training
    conditions. Groups without control cells of their own take the mean over all groups.

    Parameters
    ----------
    levels
        Number of levels of every covariate.
    n_perturbations, n_genes
        p and g.
    """

    n_features = 4

    def __init__(self, levels: Sequence[int], n_perturbations: int, n_genes: int):
        super().__init__()
        self.levels = list(levels)
        n_groups = 1
        for k in self.levels:
            n_groups *= k
        self.register_buffer("control_mean", torch.zeros(n_groups, n_genes))
        self.register_buffer("control_sd", torch.zeros(n_groups, n_genes))
        self.register_buffer("distance", torch.zeros(n_groups, n_groups))
        self.register_buffer("bandwidth", torch.ones(()))
        self.register_buffer("effects", torch.zeros(0, n_genes))
        self.register_buffer("designs", torch.zeros(0, n_perturbations))
        self.register_buffer("groups", torch.zeros(0, dtype=torch.int64))
        self._expected: dict[tuple, Tensor] = {}

    control_mean: Tensor
    control_sd: Tensor

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Take the sizes of the saved effects, which depend on the data."""
        for name in ("effects", "designs", "groups"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.bandwidth.device))
        self._expected.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, condition: Condition, mean: Tensor, variance: Tensor, n_cells: Tensor) -> None:
        """Learn from the pseudobulk of the training conditions.

        Parameters
        ----------
        condition
            The c conditions.
        mean, variance
            (c, g), over the cells of each.
        n_cells
            (c,)
        """
        group = self.group(condition)
        control = condition.is_control
        if not control.any():
            raise ValueError("the training cells hold no control cells; anchored conditioning needs them")
        everywhere = _pooled(mean[control], variance[control], n_cells[control])
        control_mean, control_var = (value.repeat(len(self.control_mean), 1) for value in everywhere)
        for k in group[control].unique().tolist():  # with time or dose, several control conditions per group
            rows = control & (group == k)
            control_mean[k], control_var[k] = _pooled(mean[rows], variance[rows], n_cells[rows])
        self.control_mean = control_mean.float()
        self.control_sd = control_var.sqrt().float()
        self.effects = (mean[~control] - control_mean[group[~control]]).float()
        self.designs = condition.perturbation[~control].clone()
        self.groups = group[~control].clone()
        self.distance = torch.cdist(control_mean, control_mean).square().float()
        self.bandwidth = self._choose_bandwidth()
        self._expected.clear()

    def forward(self, condition: Condition, is_null: Tensor | None = None) -> Tensor:
        """Features (n, g, 4) of n conditions; null rows hold the mean over all groups and no effect."""
        group = self.group(condition)
        effect = self.effect(condition)
        mean, sd = self.control_mean[group], self.control_sd[group]
        if is_null is not None:
            null = is_null[:, None]
            mean = torch.where(null, self.control_mean.mean(0), mean)
            sd = torch.where(null, self.control_sd.mean(0), sd)
            effect = torch.where(null, 0.0, effect)
        expected = (mean + effect).clamp_min(0)
        return torch.stack([mean, sd, expected, expected - mean], dim=-1)

    def effect(self, condition: Condition) -> Tensor:
        """(n, g), expected difference to the control mean; every distinct condition is computed once and kept."""
        group = self.group(condition).cpu()
        bits = condition.perturbation.detach().cpu().numpy()
        keys = [(k, row.tobytes()) for k, row in zip(group.tolist(), bits, strict=True)]
        for key, k, row in zip(keys, group.tolist(), bits, strict=True):
            if key not in self._expected:
                m = torch.tensor(row).to(self.effects)
                self._expected[key] = self._weights(m, k, float(self.bandwidth)) @ self.effects
        known = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        table = torch.stack([self._expected[key] for key in known]).to(self.effects.device)
        return table[torch.tensor([known[key] for key in keys], device=table.device)]

    def group(self, condition: Condition) -> Tensor:
        """(n,), number of the covariate group."""
        number = torch.zeros(len(condition), dtype=torch.int64, device=condition.perturbation.device)
        for k, codes in zip(self.levels, condition.covariates.values(), strict=True):
            number = number * k + codes
        return number

    def _weights(self, m: Tensor, group: int, bandwidth: float) -> Tensor:
        """(c,), weight of every training effect in the expected effect of one condition, itself left out."""
        if not len(self.effects) or not m.any():
            return torch.zeros(len(self.effects)).to(self.effects)
        similarity = torch.exp(-self.distance[group, self.groups] / bandwidth) + FLOOR
        itself = (self.groups == group) & (self.designs == m).all(1)
        similarity = torch.where(itself, 0.0, similarity).double()
        z = self.designs.double()
        relevant = (z[:, m != 0] != 0).any(1)
        largest = similarity[relevant].max() if relevant.any() else similarity.new_zeros(())
        if largest <= 0:
            return torch.zeros(len(self.effects)).to(self.effects)
        weighted = z.T * (similarity / largest)
        gram = weighted @ z + RIDGE * torch.eye(z.shape[1]).to(z)
        return (m.double() @ torch.linalg.solve(gram, weighted)).to(self.effects)

    def _choose_bandwidth(self) -> Tensor:
        positive = self.distance[self.distance > 0]
        if not len(positive) or not len(self.effects):
            return torch.ones(()).to(self.distance)
        candidates = positive.median() * 2.0 ** torch.arange(-6, 4).to(self.distance)
        left_out = torch.linspace(0, len(self.effects) - 1, min(len(self.effects), LEFT_OUT)).round().long()
        errors = []
        for bandwidth in candidates.tolist():
            pairs = zip(self.designs[left_out], self.groups[left_out].tolist(), strict=True)
            weights = torch.stack([self._weights(m, k, bandwidth) for m, k in pairs])
            errors.append(float((weights @ self.effects - self.effects[left_out]).square().sum()))
        return candidates[errors.index(min(errors))]


def _pooled(mean: Tensor, variance: Tensor, n_cells: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (g,) over all cells of several conditions."""
    weight = n_cells[:, None].to(mean)
    overall = (mean * weight).sum(0) / weight.sum()
    return overall, ((variance + (mean - overall) ** 2) * weight).sum(0) / weight.sum()

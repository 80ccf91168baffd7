"""PseudobulkAnchor: predictions of pseudobulk regression for a condition, as features of every gene.

Control cells of the covariates, and the effects that the perturbation had elsewhere, predict much of an unseen
condition. The regression is closed form; for a condition of the training data it leaves that condition out, so that a
network trained on these features meets errors of the same size as it will for new conditions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from invirtuo.batch import Condition
from invirtuo.cells.pseudobulk import Pseudobulk

__all__ = ["PseudobulkAnchor"]

FLOOR = 0.01  # weight of a group that is not like the target at all
RIDGE = 1e-3
LEFT_OUT = 200  # most conditions that are left out, one at a time, to choose the bandwidth


class PseudobulkAnchor(nn.Module):
    """Per gene: control mean, control standard deviation, expected mean, and expected effect of a condition.

    The expected effect of perturbations m (multi-hot, or features) in a group k is a ridge regression on the effects Y
    (c, g) of the training conditions with multi-hots or features Z (c, p), weighted by how alike the groups are::

        effect = m^T (Z^T S Z + ridge I)^-1 Z^T S Y,  S = diag(exp(-|control_k - control_i|^2 / bandwidth) + floor)

    with the condition itself left out of Z and Y. The bandwidth is chosen by leave-one-out error on training
    conditions. Groups without control cells of their own take the statistics of all control cells.

    Parameters
    ----------
    n_covariates, n_perturbations, n_genes
        Number of covariates, p and g.
    """

    n_features = 4

    def __init__(self, n_covariates: int, n_perturbations: int, n_genes: int):
        super().__init__()
        # row 0 is of all control cells, the others of the groups that have control cells
        self.register_buffer("codes", torch.full((1, n_covariates), -1))
        self.register_buffer("control_mean", torch.zeros(1, n_genes))
        self.register_buffer("control_sd", torch.zeros(1, n_genes))
        self.register_buffer("bandwidth", torch.ones(()))
        self.register_buffer("effects", torch.zeros(0, n_genes))
        self.register_buffer("designs", torch.zeros(0, n_perturbations))
        self.register_buffer("own_codes", torch.zeros(0, n_covariates, dtype=torch.int64))
        self._expected: dict[tuple[Any, ...], Tensor] = {}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the sizes of the saved tables, which depend on the data."""
        for name in ("codes", "control_mean", "control_sd", "effects", "designs", "own_codes"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.bandwidth.device))
        self._expected.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, training: Pseudobulk) -> None:
        """Learn from the training conditions."""
        condition = training.condition
        control = condition.is_control
        if not control.any():
            raise ValueError("the training cells hold no control cells; anchored conditioning needs them")

        # control cells: all of them in row 0, then those of every group, of all times and doses
        codes = condition.groups
        groups = codes[control].unique(dim=0) if codes.shape[1] else codes[:1]
        members = [control, *(control & (codes == group).all(1) for group in groups)]
        moments = [training[rows].pooled() for rows in members]
        self.codes = torch.cat([torch.full((1, codes.shape[1]), -1), groups])
        self.control_mean = torch.stack([m for m, _ in moments]).float()
        self.control_sd = torch.stack([v for _, v in moments]).sqrt().float()

        # effects of all perturbed conditions
        self.own_codes = codes[~control]
        self.effects = (training.mean[~control] - self.control_mean[self._rows(self.own_codes)]).float()
        self.designs = condition.code[~control].clone()
        self._expected.clear()
        self.bandwidth = self._choose_bandwidth()

    def knows(self, condition: Condition) -> Tensor:
        """(n,) bool, whether the group of each condition has control cells of its own."""
        return self._rows(condition.groups) > 0

    def add_groups(self, controls: Pseudobulk) -> None:
        """Learn of further groups from their control cells."""
        condition, codes = controls.condition, controls.condition.groups
        new = ~self.knows(condition) & condition.is_control
        for group in codes[new].unique(dim=0):
            m, v = controls[new & (codes == group).all(1)].pooled()
            self.codes = torch.cat([self.codes, group[None]])
            self.control_mean = torch.cat([self.control_mean, m.float()[None]])
            self.control_sd = torch.cat([self.control_sd, v.sqrt().float()[None]])
        self._expected.clear()

    def forward(self, condition: Condition, is_null: Tensor | None = None, genes: Tensor | None = None) -> Tensor:
        """Features of n conditions; null rows hold the statistics of all control cells and no effect.

        Parameters
        ----------
        is_null
            (n,) bool, rows whose condition is the null condition.
        genes
            (m,), numbers of the genes that are asked for; None for all.

        Returns
        -------
        (n, m, 4)
        """
        means, sds = (x if genes is None else x.index_select(1, genes) for x in (self.control_mean, self.control_sd))
        rows, effect = self._rows(condition.groups), self.effect(condition, genes)
        if is_null is not None:
            rows = torch.where(is_null, 0, rows)
            effect = torch.where(is_null[:, None], 0.0, effect)
        mean = means[rows]
        expected = (mean + effect).clamp_min(0)
        return torch.stack([mean, sds[rows], expected, expected - mean], dim=-1)

    def estimate(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Means of n conditions as pseudobulks predict them.

        Returns
        -------
        Means (n, g), not negative, and their source (n,): 2 from cells of the condition itself, 1 from the
        effects of its perturbations elsewhere, 0 not at all.
        """
        # from effects elsewhere
        codes, rows = condition.groups, self._rows(condition.groups)
        effect = self.effect(condition)
        known = torch.where(condition.is_control & (rows > 0), 2, effect.any(1).long())

        # from cells of the condition itself, where there are some
        same_group = (self.own_codes == codes[:, None]).all(-1)
        same_perturbation = (self.designs == condition.code[:, None]).all(-1)
        itself = same_group & same_perturbation  # (n, c)
        if itself.shape[1]:
            observed = itself.any(1)
            effect = torch.where(observed[:, None], self.effects[itself.long().argmax(1)], effect)
            known = torch.where(observed, 2, known)
        return (self.control_mean[rows] + effect).clamp_min(0), known

    def effect(self, condition: Condition, genes: Tensor | None = None) -> Tensor:
        """(n, g), expected difference to the control mean; every distinct condition is computed once and kept."""
        codes, multi_hot = condition.groups.cpu(), condition.code.detach().cpu()
        keys = [(c.tobytes(), m.tobytes()) for c, m in zip(codes.numpy(), multi_hot.numpy(), strict=True)]
        row_of = {key: i for i, key in reversed(list(enumerate(keys)))}  # the first of every distinct condition
        for key, i in row_of.items():
            if key not in self._expected:
                m, own = multi_hot[i].to(self.effects), codes[i].to(self.codes)
                weights = self._weights(m, own, float(self.bandwidth))
                self._expected[key] = weights @ self.effects

        # from distinct conditions to all rows
        table = torch.stack([self._expected[key] for key in row_of]).to(self.effects.device)
        table = table if genes is None else table.index_select(1, genes)
        position = {key: i for i, key in enumerate(row_of)}
        positions = [position[key] for key in keys]
        return table[torch.tensor(positions, device=table.device)]

    def _rows(self, codes: Tensor) -> Tensor:
        """(n,), row of the group in the tables; 0 for groups without control cells."""
        is_group = (codes[:, None] == self.codes[1:]).all(-1)
        numbers = torch.arange(1, len(self.codes), device=codes.device)
        return is_group.long() @ numbers

    def _weights(self, m: Tensor, codes: Tensor, bandwidth: float) -> Tensor:
        """(c,), weight of every training effect in the expected effect of one condition, itself left out."""
        nothing = torch.zeros(len(self.effects)).to(self.effects)
        relevant = (self.designs[:, m != 0] != 0).any(1)
        itself = (self.own_codes == codes).all(1) & (self.designs == m).all(1)
        if not (relevant & ~itself).any():
            return nothing

        # similar are contexts whose control cells have similar means
        own_mean = self.control_mean[self._rows(codes[None])]
        means = self.control_mean[self._rows(self.own_codes)]
        similarity = torch.exp(-(own_mean - means).square().sum(1) / bandwidth) + FLOOR
        similarity = torch.where(itself, 0.0, similarity).double()

        # ridge regression of effects on perturbations, weighted by similarity
        z = self.designs.double()
        weighted = z.T * (similarity / similarity[relevant].max())
        gram = weighted @ z + RIDGE * torch.eye(z.shape[1]).to(z)
        return (m.double() @ torch.linalg.solve(gram, weighted)).to(self.effects)

    def _choose_bandwidth(self) -> Tensor:
        """The bandwidth with the least error in predicting training effects from the others."""
        distance = torch.pdist(self.control_mean[1:].double()).square().float()
        if not (distance > 0).any() or not len(self.effects):
            return torch.ones(())
        candidates = distance[distance > 0].median() * 2.0 ** torch.arange(-6, 4)
        left_out = torch.linspace(0, len(self.effects) - 1, min(len(self.effects), LEFT_OUT)).round().long()
        errors = []
        for bandwidth in candidates.tolist():
            pairs = zip(self.designs[left_out], self.own_codes[left_out], strict=True)
            weights = torch.stack([self._weights(m, codes, bandwidth) for m, codes in pairs])
            residual = weights @ self.effects - self.effects[left_out]
            errors.append(float(residual.square().sum()))
        return candidates[errors.index(min(errors))]

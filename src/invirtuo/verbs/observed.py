"""Means of real cells, to which effects are differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
import torch

from invirtuo.errors import preview

if TYPE_CHECKING:
    from invirtuo.cells.dataset import CellDataset
    from invirtuo.design import Design

__all__ = ["ObservedMeans"]


@dataclass(frozen=True)
class ObservedMeans:
    """Means of real cells: of the control cells of every covariate group, with their spread, and of conditions.

    `control` (k, g), `sd` (k, g) have a row for each of `groups`; `mean` (c, g) one for each of `conditions` (names).
    """

    groups: tuple[str, ...]
    control: np.ndarray
    sd: np.ndarray
    conditions: tuple[str, ...]
    mean: np.ndarray

    @classmethod
    def of(cls, dataset: CellDataset, rows: np.ndarray | None = None) -> Self:
        """From all cells of a dataset, or from rows (rising)."""
        design = dataset.design
        rows = np.arange(len(dataset.obs)) if rows is None else rows
        pseudobulks = dataset.pseudobulk(rows)
        is_control = torch.from_numpy(design.is_control(pseudobulks.table))
        controls, others = pseudobulks[is_control], pseudobulks[~is_control]

        # control cells that differ in anything but covariates are pooled
        groups = design.groups(controls.table).to_numpy(dtype=str)
        names = tuple(np.unique(groups))
        mean, sd = np.zeros((2, len(names), pseudobulks.mean.shape[1]), np.float32)
        for i, name in enumerate(names):
            own_mean, own_variance = controls[torch.from_numpy(groups == name)].pooled()
            mean[i], sd[i] = own_mean.numpy(), own_variance.sqrt().numpy()

        conditions = tuple(design.names(others.table))
        return cls(names, mean, sd, conditions, others.mean.numpy().astype(np.float32))

    def state(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        names = {"groups": np.array(self.groups, dtype=str), "conditions": np.array(self.conditions, dtype=str)}
        return {**names, "control": self.control, "sd": self.sd, "mean": self.mean}

    @classmethod
    def load(cls, state: Mapping[str, np.ndarray]) -> Self:
        """From what :meth:`state` gave."""
        groups, conditions = (tuple(state[name].tolist()) for name in ("groups", "conditions"))
        return cls(groups, state["control"], state["sd"], conditions, state["mean"])

    def with_groups(self, other: Self) -> Self:
        """The same, with those groups of control cells of another that it has not got."""
        new = [i for i, group in enumerate(other.groups) if group not in self.groups]
        new_groups = [other.groups[i] for i in new]
        control = np.concatenate([self.control, other.control[new]])
        sd = np.concatenate([self.sd, other.sd[new]])
        return replace(self, groups=(*self.groups, *new_groups), control=control, sd=sd)

    def of_control(self, design: Design, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (c, g) of the control cells of each condition of a table.

        Raises
        ------
        ValueError
            If a group has no control cells.
        """
        groups = design.groups(table)
        if missing := sorted(set(groups) - set(self.groups)):
            raise ValueError(
                f"there are no control cells of {preview(missing)}, and effects are differences to them; pass such "
                "cells"
            )
        rows = [self.groups.index(group) for group in groups]
        return self.control[rows].astype(np.float64), self.sd[rows].astype(np.float64)

    def effect(self, design: Design, table: pd.DataFrame) -> np.ndarray:
        """(c, g) difference of a condition's mean to its control cells'; NaN for conditions without cells."""
        index = pd.Index(self.conditions, dtype=object)
        means = pd.DataFrame(self.mean.astype(np.float64), index=index)
        control, _ = self.of_control(design, table)
        effect: np.ndarray = means.reindex(design.names(table)).to_numpy() - control
        return effect

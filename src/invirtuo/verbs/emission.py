"""Counts of cells that are drawn in log space: the depth of each cell, and whole numbers that keep the means.

A cell of log1p(target x counts / depth) has values that are whole multiples of one unit, target / depth, once the
logarithm is undone. Measured cells show their unit; drawn ones show how deep they are among others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from invirtuo.verbs.controls import ControlCells

__all__ = ["N_CELLS", "Depths", "units", "whole"]

N_CELLS = 500  # control cells of a group that are looked at
DIVISORS = (1, 2, 3, 4)  # the smallest count of a cell, where it is not 1
TOLERANCE = 0.02  # distance of a value to a whole multiple
LARGEST_TOLD = 500.0  # multiple up to which single precision tells that
FITTING = 0.95  # share of the values of a cell that have to be multiples
SHOWING = 0.5  # share of the cells of a group that have to show their unit


def units(x: Tensor) -> Tensor:
    """Expression of one count in each measured cell, on the linear scale of the data: target / depth.

    Parameters
    ----------
    x
        (n, g) log1p of counts per depth.

    Returns
    -------
    (n,), NaN for cells without counts, and for those whose values are not multiples of one unit.

    Examples
    --------
    >>> import torch
    >>> counts = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    >>> units(torch.log1p(counts * torch.tensor([[5.0], [2.0], [1.0]]))).tolist()
    [5.0, 4.0, nan]
    """
    linear = torch.expm1(x.double())
    smallest = torch.where(linear > 0, linear, torch.inf).min(dim=1, keepdim=True).values
    unit = torch.full_like(smallest, torch.nan)
    n_genes = (linear > 0).sum(dim=1, keepdim=True)
    for divisor in DIVISORS:
        multiple = linear / smallest * divisor
        fitting = (multiple > 0) & ((multiple - multiple.round()).abs() < TOLERANCE) & (multiple < LARGEST_TOLD)
        fits = fitting.sum(dim=1, keepdim=True) >= FITTING * n_genes
        unit = torch.where(unit.isnan() & fits & smallest.isfinite(), smallest / divisor, unit)
    return unit[:, 0].float()


def whole(expected: Tensor) -> Tensor:
    """Whole numbers beside expected ones: every gene keeps its sum over the cells, and the order of its cells.

    Numbers are rounded down, and what a gene lacks then goes to the cells that lost most. What is 0 stays 0, and what
    is whole stays as it is.

    Parameters
    ----------
    expected
        (n, g), not negative.

    Returns
    -------
    (n, g), int32.

    References
    ----------
    The method of largest remainders (Hamilton) of apportionment.

    Examples
    --------
    >>> import torch
    >>> whole(torch.tensor([[0.0, 2.0], [0.4, 1.9], [0.7, 0.2]])).tolist()
    [[0, 2], [0, 2], [1, 0]]
    """
    rounded = expected.floor()
    remainder = expected - rounded
    lacking = remainder.sum(dim=0).round()
    order = remainder.T.contiguous().argsort(dim=1, descending=True, stable=True)  # of the cells, gene by gene
    is_first = torch.arange(len(expected), device=expected.device) < lacking[:, None]
    gains = torch.zeros_like(is_first).scatter_(1, order, is_first)
    return (rounded + gains.T).to(torch.int32)


def _facts(x: Tensor) -> Tensor:
    """What tells the depth of a cell, (n, 4): 1, the number of its genes, and its mean in two scales."""
    n_genes, mean = (x > 0).sum(dim=1).double(), x.double().mean(dim=1)
    return torch.stack([torch.ones_like(mean), torch.log1p(n_genes), mean, (mean + 0.01).log()], dim=1)


@dataclass(frozen=True, eq=False)
class Depths:
    """Depths of control cells, from which drawn cells get theirs.

    Parameters
    ----------
    units
        Covariate group to the units of its control cells (k,), rising.
    weights
        (4,) of the facts of a cell, for the logarithm of its unit.
    largest
        Largest training value, which bounds what is drawn.
    """

    units: Mapping[str, Tensor]
    weights: Tensor
    largest: float

    @classmethod
    def of(cls, pool: Mapping[str, ControlCells], largest: float) -> Self:
        """From control cells of every covariate group; groups that do not show their counts are left out."""
        found, facts, logs = {}, [], []
        for group, cells in pool.items():
            step = -(-len(cells) // N_CELLS)
            x, _ = cells.take(np.arange(0, len(cells), step))
            own = units(x)
            counted = ~own.isnan()
            if counted.float().mean() >= SHOWING:
                found[group] = own[counted].sort().values
                facts.append(_facts(x[counted]))
                logs.append(own[counted].double().log())
        weights = torch.zeros(4, dtype=torch.float64)
        if facts:
            weights = torch.linalg.lstsq(torch.cat(facts), torch.cat(logs)[:, None], driver="gelsd").solution[:, 0]
        return cls(found, weights, largest)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """As arrays, to be saved: name to fields."""
        common = {"weights": self.weights.numpy(), "largest": np.array(self.largest)}
        return {"all": common} | {f"of {group}": {"units": own.numpy()} for group, own in self.units.items()}

    @classmethod
    def load(cls, states: Mapping[str, Mapping[str, np.ndarray]]) -> Self:
        """From what :meth:`state` gave."""
        common, groups = states["all"], {name: state for name, state in states.items() if name != "all"}
        own = {name.removeprefix("of "): torch.from_numpy(state["units"]) for name, state in groups.items()}
        return cls(own, torch.from_numpy(common["weights"]), float(common["largest"]))

    def with_groups(self, pool: Mapping[str, ControlCells]) -> Self:
        """The same, with the depths of control cells in place of those of their groups."""
        return replace(self, units={**self.units, **self.of(pool, self.largest).units})

    def counts(self, x: Tensor, group: str, source: Tensor | None) -> Tensor:
        """Counts of drawn cells.

        Parameters
        ----------
        x
            (n, g) log1p values, with zeros.
        group
            Covariate group, whose control cells lend their depths.
        source
            (n, g) control cells from which the cells were made, which then have their depths; None: the cells that look
            deepest get the largest depths.

        Returns
        -------
        (n, g), int32.

        Raises
        ------
        ValueError
            If the control cells of the group do not show counts.
        """
        if group not in self.units:
            raise ValueError(
                f"the control cells of {group!r} are not log1p of counts per depth, which counts could be told from; "
                "leave output='counts' out, or fit the model to data of iv.preprocess.normalize"
            )
        # ranked by what tells depth, or as their source has it
        place = (_facts(x) @ self.weights).argsort().argsort()
        unit = torch.quantile(self.units[group], (place + 0.5) / len(x))
        if source is not None:
            own = units(source)
            unit = torch.where(own.isnan(), unit, own)
        linear = torch.expm1(x.clamp(0, self.largest))
        return whole(linear / unit[:, None])

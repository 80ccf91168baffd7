"""Which rows form the next batch. A sampler knows labels, never expression values.

A sampler is called as ``sampler(layout, batch_size, rng) -> Iterator[Rows]`` and passes once over the rows of a
:class:`Layout`; the same rng gives the same batches. Any function like that is one. A sampler may say of itself what
those who read cells from files need to know:

- ``groups_conditions``: it puts cells of one condition together, ``set_size`` at a time;
- ``whole_courses``: it needs all cells of a covariate group at once, and reads from memory only.

One that says nothing is taken to mix all cells, as :class:`Cells` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd

from invirtuo.design import Design

__all__ = [
    "SAMPLERS",
    "Cells",
    "Courses",
    "Layout",
    "MappedSets",
    "Pairs",
    "Rows",
    "Sampler",
    "Sets",
    "cells",
    "courses",
    "named",
    "pairs",
    "sets",
    "without",
]


class Rows(NamedTuple):
    """Rows of one batch: `target` (n,), `source` (n,) or None, cells per set."""

    target: np.ndarray
    source: np.ndarray | None = None
    set_size: int = 1


@dataclass(frozen=True)
class Layout:
    """Rows to draw from, and what a sampler may know about them.

    Parameters
    ----------
    rows
        (n,), rows of the AnnData that may be drawn.
    group
        (n,), number of the covariate group of each.
    condition
        (n,), number of the condition (covariates and perturbation) of each.
    is_control
        (n,), True for control cells.
    time
        (n,), time of each, or None.
    group_names
        Name of each group, for messages.
    spare
        Number of a group to the rows of control cells outside `rows`, for groups without control cells of their own.
    joined
        Whether spare cells also join the control cells of groups that have some.
    batch
        (n,), number of the technical batch of each, or None.
    """

    rows: np.ndarray
    group: np.ndarray
    condition: np.ndarray
    is_control: np.ndarray
    time: np.ndarray | None
    group_names: tuple[str, ...]
    spare: Mapping[int, np.ndarray] = field(default_factory=dict)
    joined: bool = False
    batch: np.ndarray | None = None

    @classmethod
    def of(cls, obs: pd.DataFrame, design: Design, rows: np.ndarray, spare: np.ndarray | None = None) -> Layout:
        """Read the layout of rows of obs; control cells among the `spare` rows help groups that have none."""
        rows = np.asarray(rows)
        chosen = obs.iloc[rows]

        # labels are read once per distinct condition, then spread to its cells
        table, position = design.unique_conditions(chosen)
        group, names = pd.factorize(design.groups(table), sort=True)
        condition, _ = pd.factorize(design.names(table), sort=True)
        is_control = design.is_control(table)[position]
        time = table[design.time].to_numpy(float)[position] if design.time else None

        # spare control cells of every group
        pools = {}
        if spare is not None:
            spare_table, spare_position = design.unique_conditions(obs.iloc[spare])
            control = design.is_control(spare_table)[spare_position]
            spare_controls = spare[control]
            groups = design.groups(spare_table).to_numpy()[spare_position[control]]
            pools = {g: spare_controls[groups == name] for g, name in enumerate(names)}
        own = group[position], condition[position], is_control, time, tuple(map(str, names)), pools
        return cls(rows, *own, batch=design.batches(chosen))

    def only(self, positions: np.ndarray, spare: Mapping[int, np.ndarray]) -> Layout:
        """The layout of the given positions in `rows`, with spare control cells that join those of every group."""
        time = None if self.time is None else self.time[positions]
        labels = self.group[positions], self.condition[positions], self.is_control[positions]
        return Layout(self.rows[positions], *labels, time, self.group_names, spare, joined=True)

    def by_batch(self) -> Layout:
        """The layout with groups and conditions split by technical batch, if there are any.

        Batches without control cells borrow those of all batches of their group.
        """
        if self.batch is None:
            return self
        group, pairs = pd.factorize(pd.MultiIndex.from_arrays([self.group, self.batch]), sort=True)
        condition, _ = pd.factorize(pd.MultiIndex.from_arrays([self.condition, self.batch]), sort=True)
        with_controls = set(group[self.is_control].tolist())
        spare = {}
        for number, (old, _) in enumerate(pairs):
            if number not in with_controls:
                own = self.rows[(self.group == old) & self.is_control]
                spare[number] = own if len(own) else self.spare.get(old, own)
        names = tuple(self.group_names[old] for old, _ in pairs)
        return replace(self, group=group, condition=condition, group_names=names, spare=spare, batch=None)

    def controls(self) -> dict[int, np.ndarray]:
        """Rows of the control cells of every group that has cells.

        Raises
        ------
        ValueError
            If a group has none.
        """
        pools: dict[int, np.ndarray] = {}
        for g in np.unique(self.group).tolist():
            # own control cells, and spare ones where these are few or none
            pool = self.rows[(self.group == g) & self.is_control]
            if self.joined or not len(pool):
                pool = np.concatenate([pool, self.spare.get(g, pool[:0])])
            pools[g] = pool
        empty = [self.group_names[g] for g, pool in pools.items() if not len(pool)]
        if empty:
            raise ValueError(
                f"no control cells among the training cells of group(s) {', '.join(empty)}; add controls, "
                "drop these cells, or use fewer covariates in the Design"
            )
        return pools


Sampler = Callable[[Layout, int, np.random.Generator], Iterator[Rows]]


@dataclass(frozen=True)
class Cells:
    """Every cell once, in random order; a last batch may be smaller."""

    def __call__(self, layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
        """Rows of every batch."""
        order = rng.permutation(len(layout.rows))
        for start in range(0, len(order), batch_size):
            yield Rows(layout.rows[order[start : start + batch_size]])


@dataclass(frozen=True)
class Pairs:
    """Every perturbed cell once, each with a random control cell of the same covariates."""

    def __call__(self, layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
        """Rows of every batch."""
        layout = layout.by_batch()
        controls = layout.controls()
        sizes = np.zeros(max(controls, default=-1) + 1, dtype=np.int64)
        sizes[list(controls)] = [len(pool) for pool in controls.values()]
        # controls of all groups in a row, and where those of each group begin
        pooled = np.concatenate([*controls.values()]) if controls else layout.rows
        first = np.cumsum(sizes) - sizes
        targets = rng.permutation(np.flatnonzero(~layout.is_control))
        for start in range(0, len(targets), batch_size):
            target = targets[start : start + batch_size]
            group = layout.group[target]
            yield Rows(layout.rows[target], pooled[first[group] + rng.integers(sizes[group])])


@dataclass(frozen=True)
class Sets:
    """Cells of one condition in sets, each set with a set of control cells of the same covariates.

    Every cell of a condition is used at least once; a short last set is filled by drawing from itself with
    replacement. Controls are drawn without replacement where there are enough of them. `batch_size` counts cells.

    Parameters
    ----------
    set_size
        Cells of a set.
    """

    groups_conditions: ClassVar[bool] = True
    set_size: int = 64

    def __call__(self, layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
        """Rows of every batch."""
        layout = layout.by_batch()
        size, controls = self.set_size, layout.controls()
        chunks = []
        for condition in np.unique(layout.condition):
            # sets of one condition; the last is filled up with cells that it has already
            members = rng.permutation(np.flatnonzero(layout.condition == condition))
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                chunks.append(np.concatenate([chunk, rng.choice(chunk, size - len(chunk))]))
        rng.shuffle(chunks)
        per_batch = max(batch_size // size, 1)
        for start in range(0, len(chunks), per_batch):
            # a set of controls for every set, without repeats where the group has enough
            target = np.concatenate(chunks[start : start + per_batch])
            pools = [controls[g] for g in layout.group[target[::size]]]
            source = np.concatenate([rng.choice(pool, size, replace=len(pool) < size) for pool in pools])
            yield Rows(layout.rows[target], source, size)


@dataclass(frozen=True)
class MappedSets(Sets):
    """Sets of one experimental batch, with control cells of that batch, or of all batches of the context.

    Parameters
    ----------
    set_size
        Cells of a set.
    mapping
        "batch": of the same batch, and of the context where that batch has none. "context": of all its batches.
    covariate
        Which of the covariates, in order, is the batch; their labels must not hold a ``|``.
    """

    mapping: str = "batch"
    covariate: int = 0

    def __call__(self, layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
        """Rows of every batch."""
        contexts = np.array([without(name, self.covariate) for name in layout.group_names])
        context, labels = pd.factorize(contexts, sort=True)
        pools = {}
        for c in range(len(labels)):
            # control cells of all batches of a context
            groups = np.flatnonzero(context == c).tolist()
            own = layout.rows[np.isin(layout.group, groups) & layout.is_control]
            pools[c] = np.concatenate([own, *(layout.spare[g] for g in groups if g in layout.spare)])
        if self.mapping == "context":
            layout = replace(layout, group=context[layout.group], group_names=tuple(map(str, labels)), spare=pools)
        else:
            # batches without any control cell borrow those of their context
            with_controls = set(layout.group[layout.is_control].tolist())
            with_controls |= {g for g, pool in layout.spare.items() if len(pool)}
            borrowed = {g: pools[int(c)] for g, c in enumerate(context) if g not in with_controls}
            layout = replace(layout, spare={**layout.spare, **borrowed})
        yield from super().__call__(layout, batch_size, rng)


def without(group: str, covariate: int) -> str:
    """Name of a covariate group without one of the covariates, counted from 0."""
    labels = group.split("|")
    return "|".join(labels[:covariate] + labels[covariate + 1 :])


@dataclass(frozen=True)
class Courses:
    """Whole time courses: all cells of a group in the order of time, as many groups as hold `batch_size` cells.

    A group larger than that is a batch by itself. Groups that fit into one batch come in the order of their names.
    """

    whole_courses: ClassVar[bool] = True

    def __call__(self, layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
        """Rows of every batch."""
        if layout.time is None:
            raise ValueError("time courses need a Design with time=; name the column of obs that holds time")
        # rows of every course in the order of time
        order = np.lexsort([layout.time, layout.group])
        groups = np.split(order, np.flatnonzero(np.diff(layout.group[order])) + 1)
        if len(order) > batch_size:
            groups = [groups[i] for i in rng.permutation(len(groups))]
        batch: list[np.ndarray] = []
        for group in groups:
            if batch and sum(map(len, batch)) + len(group) > batch_size:
                yield Rows(layout.rows[np.concatenate(batch)])
                batch = []
            batch.append(group)
        yield Rows(layout.rows[np.concatenate(batch)])


cells = Cells()
pairs = Pairs()
sets = Sets()
courses = Courses()
SAMPLERS: dict[str, Sampler] = {"cells": cells, "pairs": pairs, "sets": sets, "courses": courses}


def named(name: str | Sampler, set_size: int) -> Sampler:
    """The sampler of a name in ``SAMPLERS``, `set_size` being for "sets"; a sampler is given back as it is."""
    if not isinstance(name, str):
        return name
    return Sets(set_size) if name == "sets" else SAMPLERS[name]

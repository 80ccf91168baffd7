"""Which rows form the next batch. A sampler knows labels, never expression values.

A sampler is a function ``sampler(layout, batch_size, rng) -> Iterator[Rows]`` that passes once over the rows of a
:class:`Layout`; the same rng gives the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from invirtuo.design import Design

__all__ = [
    "SAMPLERS",
    "Layout",
    "Rows",
    "Sampler",
    "cells",
    "courses",
    "mapped_sets",
    "named",
    "pairs",
    "sets",
    "time_pairs",
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
    """

    rows: np.ndarray
    group: np.ndarray
    condition: np.ndarray
    is_control: np.ndarray
    time: np.ndarray | None
    group_names: tuple[str, ...]
    spare: Mapping[int, np.ndarray] = field(default_factory=dict)
    joined: bool = False

    @classmethod
    def of(cls, obs: pd.DataFrame, design: Design, rows: np.ndarray, spare: np.ndarray | None = None) -> Layout:
        """Read the layout of some rows of obs; control cells among the `spare` rows help groups that have none."""
        rows = np.asarray(rows)
        table, kind = design.kinds(obs.iloc[rows])
        group, names = pd.factorize(design.groups(table), sort=True)
        condition, _ = pd.factorize(design.names(table), sort=True)
        time = table[design.time].to_numpy(float)[kind] if design.time else None
        pools = {}
        if spare is not None:
            known, of_known = design.kinds(obs.iloc[spare])
            control = design.is_control(known)[of_known]
            others, groups = spare[control], design.groups(known).to_numpy()[of_known[control]]
            pools = {g: others[groups == name] for g, name in enumerate(names)}
        is_control = design.is_control(table)[kind]
        return cls(rows, group[kind], condition[kind], is_control, time, tuple(map(str, names)), pools)

    def only(self, places: np.ndarray, spare: Mapping[int, np.ndarray]) -> Layout:
        """The layout of some places of `rows`, as part of a whole whose other controls are the spare ones."""
        time = None if self.time is None else self.time[places]
        parts = (self.rows[places], self.group[places], self.condition[places], self.is_control[places], time)
        return Layout(*parts, self.group_names, spare, joined=True)

    def controls(self) -> dict[int, np.ndarray]:
        """Rows of the control cells of every group that has cells.

        Raises
        ------
        ValueError
            If a group has none.
        """
        pools = {int(g): self.rows[(self.group == g) & self.is_control] for g in np.unique(self.group)}
        for g, pool in pools.items():
            if self.joined or not len(pool):
                pools[g] = np.concatenate([pool, self.spare.get(g, pool[:0])])
        empty = [self.group_names[g] for g, pool in pools.items() if not len(pool)]
        if empty:
            raise ValueError(
                f"no control cells among the training cells of group(s) {', '.join(empty)}; add controls, "
                "drop these cells, or use fewer covariates in the Design"
            )
        return pools


Sampler = Callable[[Layout, int, np.random.Generator], Iterator[Rows]]


def cells(layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Every cell once, in random order; a last batch may be smaller."""
    order = rng.permutation(len(layout.rows))
    for start in range(0, len(order), batch_size):
        yield Rows(layout.rows[order[start : start + batch_size]])


def pairs(layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Every perturbed cell once, each with a random control cell of the same covariates."""
    controls = layout.controls()
    sizes = np.zeros(max(controls, default=-1) + 1, dtype=np.int64)
    sizes[list(controls)] = [len(pool) for pool in controls.values()]
    first, pooled = np.cumsum(sizes) - sizes, np.concatenate([*controls.values()]) if controls else layout.rows
    targets = rng.permutation(np.flatnonzero(~layout.is_control))
    for start in range(0, len(targets), batch_size):
        target = targets[start : start + batch_size]
        group = layout.group[target]
        yield Rows(layout.rows[target], pooled[first[group] + rng.integers(sizes[group])])


def sets(layout: Layout, batch_size: int, rng: np.random.Generator, *, set_size: int = 64) -> Iterator[Rows]:
    """Cells of one condition in sets, each set with a set of control cells of the same covariates.

    Every cell of a condition is used at least once; a short last set is filled by drawing from itself with
    replacement. Controls are drawn without replacement where there are enough of them. `batch_size` counts cells.
    """
    controls = layout.controls()
    chunks = []
    for condition in np.unique(layout.condition):
        members = rng.permutation(np.flatnonzero(layout.condition == condition))
        for start in range(0, len(members), set_size):
            chunk = members[start : start + set_size]
            chunks.append(np.concatenate([chunk, rng.choice(chunk, set_size - len(chunk))]))
    rng.shuffle(chunks)
    per_batch = max(batch_size // set_size, 1)
    for start in range(0, len(chunks), per_batch):
        target = np.concatenate(chunks[start : start + per_batch])
        pools = [controls[g] for g in layout.group[target[::set_size]]]
        source = np.concatenate([rng.choice(pool, set_size, replace=len(pool) < set_size) for pool in pools])
        yield Rows(layout.rows[target], source, set_size)


def mapped_sets(
    layout: Layout, batch_size: int, rng: np.random.Generator, *, set_size: int, mapping: str, place: int
) -> Iterator[Rows]:
    """Sets of one batch, with control cells of that batch, or of all batches of the context.

    Parameters
    ----------
    layout, batch_size, rng, set_size
        As for :func:`sets`.
    mapping
        "batch": of the same batch, and of the context where that batch has none. "context": of all its batches.
    place
        Which of the covariates, in order, is the batch; their labels must not hold a ``|``.
    """
    context, labels = pd.factorize(np.array([without(name, place) for name in layout.group_names]), sort=True)
    pools = {}
    for c in range(len(labels)):
        groups = np.flatnonzero(context == c).tolist()
        own = layout.rows[np.isin(layout.group, groups) & layout.is_control]
        pools[c] = np.concatenate([own, *(layout.spare[g] for g in groups if g in layout.spare)])
    if mapping == "context":
        layout = replace(layout, group=context[layout.group], group_names=tuple(map(str, labels)), spare=pools)
    else:
        with_own = np.unique(layout.group[layout.is_control])
        lonely = [g for g in range(len(context)) if g not in with_own and not len(layout.spare.get(g, ()))]
        layout = replace(layout, spare={**layout.spare, **{g: pools[int(context[g])] for g in lonely}})
    yield from sets(layout, batch_size, rng, set_size=set_size)


def without(group: str, place: int) -> str:
    """Name of a covariate group without the covariate at a place."""
    parts = group.split("|")
    return "|".join(parts[:place] + parts[place + 1 :])


def time_pairs(layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Every cell after the first time point once, each with a random cell of its group at the time point before."""
    if layout.time is None:
        raise ValueError("time pairs need a Design with time=; name the column of obs that holds time")
    earlier = {}
    for g in np.unique(layout.group):
        in_group = layout.group == g
        times = np.unique(layout.time[in_group])
        for before, now in pairwise(times):
            earlier[int(g), now] = np.flatnonzero(in_group & (layout.time == before))
    keys = zip(layout.group.tolist(), layout.time.tolist(), strict=True)
    targets = rng.permutation([i for i, key in enumerate(keys) if key in earlier])
    for start in range(0, len(targets), batch_size):
        target = targets[start : start + batch_size]
        pools = [earlier[int(layout.group[i]), layout.time[i]] for i in target]
        source = np.array([pool[rng.integers(len(pool))] for pool in pools])
        yield Rows(layout.rows[target], layout.rows[source])


def courses(layout: Layout, batch_size: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Whole time courses: all cells of a group in the order of time, as many groups as hold `batch_size` cells.

    A group larger than that is a batch by itself. Groups that fit into one batch come in the order of their names.
    """
    if layout.time is None:
        raise ValueError("time courses need a Design with time=; name the column of obs that holds time")
    order = np.lexsort([layout.time, layout.group])
    parts = np.split(order, np.flatnonzero(np.diff(layout.group[order])) + 1)
    if len(order) > batch_size:
        parts = [parts[i] for i in rng.permutation(len(parts))]
    waiting: list[np.ndarray] = []
    for part in parts:
        if waiting and sum(map(len, waiting)) + len(part) > batch_size:
            yield Rows(layout.rows[np.concatenate(waiting)])
            waiting = []
        waiting.append(part)
    yield Rows(layout.rows[np.concatenate(waiting)])


SAMPLERS = {"cells": cells, "pairs": pairs, "sets": sets, "time_pairs": time_pairs, "courses": courses}


def named(name: str | Sampler, set_size: int) -> Sampler:
    """The sampler of a name in ``SAMPLERS``, `set_size` being for "sets"; a sampler is given back as it is."""
    if not isinstance(name, str):
        return name
    return partial(sets, set_size=set_size) if name == "sets" else SAMPLERS[name]

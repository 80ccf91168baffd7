"""What the splits share: labels and states of cells, and the division of held-out conditions and of controls."""

from __future__ import annotations

import logging
import random
from collections import Counter

import numpy as np
import pandas as pd

from invirtuo.cells.conditions import Conditions, wanted
from invirtuo.design import Design
from invirtuo.errors import preview

__all__ = [
    "CAP",
    "PARTS",
    "Heldout",
    "State",
    "divide",
    "is_combination",
    "labels_and_states",
    "labels_by_state",
    "rows_by",
    "states_named",
    "warn_about_controls",
]

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
CAP = 200  # no published task holds out more labels than this in one state

State = tuple[str, ...]  # covariate values of a cell in column order
Heldout = list[tuple[str, State]]  # (perturbation label, state), in the order in which they were chosen


def labels_and_states(obs: pd.DataFrame, design: Design) -> pd.DataFrame:
    """Label and state of each cell, in canonical form."""
    table = design.tidy(obs)
    columns = [table[name] for name in design.covariates]
    states = list(zip(*columns, strict=True)) if columns else [()] * len(obs)
    return pd.DataFrame({"label": table[design.perturbation].to_numpy(), "state": states}, index=obs.index)


def labels_by_state(table: pd.DataFrame) -> list[tuple[State, list[str]]]:
    """Labels of each state in order of first appearance; states sorted."""
    found: dict[State, dict[str, None]] = {}
    for label, state in zip(table["label"], table["state"], strict=True):
        found.setdefault(state, {})[label] = None
    return [(state, list(found[state])) for state in sorted(found)]


def is_combination(label: str, design: Design) -> bool:
    """Whether a label names several perturbations."""
    return len(design.parts(label)) > 1


def states_named(groups: Conditions, design: Design, table: pd.DataFrame) -> list[State]:
    """Groups given as names, tuples or mappings -> states."""
    known = set(table["state"])
    covariates = list(design.covariates)
    states = []
    for group in wanted(groups, covariates, design):
        state = tuple(str(group.get(column)) for column in covariates)
        if state not in known:
            found = ["|".join(state) or "all" for state in sorted(known)]
            raise ValueError(f"group {'|'.join(state)!r} does not occur in obs; found {preview(found)}")
        states.append(state)
    return states


def divide(
    table: pd.DataFrame,
    design: Design,
    heldout: Heldout,
    *,
    seed: int,
    keep_singletons: bool,
    stratum_order: Conditions | None,
) -> pd.Series:
    """Divide the held-out pairs into val and test, the controls into all parts; everything else trains."""
    # a state with one held-out pair cannot be divided
    counts = Counter(state for _, state in heldout)
    alone = [(label, state) for label, state in heldout if counts[state] == 1]
    rest = [(label, state) for label, state in heldout if counts[state] > 1]
    order = sorted(counts) if stratum_order is None else states_named(stratum_order, design, table)
    missing = {state for _, state in rest} - set(order)
    if missing:
        names = preview("|".join(state) for state in sorted(missing))
        raise ValueError(f"stratum_order leaves out groups with held-out conditions: {names}")
    if alone:
        fate = "they go to test" if keep_singletons else "their cells are unassigned (keep_singletons=True: test)"
        logger.warning(
            "held-out conditions alone in their group cannot be divided into val and test, %s: %s",
            fate,
            preview("|".join([*state, label]) for label, state in alone),
        )

    # held-out pairs: half val, half test in every state
    val, test = _halves(rest, [order.index(state) for _, state in rest], seed)
    part = dict.fromkeys(val, "val") | dict.fromkeys(test, "test")
    part |= dict.fromkeys(alone, "test" if keep_singletons else "")
    pairs = zip(table["label"], table["state"], strict=True)
    split = pd.Series([part.get(pair, "train") for pair in pairs], index=table.index, name="split", dtype=object)

    # controls: half train, a quarter each val and test, whatever their state
    control = (table["label"] == design.control).to_numpy()
    rows = np.flatnonzero(control).tolist()
    shuffled = random.Random(seed).sample(rows, len(rows))
    cuts = [int(0.5 * len(rows)), int(0.75 * len(rows))]
    for name, start, stop in zip(PARTS, [0, *cuts], [*cuts, len(rows)], strict=True):
        split.iloc[shuffled[start:stop]] = name
    groups = pd.Series(["|".join(state) or "all" for state in table["state"]], index=table.index)
    warn_about_controls(split, groups, control, set(PARTS))
    return split


def _halves(pairs: Heldout, strata: list[int], seed: int) -> tuple[Heldout, Heldout]:
    """Stratified halves: val, test."""
    from sklearn.model_selection import train_test_split

    if not pairs:
        return [], []
    positions = list(range(len(pairs)))
    in_val, in_test = train_test_split(positions, test_size=0.5, random_state=seed, stratify=strata)
    val = [pairs[i] for i in in_val]
    test = [pairs[i] for i in in_test]
    return val, test


def rows_by(keys: pd.Series, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Rows of each key, keys sorted."""
    keys = keys.to_numpy()
    return [(key, rows[index]) for key, index in sorted(pd.Series(keys).groupby(keys).indices.items())]


def warn_about_controls(split: pd.Series, groups: pd.Series, control: np.ndarray, wanted: set[str]) -> None:
    """Say which groups have no control cells in one of the wanted parts."""
    for group, parts in split[control].groupby(groups[control].to_numpy(), sort=True):
        lacking = [part for part in PARTS if part in wanted - set(parts)]
        if lacking:
            logger.warning("group %s has no control cells in %s (%d in all)", group, ", ".join(lacking), len(parts))

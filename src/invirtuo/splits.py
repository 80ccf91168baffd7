"""Splits: pure functions that give every cell of obs to "train", "val" or "test".

Every function returns a text Series named ``split`` with the index of obs; an empty string marks a cell that belongs to
no part. The same obs and seed always give the same split, whatever the hash seed of the process.

`transfer`, `manual`, `combine` and `combine_inverse` are the tasks of PerturBench (Wu et al. 2024, arXiv:2408.10609)
and agree with its code cell by cell. `hold_out` is the plain choice when the wanted conditions are known.

``split.to_csv(path, header=False)`` writes the file that :func:`from_csv` reads.

Differs: covariate states are compared as tuples in column order, not as unordered sets of values.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.checks import some

if TYPE_CHECKING:
    from pathlib import Path

from invirtuo.design import Design

__all__ = ["SPLITS", "combine", "combine_inverse", "from_csv", "hold_out", "manual", "transfer"]

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
CAP = 200  # no published task holds out more labels than this in one state

State = tuple[str, ...]  # covariate values of a cell in column order
Heldout = list[tuple[str, State]]  # (perturbation label, state), in the order in which they were chosen


def transfer(
    obs: pd.DataFrame,
    design: Design,
    *,
    seed: int = 42,
    fraction: float = 0.3,
    min_train: int = 1,
    max_heldout: int = 1,
    downsample: float = 1.0,
    exclude_control: bool = False,
    keep_singletons: bool = False,
    stratum_order: Sequence | None = None,
) -> pd.Series:
    """Hold out perturbations in some covariate states; the same perturbations are trained on in the other states.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    seed
        Seed of all draws.
    fraction
        Largest share of the labels of a state that is held out (never more than 200).
    min_train
        Only perturbations seen in more than this many states are held out. A precondition, not a guarantee: with a
        large `max_heldout` all states of a perturbation may be held out.
    max_heldout
        About how many states of one perturbation may be held out.
    downsample
        Share of the perturbations to keep; the cells of the others are unassigned.
    exclude_control
        Count the labels of a state without the control (the published code counts it).
    keep_singletons
        A held-out label alone in its state cannot be divided into val and test. False, as published: its cells stay
        unassigned. True: they go to test.
    stratum_order
        States, in the order in which they are divided into val and test: names as in `Design.groups`, tuples or
        mappings of covariate values. Default: sorted. The order changes the draws.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".
    """
    table = _table(obs, design)
    perturbed = table[table["label"] != design.control].drop_duplicates()
    labels_of_state = table.drop_duplicates()["state"].value_counts()
    if exclude_control:
        labels_of_state = perturbed["state"].value_counts()
    cap = {state: min(fraction * count, CAP) for state, count in labels_of_state.items()}
    states_of = perturbed.groupby("label", sort=True)["state"].agg(list).to_dict()
    order = sorted(states_of, key=lambda label: -len(states_of[label]))
    if downsample < 1:
        order = random.Random(seed).sample(order, int(downsample * len(order)))
    n_states = table["state"].nunique()
    rng = np.random.RandomState(seed)
    seeds = [int(rng.randint(100000)) for _ in order]
    heldout: Heldout = []
    taken: Counter[State] = Counter()
    for label, label_seed in zip(order, seeds, strict=True):
        pool = [state for state in states_of[label] if taken[state] < cap[state]]
        if len(states_of[label]) <= min_train or not pool:
            continue
        draw = random.Random(label_seed)
        k = draw.randint(1, max(len(pool) - n_states + max_heldout, 1))
        chosen = draw.sample(pool, min(k, len(pool)))
        heldout += [(label, state) for state in chosen]
        taken.update(chosen)
    split = _finish(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)
    return split.where(table["label"].isin([*order, design.control]), "")


def manual(
    obs: pd.DataFrame,
    design: Design,
    *,
    groups: Sequence,
    seed: int = 0,
    fraction: float = 0.7,
    keep_singletons: bool = False,
    stratum_order: Sequence | None = None,
) -> pd.Series:
    """Hold out a share of the perturbations of the listed covariate groups; all else trains.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    groups
        Groups to hold out perturbations of: names as in `Design.groups` (values joined by ``|``), tuples or mappings
        of covariate values. The order of the list changes the draws.
    seed
        Seed of all draws.
    fraction
        Share of the perturbations of each listed group that is held out.
    keep_singletons, stratum_order
        See :func:`transfer`.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".
    """
    table = _table(obs, design)
    rng = np.random.RandomState(seed)
    seeds = {state: int(rng.randint(100000)) for state in _states(groups, design, table)}
    heldout: Heldout = []
    for state, labels in _labels_by_state(table):
        if state in seeds:
            perturbations = [label for label in labels if label != design.control]
            chosen = random.Random(seeds[state]).sample(perturbations, int(fraction * len(perturbations)))
            heldout += [(label, state) for label in chosen]
    return _finish(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)


def combine(
    obs: pd.DataFrame,
    design: Design,
    *,
    seed: int = 42,
    fraction: float = 0.7,
    keep_singletons: bool = False,
    stratum_order: Sequence | None = None,
) -> pd.Series:
    """Hold out a share of the combinations of every covariate group; all single perturbations train.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates, and the separator of combinations.
    seed
        Seed of all draws.
    fraction
        Share of the combinations of each group that is held out (never more than 200).
    keep_singletons, stratum_order
        See :func:`transfer`.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".

    Examples
    --------
    >>> import invirtuo as iv
    >>> obs = pd.DataFrame({"gene": ["control", "A", "B", "C", "A+B", "A+C"] * 4})
    >>> design = iv.Design.from_adata(obs, perturbation="gene", control="control")
    >>> split = combine(obs, design, fraction=1.0)
    >>> sorted(obs["gene"][split == "test"].unique())
    ['A+B', 'control']
    """
    table = _table(obs, design)
    heldout: Heldout = []
    for state, labels in _labels_by_state(table):
        combos = [label for label in labels if _is_combination(label, design)]
        chosen = random.Random(seed).sample(combos, min(int(fraction * len(combos)), CAP))
        heldout += [(label, state) for label in chosen]
    return _finish(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)


def combine_inverse(
    obs: pd.DataFrame,
    design: Design,
    *,
    seed: int = 42,
    fraction: float = 0.3,
    exclude_control: bool = False,
    keep_singletons: bool = False,
    stratum_order: Sequence | None = None,
) -> pd.Series:
    """Hold out single perturbations, never two that share a combination; all combinations train.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates, and the separator of combinations.
    seed
        Seed of all draws.
    fraction
        Share of the single perturbations of each group that is held out (never more than 200).
    exclude_control
        Do not treat the control as a single perturbation (the published code does).
    keep_singletons, stratum_order
        See :func:`transfer`.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".
    """
    table = _table(obs, design)
    order = list(dict.fromkeys(table["label"]))
    heldout: Heldout = []
    for state, present in _labels_by_state(table):
        labels = [label for label in order if label in set(present)]
        combos = [set(label.split(design.separator)) for label in labels if _is_combination(label, design)]
        singles = [label for label in labels if not _is_combination(label, design)]
        if exclude_control:
            singles = [label for label in singles if label != design.control]
        pool = random.Random(seed).sample(singles, len(singles))
        wanted = min(int(fraction * len(singles)), CAP)
        chosen: list[str] = []
        while pool and len(chosen) < wanted:
            chosen.append(pool.pop())
            partners = set().union(*(combo for combo in combos if chosen[-1] in combo))
            pool = [label for label in pool if label not in partners]
        heldout += [(label, state) for label in chosen]
    return _finish(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)


def hold_out(
    obs: pd.DataFrame,
    design: Design,
    conditions: pd.DataFrame | Sequence,
    *,
    seed: int = 0,
    val_fraction: float = 0.1,
    control_fractions: tuple[float, float, float] = (0.5, 0.25, 0.25),
) -> pd.Series:
    """Hold out the named conditions as test; a share of the cells of every other condition is val.

    Control cells are divided into train, val and test within each covariate group, so that the test part of each group
    has controls to judge an effect by, also where every perturbation of that group is held out. What one condition's
    cells get does not depend on the other conditions in obs.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    conditions
        What to hold out: a DataFrame with columns of the design, or a list of condition names as in `Design.names`, or
        a list of mappings of column to value. A row or mapping that leaves columns out holds out every perturbed
        condition it matches: ``{"cell_type": "B cell"}`` is every response of the B cells.
    seed
        Seed of all draws.
    val_fraction
        Share of the cells of every remaining perturbed condition that becomes val.
    control_fractions
        Shares of train, val and test among the controls of each group; they must sum to 1.

    Returns
    -------
    pd.Series
        (n,), "train", "val" or "test".

    Raises
    ------
    ValueError
        If a condition does not occur in obs, is a control, or a fraction is out of range.

    Examples
    --------
    >>> import invirtuo as iv
    >>> obs = pd.DataFrame({"gene": ["control", "A", "B"] * 8, "line": ["k", "h"] * 12})
    >>> design = iv.Design.from_adata(obs, perturbation="gene", control="control", covariates="line")
    >>> split = hold_out(obs, design, {"line": "k"})
    >>> obs[split == "test"].value_counts().to_dict()
    {('A', 'k'): 4, ('B', 'k'): 4, ('control', 'h'): 1, ('control', 'k'): 1}
    """
    _table(obs, design)  # checks the columns
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1); found {val_fraction}")
    if len(control_fractions) != len(PARTS) or min(control_fractions) < 0 or abs(sum(control_fractions) - 1) > 1e-9:
        raise ValueError(f"control_fractions must be three numbers >= 0 that sum to 1; found {control_fractions}")
    control = design.is_control(obs)
    names = design.names(obs)
    test = names.isin(_condition_names(obs, design, conditions)).to_numpy() & ~control
    keys = ("control of " + design.groups(obs)).where(control, names)
    split = pd.Series("test", index=obs.index, name="split", dtype=object)
    for key, rows in _rows_by(keys[~test], np.flatnonzero(~test)):
        fractions = control_fractions if control[rows[0]] else (1 - val_fraction, val_fraction, 0.0)
        rng = np.random.default_rng([seed, zlib.crc32(str(key).encode())])
        cuts = np.floor(np.cumsum(fractions[:2]) * len(rows) + 1e-9).astype(int)
        for part, members in zip(PARTS, np.split(rng.permutation(rows), cuts), strict=True):
            split.iloc[members] = part
    wanted = {part for part, share in zip(PARTS, control_fractions, strict=True) if share}
    _warn_about_controls(split, design.groups(obs), control, wanted)
    return split


def from_csv(path: str | Path, obs: pd.DataFrame) -> pd.Series:
    """Read a saved split: two columns without header, cell name and "train", "val", "test" or nothing.

    Parameters
    ----------
    path
        The file. Cells of obs that it does not name are unassigned.
    obs
        (n, columns), one row per cell; the index holds the cell names.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".

    Raises
    ------
    ValueError
        If the file has not two columns, names a cell twice or one that is not in obs, or holds another value.
    """
    try:
        table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; expected a file of two columns (cell name, split)") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is empty or not a table of two columns (cell name, split): {error}") from error
    if table.shape[1] != 2:
        raise ValueError(f"{path}: expected two columns (cell name, split), no header; found {table.shape[1]} columns")
    cells, values = table[0], table[1]
    wrong = ~values.isin([*PARTS, ""])
    if wrong.any():
        raise ValueError(
            f"{path}: split values must be train, val, test or empty; found {some(values[wrong].unique())} "
            f"in line {int(np.flatnonzero(wrong)[0]) + 1}. The file has no header line"
        )
    if cells.duplicated().any():
        raise ValueError(f"{path}: cells named more than once: {some(cells[cells.duplicated()].unique())}")
    if not obs.index.is_unique:
        raise ValueError(
            "obs: cell names are not unique, a split file cannot be matched; call adata.obs_names_make_unique()"
        )
    unknown = cells[~cells.isin(obs.index.astype(str))]
    if len(unknown):
        raise ValueError(f"{path}: cells that are not in obs: {some(unknown)}; obs has {some(obs.index, 3)}")
    split = pd.Series(values.to_numpy(dtype=object), index=cells).reindex(obs.index.astype(str), fill_value="")
    return pd.Series(split.to_numpy(), index=obs.index, name="split", dtype=object)


SPLITS: dict[str, Callable[..., pd.Series]] = {
    "transfer": transfer,
    "manual": manual,
    "combine": combine,
    "combine_inverse": combine_inverse,
    "hold_out": hold_out,
}


def _table(obs: pd.DataFrame, design: Design) -> pd.DataFrame:
    """Label and state of each cell, as text."""
    for column in design.columns:
        if column not in obs.columns:
            raise ValueError(f"obs has no column {column!r}, which the design names; found {some(obs.columns)}")
        if obs[column].isna().any():
            missing = int(obs[column].isna().sum())
            raise ValueError(f"obs[{column!r}] has {missing} missing values; remove these cells or label them")
    columns = [obs[name].astype(str) for name in design.covariates]
    states = list(zip(*columns, strict=True)) if columns else [()] * len(obs)
    return pd.DataFrame({"label": obs[design.perturbation].astype(str).to_numpy(), "state": states}, index=obs.index)


def _labels_by_state(table: pd.DataFrame) -> list[tuple[State, list[str]]]:
    """Labels of each state in order of first appearance; states sorted."""
    found: dict[State, dict[str, None]] = {}
    for label, state in zip(table["label"], table["state"], strict=True):
        found.setdefault(state, {})[label] = None
    return [(state, list(found[state])) for state in sorted(found)]


def _is_combination(label: str, design: Design) -> bool:
    return bool(design.separator) and design.separator in label


def _states(groups: Sequence, design: Design, table: pd.DataFrame) -> list[State]:
    """Groups given as names, tuples or mappings -> states."""
    known = {"|".join(state) or "all": state for state in sorted(set(table["state"]))}
    states = []
    for group in [groups] if isinstance(groups, str | Mapping) else groups:
        if isinstance(group, Mapping):
            name = "|".join(str(group.get(column)) for column in design.covariates)
        else:
            name = group if isinstance(group, str) else "|".join(map(str, group))
        if name not in known:
            raise ValueError(f"group {group!r} does not occur in obs; found {some(known)}")
        states.append(known[name])
    return states


def _finish(
    table: pd.DataFrame,
    design: Design,
    heldout: Heldout,
    *,
    seed: int,
    keep_singletons: bool,
    stratum_order: Sequence | None,
) -> pd.Series:
    """Divide the held-out pairs into val and test, the controls into all parts; everything else trains."""
    counts = Counter(state for _, state in heldout)
    alone = [(label, state) for label, state in heldout if counts[state] == 1]
    rest = [(label, state) for label, state in heldout if counts[state] > 1]
    order = sorted(counts) if stratum_order is None else _states(stratum_order, design, table)
    missing = {state for _, state in rest} - set(order)
    if missing:
        names = some("|".join(state) for state in sorted(missing))
        raise ValueError(f"stratum_order leaves out groups with held-out conditions: {names}")
    if alone:
        fate = "they go to test" if keep_singletons else "their cells are unassigned (keep_singletons=True: test)"
        logger.warning(
            "held-out conditions alone in their group cannot be divided into val and test, %s: %s",
            fate,
            some("|".join([*state, label]) for label, state in alone),
        )
    val, test = _halves(rest, [order.index(state) for _, state in rest], seed)
    part = dict.fromkeys(val, "val") | dict.fromkeys(test, "test")
    part |= dict.fromkeys(alone, "test" if keep_singletons else "")
    pairs = zip(table["label"], table["state"], strict=True)
    split = pd.Series([part.get(pair, "train") for pair in pairs], index=table.index, name="split", dtype=object)
    control = (table["label"] == design.control).to_numpy()
    rows = np.flatnonzero(control).tolist()
    shuffled = random.Random(seed).sample(rows, len(rows))
    cuts = [int(0.5 * len(rows)), int(0.75 * len(rows))]
    for name, start, stop in zip(PARTS, [0, *cuts], [*cuts, len(rows)], strict=True):
        split.iloc[shuffled[start:stop]] = name
    groups = pd.Series(["|".join(state) or "all" for state in table["state"]], index=table.index)
    _warn_about_controls(split, groups, control, set(PARTS))
    return split


def _halves(pairs: Heldout, strata: list[int], seed: int) -> tuple[Heldout, Heldout]:
    """Stratified halves: val, test."""
    from sklearn.model_selection import train_test_split

    if not pairs:
        return [], []
    val, test = train_test_split(list(range(len(pairs))), test_size=0.5, random_state=seed, stratify=strata)
    return [pairs[i] for i in val], [pairs[i] for i in test]


def _rows_by(keys: pd.Series, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Rows of each key, keys sorted."""
    keys = keys.to_numpy()
    return [(key, rows[index]) for key, index in sorted(pd.Series(keys).groupby(keys).indices.items())]


def _condition_names(obs: pd.DataFrame, design: Design, conditions: pd.DataFrame | Sequence) -> set[str]:
    """Names of the perturbed conditions that are asked for, each checked to exist."""
    if isinstance(conditions, pd.DataFrame):
        conditions = conditions[[column for column in conditions if column in design.columns]].to_dict("records")
    elif isinstance(conditions, str | Mapping):
        conditions = [conditions]
    if len(conditions) == 0:
        raise ValueError(f"conditions is empty; name conditions, or give rows with columns {some(design.columns)}")
    known = design.conditions(obs)
    names = design.names(known)
    found: set[str] = set()
    for wanted in conditions:
        match = (names == wanted) if isinstance(wanted, str) else _matches(known, wanted, design)
        if not match.any():
            raise ValueError(f"condition {wanted!r} is no perturbed condition of obs; found {some(names)}")
        found |= set(names[match])
    return found


def _matches(known: pd.DataFrame, wanted: Mapping, design: Design) -> pd.Series:
    """Which conditions agree with all the values that are given."""
    if not wanted or set(wanted) - set(design.columns):
        raise ValueError(f"conditions: {dict(wanted)} must name columns of the design; expected {some(design.columns)}")
    return pd.concat([_equals(known[column], value) for column, value in wanted.items()], axis=1).all(axis=1)


def _equals(column: pd.Series, value) -> pd.Series:
    """Numbers (dose, time) are compared as numbers, labels as text."""
    if pd.api.types.is_numeric_dtype(column):
        return column == pd.to_numeric(value, errors="coerce")
    return column.astype(str) == str(value)


def _warn_about_controls(split: pd.Series, groups: pd.Series, control: np.ndarray, wanted: set[str]) -> None:
    for group, parts in split[control].groupby(groups[control].to_numpy(), sort=True):
        lacking = [part for part in PARTS if part in wanted - set(parts)]
        if lacking:
            logger.warning("group %s has no control cells in %s (%d in all)", group, ", ".join(lacking), len(parts))

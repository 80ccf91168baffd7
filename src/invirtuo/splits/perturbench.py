"""The tasks of PerturBench: transfer to other contexts, combinations, and how much and how balanced the data are.

References
----------
Wu et al. 2024, PerturBench, arXiv:2408.10609.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Literal

import numpy as np
import pandas as pd

from invirtuo.cells.conditions import Conditions
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.splits.parts import (
    CAP,
    Heldout,
    State,
    divide,
    is_combination,
    labels_and_states,
    labels_by_state,
    states_named,
)

__all__ = ["combine", "combine_inverse", "imbalanced", "manual", "scaling", "transfer"]


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
    stratum_order: Conditions | None = None,
) -> pd.Series:
    """Hold out perturbations in drawn covariate states; the same perturbations are trained on in the other states.

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
    table = labels_and_states(obs, design)
    perturbed = table[table["label"] != design.control].drop_duplicates()
    labels_of_state = table.drop_duplicates()["state"].value_counts()
    if exclude_control:
        labels_of_state = perturbed["state"].value_counts()

    # at most a share of the labels of a state is held out
    cap = {state: min(fraction * count, CAP) for state, count in labels_of_state.items()}
    states_of = perturbed.groupby("label", sort=True)["state"].agg(list).to_dict()

    # perturbations seen in most states choose first; downsampling removes perturbations from all states
    order = sorted(states_of, key=lambda label: -len(states_of[label]))
    if downsample < 1:
        order = random.Random(seed).sample(order, int(downsample * len(order)))
    n_states = table["state"].nunique()
    rng = np.random.RandomState(seed)

    # a seed for each perturbation, so that the draws of one do not depend on the others
    seeds = [int(rng.randint(100000)) for _ in order]
    heldout: Heldout = []
    taken: Counter[State] = Counter()
    for label, label_seed in zip(order, seeds, strict=True):
        # states that are not full yet; a perturbation must be left to train on in min_train of them
        pool = [state for state in states_of[label] if taken[state] < cap[state]]
        if len(states_of[label]) <= min_train or not pool:
            continue
        draw = random.Random(label_seed)
        k = draw.randint(1, max(len(pool) - n_states + max_heldout, 1))
        chosen = draw.sample(pool, min(k, len(pool)))
        heldout += [(label, state) for state in chosen]
        taken.update(chosen)
    split = divide(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)
    return split.where(table["label"].isin([*order, design.control]), "")


def manual(
    obs: pd.DataFrame,
    design: Design,
    *,
    groups: Conditions,
    seed: int = 0,
    fraction: float = 0.7,
    keep_singletons: bool = False,
    stratum_order: Conditions | None = None,
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
    table = labels_and_states(obs, design)
    rng = np.random.RandomState(seed)
    seeds = {state: int(rng.randint(100000)) for state in states_named(groups, design, table)}
    heldout: Heldout = []
    for state, labels in labels_by_state(table):
        if state in seeds:
            perturbations = [label for label in labels if label != design.control]
            chosen = random.Random(seeds[state]).sample(perturbations, int(fraction * len(perturbations)))
            heldout += [(label, state) for label in chosen]
    return divide(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)


def combine(
    obs: pd.DataFrame,
    design: Design,
    *,
    seed: int = 42,
    fraction: float = 0.7,
    keep_singletons: bool = False,
    stratum_order: Conditions | None = None,
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
    table = labels_and_states(obs, design)
    heldout: Heldout = []
    for state, labels in labels_by_state(table):
        combos = [label for label in labels if is_combination(label, design)]
        chosen = random.Random(seed).sample(combos, min(int(fraction * len(combos)), CAP))
        heldout += [(label, state) for label in chosen]
    return divide(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)


def combine_inverse(
    obs: pd.DataFrame,
    design: Design,
    *,
    seed: int = 42,
    fraction: float = 0.3,
    exclude_control: bool = False,
    keep_singletons: bool = False,
    stratum_order: Conditions | None = None,
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
    table = labels_and_states(obs, design)
    order = list(dict.fromkeys(table["label"]))
    heldout: Heldout = []
    for state, present in labels_by_state(table):
        labels = [label for label in order if label in set(present)]
        # draw one by one; those that share a combination with a drawn one leave the pool
        combos = [set(design.parts(label)) for label in labels if is_combination(label, design)]
        singles = [label for label in labels if not is_combination(label, design)]
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
    return divide(table, design, heldout, seed=seed, keep_singletons=keep_singletons, stratum_order=stratum_order)


def scaling(
    obs: pd.DataFrame,
    design: Design,
    *,
    by: Literal["perturbations", "groups"] = "perturbations",
    n: int | None = None,
    core: int | None = None,
    fraction: float | None = None,
    max_heldout: int = 7,
    seed: int = 57,
) -> pd.Series:
    """Let the training data grow while validation and test stay the same.

    A core of perturbations (or of covariate groups) is drawn, and conditions are held out within the core alone. What
    comes on top of it, up to `n`, trains; the rest is unassigned. A larger `n` contains every smaller one.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    by
        What grows. "perturbations": :func:`transfer` within the core. "groups": :func:`manual` in the groups of the
        core, all of whose controls and other perturbations train.
    n
        Number of perturbations, or of groups, that are used, the core counted; None takes all.
    core
        Size of the core; None takes a quarter of the perturbations, or three groups, as published (132 of 528, and 3
        of 15).
    fraction
        As in :func:`transfer` (None: 0.3) or :func:`manual` (None: 0.7).
    max_heldout
        As in :func:`transfer`.
    seed
        Seed of all draws.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".

    Raises
    ------
    ValueError
        If `n` or `core` do not fit what obs holds.

    Notes
    -----
    Differs: the published sizes and shares, but one seed; the published draws are not reproduced.
    """
    table = labels_and_states(obs, design)
    control = table["label"] == design.control
    if by not in ("perturbations", "groups"):
        raise ValueError(f"by must be 'perturbations' or 'groups'; found {by!r}")
    labels = sorted(set(table["label"][~control])) if by == "perturbations" else sorted(set(table["state"]))
    if core is None:
        core = 3 if by == "groups" else max(len(labels) // 4, 1)
    n = len(labels) if n is None else n
    if not 0 < core <= n <= len(labels):
        raise ValueError(f"expected 0 < core <= n <= {len(labels)}, the {by} of obs; found core={core}, n={n}")

    # the core comes first at every n, so that what is held out stays the same
    order = random.Random(seed).sample(labels, len(labels))
    if by == "groups":
        used = table["state"].isin(order[:n])
        share = 0.7 if fraction is None else fraction
        return _within(used, manual(obs[used], design, groups=order[:core], seed=seed, fraction=share))
    used = control | table["label"].isin(order[:core])
    share = 0.3 if fraction is None else fraction
    split = _within(used, transfer(obs[used], design, seed=seed, fraction=share, max_heldout=max_heldout))
    return split.mask(table["label"].isin(order[core:n]), "train")


def imbalanced(
    obs: pd.DataFrame,
    design: Design,
    *,
    entropy: float = 0.8,
    order: Conditions | None = None,
    seed: int = 57,
    fraction: float = 0.3,
    min_train: int = 1,
    max_heldout: int = 1,
) -> pd.Series:
    """Thin out the perturbations of the covariate groups until they are as unequal as wanted, then `transfer`.

    The balance is the entropy of the groups' shares of the perturbations, divided by the logarithm of their number: 1
    is equal. The first group keeps all, each further one a constant factor less; of a group's perturbations the same
    ones stay first at every `entropy`. Controls stay. Three groups of 189 perturbations at 0.8 keep 189, 78 and 32
    (published: 189, 82 and 31).

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    entropy
        Wanted balance in (0, 1]; met as nearly as whole perturbations allow.
    order
        Groups from the largest to the smallest: names as in `Design.groups`, tuples or mappings of covariate values.
        None: by their number of perturbations, then by name.
    seed
        Seed of all draws.
    fraction, min_train, max_heldout
        See :func:`transfer`.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or ""; removed cells are unassigned.

    Raises
    ------
    ValueError
        If there are fewer than two groups, `order` does not list them all, or they are less balanced than wanted.

    Notes
    -----
    Differs: the paper gives the entropy, not the sizes that lead to it; the geometric sizes are our choice.
    """
    table = labels_and_states(obs, design)
    control = table["label"] == design.control
    present = {state: sorted(set(labels) - {design.control}) for state, labels in labels_by_state(table)}
    present = {state: labels for state, labels in present.items() if labels}
    if order is None:
        states = sorted(present, key=lambda state: (-len(present[state]), state))
    else:
        states = states_named(order, design, table)
    if set(states) != set(present) or len(states) < 2:
        names = preview("|".join(state) or "all" for state in sorted(present))
        raise ValueError(f"expected two or more covariate groups, each once in order=; obs has {names}")
    sizes = _unequal([len(present[state]) for state in states], entropy)

    # the first of each shuffled list stay, so that smaller selections lie inside of larger ones
    kept: set[tuple[str, State]] = set()
    for i, (state, size) in enumerate(zip(states, sizes, strict=True)):
        labels = random.Random(seed + i).sample(present[state], len(present[state]))
        kept |= {(label, state) for label in labels[:size]}
    pairs = list(zip(table["label"], table["state"], strict=True))
    used = control | pd.Series([pair in kept for pair in pairs], index=table.index)
    split = transfer(obs[used], design, seed=seed, fraction=fraction, min_train=min_train, max_heldout=max_heldout)
    return _within(used, split)


def _within(used: pd.Series, split: pd.Series) -> pd.Series:
    """Widen the split of the used cells to all; the others are unassigned."""
    found = pd.Series("", index=used.index, name="split", dtype=object)
    found[used.to_numpy()] = split.to_numpy()
    return found


def _unequal(available: list[int], entropy: float) -> list[int]:
    """Sizes that fall by a constant factor, none above what is available, with the wanted normalised entropy."""

    def sizes(factor: float) -> np.ndarray:
        falling = available[0] * factor ** np.arange(len(available))
        capped: np.ndarray = np.minimum(falling, available)
        return capped

    def balance(parts: np.ndarray) -> float:
        share = parts / parts.sum()
        return float(-(share * np.log(share)).sum() / np.log(len(share)))

    most = balance(sizes(1.0))
    if not 0 < entropy <= most + 1e-9:
        raise ValueError(f"entropy must be in (0, {most:.4g}], the balance of the groups as they are; found {entropy}")
    # bisect for the factor; the balance rises with it
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if balance(sizes(middle)) > entropy else (middle, high)
    return [max(int(size + 0.5), 1) for size in sizes(high)]

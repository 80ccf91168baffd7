"""Perturbations that no training cell has, in known contexts or in contexts that are known by control cells alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from invirtuo.cells.conditions import Conditions
from invirtuo.design import Design
from invirtuo.errors import preview, whole_number
from invirtuo.splits.contexts import Fractions, contexts_in, deal_controls

__all__ = ["regimes", "unseen_targets"]


# whether a perturbation was seen, and whether its context was
KINDS = {(True, True): "pair", (True, False): "context", (False, True): "target", (False, False): "both"}


def unseen_targets(
    obs: pd.DataFrame,
    design: Design,
    *,
    contexts: Conditions | None = None,
    fold: int = 0,
    n_folds: int = 5,
    seed: int = 0,
    control_fractions: Fractions = (0.5, 0.25, 0.25),
) -> pd.Series:
    """Hold out a fold of the perturbations everywhere: they can be known by features alone.

    Single perturbations are dealt into folds at random. Those of the fold are tested, those of the next one are for
    validation, and so are combinations with one of them. Only models that take features predict them.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    contexts
        Contexts that are new, too: of their perturbed cells those of held-out perturbations are tested (and used for
        validation), the others belong to no part; nor do cells of held-out perturbations elsewhere. None: held-out
        perturbations are tested in all contexts.
    fold, n_folds
        Which fold is tested, and their number.
    seed
        Of the folds and the control cells.
    control_fractions
        Shares of the control cells of every group in train, val and test.

    Returns
    -------
    pd.Series
        (n,), "train", "val", "test" or "".

    Raises
    ------
    ValueError
        If there are fewer perturbations than folds, or less than two, or nothing is left to test.

    Examples
    --------
    >>> import invirtuo as iv
    >>> adata = iv.datasets.toy()
    >>> design = iv.Design.from_adata(adata, perturbation="perturbation", control="control", covariates=["cell_type"])
    >>> split = iv.splits.unseen_targets(adata.obs, design, n_folds=3)
    >>> held_out = set(adata.obs.loc[split == "test", "perturbation"]) - {"control"}
    >>> held_out & set(adata.obs.loc[split == "train", "perturbation"])
    set()
    """
    n_folds, fold = whole_number("n_folds", n_folds, 2), whole_number("fold", fold, 0)
    table, row = design.unique_conditions(obs)
    parts = [set(design.parts(label)) for label in table[design.perturbation]]
    singles = sorted(set().union(*parts))
    if fold >= n_folds or len(singles) < n_folds:
        raise ValueError(
            f"fold is {fold} and n_folds {n_folds}, and there are {len(singles)} perturbations; expected a fold below "
            "n_folds, and at least as many perturbations"
        )
    dealt = np.random.default_rng(seed).permutation(singles)
    tested, validated = (set(dealt[place % n_folds :: n_folds]) for place in (fold, fold + 1))

    # part of every condition
    is_control = design.is_control(table)
    own = np.array(["test" if p & tested else "val" if p & validated else "train" for p in parts], dtype=object)
    if contexts is not None:
        inside = np.logical_or.reduce(list(contexts_in(table, design, contexts).values()))
        own = np.where(inside == (own != "train"), own, "")
    own[is_control] = "train"
    split = pd.Series(own[row], index=obs.index, name="split", dtype=object)
    if not (split == "test").any():
        raise ValueError(f"no cell has one of the perturbations of fold {fold}: {preview(sorted(tested))}")
    deal_controls(split, design, obs, control_fractions, None, seed)
    return split


def regimes(obs: pd.DataFrame, design: Design, split: pd.Series) -> pd.Series:
    """How much of every tested condition training has seen.

    Parameters
    ----------
    obs, design
        As for every split.
    split
        (n,) part of each cell.

    Returns
    -------
    pd.Series
        Index: names of the tested conditions. "pair": its perturbation was seen in other groups, and its group under
        other perturbations; "context": no perturbed cell of its group was; "target": its perturbation was not; "both".
        Of combinations that were not seen themselves the number of their parts that were seen alone follows: "pair, 2
        of 2 parts".
    """
    table, row = design.unique_conditions(obs)
    is_control = design.is_control(table)
    parts = [frozenset(design.parts(label)) for label in table[design.perturbation]]
    groups = design.groups(table).to_numpy()
    where = {part: np.unique(row[(split == part).to_numpy()]) for part in ("train", "test")}
    trained = [i for i in where["train"] if not is_control[i]]
    labels = {parts[i] for i in trained}
    contexts = {groups[i] for i in trained}
    found = {}
    for i in where["test"]:
        if is_control[i]:
            continue
        alone = sum(frozenset([part]) in labels for part in parts[i])
        is_known = parts[i] in labels or alone == len(parts[i])
        kind = KINDS[is_known, groups[i] in contexts]
        if len(parts[i]) > 1 and parts[i] not in labels:
            kind += f", {alone} of {len(parts[i])} parts"
        found[design.names(table.iloc[[i]]).iloc[0]] = kind
    return pd.Series(found, name="regime", dtype=object)

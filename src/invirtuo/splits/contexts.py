"""Hold out conditions by name, or contexts (cell lines, cell types, donors) as STATE does.

References
----------
Adduri et al. 2025, STATE, doi:10.1101/2025.06.26.661135, equations 3-7.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from invirtuo.cells.conditions import Conditions, matches, wanted
from invirtuo.design import Design
from invirtuo.errors import preview, with_likely
from invirtuo.splits.parts import PARTS, labels_and_states, rows_by, warn_about_controls

__all__ = ["deal_controls", "hold_out", "under_represented", "zero_shot"]

logger = logging.getLogger(__name__)

Fractions = tuple[float, float, float]  # of train, val and test


def hold_out(
    obs: pd.DataFrame,
    design: Design,
    conditions: Conditions,
    *,
    val: Conditions | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    control_fractions: Fractions = (0.5, 0.25, 0.25),
    unseen_control_fractions: Fractions | None = None,
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
        What to hold out: names of conditions (``"B cell|IFN-beta"``, as in `Design.names`), mappings of column to
        value, or a DataFrame with columns of the design. A row or mapping that leaves columns out holds out every
        perturbed condition it matches: ``{"cell_type": "B cell"}`` is every response of the B cells.
    val
        Whole conditions to validate on, named in the same way. They choose when training stops, and intervals of
        effects are calibrated on them.
    seed
        Seed of all draws.
    val_fraction
        Share of the cells of every remaining perturbed condition that becomes val; with `val` none do.
    control_fractions
        Shares of train, val and test among the controls of each group; they must sum to 1.
    unseen_control_fractions
        The same for groups of which every perturbed cell is held out; None: `control_fractions`. With ``(0, 0, 1)`` a
        held-out donor stays unknown until the prediction: nothing of it trains.

    Returns
    -------
    pd.Series
        (n,), "train", "val" or "test".

    Raises
    ------
    ValueError
        If a condition does not occur in obs, is a control, stands in both lists, or a fraction is out of range.

    Examples
    --------
    >>> import invirtuo as iv
    >>> obs = pd.DataFrame({"gene": ["control", "A", "B"] * 8, "line": ["k", "h"] * 12})
    >>> design = iv.Design.from_adata(obs, perturbation="gene", control="control", covariates="line")
    >>> split = hold_out(obs, design, {"line": "k"})
    >>> obs[split == "test"].value_counts().to_dict()
    {('A', 'k'): 4, ('B', 'k'): 4, ('control', 'h'): 1, ('control', 'k'): 1}
    """
    labels_and_states(obs, design)  # checks the columns
    _check_share("val_fraction", val_fraction)
    control = design.is_control(obs)
    names = design.names(obs)
    tested = _condition_names(obs, design, conditions)
    validated = set() if val is None else _condition_names(obs, design, val)
    if both := tested & validated:
        raise ValueError(f"{preview(sorted(both))} stand in conditions and in val; hold each out for one of them")

    # the named conditions are held out with all their cells
    is_test = names.isin(tested).to_numpy() & ~control
    is_val = names.isin(validated).to_numpy() & ~control
    split = pd.Series(np.where(is_val, "val", "test"), index=obs.index, name="split", dtype=object)

    # every other condition trains; unless val names conditions, a share of its cells validates
    shares = (1 - val_fraction, val_fraction, 0.0) if val is None else (1.0, 0.0, 0.0)
    others = ~is_test & ~is_val & ~control
    for name, rows in rows_by(names[others], np.flatnonzero(others)):
        _deal(split, name, rows, shares, seed)
    deal_controls(split, design, obs, control_fractions, unseen_control_fractions, seed)
    return split


def under_represented(
    obs: pd.DataFrame,
    design: Design,
    *,
    contexts: Conditions,
    seed: int = 42,
    fraction: float = 0.3,
    support: Sequence[str] | None = None,
    val_fraction: float = 0.05,
    control_fractions: Fractions = (0.5, 0.25, 0.25),
) -> pd.Series:
    """Show a model few perturbations of the test contexts and all of the others; the rest of the test contexts is test.

    Equations 3-5 of STATE. Controls of every context are among those of train, the test contexts' included. Validation
    takes whole conditions of the other contexts, never the last one that a perturbation is trained on.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    contexts
        The test contexts: names as in `Design.groups` (values joined by ``|``), tuples or mappings of covariate values.
        A mapping that leaves covariates out is one context of all the groups it matches: ``{"donor": "101"}``.
    seed
        Seed of all draws; what a context gets does not depend on the other test contexts.
    fraction
        Share of the perturbations of a test context that train (its support), rounded down, the control not counted.
    support
        Perturbations to train on in every test context, instead of a draw.
    val_fraction
        Share of the conditions of the other contexts that becomes val, rounded down, but one if it is above 0.
    control_fractions
        Shares of train, val and test among the controls of each group; they must sum to 1.

    Returns
    -------
    pd.Series
        (n,), "train", "val" or "test".

    Raises
    ------
    ValueError
        If a context does not occur, contexts overlap or leave no other, or no perturbation is left to train or to test.

    Examples
    --------
    >>> import invirtuo as iv
    >>> obs = iv.datasets.toy().obs
    >>> design = iv.Design.from_adata(obs, perturbation="perturbation", control="control", covariates="cell_type")
    >>> split = under_represented(obs, design, contexts=["b_cell"], support=["A"])
    >>> sorted(obs["perturbation"][(obs["cell_type"] == "b_cell") & (split == "train")].unique())
    ['A', 'control']
    """
    labels = labels_and_states(obs, design)["label"].to_numpy()
    _check_share("fraction", fraction)
    control = design.is_control(obs)
    found = contexts_in(obs, design, contexts)
    test = np.zeros(len(obs), dtype=bool)
    for name, inside in found.items():
        # the support set trains, the other perturbations of the context are held out
        present = sorted(set(labels[inside & ~control]))
        chosen = list(map(design.label, support)) if support is not None else _draw(present, fraction, name, seed)
        unknown = [label for label in chosen if label not in present]
        heldout = set(present) - set(chosen)
        if unknown or not chosen or not heldout:
            named = f", among them the unknown {preview(unknown)}" if unknown else ""
            raise ValueError(
                f"context {name} has {len(present)} perturbations ({preview(present)}), of which {len(chosen)} "
                f"would train{named}; at least one must train and one be held out. Change fraction= or support=, or "
                "take zero_shot"
            )
        test |= inside & np.isin(labels, sorted(heldout))

    # what trains in no context can hardly be predicted
    lacking = sorted(set(labels[test]) - set(labels[~test]))
    if lacking:
        logger.warning("held-out perturbations that are trained on in no context: %s", preview(lacking))
    others = ~np.logical_or.reduce(list(found.values()))
    return _whole_conditions(obs, design, test, others, val_fraction, control_fractions, seed)


def zero_shot(
    obs: pd.DataFrame,
    design: Design,
    *,
    context: Conditions,
    seed: int = 42,
    val_fraction: float = 0.05,
    control_fractions: Fractions = (0.5, 0.25, 0.25),
) -> pd.Series:
    """Hold out every perturbation of one context; the others, which must hold the same perturbations, train.

    Equations 6-7 of STATE. Controls of every context are among those of train, the held-out one's included. Validation
    takes whole conditions of the other contexts, never the last one that a perturbation is trained on.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold perturbation and covariates.
    context
        What to hold out: a name as in `Design.groups`, a tuple or a mapping of covariate values. A mapping that leaves
        covariates out is one context of all the groups it matches.
    seed
        Seed of all draws.
    val_fraction, control_fractions
        See :func:`under_represented`.

    Returns
    -------
    pd.Series
        (n,), "train", "val" or "test".

    Raises
    ------
    ValueError
        If the context does not occur or is the only one, or holds perturbations that no other context has.
    """
    labels = labels_and_states(obs, design)["label"].to_numpy()
    control = design.is_control(obs)
    [(name, inside)] = contexts_in(obs, design, [context]).items()
    missing = sorted(set(labels[inside & ~control]) - set(labels[~inside & ~control]))
    if missing:
        raise ValueError(
            f"the other contexts lack {len(missing)} perturbations of {name}: {preview(missing, 20)}; zero-shot needs "
            "them all. Remove their cells, or hold out conditions with hold_out"
        )
    if not (inside & ~control).any():
        raise ValueError(f"context {name} has no perturbed cells; nothing to hold out")
    return _whole_conditions(obs, design, inside & ~control, ~inside, val_fraction, control_fractions, seed)


def _whole_conditions(
    obs: pd.DataFrame,
    design: Design,
    test: np.ndarray,
    others: np.ndarray,
    val_fraction: float,
    control_fractions: Fractions,
    seed: int,
) -> pd.Series:
    """Split with the given test cells; val takes pairs of group and perturbation among the other contexts."""
    _check_share("val_fraction", val_fraction)
    control = design.is_control(obs)
    labels = design.tidy(obs)[design.perturbation].to_numpy()
    groups = design.groups(obs).to_numpy()

    # pairs that may validate, and how many groups each perturbation is trained on in
    trained = ~test & ~control
    candidates = trained & others
    left = Counter(label for label, _ in set(zip(labels[trained], groups[trained], strict=True)))
    pairs = sorted(set(zip(labels[candidates], groups[candidates], strict=True)))
    wanted = max(int(val_fraction * len(pairs) + 1e-9), 1) if val_fraction else 0

    # draw pairs, but never the last one that a perturbation is trained on
    val: set[tuple[str, str]] = set()
    for i in np.random.default_rng([seed, zlib.crc32(b"val")]).permutation(len(pairs)):
        label = pairs[i][0]
        if len(val) < wanted and left[label] > 1:
            left[label] -= 1
            val.add(pairs[i])
    split = pd.Series(np.where(test, "test", "train"), index=obs.index, name="split", dtype=object)
    split[[pair in val for pair in zip(labels, groups, strict=True)]] = "val"
    deal_controls(split, design, obs, control_fractions, None, seed)
    return split


def deal_controls(
    split: pd.Series,
    design: Design,
    obs: pd.DataFrame,
    fractions: Fractions,
    unseen_fractions: Fractions | None,
    seed: int,
) -> None:
    """Divide the controls of each group; groups without perturbed training cells may have shares of their own."""
    control = design.is_control(obs)
    groups = design.groups(obs)
    unseen_fractions = fractions if unseen_fractions is None else unseen_fractions
    for name, shares in (("control_fractions", fractions), ("unseen_control_fractions", unseen_fractions)):
        if len(shares) != len(PARTS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"{name} must be three numbers >= 0 that sum to 1; found {shares}")
    # unseen groups: all their perturbed cells are tested on
    is_test = (split == "test").to_numpy()
    unseen = set(groups[~control & is_test]) - set(groups[~control & ~is_test])
    for group, rows in rows_by(groups[control], np.flatnonzero(control)):
        _deal(split, f"control of {group}", rows, unseen_fractions if group in unseen else fractions, seed)
    for among, shares in ((groups.isin(unseen), unseen_fractions), (~groups.isin(unseen), fractions)):
        wanted = {part for part, share in zip(PARTS, shares, strict=True) if share}
        warn_about_controls(split, groups, control & among.to_numpy(), wanted)


def _deal(split: pd.Series, name: str, rows: np.ndarray, fractions: Fractions, seed: int) -> None:
    """Divide rows among train, val and test, every name by a draw of its own."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    # 1e-9: sums like 0.1 + 0.7 fall short of what they mean
    cuts = np.floor(np.cumsum(fractions[:2]) * len(rows) + 1e-9).astype(int)
    for part, members in zip(PARTS, np.split(rng.permutation(rows), cuts), strict=True):
        split.iloc[members] = part


def _draw(labels: list[str], fraction: float, name: str, seed: int) -> list[str]:
    """A share of the perturbations of a context, every context by a draw of its own."""
    rng = np.random.default_rng([seed, zlib.crc32(f"support of {name}".encode())])
    order = rng.permutation(len(labels))
    n = int(fraction * len(labels) + 1e-9)
    return [labels[i] for i in order[:n]]


def contexts_in(obs: pd.DataFrame, design: Design, contexts: Conditions) -> dict[str, np.ndarray]:
    """Name of each context to its cells; contexts are disjoint and leave cells outside."""
    groups = design.groups(obs)
    covariates = list(design.covariates)
    table = design.tidy(obs)[covariates]
    found: dict[str, np.ndarray] = {}
    for context in wanted(contexts, covariates, design):
        # "*": a context may leave covariates open
        name = "|".join(str(context.get(column, "*")) for column in covariates) or "all"
        inside = matches(context, table)
        if not inside.any():
            raise ValueError(f"context {name!r} does not occur in obs; found {preview(sorted(set(groups)))}")
        if any((inside & other).any() for other in found.values()):
            raise ValueError(f"context {name!r} shares cells with another; expected each cell in one context")
        found[name] = inside
    if np.logical_or.reduce(list(found.values())).all():
        raise ValueError(f"contexts {preview(found)} are all there is; expected others to train on")
    return found


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1); found {value}")


def _condition_names(obs: pd.DataFrame, design: Design, conditions: Conditions) -> set[str]:
    """Names of the perturbed conditions that are asked for, each checked to exist."""
    known = design.conditions(obs)
    names = design.names(known).to_numpy()
    found: set[str] = set()
    for condition in wanted(conditions, design.columns, design):
        match = matches(condition, known)
        if not match.any():
            text = "|".join(str(value) for value in condition.values())
            raise ValueError(f"condition {text!r} is no perturbed condition of obs; found {with_likely(text, names)}")
        found |= set(names[match])
    return found

"""Which labels generated cells get: the combinations that were observed, drawn with or without conditions on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from invirtuo.design import Design
from invirtuo.errors import preview

__all__ = ["Prior", "draw", "observed", "rare_counts"]

logger = logging.getLogger(__name__)

Prior = Literal["joint", "independent", "uniform"]
PRIORS = ("joint", "independent", "uniform")
N = "n_cells"  # column of the table with the number of cells


def observed(obs: pd.DataFrame, design: Design) -> pd.DataFrame:
    """Combinations of labels with their numbers of cells, sorted by name.

    Returns
    -------
    DataFrame with the attributes of the Design and ``n_cells``.
    """
    names = design.attributes
    table = design.tidy(obs)[names]
    if not names:
        return pd.DataFrame({N: [len(table)]})
    return table.groupby(names, sort=True).size().rename(N).reset_index()


def draw(
    table: pd.DataFrame,
    given: pd.DataFrame,
    rng: np.random.Generator,
    *,
    prior: Prior = "joint",
    unknown: str | None = None,
) -> pd.DataFrame:
    """Complete labels: columns that are not given are drawn, given those that are.

    Parameters
    ----------
    table
        What :func:`observed` gave for the training cells.
    given
        (n,) rows with any of the attributes, in the order wanted.
    prior
        "joint": in the observed proportions of the combinations that agree with what is given. "independent": each
        attribute in its own observed proportions. "uniform": all observed combinations alike.
    unknown
        Label of what is not known: combinations with it are not drawn while there are others.

    Returns
    -------
    DataFrame (n,) with all attributes, as text.

    Raises
    ------
    ValueError
        If the prior is not known.
    """
    if prior not in PRIORS:
        raise ValueError(f"prior is {prior!r}; expected one of {', '.join(PRIORS)}")
    names = [column for column in table.columns if column != N]
    missing = [name for name in names if name not in given.columns]
    result = given.reindex(columns=names).astype(object)

    # cells that are given the same labels draw the others together
    groups: dict[Any, Any] = {(): np.arange(len(given))}
    if len(given.columns):
        groups = given.groupby(list(given.columns), sort=True).indices
    columns = [names.index(name) for name in missing]
    for key, rows in groups.items():
        labels = key if isinstance(key, tuple) else (key,)
        wanted = dict(zip(given.columns, labels, strict=True))
        result.iloc[rows, columns] = _complete(table, wanted, missing, len(rows), rng, prior, unknown)
    return result.astype(str)


def _complete(
    table: pd.DataFrame,
    wanted: Mapping[str, str],
    missing: Sequence[str],
    n: int,
    rng: np.random.Generator,
    prior: Prior,
    unknown: str | None,
) -> np.ndarray:
    """(n, number of missing attributes) labels for cells that share the given ones."""
    # observed combinations that agree with the given labels
    agrees = np.ones(len(table), bool)
    for name, label in wanted.items():
        agrees &= (table[name] == label).to_numpy()
    agreeing = _known(table[agrees], missing, unknown)
    if not len(agreeing):
        if unknown not in wanted.values():
            text = ", ".join(f"{k}={v}" for k, v in wanted.items())
            logger.warning("%s do not occur together in the training cells; the model has to combine them", text)
        agreeing, prior = table, "independent"

    # attribute by attribute, or whole combinations
    if prior == "independent":
        drawn = np.empty((n, len(missing)), dtype=object)
        for i, name in enumerate(missing):
            known = _known(table, [name], unknown)
            share = known[N] / known[N].sum()
            drawn[:, i] = rng.choice(known[name], n, p=share)
        return drawn
    weight = np.ones(len(agreeing)) if prior == "uniform" else agreeing[N].to_numpy(float)
    rows = rng.choice(len(agreeing), n, p=weight / weight.sum())
    combinations: np.ndarray = agreeing[list(missing)].to_numpy(object)
    return combinations[rows]


def _known(table: pd.DataFrame, names: Sequence[str], unknown: str | None) -> pd.DataFrame:
    """Combinations without the unknown label in these attributes; all, if there are none."""
    known = table[~(table[list(names)] == unknown).any(axis=1)]
    return known if len(known) else table


def rare_counts(
    sizes: Mapping[str, int], n: int, *, power: float = 1.0, max_fold: float | None = None
) -> dict[str, int]:
    """How many cells to generate of each class, so that rare classes get more.

    Shares are proportional to size^(-power); fractions are dealt by largest remainder, ties by name. What a cap takes
    away is dealt to the other classes.

    Parameters
    ----------
    sizes
        Training cells of each class.
    n
        Cells to generate in all.
    power
        1 as published; 0 gives all classes the same number.
    max_fold
        Most generated cells of a class for each real one; None for no cap.

    Returns
    -------
    Cells of each class; fewer than `n` in all only if every class is at its cap.

    References
    ----------
    CFGen, arXiv:2407.11734, section 5.4: n_gen / N_c over the sum of 1 / N_c.

    Examples
    --------
    >>> rare_counts({"common": 90, "rare": 10}, 100)
    {'common': 10, 'rare': 90}
    """
    cap = {name: np.inf if max_fold is None else int(max_fold * size) for name, size in sizes.items()}
    counts = dict.fromkeys(sizes, 0)
    below_cap = sorted(sizes)
    while below_cap:
        # shares of what classes at their cap leave
        n_left = n - sum(counts[name] for name in sizes if name not in below_cap)
        weight = np.array([float(sizes[name]) ** -power for name in below_cap])
        share = n_left * weight / weight.sum()

        # whole cells, by largest remainder
        dealt = np.floor(share).astype(int)
        order = np.lexsort((below_cap, -(share - dealt).round(9)))
        dealt[order[: n_left - dealt.sum()]] += 1
        counts |= dict(zip(below_cap, dealt.tolist(), strict=True))

        # what is above a cap is dealt again
        full = [name for name in below_cap if counts[name] > cap[name]]
        if not full:
            break
        counts |= {name: int(cap[name]) for name in full}
        below_cap = [name for name in below_cap if name not in full]
    return counts


def given_labels(where: Mapping[str, Any], n: int) -> pd.DataFrame:
    """n rows with the wanted labels: one for all cells, or a list of one label a cell."""
    columns = {}
    for name, value in where.items():
        is_one = isinstance(value, str | int | float)
        values = [str(value)] * n if is_one else [*map(str, value)]
        if len(values) != n:
            raise ValueError(f"{name!r} holds {len(values)} labels for {n} cells; give one label, or one for each cell")
        columns[name] = values
    return pd.DataFrame(columns, index=range(n), dtype=object)


def check_labels(given: pd.DataFrame, table: pd.DataFrame, unknown: str | None) -> None:
    """Raise ValueError for attributes and labels that the training cells do not have."""
    attributes = [column for column in table.columns if column != N]
    for name in given.columns:
        if name not in attributes:
            raise ValueError(
                f"{name!r} is not an attribute of this model; its attributes: {preview(attributes) or 'none'}"
            )
        trained = set(table[name])
        unseen = sorted(set(given[name]) - trained - {unknown})
        if unseen:
            raise ValueError(
                f"{name}: {preview(unseen)} do not occur in the training cells; known: {preview(trained, 50)}"
            )

"""Splits of time courses, in which nothing was perturbed: whole courses, later times, single cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from invirtuo.design import Design
from invirtuo.errors import preview

__all__ = ["courses"]


def courses(
    obs: pd.DataFrame,
    design: Design,
    held_out: Sequence[str | Mapping[str, str]] | Mapping[str, str] = (),
    *,
    later: float = 0.0,
    val_fraction: float = 0.0,
    seed: int = 42,
) -> pd.Series:
    """Hold out courses by their labels, and the last part of the time range of all others.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Says which columns hold time and covariates.
    held_out
        Names of courses as in `Design.groups`, or mappings of covariate to label: ``{"donor": "s2d1"}`` holds out all
        courses of that donor.
    later
        Share of the range of time of each course that is test, from its end.
    val_fraction
        Share of the remaining cells that becomes val, drawn at random.
    seed
        Of that draw.

    Returns
    -------
    pd.Series
        (n,), "train", "val" or "test".

    Raises
    ------
    ValueError
        If nothing matches, a share is out of range, or later times are asked for without time.

    Examples
    --------
    >>> obs = pd.DataFrame({"hours": [0.0, 1, 2, 3] * 2, "donor": ["a"] * 4 + ["b"] * 4})
    >>> design = Design.from_adata(obs, covariates="donor", time="hours")
    >>> courses(obs, design, {"donor": "b"}, later=0.3).tolist()
    ['train', 'train', 'train', 'test', 'test', 'test', 'test', 'test']
    """
    if not (0 <= later < 1 and 0 <= val_fraction < 1):
        raise ValueError(f"later is {later} and val_fraction {val_fraction}; expected shares from 0 to below 1")
    test = np.zeros(len(obs), dtype=bool)
    for each in [held_out] if isinstance(held_out, Mapping) else held_out:
        test |= _matches(obs, design, each)
    if later:
        if design.time is None:
            raise ValueError("later times can be held out of a Design with time= only")
        # the range of time is that of the course
        time = pd.to_numeric(obs[design.time]).astype(float)
        by_course = time.groupby(design.groups(obs).to_numpy())
        first, last = by_course.transform("min"), by_course.transform("max")
        test |= (time > last - later * (last - first)).to_numpy()
    split = pd.Series(np.where(test, "test", "train"), index=obs.index, name="split", dtype=object)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(~test))
    split.iloc[rows[: round(val_fraction * len(rows))]] = "val"
    return split


def _matches(obs: pd.DataFrame, design: Design, wanted: str | Mapping[str, str]) -> np.ndarray:
    """(n,) bool, the cells of the courses with a name, or with the given labels."""
    if isinstance(wanted, str):
        found: np.ndarray = (design.groups(obs) == wanted).to_numpy()
    else:
        if unknown := sorted(set(wanted) - set(design.covariates)):
            raise ValueError(
                f"cannot hold out by {preview(unknown)}; covariates of the design: {preview(design.covariates)}"
            )
        found = np.ones(len(obs), dtype=bool)
        for column, label in wanted.items():
            found &= (obs[column].astype(str) == str(label)).to_numpy()
    if not found.any():
        raise ValueError(f"no cells match {wanted!r}; courses: {preview(design.groups(obs).unique())}")
    return found

"""Splits of single cells, for generators of populations: nothing is held out but cells."""

from __future__ import annotations

import numpy as np
import pandas as pd

from invirtuo.design import Design

__all__ = ["cells"]


def cells(
    obs: pd.DataFrame, design: Design, *, test_fraction: float = 0.2, val_fraction: float = 0.1, seed: int = 0
) -> pd.Series:
    """Hold out cells at random, the same share of every class.

    Parameters
    ----------
    obs
        (n, columns), one row per cell.
    design
        Its columns make the classes.
    test_fraction, val_fraction
        Shares of the cells of a class.
    seed
        Of the draw.

    Returns
    -------
    pd.Series
        (n,), "train", "val" or "test".

    Raises
    ------
    ValueError
        If the shares leave nothing to train on.

    Examples
    --------
    >>> obs = pd.DataFrame({"cell_type": ["B"] * 10 + ["T"] * 20})
    >>> cells(obs, Design.from_adata(obs, covariates="cell_type")).value_counts().to_dict()
    {'train': 21, 'test': 6, 'val': 3}
    """
    if not (0 <= test_fraction and 0 <= val_fraction and test_fraction + val_fraction < 1):
        raise ValueError(
            f"test_fraction is {test_fraction} and val_fraction {val_fraction}; expected shares that add up to below 1"
        )
    drawn = pd.Series(np.random.default_rng(seed).permutation(len(obs)), index=obs.index)
    by_class = drawn.groupby(design.names(obs).to_numpy())
    place = (by_class.rank() - 0.5) / by_class.transform("size")  # in the class, from 0 to 1
    split = np.select([place < test_fraction, place < test_fraction + val_fraction], ["test", "val"], "train")
    return pd.Series(split, index=obs.index, name="split", dtype=object)

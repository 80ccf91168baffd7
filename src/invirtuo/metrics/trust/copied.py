"""Predicted cells that are real cells, handed on as they are or with a little noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from invirtuo.cells.values import AnyMatrix
from invirtuo.metrics.numerics.distances import nearest
from invirtuo.metrics.numerics.streamed import dense

__all__ = ["COPIES", "copied"]

SAMPLE = 500  # predicted cells that are looked at
WIDTH = 64  # random directions on which distances are measured
MANY = 0.01  # share of the predicted cells from which copies are said
COPIES: dict[str, tuple[str, float, str]] = {  # kind of real cells: flag, how near is a copy, what it means
    "held-out": ("held_out_cells", 0.25, "which nobody who was given training cells alone could draw"),
    "training": ("training_cells", 0.25, "not drawn from what was learned of them"),
    # weak effects move control cells by little, and rightly
    "control": ("control_cells", 0.01, "as if nothing had been done to them"),
}


def copied(predicted: AnyMatrix, real: AnyMatrix, groups: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Say how many predicted cells are copies of real ones.

    A predicted cell is a copy if it lies much nearer to a real cell than real cells lie to each other: nearer than a
    quarter of their median distance to the nearest other one, of control cells a hundredth. Distances are Euclidean, on
    64 random directions. Noise of the size of real scatter hides a copy.

    Parameters
    ----------
    predicted, real
        (n, g) and (m, g) log values of the same genes, sparse or dense.
    groups
        Which of the real cells are "held-out", "training" and "control" cells, (m,) bool each.

    Returns
    -------
    pd.DataFrame
        Columns `flag` ("held_out_cells", "training_cells", "control_cells") and `text`, of kinds of which at least one
        in a hundred predicted cells is a copy.

    Examples
    --------
    >>> import invirtuo as iv
    >>> x = iv.preprocess.normalize(iv.datasets.toy(n_cells=200)).X
    >>> is_first = np.arange(200) < 100
    >>> copied(x[:50], x, {"training": is_first, "held-out": ~is_first})["flag"].tolist()
    ['training_cells']
    """
    directions = np.random.default_rng(0).standard_normal((real.shape[1], WIDTH))
    drawn = dense(predicted[_some(predicted.shape[0])]) @ directions
    known = real @ directions
    own = _some(len(known))
    typical = float(np.median(nearest(known[own], known, itself=own)))

    rows = []
    for kind, (flag, near, meaning) in COPIES.items():
        others = known[groups.get(kind, np.zeros(len(known), bool))]
        share = float((nearest(drawn, others) <= near * typical).mean()) if len(others) else 0.0
        if share >= MANY:
            rows.append({"flag": flag, "text": f"{share:.0%} of the cells are copies of {kind} cells, {meaning}"})
    return pd.DataFrame(rows, columns=["flag", "text"])


def _some(n: int) -> np.ndarray:
    """Up to 500 rows, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(int))

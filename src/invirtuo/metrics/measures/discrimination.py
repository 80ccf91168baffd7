"""Perturbation discrimination: how many real effects of others lie closer to a prediction than that of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.spatial.distance import cdist

from invirtuo.metrics.measures.mean import CELL_EVAL, ratio
from invirtuo.metrics.pair import Pair
from invirtuo.metrics.registry import CORRELATION, SHARE, metric

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["discrimination", "of_group"]

STATE = "Adduri et al. 2025, STATE, doi:10.1101/2025.06.26.661135, section 5.7"

Distance = Literal["l1", "l2", "cosine"]


def discrimination(
    preds: np.ndarray,
    reals: np.ndarray,
    distance: Distance,
    *,
    left_out: Sequence[np.ndarray] | None = None,
    ties: Literal["strict", "mid"] = "strict",
) -> np.ndarray:
    """Perturbation discrimination score, from 1 (own perturbation closest) to 1 / P.

    ``1 - r / P`` with r the number of other real effects strictly closer to the prediction than its own. A random guess
    gets ``(P + 1) / (2 P)``, so scores of different P cannot be compared. The paper's normalised form is
    ``2 * mean(score) - 1``.

    Parameters
    ----------
    preds, reals
        (P, g) predicted and real effects, or pseudobulks.
    distance
        "l1", "l2" or "cosine".
    left_out
        For each perturbation the positions of genes that do not count, as published its own target.
    ties
        "strict": other effects at the same distance do not count (published); "mid": they count half.

    Returns
    -------
    np.ndarray
        (P,); NaN where a distance is not defined: the cosine of no effect.

    References
    ----------
    Adduri et al. 2025, STATE, doi:10.1101/2025.06.26.661135, section 5.7; cell-eval 0.8.

    Examples
    --------
    >>> real = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> discrimination(np.array([[0.9, 0.2], [0.8, 0.1]]), real, "l2")
    array([1. , 0.5])
    """
    if distance not in ("l1", "l2", "cosine") or ties not in ("strict", "mid"):
        raise ValueError(
            f"expected distance 'l1', 'l2' or 'cosine', ties 'strict' or 'mid'; found {distance!r}, {ties!r}"
        )
    scores = np.empty(len(preds))
    counted = reals.copy()
    for i, pred in enumerate(preds.copy()):
        genes = np.empty(0, dtype=int) if left_out is None else left_out[i]
        pred[genes] = counted[:, genes] = 0.0  # adds nothing to any distance
        distances = _distances(pred, counted, distance)
        counted[:, genes] = reals[:, genes]
        # real effects closer to the prediction than its own
        own = distances[i]
        n_closer = float((distances < own).sum())
        if ties == "mid":
            n_closer += 0.5 * ((distances == own).sum() - 1)
        scores[i] = 1 - n_closer / len(preds) if np.isfinite(distances).all() else np.nan
    return scores


def _distances(pred: np.ndarray, reals: np.ndarray, distance: Distance) -> np.ndarray:
    """(P,) distances of one effect (g,) to all real effects (P, g)."""
    if distance != "cosine":
        distances: np.ndarray = cdist(pred[None], reals, {"l1": "cityblock", "l2": "euclidean"}[distance])[0]
        return distances
    return 1 - ratio(reals @ pred, np.linalg.norm(reals, axis=1) * np.linalg.norm(pred))


def of_group(
    pair: Pair,
    group: str,
    distance: Distance,
    *,
    on: Literal["effect", "mean"] = "effect",
    leave_out_targets: bool = True,
    normalised: bool = False,
) -> np.ndarray:
    """Scores of a covariate group, (P,).

    Parameters
    ----------
    pair, group, distance
        What to compare, see :func:`discrimination`.
    on
        Effects, or pseudobulks ("mean"). With L1 and L2 both give the same if the two sides share their controls.
    leave_out_targets
        Leave out the genes that a perturbation is named after (published code; the paper does not say).
    normalised
        Give ``2 * score - 1``.
    """
    preds = np.stack(list(pair.view(on, "pred", group)))
    reals = np.stack(list(pair.view(on, "real", group)))

    # target genes: those with the name of the perturbation, or of one of a combination
    labels = pair.conditions.loc[pair.names(group), pair.design.perturbation]
    targets = []
    for label in labels:
        is_target = np.isin(pair.genes, [str(label), *pair.design.parts(label)])
        targets.append(np.flatnonzero(is_target))
    scores = discrimination(preds, reals, distance, left_out=targets if leave_out_targets else None)
    return 2 * scores - 1 if normalised else scores


_LABELS: dict[Distance, str] = {"l1": "L1", "l2": "L2", "cosine": "cosine"}

for _distance, _label in _LABELS.items():
    _register = metric(
        f"pds_{_distance}",
        label=f"PDS {_label}",
        **SHARE,
        definition=f"1 minus the share of the P real effects of the group closer ({_label}) to the predicted effect "
        "than its own, target genes left out; depends on P",
        reference=CELL_EVAL,
        default=False,
        relative=True,
        of_means=True,
    )
    _register(partial(of_group, distance=_distance))
    _register = metric(
        f"pds_norm_{_distance}",
        label=f"PDS norm {_label}",
        **CORRELATION,
        definition=f"pds_{_distance} brought to the range -1 to 1, 1 - 2 r / P with r real effects closer than its "
        "own; 1 / P is expected of a guess",
        reference=STATE,
        default=False,
        relative=True,
        of_means=True,
    )
    _register(partial(of_group, distance=_distance, normalised=True))

"""Pairs of perturbations whose effect is not what their parts let expect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invirtuo.errors import preview
from invirtuo.metrics.numerics.streamed import dense

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["interactions"]

FLOOR = 0.01  # counts in ten thousand that keep the logarithm of genes that are not expressed


def interactions(
    cells: AnnData,
    design: Design,
    *,
    controls: AnnData | None = None,
    level: float = 0.9,
    n_resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the effect of a pair of perturbations is from what its two parts let expect.

    Parameters
    ----------
    cells
        log1p values, predicted or measured: pairs and their parts, in the same groups.
    design
        Which columns mean what.
    controls
        Cells that hold the control cells; None: they are among `cells`.
    level
        Of the intervals, over cells of pair, parts and controls that weigh at random.
    n_resamples, seed
        Of the Bayesian bootstrap (Rubin 1981).

    Returns
    -------
    pd.DataFrame
        A row for each pair whose parts are there: columns of the Design, `condition`, `score`, `value`, `low`, `high`.
        With effects a, b, ab (differences of mean log1p values to the control cells) the scores are "additive", the
        length of ab - a - b; "bliss", the same of logarithms of mean expression, where effects multiply; "norm", the
        length of ab over that of a + b (above 1: stronger than expected); "magnitude", the length of the coefficients
        of ab regressed on a and b (1.41: additive), and "fit", the correlation of ab with what they give (1: no new
        effect).

    Raises
    ------
    ValueError
        If no pair has both its parts, or a group has no control cells.

    References
    ----------
    Norman et al. 2019, doi:10.1126/science.aax4438 (magnitude and fit of a pair); Bliss 1939.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1")
    reference = cells if controls is None else controls[:, cells.var_names]
    of_control = design.groups(reference.obs).where(design.is_control(reference.obs)).to_numpy()
    names = design.names(cells.obs).to_numpy()
    rng = np.random.default_rng(seed)

    tables = []
    for condition, row, singles in _pairs(design, cells.obs):
        own = [dense(cells[names == name].X) for name in (condition, *singles)]
        group = design.groups(row).iloc[0]
        own.append(dense(reference[of_control == group].X))
        if not len(own[-1]):
            raise ValueError(
                f"no control cells (label {design.control!r}) of {group}; pass the cells that hold them as controls="
            )
        values = _scores([np.full(len(x), 1 / len(x)) for x in own], own)
        drawn = pd.DataFrame([_scores(_drawn(own, rng), own) for _ in range(n_resamples)])
        low, high = (drawn.quantile(tail) for tail in ((1 - level) / 2, (1 + level) / 2))
        scores = pd.DataFrame({"value": values, "low": low, "high": high}).rename_axis("score").reset_index()
        facts = row[design.columns].iloc[[0] * len(scores)].reset_index(drop=True)
        tables.append(pd.concat([facts.assign(condition=condition), scores], axis=1))
    if not tables:
        raise ValueError(f"no pair has both its parts among the cells; found {preview(sorted(set(names)))}")
    return pd.concat(tables, ignore_index=True)


def _pairs(design: Design, obs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, list[str]]]:
    """Name and row of every pair of which both parts are there, and the names of these."""
    table, _ = design.unique_conditions(obs)
    known = design.names(table)
    for i, condition in enumerate(known):
        row = table.iloc[[i]]
        parts = design.parts(row[design.perturbation].iloc[0])
        singles = [design.names(row.assign(**{str(design.perturbation): part})).iloc[0] for part in parts]
        if len(parts) == 2 and set(singles) <= set(known):
            yield condition, row, singles


def _drawn(cells: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Weights (n,) of the cells of each set, that add up to 1."""
    return [rng.dirichlet(np.ones(len(x))) for x in cells]


def _scores(weights: Sequence[np.ndarray], cells: Sequence[np.ndarray]) -> dict[str, float]:
    """Scores from weighted cells (n, g) of the pair, its two parts and the controls."""
    pair, first, second, control = (w @ x for w, x in zip(weights, cells, strict=True))
    ab, a, b = pair - control, first - control, second - control
    parts = np.stack([a, b], axis=1)
    coefficients, *_ = np.linalg.lstsq(parts, ab, rcond=None)
    fitted, expected = parts @ coefficients, float(np.linalg.norm(a + b))

    # where effects multiply, logarithms of mean expression add up
    log_means = [np.log(w @ np.expm1(x) + FLOOR) for w, x in zip(weights, cells, strict=True)]
    bliss = log_means[0] - log_means[1] - log_means[2] + log_means[3]
    fit = float(np.corrcoef(ab, fitted)[0, 1]) if fitted.std() and ab.std() else np.nan
    norm = float(np.linalg.norm(ab)) / expected if expected else np.nan
    additive, magnitude = np.linalg.norm(ab - a - b), np.linalg.norm(coefficients)
    lengths = {"additive": float(additive), "bliss": float(np.linalg.norm(bliss)), "norm": norm}
    return lengths | {"magnitude": float(magnitude), "fit": fit}

"""Hits of a screen: perturbations that change a phenotype, and how many of them a prediction finds.

Tables have one row for each pair of a perturbation (column `pert`, `condition` or `perturbation`) and a phenotype
(column `pheno`; without it there is one). A Series or a mapping has perturbations, or pairs, as its index.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from invirtuo.errors import preview, whole_number
from invirtuo.metrics.numerics.rank import ranks

__all__ = ["hit_recall", "hits_from_effects", "retrieval"]

logger = logging.getLogger(__name__)

Table: TypeAlias = "pd.DataFrame | pd.Series | Mapping[Any, float]"
KEYS = ["pert", "pheno"]
NAMES = ("pert", "condition", "perturbation")  # columns that may hold the perturbation
ROUNDING = 1e-9  # of a share times a number


def hit_recall(
    truth: Table,
    scores: Table,
    budget: float | Sequence[float] | None = 0.1,
    fdr: float | Sequence[float] | None = None,
    *,
    magnitude: Table | None = None,
    n_orders: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """How many hits are found among the best scored perturbations, phenotype by phenotype.

    With n scored perturbations of a phenotype, by falling score, there are three rules:

    - "budget" f: the first ``k = min(ceil(f n), n)`` are selected. Of tied scores every one counts with the share of
      hits among them, which is the exact expectation over their orders.
    - "fdr" t, in retrospect: the largest k of which at most the share t are no hits, which takes the truth to know. Of
      ties the mean over random orders is given; for the rate and the number over those that select anything.
    - "prospective" t: all with a q-value (column `qv`) of at most t, no truth used. The rule that says whether the
      q-values are honest: the realised rate of false discoveries should be t or less.

    Recall is the number of hits that are selected over that of all hits. A hit without a score counts as missed.

    Parameters
    ----------
    truth
        Which pairs are hits: column `hit` with 0 and 1, see :func:`hits_from_effects`.
    scores
        Predictions: column `hit_score`, large for a hit; or `qv`, small for a hit; or both.
    budget
        Shares of the perturbations that can be tried; None: this rule is left out.
    fdr
        Rates of false discoveries that are allowed; None: both rules are left out.
    magnitude
        Column `effect`, whose absolute value makes the ranking "magnitude" to compare with; None: the column `effect`
        of the scores, if they have one. Pairs without an effect come last.
    n_orders, seed
        Of random orders of ties.

    Returns
    -------
    pd.DataFrame
        Columns `pheno`, `ranking` ("prediction", "magnitude", or "random": all scores tied), `rule`, `target` (f or t),
        `recall`, `realised` (k / n, or the rate of false discoveries; NaN if nothing is selected), `n_selected`, `n`
        (scored perturbations), `n_hits`, `n_unscored_hits`. A phenotype without hits has recall NaN in the rule
        "budget" (0 of budget 0), and no row in the others. ``attrs["only_in_truth"]`` and ``attrs["only_in_scores"]``
        list the pairs of one table only, which are not ranked.

    Raises
    ------
    ValueError
        If a column is missing, a pair occurs twice, a score is no number, or the tables have no pair in common.

    References
    ----------
    PerturbHD; perturb-hd 0.1, `recall_at_budget`, `recall_at_fdr`, `recall_at_fdr_prospective`.

    Examples
    --------
    >>> truth = {"A": 1, "B": 0, "C": 1, "D": 0}
    >>> table = hit_recall(truth, {"A": 0.9, "B": 0.8, "C": 0.8, "D": 0.1}, budget=0.5)
    >>> table.set_index("ranking")["recall"].to_dict()
    {'prediction': 0.75, 'random': 0.5}
    """
    budgets, rates = _shares("budget", budget), _shares("fdr", fdr)
    n_orders = whole_number("n_orders", n_orders)
    labels = _tidy("truth", truth, ["hit"], "1 for a hit, 0 for none (see hits_from_effects)")
    if not labels["hit"].isin([0, 1]).all():
        raise ValueError(f"truth: hit must be 0 or 1; found {preview(sorted(labels['hit'].unique()))}")
    predictions = _tidy("scores", scores, ["hit_score", "qv"], "hit_score (large for a hit) or qv (small for a hit)")

    # pairs of both tables, ranked by the prediction and by what it is compared with
    merged = labels.merge(predictions, on=KEYS, how="outer", indicator=True)
    pairs = _in_both(merged)
    rankings = _rankings(pairs, scores, magnitude)

    # every phenotype under every ranking and rule
    rows: list[dict[str, Any]] = []
    for pheno, all_hits in labels.groupby("pheno", sort=True)["hit"].sum().items():
        part = pairs[pairs["pheno"] == pheno]
        hit = part["hit"].to_numpy(dtype=float)
        facts = {"n": len(part), "n_hits": int(all_hits), "n_unscored_hits": int(all_hits - hit.sum())}
        for ranking in rankings:
            score = part[ranking].to_numpy(dtype=float)
            found = [_at_budget(hit, score, f, int(all_hits)) for f in budgets]
            if all_hits:
                found += _at_rates(hit, score, rates, int(all_hits), n_orders, seed)
            if all_hits and ranking == "prediction" and "qv" in part:
                found += [_prospective(hit, part["qv"].to_numpy(), t, int(all_hits)) for t in rates]
            for row in found:
                rows.append({"pheno": pheno, "ranking": ranking, **row, **facts})

    # pairs that could not be ranked are listed
    columns = ["pheno", "ranking", "rule", "target", "recall", "realised", "n_selected", "n", "n_hits"]
    table = pd.DataFrame(rows, columns=[*columns, "n_unscored_hits"])
    for side, name in (("left_only", "only_in_truth"), ("right_only", "only_in_scores")):
        table.attrs[name] = merged.loc[merged["_merge"] == side, KEYS].to_records(index=False).tolist()
    return table


def hits_from_effects(effects: Table, share: float = 0.1, *, largest: bool = True) -> pd.DataFrame:
    """Call the perturbations with the largest effects hits, phenotype by phenotype.

    Of n perturbations those are hits whose effect is at least the ``floor(share * n)``-th largest, one at least; all
    that tie with it are hits too.

    Parameters
    ----------
    effects
        Column `effect`, for example from :func:`invirtuo.metrics.phenotype`.
    share
        Share of hits.
    largest
        Whether large effects are hits, or small ones.

    Returns
    -------
    pd.DataFrame
        Columns `pert`, `pheno`, `effect`, `hit`: a truth for :func:`hit_recall`.

    References
    ----------
    PerturbHD; perturb-hd 0.1, `rank_hits`.

    Examples
    --------
    >>> hits_from_effects({"A": 0.1, "B": 2.0, "C": -3.0}, share=0.5)["hit"].to_list()
    [False, True, False]
    """
    (share,) = _shares("share", share)
    table = _tidy("effects", effects, ["effect"], "the change of the phenotype")
    size = table["effect"] if largest else -table["effect"]
    hit = pd.Series(False, table.index)
    for _, part in size.groupby(table["pheno"]):
        n = max(int(np.floor(share * len(part) + ROUNDING)), 1)
        hit[part.index] = part >= part.nlargest(n).iloc[-1]
    return table.assign(hit=hit)


def retrieval(truth: Table, scores: Table, distance: Literal["cosine", "l1", "l2"] = "cosine") -> pd.Series:
    """Whether the predicted phenotypes of a perturbation are closer to its own real ones than to those of others.

    Parameters
    ----------
    truth, scores
        Columns `pheno` and `effect`, several phenotypes. Perturbations that lack one in either table are left out.
    distance
        Between the effects on all phenotypes of a prediction and of a real perturbation.

    Returns
    -------
    pd.Series
        (P,) share of the other perturbations whose real effects are farther away, ties counting half; NaN for a single
        one.

    References
    ----------
    PerturbHD; perturb-hd 0.1, `retrieval`.
    """
    kinds = {"cosine": "cosine", "l1": "cityblock", "l2": "euclidean"}
    if distance not in kinds:
        raise ValueError(f"distance must be 'cosine', 'l1' or 'l2'; found {distance!r}")
    wide = []
    for name, table in (("truth", truth), ("scores", scores)):
        tidy = _tidy(name, table, ["effect"], "the change of the phenotype")
        wide.append(tidy.pivot(index="pert", columns="pheno", values="effect"))
    real, pred = (table.dropna() for table in wide)
    shared = real.index.intersection(pred.index)
    different = real.columns.symmetric_difference(pred.columns)
    if len(different) or not len(shared):
        raise ValueError(
            f"truth and scores must have the same phenotypes and share perturbations with all of them; in one only: "
            f"{preview(different) or 'no phenotype'}, shared perturbations: {len(shared)}"
        )
    distances = cdist(pred.loc[shared], real.loc[shared], kinds[distance])
    return pd.Series(1 - ranks(distances, "lower", by="pred"), shared, name="retrieval")


def _at_budget(hit: np.ndarray, score: np.ndarray, share: float, n_hits: int) -> dict[str, Any]:
    """Expected recall among the first k; tied scores share their hits."""
    n = len(hit)
    k = min(int(np.ceil(share * n - ROUNDING)), n)
    _, place = np.unique(-score, return_inverse=True)
    expected = (np.bincount(place, hit) / np.bincount(place))[place]
    found = expected[np.argsort(-score, kind="stable")][:k].sum()
    recall = found / n_hits if n_hits else (np.nan if share else 0.0)
    realised = k / n if n else np.nan
    return {"rule": "budget", "target": share, "recall": recall, "realised": realised, "n_selected": float(k)}


def _at_rates(
    hit: np.ndarray, score: np.ndarray, rates: Sequence[float], n_hits: int, n_orders: int, seed: int
) -> list[dict[str, Any]]:
    """Recall at rates of false discoveries, with the truth in hand; the mean over orders of tied scores."""
    rng = np.random.default_rng(seed)
    is_tied = len(np.unique(score)) < len(score)
    place = np.arange(1, len(hit) + 1)

    # in every order the largest k within each rate
    selected: list[list[tuple[int, float]]] = [[] for _ in rates]
    for _ in range(n_orders if is_tied else 1):
        shuffled = rng.permutation(len(hit))
        order = shuffled[np.argsort(-score[shuffled], kind="stable")]
        found = np.cumsum(hit[order])
        for results, rate in zip(selected, rates, strict=True):
            allowed = np.flatnonzero(place - found <= rate * place + ROUNDING)
            k = int(allowed[-1]) + 1 if len(allowed) else 0
            results.append((k, float(found[k - 1]) if k else 0.0))

    # means over orders; the realised rate over those that select anything
    rows = []
    for results, rate in zip(selected, rates, strict=True):
        sizes, hits = np.array(results, dtype=float).T
        some = sizes > 0
        false = 1 - hits[some] / sizes[some]
        row: dict[str, Any] = {"rule": "fdr", "target": rate, "recall": hits.mean() / n_hits}
        row["realised"] = false.mean() if some.any() else np.nan
        row["n_selected"] = sizes[some].mean() if some.any() else 0.0
        rows.append(row)
    return rows


def _prospective(hit: np.ndarray, q_value: np.ndarray, rate: float, n_hits: int) -> dict[str, Any]:
    """Recall and false discoveries of what the q-values select."""
    chosen = q_value <= rate
    n, found = int(chosen.sum()), float(hit[chosen].sum())
    realised = 1 - found / n if n else np.nan
    return {
        "rule": "prospective", "target": rate, "recall": found / n_hits, "realised": realised, "n_selected": float(n)
    }  # fmt: skip


def _rankings(pairs: pd.DataFrame, scores: Table, magnitude: Table | None) -> list[str]:
    """Add a column for each ranking: that of the prediction, and those to compare with."""
    pairs["prediction"] = pairs["hit_score"] if "hit_score" in pairs else -pairs["qv"]
    names = ["prediction"]
    if magnitude is None and isinstance(scores, pd.DataFrame) and "effect" in scores:
        magnitude = scores
    if magnitude is not None:
        sizes = _tidy("magnitude", magnitude, ["effect"], "the predicted change, whose absolute value is ranked")
        size = sizes.set_index(KEYS)["effect"].abs().reindex(pd.MultiIndex.from_frame(pairs[KEYS]))
        pairs["magnitude"] = size.fillna(-1.0).to_numpy()
        names.append("magnitude")
    pairs["random"] = 0.0
    return [*names, "random"]


def _in_both(merged: pd.DataFrame) -> pd.DataFrame:
    """The pairs of both tables; those of one are named."""
    both = merged[merged["_merge"] == "both"].drop(columns="_merge").reset_index(drop=True)
    alone = merged[merged["_merge"] != "both"]
    example = preview(alone[KEYS].astype(str).agg(" / ".join, axis=1)) if len(alone) else ""
    if both.empty:
        raise ValueError(
            f"truth and scores have no pair of pert and pheno in common: {example}. Name both alike, with a column "
            "pheno in both or in neither"
        )
    if len(alone):
        logger.warning("%d pairs are in one of truth and scores only: %s", len(alone), example)
    return both


def _tidy(name: str, table: Table, columns: Sequence[str], meaning: str) -> pd.DataFrame:
    """Columns `pert`, `pheno` and those of the named columns that there are, numbers; one row for each pair."""
    frame = table.reset_index(drop=True) if isinstance(table, pd.DataFrame) else _from_values(table, columns[0])
    key = next((column for column in NAMES if column in frame), None)
    found = [column for column in columns if column in frame]
    if key is None or not found:
        raise ValueError(
            f"{name}: expected a column {' or '.join(NAMES)} and {meaning} in {' or '.join(columns)}; found columns "
            f"{preview(frame.columns)}"
        )
    tidy = pd.DataFrame({"pert": frame[key].astype(str)})
    tidy["pheno"] = frame["pheno"].astype(str) if "pheno" in frame else ""
    for column in found:
        tidy[column] = pd.to_numeric(frame[column]).astype(float)
    if n_unknown := int(tidy[found].isna().any(axis=1).sum()):
        raise ValueError(f"{name}: {n_unknown} rows without a number in {' or '.join(found)}; leave them out")
    repeated = tidy.duplicated(KEYS)
    if repeated.any():
        pairs = tidy.loc[repeated, KEYS].agg(" / ".join, axis=1)
        raise ValueError(f"{name}: pairs of pert and pheno occur more than once: {preview(pairs)}; keep one of each")
    return tidy


def _from_values(values: pd.Series | Mapping[Any, float], column: str) -> pd.DataFrame:
    """A table from values by perturbation, or by perturbation and phenotype."""
    series = pd.Series(values)
    levels = series.index.nlevels
    if levels > len(KEYS):
        raise ValueError(f"expected an index of pert, or of pert and pheno; found {levels} levels")
    return series.rename(column).rename_axis(KEYS[:levels]).reset_index()


def _shares(name: str, values: float | Sequence[float] | None) -> list[float]:
    """Numbers from 0 to 1."""
    if values is None:
        return []
    shares = [float(value) for value in np.atleast_1d(np.asarray(values, dtype=float))]
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"{name}: expected shares from 0 to 1; found {preview(wrong)}")
    return shares

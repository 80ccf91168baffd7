"""Ways to game metrics, from cell-eval2's catalogue and our own, and what they gain.

Each takes honest predicted counts and spoils them; none knows the real cells that are predicted. `python -m studies
attacks` scores them on the scale where the mean response is 0 and a replicate 1, beside what they were made from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

import invirtuo as iv
from studies.comparison import task_of
from studies.harness import Tables, part, study

Spoil = Callable[["Prediction"], AnnData]
ATTACKS: dict[str, Spoil] = {}
TARGET_SUM = 2000  # the panels have 150 to 300 counts of a cell


class Prediction:
    """Predicted counts, condition by condition, with the control cells that everybody has."""

    def __init__(self, cells: AnnData, controls: AnnData, column: str, seed: int = 0):
        self.obs, self.var, self.column = cells.obs, cells.var, column
        self.counts = dense(cells)
        self.controls = dense(controls)
        self.rng = np.random.default_rng(seed)
        self.genes = list(cells.var_names)

    @property
    def labels(self) -> list[str]:
        return sorted(self.obs[self.column].astype(str).unique())

    def rows(self, label: str) -> np.ndarray:
        return np.flatnonzero(self.obs[self.column].astype(str) == label)

    def targets(self, label: str) -> list[int]:
        """Positions of the genes that a label is named after."""
        return [self.genes.index(name) for name in label.split("+") if name in self.genes]

    def rounded(self, counts: np.ndarray) -> np.ndarray:
        """Whole numbers with the same means."""
        return np.floor(counts + self.rng.random(counts.shape))

    def with_counts(self, counts: np.ndarray, keep: np.ndarray | None = None) -> AnnData:
        """The same cells with other counts."""
        made = AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=self.obs.copy(), var=self.var[[]].copy())
        return made if keep is None else made[keep].copy()


def dense(cells: AnnData) -> np.ndarray:
    """(n, g) counts of cells in float64."""
    return np.asarray(cells.X.toarray() if sparse.issparse(cells.X) else cells.X, dtype=float)


def attack(function: Spoil) -> Spoil:
    """Put a function on the list."""
    ATTACKS[function.__name__] = function
    return function


@attack
def amplified(pred: Prediction) -> AnnData:
    """Log fold changes 2.5 times as large."""
    counts = pred.counts.copy()
    control = pred.controls.mean(axis=0) + 0.01
    for label in pred.labels:
        rows = pred.rows(label)
        change = (pred.counts[rows].mean(axis=0) + 0.01) / control
        counts[rows] = pred.rounded(counts[rows] * change**1.5)
    return pred.with_counts(counts)


@attack
def everything_called(pred: Prediction) -> AnnData:
    """Every gene three times as high or as low."""
    factor = np.where(pred.rng.random(len(pred.genes)) < 0.5, 3.0, 1 / 3)
    return pred.with_counts(pred.rounded(pred.counts * factor))


@attack
def nothing_called(pred: Prediction) -> AnnData:
    """Four cells of each condition: no test sees anything."""
    first = [pred.rows(label)[:4] for label in pred.labels]
    return pred.with_counts(pred.counts, np.sort(np.concatenate(first)))


@attack
def extra_depth(pred: Prediction) -> AnnData:
    """Twenty-five times the counts."""
    return pred.with_counts(pred.counts * 25)


@attack
def own_target_scatter(pred: Prediction) -> AnnData:
    """200 counts in the targeted gene of every second cell, which no error counts but which makes noise."""
    counts = pred.counts.copy()
    for label in pred.labels:
        counts[np.ix_(pred.rows(label)[::2], pred.targets(label))] += 200
    return pred.with_counts(counts)


@attack
def pinned_sums(pred: Prediction) -> AnnData:
    """Scatter of control cells that cancels in the sum of every condition."""
    counts = pred.counts.copy()
    for label in pred.labels:
        rows = pred.rows(label)
        drawn = pred.controls[pred.rng.integers(0, len(pred.controls), len(rows))]
        missing = np.rint(pred.controls.mean(axis=0) * len(rows)) - drawn.sum(axis=0)
        for gene, n in enumerate(missing.astype(int)):
            takes = np.arange(len(rows)) if n > 0 else np.flatnonzero(drawn[:, gene])
            np.add.at(drawn[:, gene], np.resize(pred.rng.permutation(takes), abs(n)), np.sign(n))
        counts[rows] = np.maximum(drawn, 0)
    return pred.with_counts(counts)


@attack
def silent_genes_raised(pred: Prediction) -> AnnData:
    """Three counts more in every gene that control cells hardly express."""
    mean = pred.controls.mean(axis=0)
    silent = mean * 1e6 / mean.sum() <= 5
    silent = silent if silent.any() else mean <= np.sort(mean)[19]
    return pred.with_counts(pred.counts + 3 * silent)


@attack
def other_targets_spiked(pred: Prediction) -> AnnData:
    """Forty counts in the genes that all other perturbations target."""
    counts = pred.counts.copy()
    for label in pred.labels:
        others = {gene for other in pred.labels if other != label for gene in pred.targets(other)}
        counts[np.ix_(pred.rows(label), sorted(others - set(pred.targets(label))))] += 40
    return pred.with_counts(counts)


@attack
def collapsed(pred: Prediction) -> AnnData:
    """Every cell of a condition the same, twenty times as deep."""
    counts = pred.counts.copy()
    for label in pred.labels:
        counts[pred.rows(label)] = np.rint(20 * pred.counts[pred.rows(label)].mean(axis=0))
    return pred.with_counts(counts)


@attack
def same_for_all(pred: Prediction) -> AnnData:
    """The same control cells under every label: ties everywhere."""
    counts = pred.counts.copy()
    for label in pred.labels:
        counts[pred.rows(label)] = np.resize(pred.controls, (len(pred.rows(label)), len(pred.genes)))
    return pred.with_counts(counts)


# ---- the table -----------------------------------------------------------------------------------------------------


@study(quick={"tasks": ["papalexi-replicate"], "n_splits": 2})
def attacks(
    *,
    out: Path,
    data_dir: str | None = None,
    tasks: tuple[str, ...] = ("papalexi-replicate", "norman-mini-combo"),
    n_splits: int = 5,
    seed: int = 0,
) -> Tables:
    """What attacks gain over the fold changes or control cells that they are made from, and which flags they raise.

    Parameters
    ----------
    n_splits
        Divisions of the real cells for the replicate.
    seed
        Of everything that is drawn.
    """
    tables = {}
    for name in tasks:
        table = scored(name, data_dir, n_splits, seed)
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / f"{name}.csv", index=False)
        tables[name] = table.set_index("prediction")
    return tables


def scored(name: str, data_dir: str | None, n_splits: int, seed: int) -> pd.DataFrame:
    """Scaled scores of honest and spoilt predictions on the test conditions of a task."""
    adata, design, split = task_of(name).load(data_dir=data_dir)
    adata.X = adata.layers["counts"]
    train, real = part(adata, split, "train"), part(adata, split, "test")
    is_control = design.is_control(real.obs)
    controls = real[is_control]
    targeted = {name for label in real.obs[design.perturbation].astype(str).unique() for name in design.parts(label)}
    genes = "parts" if targeted & set(real.var_names) else {"*": None}
    options = {"bulk_target_sum": TARGET_SUM, "target_genes": genes}

    mean = iv.metrics.mean_response(real, design, seed=seed, target_genes=genes)
    baseline = iv.metrics.vcc2026(mean, real, design, fractional=True, **options)
    replicate = iv.metrics.replicates(real, design, n_splits=n_splits, **options)
    rows = []
    honest = {"control cells": resampled(real, controls, design, seed)}
    honest["fold change"] = multiplied(honest["control cells"], train, design, seed)
    for origin, cells in honest.items():
        made = {origin: cells}
        for label, spoil in ATTACKS.items():
            made[f"{origin}, {label}"] = spoil(Prediction(cells, controls, design.perturbation, seed))
        for label, pred in made.items():
            found = iv.metrics.vcc2026(pred, real, design, **options)
            scaled = iv.metrics.anchored(found, baseline, replicate)["score"]
            flags = iv.metrics.flags(pred, real, design, scale="counts", target_genes=genes)["flag"]
            rows.append({"prediction": label, **scaled.round(3), "flags": ", ".join(flags)})
            print(name, label, round(scaled["average"], 3), list(flags), flush=True)
    return pd.DataFrame(rows)


def resampled(real: AnnData, controls: AnnData, design: iv.Design, seed: int) -> AnnData:
    """Control cells drawn with replacement, as many for each perturbation as are real."""
    rng = np.random.default_rng(seed)
    obs = real.obs[~design.is_control(real.obs)].copy()
    rows = rng.integers(0, controls.n_obs, len(obs))
    return AnnData(sparse.csr_matrix(controls.X)[rows], obs=obs, var=real.var[[]].copy())


def multiplied(cells: AnnData, train: AnnData, design: iv.Design, seed: int) -> AnnData:
    """Cells times the fold changes of training cells; of an unseen combination those of its parts."""
    rng = np.random.default_rng(seed + 1)
    labels = train.obs[design.perturbation].astype(str).map(design.label)
    counts = dense(train)
    profiles = {label: counts[(labels == label).to_numpy()].sum(axis=0) for label in labels.unique()}
    shares = {label: (total + 0.5) / total.sum() for label, total in profiles.items()}
    made = dense(cells)
    own = cells.obs[design.perturbation].astype(str).map(design.label)
    for label in own.unique():
        known = [label] if label in shares else [p for p in design.parts(label) if p in shares]
        for name in known:
            made[(own == label).to_numpy()] *= shares[name] / shares[design.control]
    made = np.floor(made + rng.random(made.shape))
    return AnnData(sparse.csr_matrix(made.astype(np.float32)), obs=cells.obs, var=cells.var)

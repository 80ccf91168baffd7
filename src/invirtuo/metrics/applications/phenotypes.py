"""Phenotypes of cells: one number for each condition, by which perturbations become hits of a screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from invirtuo.cells.source import AnyCells
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics.cells import Cells, Scale, common_scale, compare_levels, labels_of, read_cells
from invirtuo.metrics.numerics.streamed import BLOCK, dense, mean_of_genes

__all__ = ["phenotype"]


def phenotype(
    cells: AnyCells,
    design: Design,
    *,
    genes: Sequence[str] | None = None,
    signature: Mapping[str, float] | pd.Series | None = None,
    classifier: Any = None,
    label: Any = None,
    controls: AnyCells | None = None,
    name: str = "phenotype",
    scale: Scale = "log1p",
) -> pd.DataFrame:
    """A number that says what state the cells of each condition are in, and how it differs from the control cells.

    Parameters
    ----------
    cells, design
        As in :func:`invirtuo.evaluate`, real or predicted.
    genes
        A gene set: mean log1p expression of its genes minus that of all genes.
    signature
        Gene to weight w: the projection ``x . w / |w|`` of log1p expression x; genes that are not named weigh 0.
    classifier
        A fitted classifier of scikit-learn: its probability of the class `label`, cell by cell. Genes are matched by
        its ``feature_names_in_``; without these they are in the order of the file.
    label
        Class of the classifier.
    controls
        Cells among which the control cells stand, if `cells` has none; the same genes.
    name
        Of the phenotype, in the column `pheno`.
    scale
        As in :func:`invirtuo.evaluate`.

    Returns
    -------
    pd.DataFrame
        One row per condition: `condition`, `perturbation`, covariates, `pheno`, `value` (mean over cells), `control`
        (that of the control cells of the group), `effect` (the difference), `n_cells`.

    Raises
    ------
    ValueError
        If not exactly one of `genes`, `signature` and `classifier` is given, genes or classes are missing, or a group
        has no control cells.

    References
    ----------
    PerturbHD; perturb-hd 0.1, phenotypes of perturbed cells.
    """
    ways = {"genes": genes, "signature": signature, "classifier": classifier}
    given = [kind for kind, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of genes, signature and classifier; found {' and '.join(given) or 'none'}")
    if design.perturbation is None:
        raise ValueError("phenotype compares with control cells, and the design names no perturbation")

    # the cells, those among which their controls stand, and what is measured
    own, reference = _both_files(cells, controls, design, scale)
    if classifier is not None:
        measure = _probability(own, classifier, label)
    else:
        measure = _weighted_mean(_gene_weights(own, genes, signature))

    # an effect is the difference to the control cells of the group
    of_control = {group: measure(reference, rows) for group, rows in reference.controls.items()}
    table = own.table.loc[sorted(own.rows)]
    if lacking := sorted(set(table["_group"]) - set(of_control)):
        raise ValueError(
            f"no control cells (label {design.control!r}) of {preview(lacking)}; pass the cells that hold them as "
            "controls="
        )
    result = labels_of(table, design)
    result["pheno"] = name
    result["value"] = [measure(own, own.rows[condition]) for condition in table.index]
    result["control"] = table["_group"].map(of_control).to_numpy()
    result["effect"] = result["value"] - result["control"]
    result["n_cells"] = [len(own.rows[condition]) for condition in table.index]
    return result


def _both_files(cells: AnyCells, controls: AnyCells | None, design: Design, scale: Scale) -> tuple[Cells, Cells]:
    """The cells, and those among which their control cells stand, on one scale."""
    read = read_cells("cells", cells, design)
    if controls is None:
        own = read.on_scale(common_scale(scale, read))
        return own, own
    other = read_cells("controls", controls, design, genes=read.genes)
    stated = common_scale(scale, read, other)
    own, reference = read.on_scale(stated), other.on_scale(stated)
    compare_levels(own, reference)
    return own, reference


def _gene_weights(
    cells: Cells, genes: Sequence[str] | None, signature: Mapping[str, float] | pd.Series | None
) -> np.ndarray:
    """(g,) weights whose product with the mean expression is the phenotype."""
    if genes is not None:
        names = list(dict.fromkeys([genes] if isinstance(genes, str) else genes))
        values = np.ones(len(names))
    else:
        series = pd.Series(signature, dtype=float)
        names, values = list(series.index), series.to_numpy()
    places = _places(cells, names)
    weights = np.zeros(len(cells.genes))
    weights[places] = values
    size = weights.sum() if genes is not None else np.linalg.norm(weights)
    if not np.isfinite(size) or size == 0:
        raise ValueError("the gene set is empty, or all weights of the signature are 0 or not finite")
    weights /= size
    return weights - 1 / len(weights) if genes is not None else weights


def _places(cells: Cells, names: Sequence[str]) -> np.ndarray:
    """Positions of genes; an error if one is missing."""
    places = pd.Index(cells.genes).get_indexer(names)
    if (places < 0).any():
        missing = [name for name, place in zip(names, places, strict=True) if place < 0]
        raise ValueError(f"{len(missing)} of {len(names)} genes are not in the cells: {preview(missing)}")
    return np.asarray(places)


def _weighted_mean(weights: np.ndarray) -> Callable[[Cells, np.ndarray], float]:
    def measure(cells: Cells, rows: np.ndarray) -> float:
        return float(mean_of_genes(cells.matrix_of(rows)) @ weights)

    return measure


def _probability(cells: Cells, classifier: Any, label: Any) -> Callable[[Cells, np.ndarray], float]:
    """Mean probability of a class over cells."""
    classes = list(classifier.classes_)
    if label not in classes:
        raise ValueError(f"label {label!r} is no class of the classifier; its classes: {preview(classes)}")
    names = getattr(classifier, "feature_names_in_", None)
    places = np.argsort(cells.columns) if names is None else _places(cells, list(names))
    expected = getattr(classifier, "n_features_in_", len(places))
    if expected != len(places):
        raise ValueError(f"the classifier takes {expected} genes; the cells have {len(places)}, and it names none")

    def measure(file: Cells, rows: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(rows), BLOCK):
            values = dense(file.read(rows[start : start + BLOCK])[:, places])
            features = values if names is None else pd.DataFrame(values, columns=names)
            total += float(classifier.predict_proba(features)[:, classes.index(label)].sum())
        return total / len(rows)

    return measure

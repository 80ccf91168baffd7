"""How much an embedding knows of labels: what a small network reads from it, and how far labels lie apart."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from invirtuo.errors import preview

__all__ = ["label_scores"]


def label_scores(
    embedding: np.ndarray,
    labels: Any,
    *,
    groups: Any = None,
    predicted: tuple[np.ndarray, Any] | None = None,
    test_size: float = 0.2,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a classifier of the labels that reads the embedding, in every group on its own.

    The network has one hidden layer of 256 (ReLU, Adam with 0.001, at most 50 passes, stopped early on a tenth of its
    training cells) and sees standardised embeddings. A fifth of the cells of every label is for the test. With
    `predicted` it is tested on these cells: are they taken for what they should be (extrinsic evaluation)?

    Parameters
    ----------
    embedding
        (n, d).
    labels
        (n,), what is guessed, for example the perturbation or the type of a cell.
    groups
        (n,), for example the cell line of each cell; None: one group.
    predicted
        (m, d) embeddings of predicted cells and their (m,) labels, for one group; labels must be among the real ones.
    test_size, seed
        Share of test cells, and the seed of their choice and of the network.

    Returns
    -------
    One row per group: `group`, `n_labels`, `accuracy`, `balanced_accuracy`, `f1` (macro), `auroc` (macro, one against
    the rest), `silhouette` (of the labels, on at most 5,000 cells; between -1 and 1).

    Raises
    ------
    ValueError
        If lengths differ, values are not finite, a group has fewer than two labels of at least five cells, or predicted
        cells have several groups or other labels.

    References
    ----------
    Adduri et al. 2025, doi:10.1101/2025.06.26.661135, section 5.7.3.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z, kind = rng.normal(size=(200, 5)), np.repeat(["T", "B"], 100)
    >>> z[:100] += 5
    >>> float(label_scores(z, kind)["accuracy"].iloc[0])
    1.0
    """
    embedding = np.asarray(embedding, np.float32)
    labels = np.asarray(labels).astype(str)
    groups = np.full(len(labels), "all") if groups is None else np.asarray(groups).astype(str)
    if embedding.ndim != 2 or not len(embedding) == len(labels) == len(groups):
        raise ValueError(
            f"embedding has shape {embedding.shape}, with {len(labels)} labels and {len(groups)} groups; expected "
            "a row, a label and a group for each cell"
        )
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding holds values that are not finite; expected numbers only")
    rows = []
    for group in np.unique(groups):
        here = groups == group
        # labels with too few cells cannot be split into train and test
        names, counts = np.unique(labels[here], return_counts=True)
        here &= np.isin(labels, names[counts >= 5])
        if (counts >= 5).sum() < 2:
            raise ValueError(f"group {group!r} has {(counts >= 5).sum()} label(s) of at least five cells; expected two")
        other = None if predicted is None else _checked(*predicted, embedding, labels[here], groups)
        rows.append({"group": group} | _scores(embedding[here], labels[here], other, test_size, seed))
    return pd.DataFrame(rows)


def _checked(
    z: np.ndarray, labels: Any, real: np.ndarray, known: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted cells, if they can be read by a network of the real ones."""
    z = np.asarray(z, np.float32)
    labels = np.asarray(labels).astype(str)
    if z.shape != (len(labels), real.shape[1]) or not np.isfinite(z).all():
        raise ValueError(
            f"predicted embeddings have shape {z.shape}, with {len(labels)} labels; expected a finite row of "
            f"{real.shape[1]} numbers for each"
        )
    if len(np.unique(groups)) > 1:
        raise ValueError("predicted cells are scored in one group; leave groups out, or pass one group at a time")
    if unknown := sorted(set(labels) - set(known)):
        raise ValueError(
            f"predicted label(s) {preview(unknown)} have no five real cells; known: {preview(np.unique(known))}"
        )
    return z, labels


def _scores(
    z: np.ndarray, labels: np.ndarray, predicted: tuple[np.ndarray, np.ndarray] | None, test_size: float, seed: int
) -> dict[str, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import f1_score, silhouette_score
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z_train, z_test, y_train, y_test = train_test_split(
        z, labels, test_size=test_size, stratify=labels, random_state=seed
    )
    if predicted is not None:
        z_test, y_test = predicted

    # of few training cells none can be spared to stop early
    early = len(z_train) >= 10 * len(np.unique(labels))
    batch_size = min(200, 1 + len(z_train) // 10)
    network = MLPClassifier((256,), max_iter=50, early_stopping=early, random_state=seed, batch_size=batch_size)
    model = make_pipeline(StandardScaler(), network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 50 passes are the protocol
        model.fit(z_train, y_train)

    # scores on the test cells; the silhouette is one of the embedding, and asks no classifier
    predicted_labels = model.predict(z_test)
    present = np.unique(y_test)
    recalls = [(predicted_labels[y_test == name] == name).mean() for name in present]
    f1 = f1_score(y_test, predicted_labels, labels=present, average="macro")
    silhouette = silhouette_score(z, labels, sample_size=min(5000, len(z)), random_state=seed)
    scores = {"n_labels": len(model.classes_), "accuracy": float((predicted_labels == y_test).mean())}
    scores |= {"balanced_accuracy": float(np.mean(recalls)), "f1": float(f1)}
    scores["auroc"] = _auroc(y_test, model.predict_proba(z_test), model.classes_)
    scores["silhouette"] = float(silhouette)
    return scores


def _auroc(labels: np.ndarray, chances: np.ndarray, classes: np.ndarray) -> float:
    """Mean over the labels that occur of the area for that label against the rest; NaN if only one occurs."""
    from sklearn.metrics import roc_auc_score

    present = [i for i, name in enumerate(classes) if (labels == name).any()]
    if len(present) < 2:
        return float("nan")
    return float(np.mean([roc_auc_score(labels == classes[i], chances[:, i]) for i in present]))

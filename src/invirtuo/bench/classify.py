"""Classifiers as judges of generated cells: do they help to find rare classes, do they have the label asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.checks import labels
from invirtuo.errors import preview
from invirtuo.metrics.cells import per_10k
from invirtuo.metrics.numerics.axes import principal_axes, projected

if TYPE_CHECKING:
    from anndata import AnnData
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import Pipeline

__all__ = ["CLASSIFIERS", "label_probability", "oversampled", "rare_recall"]

REAL = "real cells"  # name of the row without added cells


def rare_recall(
    real: AnnData, added: Mapping[str, AnnData], test: AnnData, by: str, *, n_pcs: int = 50, seed: int = 0
) -> pd.DataFrame:
    """Recall, precision and F1 of each class in held-out cells, before and after cells are added to the training cells.

    Give, beside generated cells, copies of rare real cells (:func:`oversampled`) and cells of independent genes to the
    same numbers: what these gain as well does not speak for a generator. Recall of a rare class rises by naming it too
    often, which precision and F1 show.

    Parameters
    ----------
    real
        Training cells, raw counts in X, `by` in obs.
    added
        Name to cells that are added to them.
    test
        Held-out cells, best of other donors.
    by
        Column of obs with the classes.
    n_pcs
        Principal components, of the real training cells, in which the kNN classifier looks.
    seed
        Of the logistic regression.

    Returns
    -------
    DataFrame: `classifier` ("knn", 10 neighbours; "logistic", on log1p of counts per 10,000), `model` ("real cells"
    and the names of `added`), `class`, ``n_training`` and ``n_test`` real cells, `metric` ("recall", "precision", "f1")
    and `value`. Classes that `test` lacks are left out.

    References
    ----------
    CFGen, arXiv:2407.11734, section 5.4 and appendix G.6; there the neighbours are found in scGPT embeddings.
    """
    from sklearn.metrics import precision_recall_fscore_support

    # real cells to train on, and to test on, in the same genes and components
    genes = real.var_names
    logged, real_label = per_10k(real.X), labels(real, by, "real")
    test_logged, truth = per_10k(test[:, genes].X), labels(test, by, "test")
    centre, axes = principal_axes(logged, n_pcs)
    test_components = projected(test_logged, centre, axes)
    names = sorted(set(truth))
    n_training = pd.Series(real_label).value_counts()
    n_test = pd.Series(truth).value_counts()

    # each classifier is trained on real cells alone, and with each set of further cells
    rows: list[dict[str, Any]] = []
    for model, extra in {REAL: None, **added}.items():
        x, y = logged, real_label
        if extra is not None:
            x = sparse.vstack([x, per_10k(extra[:, genes].X)], format="csr")
            y = np.concatenate([y, labels(extra, by, model)])
        for classifier, make in CLASSIFIERS.items():
            train_x, test_x = x, test_logged
            if classifier == "knn":
                train_x, test_x = projected(x, centre, axes), test_components
            guess = make(seed).fit(train_x, y).predict(test_x)
            scores = precision_recall_fscore_support(truth, guess, labels=names, zero_division=0.0)
            for name, *values in zip(names, *scores[:3], strict=True):
                about = {"classifier": classifier, "model": model, "class": name}
                about |= {"n_training": int(n_training.get(name, 0)), "n_test": int(n_test[name])}
                for metric, value in zip(("precision", "recall", "f1"), values, strict=True):
                    rows.append(about | {"metric": metric, "value": float(value)})
    return pd.DataFrame(rows)


def oversampled(real: AnnData, by: str, counts: Mapping[str, int], *, seed: int = 0) -> AnnData:
    """Copies of real cells, drawn with replacement: `counts` of each class."""
    import anndata

    rng = np.random.default_rng(seed)
    label = labels(real, by, "real")
    if unknown := sorted(set(counts) - set(label)):
        raise ValueError(f"counts: {preview(unknown)} do not occur in {by!r}; known: {preview(sorted(set(label)))}")
    rows = np.concatenate([rng.choice(np.flatnonzero(label == name), n) for name, n in counts.items()])
    obs = real.obs.iloc[rows].set_axis([f"copy_{i}" for i in range(len(rows))])
    return anndata.AnnData(sparse.csr_matrix(real.X)[rows], obs=obs, var=real.var.copy())


def label_probability(
    real: AnnData, columns: str | list[str], *, n_pcs: int = 50, seed: int = 0
) -> Callable[[AnnData], dict[str, pd.DataFrame]]:
    """Train a classifier of each column on real cells; the result gives the probabilities of other cells.

    A multilayer perceptron with two hidden layers of 128 and early stopping, on principal components of log1p of counts
    per 10,000 divided by their standard deviation.

    Parameters
    ----------
    real
        Raw counts in X.
    columns
        Columns of obs, each with a classifier of its own.
    n_pcs
        Principal components.
    seed
        Of the classifiers.

    Returns
    -------
    Function of cells with the same genes: column to a DataFrame (n, classes) of probabilities, a row for each cell.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix G.5 and table 10: the mean probability of the label that was asked for.
    """
    from sklearn.neural_network import MLPClassifier

    logged, genes = per_10k(real.X), real.var_names
    centre, axes = principal_axes(logged, n_pcs)
    spread = projected(logged, centre, axes).std(axis=0)

    def components(cells: AnnData) -> np.ndarray:
        scaled: np.ndarray = projected(per_10k(cells[:, genes].X), centre, axes) / spread
        return scaled

    classifiers = {}
    for column in [columns] if isinstance(columns, str) else columns:
        classifier = MLPClassifier((128, 128), early_stopping=True, random_state=seed, max_iter=100)
        classifiers[column] = classifier.fit(components(real), labels(real, column, "real"))

    def probabilities(cells: AnnData) -> dict[str, pd.DataFrame]:
        x = components(cells)
        tables = {}
        for column, classifier in classifiers.items():
            probability = classifier.predict_proba(x)
            tables[column] = pd.DataFrame(probability, index=cells.obs_names, columns=classifier.classes_)
        return tables

    return probabilities


def _knn(_: int) -> KNeighborsClassifier:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(10)


def _logistic(seed: int) -> Pipeline:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    return make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=500, random_state=seed))


CLASSIFIERS: dict[str, Callable[[int], Any]] = {"knn": _knn, "logistic": _logistic}

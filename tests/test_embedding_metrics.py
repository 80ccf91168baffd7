"""What is read from an embedding."""

from __future__ import annotations

import numpy as np
import pytest

from invirtuo.metrics.applications.embedding import label_scores


def blobs(distance: float, n: int = 400, kinds: int = 2):
    rng = np.random.default_rng(0)
    labels = rng.integers(kinds, size=n)
    z = rng.normal(size=(n, 6))
    z[np.arange(n), labels] += distance
    return z, labels.astype(str)


def test_clear_labels_are_read_and_no_labels_are_not():
    clear, none = (label_scores(*blobs(distance)).iloc[0] for distance in (8.0, 0.0))
    assert min(clear["accuracy"], clear["f1"], clear["auroc"]) > 0.97
    assert clear["silhouette"] > 0.4 > abs(none["silhouette"]) + 0.3
    assert 0.35 < none["auroc"] < 0.65
    some = label_scores(*blobs(2.0)).iloc[0]
    assert none["auroc"] < some["auroc"] < 1.0


def test_several_labels_and_groups():
    z, labels = blobs(6.0, 600, 3)
    table = label_scores(z, labels, groups=np.repeat(["x", "y"], 300))
    assert table["group"].tolist() == ["x", "y"]
    assert (table["n_labels"] == 3).all() and (table["auroc"] > 0.98).all()
    assert label_scores(z, labels, seed=1).equals(label_scores(z, labels, seed=1))


def test_labels_of_few_cells_are_left_out():
    z, labels = blobs(6.0)
    labels[:3] = "rare"
    assert label_scores(z, labels)["n_labels"].iloc[0] == 2


def test_bad_input():
    z, labels = blobs(1.0, 50)
    with pytest.raises(ValueError, match="a row, a label and a group for each cell"):
        label_scores(z, labels[:-1])
    with pytest.raises(ValueError, match="not finite"):
        label_scores(np.full((4, 2), np.nan), list("abab"))
    with pytest.raises(ValueError, match="expected two"):
        label_scores(z, np.full(50, "a"))


def test_predicted_cells_are_read_by_a_network_of_real_ones():
    z, labels = blobs(6.0, 600, 3)
    good, wrong = ((z[:200], labels[:200]), (z[:200], np.roll(np.array(["0", "1", "2"]), 1)[labels[:200].astype(int)]))
    assert label_scores(z, labels, predicted=good)["accuracy"].iloc[0] > 0.97
    assert label_scores(z, labels, predicted=wrong)["accuracy"].iloc[0] < 0.03
    one = labels[:200] == "0"
    alone = label_scores(z, labels, predicted=(z[:200][one], labels[:200][one])).iloc[0]
    assert alone["accuracy"] > 0.97 and np.isnan(alone["auroc"])
    for other, words in (((z[:3, :2], list("000")), "row of 6 numbers"), ((z[:1], ["9"]), "have no five real cells")):
        with pytest.raises(ValueError, match=words):
            label_scores(z, labels, predicted=other)
    with pytest.raises(ValueError, match="one group"):
        label_scores(z, labels, groups=np.repeat(["a", "b"], 300), predicted=good)

"""What generated cells are good for, on made-up cells: copies, rare classes, labels, hidden counts, batches."""

from __future__ import annotations

import json
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import invirtuo as iv
from invirtuo.bench import (
    imputation_scores,
    integration,
    integration_scores,
    label_probability,
    marker_correlation,
    oversampled,
    populations,
    rare_recall,
    trivial_answers,
)
from invirtuo.metrics.applications.copies import copying, nearest, resemblance
from invirtuo.metrics.cells import per_10k
from invirtuo.verbs.masking import mask_entries


@pytest.fixture(scope="module")
def cells():
    """Counts of 400 cells of two frequent types and of a rare one, 30 genes."""
    rng = np.random.default_rng(0)
    kind = np.array(["a", "b", "rare"])[np.searchsorted([0.5, 0.95], rng.random(400), side="right")]
    rate = np.full((3, 30), 3.0)
    rate[0, :8] = rate[1, 8:16] = rate[2, 16:24] = 9.0
    x = rng.poisson(rate[pd.Categorical(kind).codes] * rng.lognormal(0, 0.3, (400, 1))).astype(np.float32)
    obs = pd.DataFrame({"kind": kind}, index=[f"c{i}" for i in range(400)])
    return ad.AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))


def test_per_10k(cells):
    x = cells.X.toarray()
    x[3] = 0
    logged = per_10k(sparse.csr_matrix(x))
    expected = np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1))
    np.testing.assert_allclose(logged.toarray(), expected, rtol=1e-5)
    assert x.max() == cells.X.max()  # what was given stays as it is


# ---- copies ------------------------------------------------------------------------------------------------------


def test_nearest_by_hand():
    points, others = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(nearest(points, others), [0.0, 4.0])
    np.testing.assert_allclose(nearest(others, others, itself=np.arange(2)), [3.0, 3.0])


def test_copies_are_found_and_real_cells_are_not(cells):
    train, other, more = cells[:150], cells[150:280], cells[280:]
    noisy = train.copy()
    noisy.X = sparse.csr_matrix(train.X + (np.random.default_rng(0).random(train.shape) < 0.01))
    for held_out in (other, None):
        copied = copying(noisy, train, held_out, by="kind", n_pcs=10).set_index("kind")
        fresh = copying(more, train, held_out, by="kind", n_pcs=10).set_index("kind")
        for kind in "ab":
            assert copied.loc[kind, "near"] > 0.9 and copied.loc[kind, "ratio"] < 0.6
            assert fresh.loc[kind, "near"] < 0.2 and 0.7 < fresh.loc[kind, "ratio"] < 1.3
    assert fresh.loc["a", "n_held_out"] == 0 and fresh.loc["a", "n_training"] == (train.obs["kind"] == "a").sum()


def test_a_class_without_real_cells_has_no_figure(cells):
    made = cells[:20].copy()
    made.obs["kind"] = "new"
    row = copying(made, cells[20:], by="kind", n_pcs=5).iloc[0]
    assert row["n_training"] == 0 and np.isnan(row["ratio"]) and np.isnan(row["near"]) and row["generated"] > 0


def test_what_copying_refuses(cells):
    with pytest.raises(ValueError, match="generated: column 'type' is not in the table; found kind"):
        copying(cells, cells, by="type")
    with pytest.raises(ValueError, match="held_out lacks 1 genes of the training cells: g0"):
        copying(cells, cells, cells[:, 1:], by="kind")


def test_augment_reports_copies(cells, tmp_path):
    split = pd.Series(np.where(np.arange(400) % 4, "train", "test"), index=cells.obs_names)
    model = iv.models.MODELS["independent_nb"](iv.Design.from_adata(cells, covariates=["kind"]), cells.var_names)
    both = model.fit(cells, split).augment(cells, "kind", 500, split=split, check_copies=True)
    table, counts = both.uns["invirtuo"]["copying"], json.loads(both.uns["invirtuo"]["augmented"])
    assert dict(zip(table["kind"], table["n_generated"], strict=True)) == counts
    assert table["n_held_out"].sum() == (split == "test").sum()
    both.write_h5ad(tmp_path / "both.h5ad")
    again = iv.files.read_h5ad(tmp_path / "both.h5ad").uns["invirtuo"]["copying"]
    np.testing.assert_allclose(again["ratio"], table["ratio"])
    alone = model.augment(cells, "kind", 500, check_copies=True).uns["invirtuo"]["copying"]
    assert (alone["n_held_out"] == 0).all()
    assert "copying" not in model.augment(cells, "kind", 500).uns["invirtuo"]


def test_cells_unlike_their_class_are_found(cells):
    train, other = cells[:200], cells[200:]
    table = resemblance(other, train, by="kind", n_pcs=10)
    assert not table["unlike"].any()
    assert (table[["generated", "real"]] > 0.9).all(axis=None)
    swapped = other.copy()
    swapped.obs["kind"] = "a"  # whatever they are
    row = resemblance(swapped, train, by="kind", n_pcs=10).iloc[0]
    assert row["unlike"] and row["n_training"] == (train.obs["kind"] == "a").sum()
    assert row["generated"] == pytest.approx((other.obs["kind"] == "a").mean(), abs=0.1)
    made = other.copy()
    made.obs["kind"] = "new"
    assert resemblance(made, train, by="kind", n_pcs=10).empty


def test_a_real_cell_is_no_part_of_the_centroid_it_is_compared_with():
    """Two cells of a class far from each other: each is nearer to the other class than to the other cell."""
    x = np.array([[1000, 10], [10, 1000], [95, 100], [105, 100], [100, 90]], dtype=np.float32)
    x = np.column_stack([x, 10_000 - x.sum(axis=1)])
    train = ad.AnnData(sparse.csr_matrix(x), obs=pd.DataFrame({"kind": list("aabbb")}, index=list("vwxyz")))
    table = resemblance(train, train, by="kind", n_pcs=1).set_index("kind")
    assert table.loc["a", "real"] == 0


def test_augment_warns_of_cells_that_are_unlike_their_class(cells, monkeypatch, caplog):
    model = iv.models.MODELS["independent_nb"](iv.Design.from_adata(cells, covariates=["kind"]), cells.var_names)
    model.fit(cells)
    both = model.augment(cells, "kind", 600)
    assert not both.uns["invirtuo"]["resemblance"]["unlike"].any()
    assert "nearest to the real cells of their class" not in caplog.text
    generate, flipped = model.generate, {"a": "b", "b": "rare", "rare": "a"}

    def wrong(labels, **options):
        made = generate(labels=labels.replace(flipped), **options)
        made.obs = made.obs.assign(kind=labels["kind"].to_numpy())
        return made

    monkeypatch.setattr(model, "generate", wrong)
    assert model.augment(cells, "kind", 600).uns["invirtuo"]["resemblance"]["unlike"].all()
    assert "a: 0.0" in caplog.text


# ---- classifiers -------------------------------------------------------------------------------------------------


def test_rare_recall(cells):
    """Few cells of the rare class are overlooked; many more of them are not; wrong ones do harm that F1 sees."""
    few = np.flatnonzero(cells.obs["kind"] == "rare")[:3]
    rows = np.concatenate([np.flatnonzero(cells.obs["kind"] != "rare")[:200], few])
    train, test = cells[rows].copy(), cells[~np.isin(np.arange(400), rows)].copy()
    more = oversampled(train, "kind", {"rare": 60})
    wrong = train[train.obs["kind"] == "a"].copy()
    wrong.obs["kind"] = "rare"
    table = rare_recall(train, {"more": more, "wrong": wrong}, test, "kind", n_pcs=10)
    value = table.set_index(["classifier", "model", "class", "metric"])["value"]
    assert value["knn", "real cells", "rare", "recall"] < 0.2
    assert value["knn", "more", "rare", "recall"] > 0.8
    assert value["logistic", "wrong", "a", "f1"] < value["logistic", "real cells", "a", "f1"] - 0.1
    row = table[(table["class"] == "rare")].iloc[0]
    assert row["n_training"] == 3 and row["n_test"] == (test.obs["kind"] == "rare").sum()
    p, r, f = (value["knn", "more", "rare", name] for name in ("precision", "recall", "f1"))
    assert f == pytest.approx(2 * p * r / (p + r))
    test.obs = test.obs.drop(columns="kind")
    with pytest.raises(ValueError, match="test: column 'kind' is not in the table"):
        rare_recall(train, {}, test, "kind")


def test_oversampled(cells):
    copies = oversampled(cells, "kind", {"a": 7, "rare": 3}, seed=1)
    assert copies.obs["kind"].value_counts().to_dict() == {"a": 7, "rare": 3}
    assert (nearest(copies.X.toarray(), cells.X.toarray()) == 0).all() and copies.obs_names.is_unique
    with pytest.raises(ValueError, match="plant do not occur in 'kind'; known: a, b, rare"):
        oversampled(cells, "kind", {"plant": 1})


def test_label_probability(cells):
    judge = label_probability(cells[:300], "kind", n_pcs=10)
    found = judge(cells[300:])["kind"]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    truth = cells.obs["kind"].iloc[300:]
    assert [*found.columns] == ["a", "b", "rare"] and [*found.index] == [*truth.index]
    assert found.loc[truth == "a", "a"].mean() > 0.8
    assert found.loc[truth == "b", "a"].mean() < 0.2


def test_marker_correlation(cells):
    half, other = cells[:200], cells[200:]
    table = marker_correlation(half, other, "kind", min_cells=5).set_index("kind")
    assert set(table.index) == {"a", "b", "rare"} and (table > 0.9).loc[["a", "b"]].all(axis=None)
    mean = {k: per_10k(x[(x.obs["kind"] == "a").to_numpy()].X).mean(axis=0) for k, x in {"p": half, "r": other}.items()}
    expected = np.corrcoef(np.asarray(mean["p"]).ravel(), np.asarray(mean["r"]).ravel())[0, 1]
    assert table.loc["a", "pearson"] == pytest.approx(expected, rel=1e-5)
    swapped = half.copy()
    swapped.obs["kind"] = swapped.obs["kind"].map({"a": "b", "b": "a", "rare": "rare"})
    wrong = marker_correlation(swapped, other, "kind", min_cells=5).set_index("kind")
    assert wrong.loc["a", "pearson_centred"] < 0 < table.loc["a", "pearson_centred"]
    assert set(marker_correlation(half, other, "kind", ["g0", "g9"])["kind"]) == {"a", "b"}
    with pytest.raises(ValueError, match="no class of 'kind' has 1000 cells in both"):
        marker_correlation(half, other, "kind", min_cells=1000)


def test_markers_among_peaks_are_shares_of_open_cells():
    x = sparse.csr_matrix(np.array([[5.0, 5.0, 1.0, 0.0], [2.0, 8.0, 0.0, 0.0]]))
    genes = ["a", "b", "atac:1", "atac:2"]
    cells = ad.AnnData(x, obs=pd.DataFrame({"kind": ["k", "k"]}, index=["1", "2"]), var=pd.DataFrame(index=genes))
    expected = [np.log1p([5000, 2000]).mean(), np.log1p([5000, 8000]).mean(), 0.5, 0.0]
    np.testing.assert_allclose(populations._profiles(cells, "kind", genes, 2).loc["k"], expected, rtol=1e-5)


# ---- hidden counts -----------------------------------------------------------------------------------------------


def test_imputation_scores_by_hand():
    real = np.array([[1.0, 4.0], [0.0, 3.0]])
    mask = sparse.csr_matrix(np.array([[True, True], [False, True]]))
    guess = sparse.csr_matrix(np.array([[2.0, 4.0], [9.0, 1.0]]))
    table = imputation_scores(real, {"guess": guess, "nothing": np.zeros((2, 2))}, mask).set_index("model")
    assert table.loc["truth", "l1"] == 0 and table.loc["truth", "pearson"] == pytest.approx(1)
    assert table.loc["guess", "l1"] == pytest.approx(1.0) and table.loc["guess", "mean"] == pytest.approx(7 / 3)
    assert table.loc["guess", "pearson"] == pytest.approx(np.corrcoef([2, 4, 1], [1, 4, 3])[0, 1])
    logs = np.abs(np.log1p([2, 4, 1]) - np.log1p([1, 4, 3])).mean()
    assert table.loc["guess", "l1_log"] == pytest.approx(logs)
    assert table.loc["nothing", "l1"] == pytest.approx(8 / 3) and np.isnan(table.loc["nothing", "pearson"])
    with pytest.raises(ValueError, match="guess has shape"):
        imputation_scores(real, {"guess": np.zeros((2, 3))}, mask)
    with pytest.raises(ValueError, match="mask hides no entry"):
        imputation_scores(real, {}, sparse.csr_matrix((2, 2), dtype=bool))


def test_trivial_answers(cells):
    masked, mask = mask_entries(cells, 0.1, which="all")
    found = trivial_answers(masked, "kind", masked_fraction=0.1)
    table = imputation_scores(cells.X, found, mask).set_index("model")
    assert table["l1"].idxmax() == "nothing (0)"
    assert table.loc["mean of the class x depth", "pearson"] > table.loc["mean of the gene", "pearson"] + 0.2
    truth = table.loc["truth", "mean"]
    assert table.loc["mean of the gene", "mean"] == pytest.approx(truth, rel=0.05)
    a = (cells.obs["kind"] == "a").to_numpy()
    x = masked.X.toarray()
    share = x[a].sum(0) / x[a].sum()
    np.testing.assert_allclose(
        found["mean of the class x depth"][a], share * x[a].sum(1, keepdims=True) / 0.9, rtol=1e-4
    )
    split = pd.Series(np.where(np.arange(len(a)) % 2, "train", "test"), index=cells.obs_names)
    half = trivial_answers(masked, "kind", masked_fraction=0.1, split=split)["mean of the class x depth"]
    own = (split == "train").to_numpy()
    of_train = trivial_answers(masked[own].copy(), "kind", masked_fraction=0.1)["mean of the class x depth"]
    np.testing.assert_allclose(half[own], of_train, rtol=1e-5)
    assert half.shape == cells.shape and not np.allclose(half[~own], found["mean of the class x depth"][~own])
    with pytest.raises(ValueError, match="the data: column 'type' is not in the table"):
        trivial_answers(masked, "type")


# ---- batches -----------------------------------------------------------------------------------------------------


def test_integration_scores():
    pytest.importorskip("scib_metrics", reason="needs scib-metrics")
    rng = np.random.default_rng(0)
    label, batch = rng.integers(0, 3, 300), rng.integers(0, 2, 300)
    mixed = rng.normal(size=(300, 10))
    mixed[:, :3] += 6 * np.eye(3)[label]
    apart = mixed + 6 * batch[:, None] * np.eye(10)[5]
    table = integration_scores({"mixed": mixed, "apart": apart}, apart, batch.astype(str), label.astype(str))
    means = table[table["metric"] == "mean"].pivot(index="model", columns="kind", values="value")
    assert means.loc["mixed", "batch"] > means.loc["apart", "batch"] + 0.2
    assert abs(means.loc["mixed", "bio"] - means.loc["apart", "bio"]) < 0.2
    assert table.groupby(["model", "kind"]).size().unique().tolist() == [6]
    single = table[(table["metric"] != "mean") & (table["kind"] == "bio") & (table["model"] == "mixed")]
    assert single["value"].mean() == pytest.approx(means.loc["mixed", "bio"])


def test_integration_table_is_read_by_kind(monkeypatch):
    """Means are taken over what the package calls batch and biology; its aggregate columns are left out."""

    class Benchmarker:
        def __init__(self, cells, batch, label, keys, **_):
            assert cells.obs[batch].tolist() == ["x", "y"] and cells.obs[label].tolist() == ["k", "k"]
            self.keys = keys

        def benchmark(self):
            pass

        def get_results(self, min_max_scale):
            assert not min_max_scale
            columns = ["iLISI", "KBET", "cLISI", "Batch correction"]
            table = pd.DataFrame(
                [[0.2, 0.4, 0.9, 9.0]] * len(self.keys), index=self.keys, columns=columns, dtype=object
            )
            table.loc["Metric Type"] = ["Batch correction", "Batch correction", "Bio conservation", "Aggregate score"]
            return table

    monkeypatch.setattr(integration, "_benchmarker", lambda: Benchmarker)
    table = integration_scores({"z": np.ones((2, 3))}, np.ones((2, 3)), ["x", "y"], ["k", "k"])
    means = table[table["metric"] == "mean"].set_index("kind")["value"]
    assert means["batch"] == pytest.approx(0.3) and means["bio"] == pytest.approx(0.9)
    assert set(table["metric"]) == {"iLISI", "KBET", "cLISI", "mean"}


def test_integration_needs_its_extra_and_all_cells(monkeypatch):
    with pytest.raises(ValueError, match="z has 3 rows, uncorrected has 2"):
        integration_scores({"z": np.ones((3, 3))}, np.ones((2, 3)), ["x", "y"], ["k", "k"])
    monkeypatch.setitem(sys.modules, "scib_metrics.benchmark", None)
    with pytest.raises(ValueError, match="scib-metrics is not installed; install the extra"):
        integration_scores({"z": np.ones((2, 3))}, np.ones((2, 3)), ["x", "y"], ["k", "k"])

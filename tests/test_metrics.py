"""Contract over the registry of metrics, formulas against scipy and brute force, and the messages for bad input."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score as sklearn_r2

from invirtuo import Design
from invirtuo.metrics import (
    METRICS,
    Pair,
    core,
    de,
    distribution,
    evaluate,
    mean,
    metric,
    noise_floor,
    rank,
    score,
    summarize,
)

N_GENES = 70
LABELS = ("control", "A", "B", "A+B", "C")


def cells(*, seed=0, effect=1.0, n=24):
    """Log1p cells of two cell types under five labels; genes are not in alphabetical order."""
    truth = np.random.default_rng(99)
    base = {kind: truth.gamma(1.0, 0.7, N_GENES) for kind in ("t1", "t2")}
    shift = {label: truth.normal(0, 0.9, N_GENES) * (truth.random(N_GENES) < 0.4) for label in LABELS[1:]}
    shift["control"] = np.zeros(N_GENES)
    rng = np.random.default_rng(seed)
    blocks, rows = [], []
    for kind, expression in base.items():
        for i, label in enumerate(LABELS):
            mu = np.clip(expression + effect * shift[label], 0, None)
            blocks.append(np.log1p(rng.poisson(3 * mu, (n + i, N_GENES))).astype(np.float32))
            rows += [(label, kind)] * (n + i)
    obs = pd.DataFrame(rows, columns=["gene", "kind"], index=[f"c{i}" for i in range(len(rows))])
    names = np.random.default_rng(5).permutation([f"G{i:02d}" for i in range(N_GENES)])
    adata = anndata.AnnData(sparse.csr_matrix(np.concatenate(blocks)), obs=obs, var=pd.DataFrame(index=names))
    adata.strings_to_categoricals()
    return adata


REAL = cells()
PRED = cells(seed=1)
DESIGN = Design.from_adata(REAL, perturbation="gene", control="control", covariates=["kind"])
ALL = list(METRICS)
COUNTS = ["de_nsig_real", "de_nsig_pred"]  # describe, judge nothing
JUDGES = [name for name in ALL if name not in COUNTS]
UNBIASED = ("energy_distance", "mmd_pca_disjoint", "mmd_rbf_unbiased", "mmd_rbf_median")


def values(table):
    return table.pivot(index="condition", columns="metric", values="value").sort_index()


@pytest.fixture(scope="module")
def reference():
    return values(evaluate(PRED, REAL, DESIGN, ALL, n_pcs=10))


# contract


@pytest.mark.parametrize("name", ALL)
def test_record_says_what_a_reader_needs(name):
    record = METRICS[name]
    assert record.name == name
    assert record.label and record.reference
    assert "\n" not in record.definition and len(record.definition) > 20
    if name in COUNTS:
        assert record.direction is None and np.isnan(record.best)
        return
    assert record.direction in ("lower", "higher")
    assert record.range[0] <= record.best <= record.range[1]
    assert record.best == 0 or record.best == record.range[record.direction == "higher"]


def test_published_names_are_there():
    published = ["mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean"]
    assert {*published, *(f"{name}_rank" for name in published)} <= set(METRICS)


@pytest.mark.parametrize("name", JUDGES)
def test_real_against_real_is_best(name):
    table = evaluate(REAL, REAL, DESIGN, name)
    if name in UNBIASED:  # unbiased: below 0 for the very same cells, not for other cells of the same kind
        assert (table["value"] < 0).all()
    else:
        np.testing.assert_allclose(table["value"], METRICS[name].best, atol=1e-6)


def relabelled(adata):
    """Effects given to other perturbations: what a correlation over perturbations sees."""
    copy = adata.copy()
    copy.obs["gene"] = copy.obs["gene"].cat.rename_categories(dict(zip("ABC", "BCA", strict=True)))
    return copy


@pytest.mark.parametrize("name", JUDGES)
def test_worse_data_score_worse(name, reference):
    bad = relabelled(PRED) if name in ("de_spearman_size", "edistance_pearson") else cells(seed=1, effect=0.0)
    worse = values(evaluate(bad, REAL, DESIGN, [name], n_pcs=10))[name].mean()
    good = reference[name].mean()
    low, high = METRICS[name].range
    assert low <= good <= high
    assert (worse - good > 0.05) if METRICS[name].direction == "lower" else (good - worse > 0.05)


def test_order_of_cells_and_genes_does_not_matter(reference):
    rng = np.random.default_rng(3)
    shuffled = [a[rng.permutation(a.n_obs)][:, rng.permutation(a.n_vars)].copy() for a in (PRED, REAL)]
    table = values(evaluate(*shuffled, DESIGN, ALL, n_pcs=10))
    pd.testing.assert_frame_equal(table, reference, rtol=1e-6, atol=1e-6)


def dense(a):
    return anndata.AnnData(a.X.toarray(), obs=a.obs, var=a.var)


def retyped(matrix):
    return anndata.AnnData(matrix, obs=REAL.obs, var=REAL.var)


def written(adata, folder):
    adata.write_h5ad(folder / "real.h5ad")
    return folder / "real.h5ad"


def backed(adata, folder):
    return anndata.read_h5ad(written(adata, folder), backed="r")


def in_two_pieces(matrix):
    """The same matrix with every value stored as two that add up."""
    doubled = sparse.csr_matrix(matrix.shape, dtype=np.float64)
    doubled.data = np.repeat(matrix.data.astype(np.float64) / 2, 2)
    doubled.indices, doubled.indptr = np.repeat(matrix.indices, 2), matrix.indptr * 2
    return doubled


def with_unused_category(adata):
    copy = adata.copy()
    copy.obs["gene"] = copy.obs["gene"].cat.add_categories(["never"])
    return copy


FORMS = {
    "dense": lambda folder: dense(REAL),
    "float64": lambda folder: retyped(REAL.X.astype(np.float64)),
    "csc": lambda folder: retyped(REAL.X.tocsc()),
    "csr array": lambda folder: retyped(sparse.csr_array(REAL.X)),
    "csr with duplicates": lambda folder: retyped(in_two_pieces(REAL.X)),
    "view": lambda folder: anndata.concat([REAL, REAL[:3]], index_unique="-")[: REAL.n_obs],
    "path": lambda folder: str(written(REAL, folder)),
    "backed csr": lambda folder: backed(REAL, folder),
    "backed csc": lambda folder: backed(retyped(REAL.X.tocsc()), folder),
    "backed dense": lambda folder: backed(dense(REAL), folder),
    "backed view": lambda folder: backed(REAL, folder)[np.arange(REAL.n_obs)[::-1]],
    "unused category": lambda folder: with_unused_category(REAL),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_storage_gives_the_same_numbers(form, tmp_path, reference):
    real = FORMS[form](tmp_path)
    table = values(evaluate(PRED, real, DESIGN, ALL, n_pcs=10))
    pd.testing.assert_frame_equal(table, reference, rtol=1e-5, atol=1e-5)
    if form == "csr with duplicates":
        assert real.X.nnz == 2 * REAL.X.nnz  # not tidied up in place
    if form.startswith("backed"):
        real.file.close()


def test_input_is_not_changed():
    pred, real = PRED.copy(), REAL.copy()
    evaluate(pred, real, DESIGN)
    for after, before in ((pred, PRED), (real, REAL)):
        assert (after.X != before.X).nnz == 0
        pd.testing.assert_frame_equal(after.obs, before.obs)
        assert list(after.var_names) == list(before.var_names)


def test_table_is_tidy(reference):
    table = evaluate(PRED, REAL, DESIGN)
    columns = ["condition", "perturbation", "kind", "metric", "value", "n_pred", "n_real"]
    assert list(table.columns) == columns
    assert len(table) == 8 * sum(record.default for record in METRICS.values())
    row = table[(table["condition"] == "t2|A+B") & (table["metric"] == "rmse_mean")].iloc[0]
    assert (row["perturbation"], row["kind"], row["n_pred"], row["n_real"]) == ("A+B", "t2", 27, 27)
    assert set(table["condition"]) == set(DESIGN.names(DESIGN.conditions(REAL.obs)))
    assert table.attrs["n_scored"]["rmse_mean"] == 8 and table.attrs["n_nan"]["rmse_mean"] == 0


def test_leaving_a_metric_or_group_out_changes_nothing_else(reference):
    alone = values(evaluate(PRED, REAL, DESIGN, ["mmd_gex", "deg_recall_rank"], n_pcs=10))
    pd.testing.assert_frame_equal(alone, reference[["deg_recall_rank", "mmd_gex"]], atol=1e-9)
    one = PRED[PRED.obs["kind"] == "t1"]
    part = values(evaluate(one, REAL, DESIGN, ALL, n_pcs=10))
    pd.testing.assert_frame_equal(part, reference.loc[part.index], atol=1e-9)


def test_a_new_metric_is_one_function(reference):
    @metric(
        "largest_gap",
        label="Largest gap",
        direction="lower",
        range=(0.0, np.inf),
        best=0.0,
        definition="Largest difference of means over genes",
        reference="this test",
        on="mean",
        ranked=True,
    )
    def largest_gap(pred, real):
        return np.abs(pred - real).max()

    try:
        table = values(evaluate(PRED, REAL, DESIGN, ["largest_gap", "largest_gap_rank"]))
    finally:
        del METRICS["largest_gap"], METRICS["largest_gap_rank"]
    side = [np.asarray(a[((a.obs["gene"] == "C") & (a.obs["kind"] == "t1"))].X.mean(axis=0)) for a in (PRED, REAL)]
    assert table.loc["t1|C", "largest_gap"] == pytest.approx(np.abs(side[0] - side[1]).max(), abs=1e-6)
    assert table["largest_gap_rank"].between(0, 1).all()


@pytest.mark.parametrize("record", [{"direction": "lower"}, {"direction": None, "on": "mean"}])
def test_a_rank_needs_a_view_and_a_direction(record):
    record |= {"label": "x", "range": (0, 1), "best": 0, "definition": "x", "reference": "x"}
    with pytest.raises(ValueError, match="ranked=True needs a view to compare and a direction"):
        metric("nothing", **record, ranked=True)(len)
    assert "nothing" not in METRICS


def test_a_new_metric_may_see_a_whole_group():
    """One number per group, as metrics over effect sizes need it."""

    @metric(
        "size_order",
        label="Order of effect sizes",
        direction="higher",
        range=(-1.0, 1.0),
        best=1.0,
        definition="Spearman correlation of predicted and real effect sizes of a group",
        reference="this test",
    )
    def size_order(pair, group):
        sizes = [[np.abs(view).sum() for view in pair.view("logfc", side, group)] for side in ("pred", "real")]
        return np.full(len(sizes[0]), stats.spearmanr(*sizes).statistic)

    try:
        best = evaluate(REAL, REAL, DESIGN, ["size_order"])
        other = values(evaluate(PRED, REAL, DESIGN, ["size_order"]))["size_order"]
    finally:
        del METRICS["size_order"]
    np.testing.assert_allclose(best["value"], 1.0)
    assert other.groupby(other.index.str[:2]).nunique().tolist() == [1, 1] and (other < 1).any()


def test_summary_means_and_counts():
    scores = pd.DataFrame({"kind": list("aabb"), "metric": ["z", "y"] * 2, "value": [1.0, 2.0, 4.0, np.nan]})
    table = summarize(scores)
    assert table.index.tolist() == ["z", "y"]
    assert table.to_dict("list") == {"mean": [2.5, 2.0], "n_scored": [2, 1], "n_nan": [0, 1]}
    assert summarize(scores, ["kind", "metric"]).loc[("b", "z"), "mean"] == 4.0


# formulas


def select(adata, label, kind="t1"):
    return adata[(adata.obs["gene"] == label) & (adata.obs["kind"] == kind)].X.toarray().astype(float)


def test_rmse_and_cosine(reference):
    x, y, c = select(PRED, "B").mean(0), select(REAL, "B").mean(0), select(REAL, "control").mean(0)
    assert reference.loc["t1|B", "rmse_mean"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), abs=1e-6)
    dx, dy = (np.log2(m + 0.1) - np.log2(c + 0.1) for m in (x, y))
    assert reference.loc["t1|B", "cosine_logfc"] == pytest.approx(dx @ dy / np.sqrt(dx @ dx * (dy @ dy)), abs=1e-6)


def test_vector_metrics_against_scipy():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    assert mean.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert mean.r2_score(x, y) == pytest.approx(sklearn_r2(x, y))  # the prediction in the role of the truth
    assert mean.mae(x, y) == pytest.approx(np.mean(np.abs(x - y)))
    assert np.isnan(mean.cosine(np.zeros(3), np.ones(3))) and np.isnan(mean.pearson(np.ones(3), np.arange(3.0)))
    assert mean.r2_score(np.ones(3), np.arange(3.0)) == 0 and mean.r2_score(np.ones(3), np.ones(3)) == 1
    np.testing.assert_allclose(mean.cosine(x, np.stack([x, -x, y])), [1, -1, mean.cosine(x, y)])


def test_matrices_are_the_functions_of_all_pairs():
    views = np.random.default_rng(0).normal(size=(2, 4, 60))
    views[0, 1] = 0  # no cosine
    for function, matrix in (
        (mean.rmse, mean._rmse_matrix),
        (mean.cosine, mean._cosine_matrix),
        (de.top_k_recall, de._recall_matrix),
    ):
        pairs = [[function(x, y) for y in views[1]] for x in views[0]]
        np.testing.assert_allclose(matrix(list(views[0]), list(views[1])), pairs, atol=1e-12)


def test_logfc_of_negative_means_is_zero():
    np.testing.assert_allclose(mean.logfc([-0.2, 0.3], [0.1, 0.1]), [0.0, 1.0])


def test_scaled_view():
    pair = Pair(PRED, REAL, DESIGN)
    group = np.concatenate([select(PRED, label) for label in LABELS[1:]] + [select(REAL, "control")])
    z = (select(PRED, "A") - group.mean(0)) / group.std(0, ddof=1)
    genes = PRED.var_names.get_indexer(pair.genes)
    np.testing.assert_allclose(pair.see("scaled", "pred", "t1|A"), np.clip(z, -10, 10).mean(0)[genes], atol=1e-6)


def test_t_scores_and_p_values_against_scipy():
    pair = Pair(PRED, REAL, DESIGN)
    genes = REAL.var_names.get_indexer(pair.genes)
    x, c = select(PRED, "A+B")[:, genes], select(REAL, "control")[:, genes]
    np.testing.assert_array_equal(pair.control_cells("pred", "t1"), c.astype(np.float32))
    moments = [x.mean(0), x.std(0, ddof=1), len(x), c.mean(0), c.std(0, ddof=1), len(x)]
    expected = stats.ttest_ind_from_stats(*moments, equal_var=False)
    np.testing.assert_allclose(pair.see("scores", "pred", "t1|A+B"), expected.statistic, rtol=1e-5)
    np.testing.assert_allclose(pair.see("pvals", "pred", "t1|A+B"), expected.pvalue, rtol=1e-5, atol=1e-12)
    adjusted = stats.false_discovery_control(expected.pvalue)
    logp = -np.log(adjusted + 1e-37) * np.sign(expected.statistic)
    np.testing.assert_allclose(pair.see("logp", "pred", "t1|A+B"), logp, rtol=1e-4)


def test_zero_variance_gives_no_score():
    still = (np.array([1.0, 2.0]), np.zeros(2), 5)
    np.testing.assert_array_equal(de.t_scores(still, (np.array([1.0, 1.0]), np.zeros(2), 9)), [0, 0])
    np.testing.assert_array_equal(de.p_values(still, (np.array([1.0, 1.0]), np.zeros(2), 9)), [1, 1])


def test_top_k_recall_ties_and_few_genes():
    flat = np.zeros(60)
    assert de.top_k_recall(flat, np.arange(60.0), k=10) == 1.0  # of equal scores the later gene wins
    assert de.top_k_recall(flat, -np.arange(60.0)[::-1], k=10) == 0.0
    assert de.top_k_recall(np.arange(4.0), np.arange(4.0)[::-1]) == 1.0  # fewer genes than k
    x, y = np.random.default_rng(0).normal(size=(2, 60))
    shared = set(np.argsort(-np.abs(x))[:7]) & set(np.argsort(-np.abs(y))[:7])
    assert de.top_k_recall(x, y, k=7) == pytest.approx(len(shared) / 7)
    np.testing.assert_allclose(de._recall_matrix([x, y], [x, y])[0, 1], de.top_k_recall(x, y))


@pytest.mark.parametrize("width", [20, 400])  # float64 and float32 products
def test_energy_distance_against_brute_force(width, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 1, (31, width)), rng.normal(3.2, 1, (17, width))
    x[3] = x[5] = y[2]  # duplicates, where |x|^2 - 2xy + |y|^2 cancels
    within_x, within_y, cross = cdist(x, x), cdist(y, y), cdist(x, y)
    half = cross.mean() - within_x.mean() / 2 - within_y.mean() / 2
    assert distribution.half_energy(x, y) == pytest.approx(half, abs=2e-5)
    unbiased = 2 * cross.mean() - within_x.sum() / (31 * 30) - within_y.sum() / (17 * 16)
    assert distribution.energy_distance(x, y) == pytest.approx(unbiased, abs=2e-5)
    matrix = distribution._half_energy_matrix([x, y, x], [y, x, x])
    pairs = [[distribution.half_energy(a, b) for b in (y, x, x)] for a in (x, y, x)]
    np.testing.assert_allclose(matrix, pairs, atol=1e-5)
    monkeypatch.setattr(distribution, "PAIRS", 40)  # in blocks as at once
    monkeypatch.setattr(distribution, "CACHED_CELLS", 1)
    np.testing.assert_allclose(distribution._half_energy_matrix([x, y, x], [y, x, x]), matrix, atol=1e-6)


def test_half_energy_of_itself_is_exactly_zero_and_symmetric():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 300))
    assert distribution.half_energy(x, x.copy()) == 0
    assert distribution.half_energy(x, y) == pytest.approx(distribution.half_energy(y, x), abs=1e-6)


def test_energy_distance_is_unbiased_and_mmd_is_not():
    rng = np.random.default_rng(0)
    draws = [(rng.normal(size=(8, 5)), rng.normal(size=(12, 5))) for _ in range(400)]
    unbiased = np.array([distribution.energy_distance(*draw) for draw in draws])
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 20
    distance = np.mean([cdist(*draw).mean() for draw in draws])
    bias = distance / 16 + distance / 24
    assert np.mean([distribution.half_energy(*draw) for draw in draws]) == pytest.approx(bias, rel=0.15)
    assert np.isnan(distribution.energy_distance(np.zeros((1, 2)), np.ones((3, 2))))


def test_mmd_pca_against_sklearn(reference):
    everything = REAL.X.toarray().astype(float)
    pca = PCA(10, svd_solver="full").fit(everything)
    x, y = pca.transform(select(PRED, "C", "t2")), pca.transform(select(REAL, "C", "t2"))
    half = cdist(x, y).mean() - cdist(x, x).mean() / 2 - cdist(y, y).mean() / 2
    assert reference.loc["t2|C", "mmd_pca"] == pytest.approx(half, abs=1e-5)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_principal_axes_two_ways(form):
    x = np.random.default_rng(0).normal(size=(40, 25)) * np.linspace(1, 3, 25)
    centre = x.mean(0)
    few, many = (f(form(x), centre, 4) for f in (distribution._axes_of_few_genes, distribution._axes_of_many_genes))
    np.testing.assert_allclose(few[0], many[0])
    np.testing.assert_allclose(np.abs(few[1].T @ many[1]), np.eye(4), atol=1e-7)
    np.testing.assert_allclose(few[0], np.linalg.svd(x - centre)[1][:4] ** 2)


def test_principal_axes_are_fewer_with_a_warning(caplog):
    x = np.random.default_rng(0).normal(size=(20, 2)) @ np.random.default_rng(1).normal(size=(2, 9))
    with caplog.at_level(logging.WARNING):
        _, axes = distribution.principal_axes(x, 5)
    assert axes.shape == (9, 2)
    assert "only 2 components" in caplog.text


# ranks


def test_ranks_by_hand():
    matrix = np.array([[0.1, 0.9, 0.3], [0.2, 0.8, 0.1], [0.3, 0.7, 0.2]])
    np.testing.assert_allclose(rank.ranks(matrix, "lower"), [0, 0.5, 0.5])
    np.testing.assert_allclose(rank.ranks(matrix, "higher"), [1, 0.5, 0.5])
    np.testing.assert_allclose(rank.ranks(matrix, "lower", by="pred"), [0, 1, 0])


def test_ranks_of_ties_nan_and_one():
    flat = np.ones((5, 5))
    np.testing.assert_allclose(rank.ranks(flat, "lower"), 0.5)
    np.testing.assert_allclose(rank.ranks(flat, "lower", ties="worst"), 1.0)
    random = np.concatenate([rank.ranks(flat, "lower", ties="random", seed=seed) for seed in range(200)])
    assert random.mean() == pytest.approx(0.5, abs=0.03) and set(random) == {0, 0.25, 0.5, 0.75, 1}
    np.testing.assert_array_equal(rank.ranks([[3.0]], "lower"), [0.0])
    np.testing.assert_allclose(rank.ranks([[np.nan, 1.0], [5.0, 2.0]], "higher"), [1, 0])
    with pytest.raises(ValueError, match="'median'"):
        rank.ranks(flat, "lower", ties="median")


def test_equal_predictions_rank_in_the_middle():
    pred = REAL[(REAL.obs["gene"] == "A").to_numpy()]
    copies = []
    for label in LABELS[1:]:
        copy = pred.copy()
        copy.obs["gene"] = label
        copies.append(copy)
    table = evaluate(anndata.concat(copies, index_unique="-"), REAL, DESIGN, n_pcs=10)
    ranks = values(table).filter(like="_rank")
    np.testing.assert_allclose(ranks, 0.5)


def test_one_perturbation_ranks_zero():
    only = REAL[REAL.obs["gene"].isin(["control", "C"])]
    table = values(evaluate(PRED[PRED.obs["gene"] == "C"], only, DESIGN))
    assert (table.filter(like="_rank") == 0).all(axis=None)
    assert table["rmse_mean"].gt(0).all()


# options, edges and messages


def test_no_covariates_is_one_group():
    design = Design.from_adata(REAL, perturbation="gene", control="control")
    table = evaluate(PRED, REAL, design, ["rmse_mean", "rmse_mean_rank"])
    assert set(table["condition"]) == set(LABELS[1:]) and "kind" not in table
    assert table["n_real"].sum() == 2 * 2 * sum(24 + i for i in range(1, 5))


def test_controls_of_prediction():
    shifted = PRED.copy()
    control = (shifted.obs["gene"] == "control").to_numpy()
    shifted.X = sparse.csr_matrix(shifted.X.toarray() + 0.5 * control[:, None])
    kept = [values(evaluate(p, REAL, DESIGN, ["cosine_logfc"])) for p in (PRED, shifted)]
    pd.testing.assert_frame_equal(*kept)  # controls="real" does not look at predicted controls
    own = values(evaluate(shifted, REAL, DESIGN, ["cosine_logfc"], controls="pred"))
    assert (own < kept[0] - 0.01).all(axis=None)
    without = shifted[~control]
    with pytest.raises(ValueError, match=r"pred: group 't1' has no control cells"):
        evaluate(without, REAL, DESIGN, ["cosine_logfc"], controls="pred")
    pd.testing.assert_frame_equal(values(evaluate(without, REAL, DESIGN, ["cosine_logfc"])), kept[0])
    with pytest.raises(ValueError, match="'ref'"):
        evaluate(PRED, REAL, DESIGN, controls="ref")


def test_noise_floor(reference):
    table = noise_floor(REAL, DESIGN, n_pcs=10, seed=1)
    again = noise_floor(REAL, DESIGN, n_pcs=10, seed=1)
    other = noise_floor(REAL, DESIGN, n_pcs=10, seed=2)
    pd.testing.assert_frame_equal(table, again)
    assert not table["value"].equals(other["value"])
    n_real = REAL.obs.groupby(["kind", "gene"], observed=True).size()
    for row in table.itertuples():
        assert row.n_pred + row.n_real == n_real[row.kind, row.perturbation] and 0 <= row.n_real - row.n_pred <= 1
    floor = values(table)
    assert (floor["rmse_mean"] < 0.4).all() and (floor["rmse_mean"] > reference["rmse_mean"]).mean() > 0.5
    collapsed = values(evaluate(cells(seed=1, effect=0.0), REAL, DESIGN, n_pcs=10))
    assert floor["cosine_logfc"].mean() > collapsed["cosine_logfc"].mean() + 0.3


def test_noise_floor_halves_are_disjoint_and_complete():
    pair = Pair.halves(REAL, DESIGN, seed=3)
    for name in pair.conditions.index:
        kind, label = name.split("|")
        halves = np.concatenate([pair.cells(side, name) for side in ("pred", "real")])
        whole = select(REAL, label, kind)[:, REAL.var_names.get_indexer(pair.genes)]
        np.testing.assert_allclose(np.sort(halves.sum(1, dtype=float)), np.sort(whole.sum(1)), rtol=1e-12)


def test_noise_floor_skips_single_cells(caplog):
    first = (REAL.obs["gene"] == "A") & (REAL.obs["kind"] == "t1")
    few = REAL[~first | (first.cumsum() == 1)]
    with caplog.at_level(logging.WARNING):
        table = noise_floor(few, DESIGN, ["rmse_mean"])
    assert table.attrs["skipped"] == {"t1|A": "only one cell"} and "t1|A" in caplog.text
    assert len(table) == 7


def test_conditions_on_one_side_are_reported(caplog):
    pred = PRED[~((PRED.obs["gene"] == "A") & (PRED.obs["kind"] == "t2"))]
    real = REAL[~((REAL.obs["gene"] == "C") & (REAL.obs["kind"] == "t1"))]
    with caplog.at_level(logging.WARNING):
        table = evaluate(pred, real, DESIGN)
    assert table.attrs["skipped"] == {"t2|A": "not in pred", "t1|C": "not in real"}
    assert "t2|A" in caplog.text and "t1|C" in caplog.text
    assert set(table["condition"]) == {"t1|A", "t1|B", "t1|A+B", "t2|B", "t2|A+B", "t2|C"}


def test_constant_prediction_and_single_cell():
    pred = dense(PRED[PRED.obs["gene"] != "control"])
    mean_of = REAL.X.toarray().mean(axis=0)
    pred.X = np.tile(mean_of, (pred.n_obs, 1)).astype(np.float32)
    table = values(evaluate(pred, REAL, DESIGN, n_pcs=10))
    assert np.isfinite(table).all(axis=None)
    np.testing.assert_allclose(table["rmse_mean_rank"], 0.5)
    one = pred[~pred.obs.duplicated(["gene", "kind"])]
    single = evaluate(one, REAL, DESIGN, n_pcs=10)
    assert (single["n_pred"] == 1).all()
    np.testing.assert_allclose(values(single)["rmse_mean"], table["rmse_mean"], atol=1e-6)
    assert values(single)["deg_recall"].between(0, 1).all()


def test_nan_values_are_counted():
    real = dense(REAL)
    label, control = ((real.obs["gene"] == name) & (real.obs["kind"] == "t1") for name in ("A", "control"))
    real.X[label] = real.X[control].mean(axis=0)
    real.X[control] = real.X[control].mean(axis=0)  # no effect at all: the cosine is not defined
    table = evaluate(PRED, real, DESIGN, ["cosine_logfc"])
    assert table.attrs["n_nan"] == {"cosine_logfc": 1} and table.attrs["n_scored"] == {"cosine_logfc": 7}
    assert np.isnan(values(table).loc["t1|A", "cosine_logfc"])


def edited(adata, change):
    copy = dense(adata)
    return change(copy) or copy


def set_value(value):
    def change(adata):
        adata.X[7, 3] = value

    return change


def rename_genes(adata):
    adata.var_names = [adata.var_names[1], *adata.var_names[1:]]


def relabel(adata):
    adata.obs["gene"] = "other"


def drop_column(adata):
    del adata.obs["kind"]


def remove_labels(adata):
    adata.obs["kind"] = adata.obs["kind"].cat.remove_categories(["t1"])


def to_counts(adata):
    adata.X = np.clip(np.round(np.expm1(adata.X)), 0, 9)  # shallow counts, no larger than log1p values may be


MESSAGES = {
    "missing column": (lambda: (edited(PRED, drop_column), REAL), "pred: .*'kind'"),
    "missing label": (lambda: (PRED, edited(REAL, remove_labels)), "real: .*missing values"),
    "missing genes": (lambda: (PRED[:, 2:], REAL), f"pred lacks 2 of the {N_GENES} genes.*G"),
    "duplicate genes": (lambda: (PRED, edited(REAL, rename_genes)), "real: gene names are not unique"),
    "nan": (lambda: (edited(PRED, set_value(np.nan)), REAL), "pred: X holds 1 NaN"),
    "inf": (lambda: (PRED, edited(REAL, set_value(np.inf))), "real: X holds 1 NaN or infinite"),
    "no control": (lambda: (PRED, REAL[REAL.obs["gene"] != "control"]), "group 't1' has no control cells"),
    "no common condition": (lambda: (edited(PRED, relabel), REAL), r"no condition is in both.*t1\|other"),
    "large counts": (lambda: (edited(PRED, set_value(300.0)), REAL), "pred: X looks like raw counts.*log1p"),
    "small counts": (lambda: (PRED, edited(REAL, to_counts)), "real: .*raw counts"),
    "empty": (lambda: (PRED[:0], REAL), "pred: expected cells"),
    "no file": (lambda: ("nowhere.h5ad", REAL), "nowhere.h5ad"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    make, message = MESSAGES[case]
    with pytest.raises(ValueError, match=message):
        evaluate(*make(), DESIGN)


def test_unknown_metric_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown metrics: mmd_gx; known: .*mmd_gex"):
        evaluate(PRED, REAL, DESIGN, ["mmd_gx"])
    with pytest.raises(ValueError, match="none named"):
        evaluate(PRED, REAL, DESIGN, [])


def test_clash_with_the_columns_of_the_table():
    real = REAL.copy()
    real.obs["metric"] = real.obs["kind"]
    design = Design.from_adata(real, perturbation="gene", control="control", covariates=["metric"])
    with pytest.raises(ValueError, match="clash"):
        evaluate(real, real, design)


def test_metrics_without_control_do_not_ask_for_one():
    real = REAL[REAL.obs["gene"] != "control"]
    assert len(evaluate(PRED, real, DESIGN, ["rmse_mean", "mmd_gex_rank"])) == 16


def test_another_prediction_against_the_same_real_data(monkeypatch, reference):
    first = Pair(cells(seed=4), REAL, DESIGN, n_pcs=10)
    score(first, ALL)
    calls = []
    original = core._moments
    monkeypatch.setattr(core, "_moments", lambda block: calls.append(1) or original(block))
    monkeypatch.setattr(distribution, "principal_axes", None)  # not needed again
    pd.testing.assert_frame_equal(values(score(first.against(PRED), ALL)), reference)
    assert len(calls) == 8  # the predicted side only


def test_score_of_a_pair_computes_shared_parts_once(monkeypatch):
    calls = []
    original = core._moments
    monkeypatch.setattr(core, "_moments", lambda block: calls.append(1) or original(block))
    pair = Pair(PRED, REAL, DESIGN, n_pcs=10)
    score(pair)
    assert len(calls) == 2 * 8 + 2  # each condition on both sides, and the controls of each group
    score(pair)
    assert len(calls) == 18

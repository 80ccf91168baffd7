"""Contract over the registry of metrics, formulas against scipy and brute force, and the messages for bad input."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score as sklearn_r2

from invirtuo import Design
from invirtuo.metrics import (
    METRICS,
    PROFILES,
    Pair,
    ceiling,
    de,
    distribution,
    evaluate,
    generation,
    mean,
    metric,
    noise_floor,
    population,
    rank,
    score,
    summarize,
)
from invirtuo.metrics import pair as pairs
from invirtuo.metrics.numerics import axes as principal
from invirtuo.metrics.numerics import distances

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
INERT = ["de_false_calls", "de_false_share", "de_false_any"]  # of conditions without DE genes, of which REAL has none
DESCRIPTIONS = ["de_nsig_real", "de_nsig_pred", "variance_ratio"]  # describe, judge nothing
JUDGES = [name for name in ALL if name not in (*DESCRIPTIONS, *INERT)]
UNBIASED = (
    *("energy_distance", "mmd_pca_disjoint", "mmd_rbf_unbiased", "mmd_rbf_median", "mmd_rbf_disjoint"),
    "expr_mse_unbiased_capped_norm",
)


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
    if name in DESCRIPTIONS:
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
    elif name in ("wasserstein2_disjoint", "c2st"):  # against half of the cells
        worse = evaluate(cells(seed=1, effect=0.0), REAL, DESIGN, name)
        assert table["value"].mean() < 0.7 * worse["value"].mean()
    else:
        np.testing.assert_allclose(table["value"], METRICS[name].best, atol=1e-6)


def relabelled(adata):
    """Effects given to other perturbations: what a correlation over perturbations sees."""
    copy = adata.copy()
    copy.obs["gene"] = copy.obs["gene"].cat.rename_categories(dict(zip("ABC", "BCA", strict=True)))
    return copy


def thinned(adata):
    """Every other value is lost."""
    copy = adata.copy()
    copy.X = copy.X.multiply(np.random.default_rng(0).random(copy.shape) < 0.5).tocsr()
    return copy


def swollen(adata):
    """Every cell times a number of its own, so that all genes vary together."""
    copy = dense(adata)
    copy.X *= np.random.default_rng(0).lognormal(0, 1, (copy.n_obs, 1)).astype(np.float32)
    return copy


def independent(adata):
    """Genes permuted within each condition, one by one."""
    rng, copy = np.random.default_rng(0), dense(adata)
    names = DESIGN.names(copy.obs)
    for name in names.unique():
        rows = np.flatnonzero(names == name)
        for gene in range(copy.n_vars):
            copy.X[rows, gene] = rng.permutation(copy.X[rows, gene])
    return copy


@pytest.mark.parametrize("name", JUDGES)
def test_worse_data_score_worse(name, reference):
    ways = {"de_spearman_size": relabelled, "edistance_pearson": relabelled, "zeros_distance": thinned,
            "correlation_error": swollen, "de_fdr": relabelled}  # fmt: skip
    bad = ways[name](PRED) if name in ways else cells(seed=1, effect=0.0)
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
    columns = ["condition", "perturbation", "kind", "metric", "value", "direction", "n_pred", "n_real"]
    assert list(table.columns) == columns
    better = dict(zip(table["metric"], table["direction"], strict=True))
    assert better["rmse_mean"] == "lower" and better["cosine_logfc"] == "higher"
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
    assert np.isnan(de.top_k_recall(np.arange(4.0), np.arange(4.0)[::-1]))  # the top 50 of 4 genes are all of them
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
    monkeypatch.setattr(distances, "PAIRS", 40)  # in blocks as at once
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
def test_principal_axes_three_ways(form):
    x = np.random.default_rng(0).normal(size=(240, 200)) * np.linspace(1, 3, 200)
    centre = x.mean(0)
    _, values, vectors = np.linalg.svd(x - centre)
    ways = (principal._axes_of_few_genes, principal._axes_of_few_cells, principal._axes_of_many_genes)
    for way in ways:
        variances, axes = way(form(x), centre, 4)
        np.testing.assert_allclose(variances, values[:4] ** 2)
        np.testing.assert_allclose(np.abs(vectors[:4] @ axes), np.eye(4), atol=1e-7)


def test_principal_axes_of_few_distinct_cells(monkeypatch):
    """Fewer dimensions than asked for, by each way."""
    x = np.random.default_rng(0).normal(size=(3, 60))[np.arange(90) % 3]
    for way in ("_axes_of_few_genes", "_axes_of_few_cells", "_axes_of_many_genes"):
        monkeypatch.setattr(principal, "_axes_of_few_genes", getattr(principal, way))
        centre, axes = principal.principal_axes(x, 5)
        assert axes.shape == (60, 2)
        np.testing.assert_allclose((x - centre) @ axes @ axes.T, x - centre, atol=1e-6)


def test_principal_axes_are_fewer_with_a_warning(caplog):
    x = np.random.default_rng(0).normal(size=(20, 2)) @ np.random.default_rng(1).normal(size=(2, 9))
    with caplog.at_level(logging.WARNING):
        _, axes = principal.principal_axes(x, 5)
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
    np.testing.assert_array_equal(rank.ranks([[3.0]], "lower"), [np.nan])
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


def test_one_perturbation_has_no_rank():
    only = REAL[REAL.obs["gene"].isin(["control", "C"])]
    relative = [name for name, record in METRICS.items() if record.relative]
    assert {"pds_l1", "pds_norm_l2", "mmd_gex_rank"} < set(relative)
    scores = evaluate(PRED[PRED.obs["gene"] == "C"], only, DESIGN, [*relative, "rmse_mean"])
    table = values(scores)
    assert table[relative].isna().all(axis=None)
    assert table["rmse_mean"].gt(0).all()
    assert set(scores.attrs["reasons"]) == set(relative)
    assert "two perturbations" in scores.attrs["reasons"]["mmd_gex_rank"]


def test_the_top_50_of_50_genes_mean_nothing():
    few = REAL[:, :50], PRED[:, :50]
    scores = evaluate(few[1], few[0], DESIGN, ["deg_recall", "deg_recall_rank", "cosine_logfc"])
    assert values(scores)["deg_recall"].isna().all()
    assert "50 genes" in scores.attrs["reasons"]["deg_recall"]


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
    assert np.isfinite(table.drop(columns="de_false_calls")).all(axis=None)
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


def to_linear(adata):
    adata.X = np.expm1(2 * adata.X)


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
    "no logarithm": (lambda: (PRED, edited(REAL, to_linear)), "real: X looks like raw counts"),
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
    original = pairs.moments
    monkeypatch.setattr(pairs, "moments", lambda block: calls.append(1) or original(block))
    monkeypatch.setattr(distribution, "principal_axes", None)  # not needed again
    pd.testing.assert_frame_equal(values(score(first.against(PRED), ALL)), reference)
    assert len(calls) == 8  # the predicted side only


def test_score_of_a_pair_computes_shared_parts_once(monkeypatch):
    calls = []
    original = pairs.moments
    monkeypatch.setattr(pairs, "moments", lambda block: calls.append(1) or original(block))
    pair = Pair(PRED, REAL, DESIGN, n_pcs=10)
    score(pair)
    assert len(calls) == 2 * 8 + 2  # each condition on both sides, and the controls of each group
    score(pair)
    assert len(calls) == 18


# generated populations


def test_transport_of_equal_numbers_is_an_assignment():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 60):
        cost = cdist(rng.normal(size=(n, 3)), rng.normal(0.5, 1, size=(n, 3)))
        assert generation.transport_cost(cost) == pytest.approx(cost[linear_sum_assignment(cost)].mean(), rel=1e-12)


def test_transport_of_unequal_numbers_is_that_of_copies():
    rng = np.random.default_rng(0)
    for n, m in ((6, 4), (9, 15), (1, 5), (30, 18)):
        x, y = rng.normal(size=(n, 3)), rng.normal(0.5, 1, size=(m, 3))
        shared = np.lcm(n, m)
        copies = [np.repeat(side, shared // len(side), axis=0) for side in (x, y)]
        assert generation.wasserstein2(x, y) == pytest.approx(generation.wasserstein2(*copies), rel=1e-9)
        assert generation.wasserstein1(y, x) == pytest.approx(generation.wasserstein1(*copies), rel=1e-9)
    assert generation.transport_cost(np.zeros((2, 3))) == 0


def test_transport_needs_routes_beyond_the_cheapest():
    """All are nearest to the same few: most of the mass must go far."""
    x, y = np.random.default_rng(0).normal(size=(40, 2)), np.concatenate([np.zeros((30, 2)), np.full((70, 2), 9.0)])
    copies = np.repeat(x, 5, axis=0), np.repeat(y, 2, axis=0)
    assert generation.wasserstein2(x, y) == pytest.approx(generation.wasserstein2(*copies), rel=1e-9)


def test_neighbourhoods_by_hand():
    real, pred = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [1.0], [10.0]])
    # k = 1: real balls (-1, 1), (0, 2), (1, 5); predicted (0, 1), (0.5, 1.5), (1, 19)
    assert generation.knn_precision(pred, real, k=1) == pytest.approx(2 / 3)
    assert generation.knn_recall(pred, real, k=1) == pytest.approx(2 / 3)  # 1 and 3; 0 lies on the border
    assert generation.knn_density(pred, real, k=1) == pytest.approx((2 + 1 + 0) / 3)
    assert generation.knn_coverage(pred, real, k=1) == pytest.approx(2 / 3)
    assert generation.knn_precision(pred, real, k=50) == generation.knn_precision(pred, real, k=2)
    assert np.isnan(generation.knn_precision(pred, real[:1])) and np.isnan(generation.knn_recall(pred[:1], real))


def test_kernels_by_hand():
    x, y = np.array([[0.0], [2.0], [5.0]]), np.array([[1.0], [2.0], [9.0], [4.0]])

    def mean(a, b, sigma):
        return np.exp(-cdist(a, b, "sqeuclidean") / (2 * sigma**2)).mean()

    biased = sum(mean(x, x, s) + mean(y[:3], y[:3], s) - 2 * mean(x, y[:3], s) for s in (1, 3))
    assert generation.mmd_rbf(x, y, sigmas=(1, 3)) == pytest.approx(biased)
    inner = [(9 * mean(a, a, 2) - 3) / 6 for a in (x, y[:3])]
    assert generation.mmd_rbf_unbiased(x, y, sigmas=(2,)) == pytest.approx(sum(inner) - 2 * mean(x, y[:3], 2))
    sigma = np.median([1, 8, 3, 7, 2, 5])
    inner = (9 * mean(x, x, sigma) - 3) / 6 + (16 * mean(y, y, sigma) - 4) / 12
    assert generation.mmd_rbf_median(x, y) == pytest.approx(inner - 2 * mean(x, y, sigma))
    difference = x[:, 0] - y[:3, 0]
    assert generation.mmd_linear(x, y) == pytest.approx(
        (difference[0] * difference[1] + difference[1] * difference[2]) / 2
    )


def test_edges_of_generated_populations():
    one, same, real = np.ones((1, 2)), np.ones((12, 2)), np.random.default_rng(0).normal(size=(20, 2))
    for function in (generation.mmd_rbf_unbiased, generation.mmd_rbf_median, generation.mmd_linear):
        assert np.isnan(function(one, real))
    assert np.isnan(generation.mmd_rbf_median(real, same))  # no distance to measure by
    assert generation.mmd_rbf(real, real) == 0 and generation.wasserstein2(real, real[::-1]) == 0
    assert generation.knn_recall(same, real) == 0  # a collapsed prediction covers nothing
    assert generation.knn_precision(one, real) in (0, 1) and generation.wasserstein2(one, real) > 0


def test_neighbours_on_axes_of_other_cells():
    """Other cells of the same kind are covered, unless the axes are those of the cells that are scored."""

    def noise(seed):
        x = np.log1p(np.random.default_rng(seed).poisson(1.0, (120, 400))).astype(np.float32)
        return anndata.AnnData(x, var=pd.DataFrame(index=[f"G{i}" for i in range(400)]))

    names = ["knn_recall", "knn_recall_disjoint", "knn_precision_disjoint"]
    table = evaluate(noise(0), noise(1), Design(), names).set_index("metric")["value"]
    assert table["knn_recall"] < 0.3
    assert table["knn_recall_disjoint"] > 0.7
    assert table["knn_precision_disjoint"] > 0.7


def test_median_distance_of_many(monkeypatch):
    x = np.random.default_rng(0).normal(size=(300, 4))
    every = generation._median_distance(x)
    monkeypatch.setattr(generation, "MANY", 150)
    some = generation._median_distance(x)
    assert some != every and some == pytest.approx(every, rel=0.05)


def test_unbiased_kernel_distance_has_mean_zero():
    rng = np.random.default_rng(0)
    found = np.array([generation.mmd_rbf_median(rng.normal(size=(9, 3)), rng.normal(size=(14, 3))) for _ in range(300)])
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(300)


def test_scaled_components_have_unit_variance():
    pair = Pair(PRED, REAL, DESIGN, n_pcs=5)
    centre, axes = distribution.axes_of_all(pair)
    projected = (REAL[:, pair.genes].X.toarray().astype(float) - centre) @ axes
    for side in ("pred", "real"):
        ratio = pair.see("pca", side, "t1|A") / pair.see("pca_scaled", side, "t1|A")
        np.testing.assert_allclose(ratio, np.tile(projected.std(axis=0), (len(ratio), 1)), rtol=1e-6)


# corrected variants


def test_linear_logfc_undoes_the_logarithm_first():
    pair = Pair(PRED, REAL, DESIGN)
    genes = REAL.var_names.get_indexer(pair.genes)
    x, c = (np.expm1(select(a, label)).mean(0)[genes] for a, label in ((PRED, "B"), (REAL, "control")))
    found = pair.see("logfc_linear", "pred", "t1|B")
    np.testing.assert_allclose(found, np.log2(x + 0.1) - np.log2(c + 0.1), atol=1e-5)
    below = edited(PRED, set_value(-3.0))
    assert np.isfinite(values(evaluate(below, REAL, DESIGN, "cosine_logfc_linear"))).all(axis=None)


def test_variance_floor_keeps_deterministic_predictions():
    still = dense(PRED)
    for label in LABELS[1:]:
        for kind in ("t1", "t2"):
            rows = ((still.obs["gene"] == label) & (still.obs["kind"] == kind)).to_numpy()
            still.X[rows] = still.X[rows].mean(axis=0)
    table = values(evaluate(still, REAL, DESIGN, ["deg_recall_floor", "deg_recall"]))
    moving = values(evaluate(PRED, REAL, DESIGN, ["deg_recall_floor"]))
    np.testing.assert_allclose(table["deg_recall_floor"], moving["deg_recall_floor"], atol=0.1)
    pair = Pair(still, REAL, DESIGN)
    x, v, n = pair.moments("pred", "t1|A")
    c, w, _ = pair.control_moments("pred", "t1")
    expressed = w > 0
    expected = (x - c)[expressed] / np.sqrt(np.maximum(v, w) / n + w / n)[expressed]
    np.testing.assert_allclose(pair.see("scores_floor", "pred", "t1|A")[expressed], expected, rtol=1e-5)
    one = still[~still.obs.duplicated(["gene", "kind"])]
    assert (values(evaluate(one, REAL, DESIGN, ["deg_recall_floor"])) > 0.7).all(axis=None)


def test_variance_ratio():
    real = np.random.default_rng(0).normal(size=(9, 5))
    var = real.var(0, ddof=1)
    assert mean.variance_ratio((3 * real).var(0, ddof=1), var) == pytest.approx(9)
    assert np.isnan(mean.variance_ratio(var, 0 * var)) and np.isnan(mean.variance_ratio(np.full(5, np.nan), var))
    assert values(evaluate(REAL, REAL, DESIGN, "variance_ratio"))["variance_ratio"].to_numpy() == pytest.approx(1)


def test_coefficient_of_variation():
    x = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0]])
    found = mean.coefficient_of_variation(x.mean(0), x.var(0, ddof=1), 2)
    np.testing.assert_allclose(found, [0.5, 0, 0])
    np.testing.assert_array_equal(mean.coefficient_of_variation(x[0], np.full(3, np.nan), 1), 0)


def test_r2_with_the_real_data_as_truth():
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    assert mean.r2_ref(x, y) == pytest.approx(sklearn_r2(y, x)) != pytest.approx(mean.r2_score(x, y))


def test_scaled_by_the_real_cells(reference):
    pair = Pair(PRED, REAL, DESIGN)
    np.testing.assert_allclose(pair.see("scaled_ref", "real", "t1|A"), pair.see("scaled", "real", "t1|A"))
    group = np.concatenate([select(REAL, label) for label in LABELS])
    z = (select(PRED, "A") - group.mean(0)) / group.std(0, ddof=1)
    genes = PRED.var_names.get_indexer(pair.genes)
    np.testing.assert_allclose(pair.see("scaled_ref", "pred", "t1|A"), np.clip(z, -10, 10).mean(0)[genes], atol=1e-6)


def test_components_of_cells_that_are_not_scored():
    pair = Pair(PRED, REAL, DESIGN, n_pcs=5)
    n_scored = sum(len(pair.scored_half(name)) for name in pair.conditions.index)
    assert pair.unscored_matrix().shape[0] == REAL.n_obs - n_scored
    for name in pair.conditions.index:
        half = pair.scored_half(name)
        assert len(half) == (pair.n_cells("real", name) + 1) // 2 == len(pair.see("pca_disjoint", "real", name))
        assert len(pair.see("pca_disjoint", "pred", name)) == pair.n_cells("pred", name)
    # cells that are scored do not bend the axes: new values in them leave the projection of the others as it is
    changed = dense(REAL)
    first = np.flatnonzero((REAL.obs["gene"] == "A") & (REAL.obs["kind"] == "t1"))
    axes = principal.principal_axes(pair.unscored_matrix(), 5)
    changed.X[first[pair.scored_half("t1|A")]] += 1.0
    other = Pair(PRED, changed, DESIGN, n_pcs=5)
    other.scored_half = pair.scored_half  # the halves depend on the values
    np.testing.assert_allclose(principal.principal_axes(other.unscored_matrix(), 5)[0], axes[0], atol=1e-6)


def test_seeded_order_is_that_of_the_cells():
    pair = Pair(PRED, REAL, DESIGN)
    turned = Pair(PRED[::-1], REAL, DESIGN)
    orders = [one.cells("pred", "t1|A")[one.seeded_order("pred", "t1|A")] for one in (pair, turned)]
    np.testing.assert_array_equal(*orders)
    assert (np.diff(pair.seeded_order("pred", "t1|A")) != 1).any()


# large matrices of distances


def test_a_rough_look_changes_no_rank(monkeypatch):
    rng = np.random.default_rng(0)
    shifts = [rng.normal(size=600) * (rng.random(600) < 0.1) for _ in range(7)]
    sides = [[rng.gamma(1, 1, (20 + i, 600)) + shift for i, shift in enumerate(shifts)] for _ in range(2)]
    sides[0].append(sides[0][-1] + 1e-4 * rng.normal(size=sides[0][-1].shape))  # hardly told apart
    sides[1].append(rng.gamma(1, 1, (20, 600)))
    exact = distribution._half_energy_matrix(*sides)
    seen = []
    settled = distribution._settled
    monkeypatch.setattr(distribution, "_settled", lambda *args: seen.append(settled(*args)) or seen[-1].copy())
    monkeypatch.setattr(distribution, "SCREENED", 0)
    rough = distribution._half_energy_matrix(*sides)
    np.testing.assert_array_equal(rank.ranks(rough, "lower"), rank.ranks(exact, "lower"))
    np.testing.assert_allclose(np.diagonal(rough), np.diagonal(exact), atol=1e-6)
    assert 0 < np.isnan(seen[0]).sum() < 40 and np.abs(rough - exact).max() < 0.1
    monkeypatch.setattr(distribution, "CACHED_CELLS", 1)
    monkeypatch.setattr(distribution, "PAIRS", 300)
    np.testing.assert_allclose(distribution._half_energy_matrix(*sides), rough, atol=1e-4)


def test_equal_predictions_after_a_rough_look(monkeypatch):
    monkeypatch.setattr(distribution, "SCREENED", 0)
    rng = np.random.default_rng(0)
    pred, reals = rng.random((15, 600)), [rng.random((12, 600)) + i / 9 for i in range(4)]
    np.testing.assert_allclose(rank.ranks(distribution._half_energy_matrix([pred] * 4, reals), "lower"), 0.5)


# files from anyone


def as_counts(adata):
    return anndata.AnnData(adata.X.expm1().rint(), obs=adata.obs, var=adata.var)


def normalised(counts):
    depth = np.asarray(counts.X.sum(axis=1)).ravel()
    return anndata.AnnData(np.log1p(counts.X.toarray() / (depth / np.median(depth))[:, None]), counts.obs, counts.var)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, lambda x: x.toarray()])
def test_counts_on_both_sides(form):
    sides = [as_counts(a) for a in (PRED, REAL)]
    expected = values(evaluate(*map(normalised, sides), DESIGN, ["rmse_mean", "deg_recall", "mae"]))
    counts = [anndata.AnnData(form(a.X).astype(np.int64), obs=a.obs, var=a.var) for a in sides]
    for scale in ("counts", "auto"):
        found = values(evaluate(*counts, DESIGN, ["rmse_mean", "deg_recall", "mae"], scale=scale))
        pd.testing.assert_frame_equal(found, expected, atol=1e-6)
    floor = [
        noise_floor(a, DESIGN, "mae", scale=s) for a, s in ((counts[1], "counts"), (normalised(sides[1]), "log1p"))
    ]
    np.testing.assert_allclose(*(table["value"] for table in floor), atol=1e-6)


def test_an_empty_cell_stays_empty():
    counts = as_counts(PRED)
    counts.X = sparse.diags_array((np.arange(counts.n_obs) != 3).astype(np.float32)) @ counts.X
    found = values(evaluate(counts, as_counts(REAL), DESIGN, "mae", scale="counts"))
    assert np.isfinite(found).all(axis=None)


def test_a_model_may_overshoot():
    pair = edited(PRED, set_value(24.0))
    assert np.isfinite(values(evaluate(pair, REAL, DESIGN, "mae"))).all(axis=None)


def test_messages_about_scale():
    counts = as_counts(PRED)
    with pytest.raises(ValueError, match="real seems to hold log1p and pred seems to hold counts"):
        evaluate(counts, REAL, DESIGN, "mae", scale="auto")
    with pytest.raises(ValueError, match="real: X does not hold counts.*some with a fraction"):
        evaluate(counts, REAL, DESIGN, "mae", scale="counts")
    with pytest.raises(ValueError, match="pred: X looks like raw counts.*scale='counts'"):
        evaluate(counts, REAL, DESIGN, "mae")
    with pytest.raises(ValueError, match="'logp'"):
        evaluate(PRED, REAL, DESIGN, "mae", scale="logp")
    auto = values(evaluate(PRED, REAL, DESIGN, "mae", scale="auto"))
    pd.testing.assert_frame_equal(auto, values(evaluate(PRED, REAL, DESIGN, "mae")))


def elsewhere(adata, place):
    """The expression in a layer or in obsm, something else in X."""
    other = anndata.AnnData(sparse.csr_matrix(adata.shape, dtype=np.float32), obs=adata.obs, var=adata.var.copy())
    if place == "layer":
        other.layers["expr"] = adata.X
    elif place == "frame":
        other.obsm["expr"] = pd.DataFrame(adata.X.toarray(), index=adata.obs_names, columns=adata.var_names)
    elif place == "array":
        other.obsm["expr"] = adata.X.toarray()
    else:
        more = anndata.AnnData(np.zeros((adata.n_obs, 3), np.float32), obs=adata.obs)
        more.var_names = ["x", "y", "z"]
        other = anndata.concat([other, more], axis=1, merge="first")[:, ::-1].copy()
        other.var["highly_variable"] = ~other.var_names.isin(["x", "y", "z"])
        other.obsm["expr"] = adata[:, other.var_names[other.var["highly_variable"]]].X.toarray()
    return other


@pytest.mark.parametrize("place", ["layer", "frame", "array", "highly variable"])
def test_expression_elsewhere(place, tmp_path, reference):
    names = ["rmse_mean", "mmd_pca", "deg_recall"]
    pred, real = elsewhere(PRED, place), elsewhere(REAL, place)
    both = values(evaluate(pred, real, DESIGN, names, layer="expr", n_pcs=10))
    pd.testing.assert_frame_equal(both, reference[sorted(names)], rtol=1e-5, atol=1e-5)
    written(real, tmp_path)
    one = evaluate(PRED, tmp_path / "real.h5ad", DESIGN, names, layer={"real": "expr"}, n_pcs=10)
    pd.testing.assert_frame_equal(values(one), both, atol=1e-6)
    floor = noise_floor(real, DESIGN, "rmse_mean", layer="expr", seed=1)
    np.testing.assert_allclose(floor["value"], noise_floor(REAL, DESIGN, "rmse_mean", seed=1)["value"], atol=1e-6)


def test_messages_about_layers():
    with pytest.raises(ValueError, match="pred: there is no layer and no obsm 'expr'; found layers none, obsm none"):
        evaluate(PRED, REAL, DESIGN, "mae", layer={"pred": "expr"})
    with pytest.raises(ValueError, match="keys 'pred' and 'real'; found truth"):
        evaluate(PRED, REAL, DESIGN, "mae", layer={"truth": "expr"})
    short = elsewhere(PRED, "array")
    short.obsm["expr"] = short.obsm["expr"][:, :9]
    with pytest.raises(ValueError, match=f"9 columns without gene names, var_names has {N_GENES}"):
        evaluate(short, REAL, DESIGN, "mae", layer={"pred": "expr"})
    bare = anndata.AnnData(obs=PRED.obs, obsm={"X_hvg": PRED.X.toarray()})
    with pytest.raises(ValueError, match="pred: expected cells and genes.*stands in X_hvg, name it with layer="):
        evaluate(bare, REAL, DESIGN, "mae")


def test_a_file_without_gene_names(caplog, reference):
    nameless = [anndata.AnnData(a.X, obs=a.obs) for a in (PRED, REAL)]
    with pytest.raises(ValueError, match="pred: no gene names.*adata.var_names"):
        evaluate(nameless[0], REAL, DESIGN, "mae")
    with pytest.raises(ValueError, match="real: no gene names"):
        evaluate(PRED, nameless[1], DESIGN, "mae")
    with caplog.at_level(logging.WARNING):
        found = values(evaluate(*nameless, DESIGN, "mae"))
    assert "neither file has gene names" in caplog.text
    pd.testing.assert_frame_equal(found, reference[["mae"]], atol=1e-6)


def test_real_files_may_have_fewer_genes_than_the_prediction(reference):
    fewer = REAL[:, 5:].copy()
    found = evaluate(PRED, fewer, DESIGN, "mae")
    pd.testing.assert_frame_equal(values(found), values(evaluate(PRED[:, 5:], fewer, DESIGN, "mae")))


def test_genes_that_no_cell_expresses():
    """They change no mean over genes but its denominator, and no metric becomes undefined."""
    silent = anndata.AnnData(np.zeros((REAL.n_obs, 4), np.float32), obs=REAL.obs)
    silent.var_names = [f"S{i}" for i in range(4)]
    sides = [anndata.concat([a, silent], axis=1, merge="first") for a in (PRED, REAL)]
    table, plain = (values(evaluate(*pair, DESIGN, ALL, n_pcs=10)) for pair in (sides, (PRED, REAL)))
    assert table.isna().sum().sum() == plain.isna().sum().sum()
    np.testing.assert_allclose(table["mse"] * (N_GENES + 4), plain["mse"] * N_GENES, rtol=1e-6)
    same = ["cosine_logfc", "cosine_logfc_linear", "mmd_gex", "mmd_pca", "deg_recall", "pds_l1", "wasserstein2"]
    pd.testing.assert_frame_equal(table[same], plain[same], atol=1e-6)


def test_predictions_without_variance_or_with_one_cell():
    still = dense(PRED)
    for label in LABELS[1:]:
        rows = (still.obs["gene"] == label).to_numpy()
        still.X[rows] = still.X[rows].mean(axis=0)
    table = values(evaluate(still, REAL, DESIGN, ALL, n_pcs=10))
    undefined = set(table.columns[table.isna().any()])
    assert undefined == set(INERT)
    assert (table["knn_recall"] == 0).all() and (table["mmd_rbf"] > 0.1).all()
    one = still[~still.obs.duplicated(["gene", "kind"])]
    single = values(evaluate(one, REAL, DESIGN, ALL, n_pcs=10))
    needs_two = {
        "variance_ratio",
        "energy_distance",
        "mmd_pca_disjoint",
        "mmd_rbf_unbiased",
        "mmd_rbf_median",
        "mmd_linear",
        *("knn_recall", "knn_recall_disjoint", "knn_precision_disjoint"),
        "mmd_rbf_disjoint",
        "c2st",
        "correlation_error",
        "rmse_logvar",
    }
    assert (
        needs_two
        <= set(single.columns[single.isna().any()])
        <= needs_two | {*INERT, "de_spearman_lfc", "de_spearman_size"}
    )
    lonely = REAL[~REAL.obs.duplicated(["gene", "kind"]) | (REAL.obs["gene"] == "control")]
    alone = evaluate(PRED, lonely, DESIGN, ALL, n_pcs=10)
    assert (alone["n_real"] == 1).all() and values(alone)[["rmse_mean", "mmd_gex", "wasserstein2"]].notna().all(
        axis=None
    )


# halves and summaries


def test_ceiling():
    names = ["pearson_delta", "de_recall", "mae"]
    table = ceiling(REAL, DESIGN, names, seed=3)
    halves = Pair.equal_halves(REAL, DESIGN, seed=3)
    r = values(score(halves, names)).mean()
    np.testing.assert_allclose(table.loc[names[:2], "ceiling"], (2 * r / (1 + r))[names[:2]])
    assert np.isnan(table.loc["mae", "ceiling"]) and table.loc["mae", "mean"] == pytest.approx(r["mae"])
    assert not table.equals(ceiling(REAL, DESIGN, names, seed=4))
    sizes = {name: halves.n_cells("pred", name) for name in halves.conditions.index}
    assert sizes == {name: halves.n_cells("real", name) for name in sizes}
    assert sizes["t1|A"] == 12 and sizes["t1|C"] == 14
    assert [halves.control_moments(side, "t1")[2] for side in ("pred", "real")] == [12, 12]
    assert (halves.control_moments("pred", "t1")[0] != halves.control_moments("real", "t1")[0]).any()


def test_ceiling_messages(caplog):
    one = REAL.obs.duplicated(["gene", "kind"])
    with pytest.raises(ValueError, match=r"controls of t1.*fewer than two"):
        ceiling(REAL[(REAL.obs["gene"] != "control") | ~one], DESIGN, "mae")
    with pytest.raises(ValueError, match="no condition has two or more cells"):
        ceiling(REAL[~one | (REAL.obs["gene"] == "control")], DESIGN, "mae")
    lonely = (REAL.obs["gene"] == "A") & (REAL.obs["kind"] == "t1") & one
    with caplog.at_level(logging.WARNING):
        assert ceiling(REAL[~lonely], DESIGN, "mae").loc["mae", "n_scored"] == 7
    assert "t1|A" in caplog.text


def test_summary_in_which_nan_spoils_the_mean():
    rows = [("A", "mae", 1.0), ("B", "mae", np.nan), ("A", "de_recall", np.nan), ("B", "de_recall", 0.5)]
    rows += [("A", "de_spearman_lfc", np.nan), ("B", "de_spearman_lfc", 0.25)]
    scores = pd.DataFrame(rows, columns=["condition", "metric", "value"])
    assert summarize(scores)["mean"].to_dict() == {"mae": 1.0, "de_recall": 0.5, "de_spearman_lfc": 0.25}
    strict = summarize(scores, compat=True)
    assert np.isnan(strict.loc["mae", "mean"]) and strict.loc["mae", "n_nan"] == 1
    assert strict.loc["de_recall", "mean"] == 0.5  # A has no real DE gene: no value, not NaN
    assert strict.loc["de_spearman_lfc", "mean"] == 0.25
    swapped = scores.replace({"condition": {"A": "B", "B": "A"}}).iloc[[2, 3]]
    mixed = pd.concat([swapped, scores.iloc[[4, 5]]])
    assert np.isnan(summarize(mixed, compat=True).loc["de_spearman_lfc", "mean"])  # A has DE genes, and no correlation


# populations


def gaussian(n, seed, *, scale=1.0, mixing=None):
    x = scale * np.random.default_rng(seed).normal(size=(n, 6))
    return x if mixing is None else x @ mixing


def test_classifier_test():
    real = gaussian(400, 0)
    assert population.c2st(gaussian(400, 1), real) < 0.12
    assert population.c2st(gaussian(400, 1) + 3, real) > 0.95
    assert population.c2st(gaussian(400, 1, scale=2), real) > 0.6  # the spread alone tells them apart
    assert np.isnan(population.c2st(gaussian(4, 1), real))


def test_correlation_error():
    mixing = np.random.default_rng(0).normal(size=(6, 6))
    real, same, alone = (
        np.corrcoef(x, rowvar=False)
        for x in (gaussian(3000, 1, mixing=mixing), gaussian(3000, 2, mixing=mixing), gaussian(3000, 3))
    )
    upper = np.triu_indices(6, 1)
    assert population.correlation_error(same, real) < 0.03
    assert population.correlation_error(alone, real) == pytest.approx(np.abs(alone - real)[upper].mean())
    constant = np.full((6, 6), np.nan)
    assert np.isnan(population.correlation_error(real, constant))
    partly = real.copy()
    partly[0, 1:] = partly[1:, 0] = np.nan  # constant in the prediction: correlates with none
    assert population.correlation_error(partly, real) == pytest.approx(np.abs(real[0, 1:]).sum() / 15)
    assert population.correlation_error(real, partly) == 0


def test_independent_genes_are_told_by_their_correlations_alone():
    names = ["rmse_mean", "rmse_logvar", "correlation_error"]
    found = values(evaluate(independent(REAL), REAL, DESIGN, names)).mean()
    assert found["rmse_mean"] < 1e-6 and found["rmse_logvar"] < 1e-6
    assert found["correlation_error"] > 0.1


def test_zeros_distance_and_log_variance():
    assert population.zeros_distance(np.array([0.1, 0.3]), np.array([0.2, 0.4])) == pytest.approx(0.1)
    assert population.rmse_logvar(np.array([0.0, -1.0]), np.array([0.0, -2.0])) == pytest.approx(np.sqrt(0.5))
    pair = Pair(PRED, REAL, DESIGN)
    name = pair.names(pair.groups[0])[0]
    dense_cells = pair.cells("real", name)
    np.testing.assert_allclose(pair.see("zeros", "real", name), (dense_cells == 0).mean(axis=1))


def test_populations_without_perturbation():
    design = Design.from_adata(REAL, covariates=["kind"])
    table = evaluate(PRED, REAL, design)
    assert set(table["metric"]) == set(PROFILES["generation"])
    assert set(table["condition"]) == set(REAL.obs["kind"]) and (table["perturbation"] == "").all()
    assert set(noise_floor(REAL, design)["metric"]) == set(PROFILES["generation"])
    assert list(evaluate(PRED, REAL, Design(), "rmse_mean")["condition"]) == ["all"]
    with pytest.raises(ValueError, match="the design names none; .*generation"):
        evaluate(PRED, REAL, design, "cosine_logfc")

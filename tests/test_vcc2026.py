"""The metrics of the Virtual Cell Challenge 2026: against a literal transcription, attacks, anchors, false calls."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from invirtuo import Design, metrics
from invirtuo.metrics.measures import counts, wilcoxon
from invirtuo.metrics.measures.counts import bulk

GENES = [*"ABC", *(f"G{i:02d}" for i in range(57))]
TARGET_SUM = 500.0


def screen(seed=0, effect=1.0, n=70, labels=("control", "A", "B", "C", "A+B", "nobody")):
    """Counts of cells of different depth; "nobody" has no effect, as in the real screens."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(5).gamma(1.0, 3.0, len(GENES))
    blocks, names = [], []
    for label in labels:
        change = np.zeros(len(GENES))
        for part in label.split("+"):
            if part in GENES:
                truth = np.random.default_rng(ord(part))
                change[truth.permutation(len(GENES))[:25]] += truth.normal(0, 1.2, 25)
        rate = base * np.exp(effect * change) * rng.gamma(6.0, 1 / 6.0, (n, 1))
        blocks.append(rng.poisson(rate))
        names += [label] * n
    x = sparse.csr_matrix(np.concatenate(blocks).astype(np.float32))
    obs = pd.DataFrame({"gene": names}, index=[f"c{i}" for i in range(len(names))])
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=GENES))


REAL, PRED = screen(0), screen(1, effect=0.6)
DESIGN = Design.from_adata(REAL, perturbation="gene", control="control")
OPTIONS = {"bulk_target_sum": TARGET_SUM}


def panel(pred, real=REAL, **options):
    return pd.Series(metrics.vcc2026(pred, real, DESIGN, **OPTIONS | options).attrs["panel"])


# ---- the definitions, cell by cell -----------------------------------------------------------------------------------


def cells_of(adata, label):
    return adata[adata.obs["gene"] == label].X.toarray().astype(np.float64)


def profile(cells):
    return np.log1p(TARGET_SUM * cells.sum(axis=0) / cells.sum())


def jackknife(cells):
    left = np.stack([profile(np.delete(cells, i, axis=0)) for i in range(len(cells))])
    return (len(cells) - 1) / len(cells) * np.square(left - left.mean(axis=0)).sum()


def table_of(cells, control):
    """Fold changes, p-values and adjusted p-values of the genes that the control expresses."""
    cells, control = (1e6 * x / x.sum(axis=1, keepdims=True) for x in (cells, control))
    kept = control.mean(axis=0) > 5
    lfc = np.log2((cells.mean(axis=0) + 1e-9) / (control.mean(axis=0) + 1e-9))
    p = np.ones(cells.shape[1])
    for g in np.flatnonzero(kept):
        values = (np.log1p(x[:, g]).round(12) for x in (cells, control))
        p[g] = stats.mannwhitneyu(*values, method="asymptotic").pvalue
    adjusted = np.ones_like(p)
    adjusted[kept] = stats.false_discovery_control(p[kept])
    return lfc, p, adjusted


def literal(pred, real):
    """The six values, as the challenge writes them down."""
    labels = sorted(set(real.obs["gene"]) - {"control"})
    control = cells_of(real, "control")
    own = {label: GENES.index(label) if label in GENES else None for label in labels}
    effects = [{p: profile(cells_of(x, p)) - profile(control) for p in labels} for x in (pred, real)]
    kept = [g for g in range(len(GENES)) if g not in own.values()]
    ranks = []
    for p in labels:
        cosine = []
        for q in labels:
            x, y = effects[0][p][kept], effects[1][q][kept]
            cosine.append(1 - np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))
        mine = cosine[labels.index(p)]
        ranks.append(1 - sum(d < mine for d in cosine) / (len(labels) - 1))

    weight = {p: len(GENES) - (own[p] is not None) for p in labels}
    noise = {p: jackknife(cells_of(real, p)) for p in labels}
    claim = {p: min(jackknife(cells_of(pred, p)), noise[p]) for p in labels}
    budget = 0.0
    for g in range(len(GENES)):
        counted = [p for p in labels if own[p] != g]
        share = np.array([1 / weight[p] for p in counted])
        values = np.array([profile(cells_of(pred, p))[g] for p in counted])
        budget += (share * np.square(values - np.average(values, weights=share))).sum()
    rho = min(1.0, budget / sum(claim[p] / weight[p] for p in labels))
    error, distance, tables = 0.0, 0.0, {}
    for p in labels:
        genes = [g for g in range(len(GENES)) if g != own[p]]
        difference = (profile(cells_of(pred, p)) - profile(cells_of(real, p)))[genes]
        error += (np.square(difference).sum() - rho * claim[p] - noise[p]) / weight[p]
        distance += (np.square(effects[1][p][genes]).sum() - noise[p] - jackknife(control)) / weight[p]
        tables[p] = [[x[genes] for x in table_of(cells_of(side, p), control)] for side in (pred, real)]

    fidelity, reach, jaccard, nmae = [], [], [], []
    for (lfc, p_value, fdr), (real_lfc, _, real_fdr) in tables.values():
        called, truth = set(np.flatnonzero(fdr < 0.05)), set(np.flatnonzero(real_fdr < 0.05))
        right = np.sign(lfc) == np.sign(real_lfc)
        fidelity.append(sum(right[g] for g in called) / max(len(called), len(truth)) if called or truth else np.nan)
        jaccard.append(len(called & truth) / len(called | truth) if called | truth else 1.0)
        walk = sorted(truth, key=lambda g, f=fdr, p=p_value, lfc=lfc: (f[g] >= 0.05, f[g], p[g], -abs(lfc[g]), g))
        good = [k for k in range(1, len(walk) + 1) if sum(right[g] for g in walk[:k]) / k >= 0.9]
        reach.append(max(good, default=0) / len(truth) if truth else np.nan)
        if len(truth) >= 10:
            gate = sorted(truth)
            nmae.append(np.abs(lfc - real_lfc)[gate].sum() / np.abs(real_lfc)[gate].sum())
    values = [np.mean(ranks), error / distance, np.nanmean(fidelity), np.nanmean(reach), np.mean(jaccard)]
    return [*values, np.mean(nmae)]


@pytest.mark.parametrize("pred", [PRED, screen(2, effect=0.0), screen(3, effect=1.5, n=9)], ids=["half", "none", "few"])
def test_the_six_metrics_are_what_the_challenge_says(pred):
    np.testing.assert_allclose(panel(pred), literal(pred, REAL), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [2, 40, 200])
def test_the_noise_of_a_pseudobulk_is_its_jackknife(n):
    cells = cells_of(screen(4, n=n), "A")
    assert bulk(sparse.csr_array(cells), TARGET_SUM).noise == pytest.approx(jackknife(cells), rel=1e-9)
    alone = np.zeros_like(cells)
    alone[0] = cells[0]
    assert bulk(sparse.csr_array(alone), TARGET_SUM).noise == pytest.approx(
        np.square(profile(alone)).sum() * (1 - 1 / n) ** 2
    )


def test_a_group_without_counts_or_with_one_cell_has_no_noise():
    assert bulk(sparse.csr_array((3, 4))).noise == 0 and not bulk(sparse.csr_array((3, 4))).profile.any()
    assert bulk(sparse.csr_array(np.ones((1, 4)))).noise == 0


def test_evaluate_knows_them_too():
    table = metrics.evaluate(PRED, REAL, DESIGN, "vcc2026", scale="counts")
    means = metrics.summarize(table)["mean"]
    assert list(means.index) == list(metrics.PROFILES["vcc2026"])
    official = metrics.vcc2026(PRED, REAL, DESIGN).attrs["panel"]
    np.testing.assert_allclose(means, list(official.values()))


# ---- what goes in ----------------------------------------------------------------------------------------------------


def test_order_of_cells_and_genes_and_storage_do_not_matter():
    rng = np.random.default_rng(0)
    shuffled = PRED[rng.permutation(PRED.n_obs)][:, rng.permutation(PRED.n_vars)].copy()
    pd.testing.assert_series_equal(panel(shuffled), panel(PRED))
    dense = anndata.AnnData(PRED.X.toarray().astype(np.int64), obs=PRED.obs, var=PRED.var)
    pd.testing.assert_series_equal(panel(dense), panel(PRED))


def test_own_genes_do_not_count_and_may_be_declared(caplog):
    spoiled = PRED.copy()
    spoiled.X = PRED.X.toarray()
    spoiled.X[(spoiled.obs["gene"] == "A").to_numpy(), GENES.index("A")] += 3
    tests = ["de_wilcoxon_sig_jaccard", "de_wilcoxon_direction_reach_raw"]
    with caplog.at_level(logging.WARNING):
        found = metrics.vcc2026(PRED, REAL, DESIGN, **OPTIONS)
    assert "no gene of its own is left out for A+B, nobody" in caplog.text
    told = metrics.vcc2026(PRED, REAL, DESIGN, target_genes={"A+B": None, "nobody": None}, **OPTIONS)
    pd.testing.assert_frame_equal(found, told)
    split = metrics.vcc2026(PRED, REAL, DESIGN, target_genes="parts", **OPTIONS)
    of_pair = found["perturbation"] == "A+B"
    assert not np.allclose(found[of_pair]["value"], split[of_pair]["value"])
    assert found[found["perturbation"] == "A"].set_index("metric")["value"][tests].notna().all()
    with pytest.raises(ValueError, match=r"no perturbation is named after a measured gene.*target_genes"):
        metrics.vcc2026(PRED, REAL, DESIGN, target_genes=dict.fromkeys(["A", "B", "C", "A+B", "nobody"], "elsewhere"))
    assert metrics.vcc2026(PRED, REAL, DESIGN, target_genes={"*": None}).attrs["panel"]


@pytest.mark.parametrize("rows", [1, 100, 10**6])
def test_files_are_read_condition_by_condition(tmp_path, monkeypatch, rows):
    """Files on disk, few of whose cells are in memory at a time, give the same values."""
    monkeypatch.setattr(wilcoxon, "CELLS_AT_ONCE", rows)
    paths = [tmp_path / name for name in ("pred.h5ad", "real.h5ad")]
    for path, cells in zip(paths, (PRED, REAL), strict=True):
        cells.write_h5ad(path)
    backed = [anndata.read_h5ad(path, backed="r") for path in paths]
    expected = metrics.challenge_score(PRED, REAL, DESIGN, n_splits=2, target_genes="parts", **OPTIONS)
    found = metrics.challenge_score(*backed, DESIGN, n_splits=2, target_genes="parts", **OPTIONS)
    pd.testing.assert_frame_equal(found, expected)
    table = metrics.vcc2026(*map(str, paths), DESIGN, target_genes="parts", **OPTIONS)
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected.attrs["scores"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.log1p, "does not hold raw counts"),
        (lambda x: x - 1, "does not hold raw counts"),
        (lambda x: x * 1e5, "counts; expected at most 1,000,000"),
    ],
)
def test_values_that_are_no_counts(change, message):
    wrong = anndata.AnnData(change(PRED.X.toarray()), obs=PRED.obs, var=PRED.var)
    with pytest.raises(ValueError, match=message):
        metrics.vcc2026(wrong, REAL, DESIGN)


def test_genes_and_labels_must_be_the_same():
    with pytest.raises(ValueError, match="same perturbations; found in real only: C"):
        metrics.vcc2026(PRED[PRED.obs["gene"] != "C"], REAL, DESIGN)
    with pytest.raises(ValueError, match="same genes; found in pred only: G56"):
        metrics.vcc2026(PRED, REAL[:, :-1].copy(), DESIGN)


def test_log_values_stand_for_what_they_are_the_logarithm_of():
    sides = [anndata.AnnData(np.log1p(x.X.toarray()), obs=x.obs, var=x.var) for x in (PRED, REAL)]
    found = metrics.vcc2026(*sides, DESIGN, scale="log1p", **OPTIONS)
    assert found.attrs["input"] == "log1p"
    np.testing.assert_allclose(list(found.attrs["panel"].values()), panel(PRED), rtol=1e-4)


def test_a_ratio_that_does_not_exist_says_why(caplog):
    few = screen(0, effect=0.02, n=6)
    with caplog.at_level(logging.WARNING):
        found = metrics.vcc2026(screen(1, n=6), few, DESIGN)
    assert np.isnan(found.attrs["panel"]["expr_mse_unbiased_capped_norm"])
    assert "take about ten times the counts of a cell" in caplog.text
    assert "bulk_target_sum=50000" in found.attrs["reasons"]["expr_mse_unbiased_capped_norm"]


# ---- anchors ---------------------------------------------------------------------------------------------------------


def test_between_the_mean_response_and_a_replicate():
    baseline = metrics.vcc2026(metrics.mean_response(REAL, DESIGN), REAL, DESIGN, fractional=True, **OPTIONS)
    replicates = metrics.replicates(REAL, DESIGN, n_splits=3, **OPTIONS)
    assert set(replicates["split"]) == {0, 1, 2} and len(replicates) == 18
    scaled = {name: metrics.anchored(metrics.vcc2026(cells, REAL, DESIGN, **OPTIONS), baseline, replicates)
              for name, cells in {"twin": screen(9), "half": PRED, "none": screen(8, effect=0.0)}.items()}  # fmt: skip
    averages = {name: table.loc["average", "score"] for name, table in scaled.items()}
    assert averages["twin"] > 0.9 and averages["twin"] > averages["half"] > averages["none"] and averages["none"] < 0.2
    own = metrics.anchored(baseline, baseline, replicates)["score"].iloc[:-1]
    np.testing.assert_allclose(own, 0, atol=1e-12)


def test_every_cell_of_a_tile_is_the_mean_response():
    tile = metrics.mean_response(REAL, DESIGN, emission="tile")
    means = np.stack([cells_of(REAL, label).mean(axis=0) for label in sorted(set(REAL.obs["gene"]) - {"control"})])
    g = GENES.index("B")
    others = np.delete(means[:, g], 2)  # A, A+B, B, C, nobody
    np.testing.assert_allclose(tile.X.toarray()[:, g], others.mean(), rtol=1e-6)
    np.testing.assert_allclose(tile.X.toarray()[:, 10], means[:, 10].mean(), rtol=1e-6)
    assert list(tile.var_names) == GENES and "control" not in set(tile.obs["gene"])


def test_any_metric_may_be_anchored():
    log = [anndata.AnnData(np.log1p(x.X.toarray()), obs=x.obs, var=x.var) for x in (PRED, REAL, screen(8, effect=0.0))]
    pred, real, null = log
    names = ["mse", "pearson_delta", "de_nsig_pred"]
    scores, base = (metrics.evaluate(x, real, DESIGN, names) for x in (pred, null))
    replicates = metrics.replicates(real, DESIGN, names, n_splits=2)
    scaled = metrics.anchored(scores, base, replicates)
    assert list(scaled.index) == ["mse", "pearson_delta", "average"]  # a number of genes is no score
    assert 0 < scaled.loc["average", "score"] < 1.1 and (scaled["n_splits"].iloc[:-1] == 2).all()


def test_undefined_scores_and_anchors_out_of_order():
    base = {"pds_cosine": 0.5, "de_wilcoxon_lfc_nmae": 1.0, "de_wilcoxon_sig_jaccard": 0.4, "mse": 0.2}
    replicate = {"pds_cosine": 0.9, "de_wilcoxon_lfc_nmae": 0.4, "de_wilcoxon_sig_jaccard": 0.3, "mse": 0.1}
    scaled = metrics.anchored(dict.fromkeys(base, np.nan), base, replicate)
    assert scaled["score"].round(6).to_list()[:2] == [-1.25, -6.0] and scaled["score"].iloc[2:4].isna().all()
    assert "not better than the baseline" in scaled.loc["de_wilcoxon_sig_jaccard", "reason"]
    assert scaled.attrs["n_averaged"] == 2 and scaled.loc["average", "score"] == pytest.approx(-3.625)
    far = metrics.anchored({"expr_mse_unbiased_capped_norm": -2.0}, {"expr_mse_unbiased_capped_norm": 1.0},
                           {"expr_mse_unbiased_capped_norm": 0.1})  # fmt: skip
    assert far.loc["average", "score"] == 1
    wide = metrics.anchored({"mse": 0.1}, {"mse": 0.2}, [{"mse": 0.05}, {"mse": 0.17}])
    assert not wide.loc["mse", "trusted"] and wide.loc["mse", "replicate_sd"] == pytest.approx(0.06)
    for wrong in ({"pds_cosine": 0.5}, {}):
        with pytest.raises(ValueError, match="lacks metrics"):
            metrics.anchored(base, base, wrong)
    with pytest.raises(ValueError, match="unknown metric 'speed'"):
        metrics.anchored({"speed": 1}, {"speed": 1}, {"speed": 1})


def test_contexts_are_scored_one_by_one():
    def both(a, b):
        return anndata.concat({"left": a, "right": b}, label="line", index_unique="-")

    real, pred = both(REAL, screen(20)), both(PRED, screen(21))
    design = Design.from_adata(real, perturbation="gene", control="control", covariates=["line"])
    table = metrics.vcc2026(pred, real, design, **OPTIONS)
    assert list(table.attrs["contexts"].index) == ["left", "right"]
    np.testing.assert_allclose(table.attrs["contexts"].loc["left"], panel(PRED))
    baseline = metrics.vcc2026(metrics.mean_response(real, design), real, design, fractional=True, **OPTIONS)
    scaled = metrics.anchored(table, baseline, metrics.replicates(real, design, n_splits=2, **OPTIONS))
    assert scaled.loc["average", "score"] == pytest.approx(scaled.attrs["contexts"].mean(axis=1).mean())


# ---- false discoveries -----------------------------------------------------------------------------------------------


def test_false_calls_are_seen_where_nothing_changes():
    honest = metrics.false_discoveries(screen(9), REAL, DESIGN, target_genes={"*": None})
    shifted = screen(9)
    shifted.X = sparse.csr_matrix(shifted.X.toarray() + 1)  # no zero is left
    loud = metrics.false_discoveries(shifted, REAL, DESIGN, target_genes={"*": None})
    assert honest["n_inert"] == loud["n_inert"] == 1 and honest["n_active"] == 4
    assert honest["false_calls_mean"] <= 3 and loud["false_calls_mean"] > 20
    assert honest["fdr"] < 0.25 and loud["fdr"] > 0.25 and honest["recall"] > 0.6
    table = honest.attrs["calls"]
    assert table["n_both"].le(table[["n_real", "n_pred"]].min(axis=1)).all()


def test_false_discoveries_take_the_cells_that_evaluate_takes():
    log = [anndata.AnnData(np.log1p(x.X.toarray()), obs=x.obs, var=x.var) for x in (screen(9), REAL)]
    names = ["de_false_calls", "de_fdr", "de_recall_active"]
    means = metrics.summarize(metrics.evaluate(*log, DESIGN, names))["mean"]
    found = metrics.false_discoveries(*log, DESIGN)
    np.testing.assert_allclose(found[["false_calls_mean", "fdr", "recall"]], means[names])
    with pytest.raises(ValueError, match="real seems to hold counts and pred seems to hold log1p"):
        metrics.false_discoveries(log[0], REAL, DESIGN)


def test_more_predicted_cells_call_no_more_genes():
    many = screen(9, n=700, effect=0.6)
    log = [anndata.AnnData(np.log1p(x.X.toarray()), obs=x.obs, var=x.var) for x in (many, REAL)]
    pair = metrics.Pair(*log, DESIGN)
    few, all_cells = (pair.see(view, "pred", "A").significant.sum() for view in ("equal_tests", "count_tests"))
    assert few < all_cells
    again = metrics.Pair(*log, DESIGN)
    np.testing.assert_array_equal(pair.see("equal_tests", "pred", "A").lfc, again.see("equal_tests", "pred", "A").lfc)


def test_recall_at_a_rate_of_false_discoveries():
    def tests(p_value, significant):
        p_value = np.array(p_value)
        return counts.CountTests(np.ones(len(p_value)), p_value, np.where(significant, 0.01, 1.0), p_value < 2)

    truth = tests(np.ones(20), [True] * 10 + [False] * 10)

    def recall(p_value):
        pair = metrics.Pair(REAL, REAL, DESIGN, scale="counts")
        pair.own_genes = lambda name: np.empty(0, dtype=int)
        pair.genes = np.arange(20)
        pair.once("pred", ("view", "equal_tests", "A"), lambda: tests(p_value, np.ones(20)))
        pair.once("real", ("view", "equal_tests", "A"), lambda: truth)
        pair.names = lambda group: ["A"]
        return metrics.METRICS["de_recall_at_fdr"].values(pair, "all")[0]

    assert recall(np.arange(20) / 20) == 1  # all real genes first
    assert recall(np.arange(20)[::-1] / 20) == 0  # last
    assert recall(np.zeros(20)) == 0  # ties: all or none
    assert recall([0.1] * 9 + [0.3] + [0.2] * 10) == 0.9


# ---- the score, in Python and on the command line --------------------------------------------------------------------


def test_the_score_is_kept_by_content(tmp_path):
    options = {**OPTIONS, "n_splits": 2, "target_genes": "parts"}
    plain = metrics.challenge_score(PRED, REAL, DESIGN, **options)
    cache = tmp_path / "cache"
    kept = [metrics.challenge_score(PRED, REAL, DESIGN, cache=cache, **options) for _ in range(2)]
    for table in kept:
        pd.testing.assert_frame_equal(table, plain, check_exact=False, rtol=1e-12)
    assert len(list(cache.iterdir())) == 1

    # another order and storage of the same cells are the same content, another value is not
    order = np.random.default_rng(0).permutation(REAL.n_vars)
    same = anndata.AnnData(REAL.X.toarray()[:, order], obs=REAL.obs, var=REAL.var.iloc[order])
    pd.testing.assert_frame_equal(metrics.challenge_score(PRED, same, DESIGN, cache=cache, **options), kept[0])
    assert len(list(cache.iterdir())) == 1
    other = REAL.copy()
    other.X = REAL.X.toarray()
    other.X[0, 0] += 1
    assert not metrics.challenge_score(PRED, other, DESIGN, cache=cache, **options).equals(kept[0])
    assert len(list(cache.iterdir())) == 2


def test_log_values_have_anchors_too():
    pred, real = (anndata.AnnData(np.log1p(x.X.toarray()), obs=x.obs, var=x.var) for x in (PRED, REAL))
    options = {**OPTIONS, "n_splits": 2, "target_genes": "parts"}
    found = metrics.challenge_score(pred, real, DESIGN, scale="log1p", **options)
    counted = metrics.challenge_score(PRED, REAL, DESIGN, **options)
    np.testing.assert_allclose(found["score"], counted["score"], atol=0.02)


def test_score_on_the_command_line(tmp_path, run):
    PRED.write_h5ad(tmp_path / "pred.h5ad")
    REAL.write_h5ad(tmp_path / "real.h5ad")
    (tmp_path / "targets.csv").write_text("label,gene\nA+B,\nnobody,\n")
    command = [
        "score",
        tmp_path / "pred.h5ad",
        tmp_path / "real.h5ad",
        "--perturbation",
        "gene",
        "--control",
        "control",
    ]
    command += ["--bulk-target-sum", TARGET_SUM, "--splits", 2, "--out", tmp_path / "scores.csv"]
    code, out, _ = run(*command, "--target-genes", tmp_path / "targets.csv")
    assert code == 0 and "average" in out and "pds_cosine" in out
    found = pd.read_csv(tmp_path / "scores.csv", index_col="metric")
    genes = {"A+B": None, "nobody": None}
    expected = metrics.challenge_score(PRED, REAL, DESIGN, n_splits=2, target_genes=genes, **OPTIONS)
    np.testing.assert_allclose(found["score"], expected["score"])
    code, _, err = run(*command, "--target-genes", tmp_path / "nowhere.csv")
    assert code == 2 and "--target-genes" in err and "does not exist" in err
    (tmp_path / "targets.csv").write_text("name,gene\nA+B,\n")
    code, _, err = run(*command, "--target-genes", tmp_path / "targets.csv")
    assert code == 2 and "expected label and gene" in err

"""Reference: numbers of cell-eval2 0.20.0 on real screens, honest predictions and attacks."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from invirtuo import Design, metrics

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "yardstick2026"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden files are not at {GOLDEN}")

DATA = ["papalexi", "norman", "norman_no_gate", "h1"]
CASES = sorted(f"{file.parent.parent.name}/{file.parent.name}" for file in GOLDEN.glob("*/*/case.json"))


def opened(data, config):
    real = anndata.read_h5ad(GOLDEN / data / "real.h5ad")
    design = Design.from_adata(real, perturbation=config["pert_col"], control=config["control"])
    options = {"bulk_target_sum": config["bulk_target_sum"], "target_genes": config["target_gene_map"]}
    return real, design, options


def compared(table, file, keys=("perturbation", "metric"), atol=1e-9):
    expected = pd.read_csv(file).set_index(list(keys))["value"]
    found = table.set_index(list(keys))["value"]
    known = set(found.index.get_level_values("metric"))
    expected = expected[expected.index.get_level_values("metric").isin(known)]
    assert set(found.index) == set(expected.index)
    np.testing.assert_allclose(found[expected.index], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_predictions(case):
    folder = GOLDEN / case
    config = json.loads((folder / "case.json").read_text())["config"]
    real, design, options = opened(folder.parent.name, config)
    pred = anndata.read_h5ad(folder / "pred.h5ad")
    table = metrics.vcc2026(pred, real, design, controls=config["control_source"], **options)
    compared(table, folder / "results.csv")
    means = pd.read_csv(folder / "agg.csv").set_index("statistic").loc["mean"]
    panel = table.attrs["panel"]
    np.testing.assert_allclose(list(panel.values()), means.reindex(panel).astype(float), rtol=0, atol=1e-9)
    if (folder / "results_ts50000.csv").exists():
        official = metrics.vcc2026(pred, real, design, target_genes=options["target_genes"])
        expected = pd.read_csv(folder / "results_ts50000.csv")
        shared = official[official["metric"].isin(set(expected["metric"]))]
        compared(shared, folder / "results_ts50000.csv")


@pytest.mark.parametrize("case", CASES)
def test_false_discoveries(case):
    folder = GOLDEN / case
    config = json.loads((folder / "case.json").read_text())["config"]
    real, design, options = opened(folder.parent.name, config)
    pred = anndata.read_h5ad(folder / "pred.h5ad")
    found = metrics.false_discoveries(pred, real, design, target_genes=options["target_genes"])
    expected = pd.Series(json.loads((folder / "false_discoveries.json").read_text()), dtype=float)
    np.testing.assert_allclose(found[expected.index].astype(float), expected, rtol=1e-12)


@pytest.mark.parametrize("data", [pytest.param("papalexi", marks=pytest.mark.slow), *DATA[1:]])
def test_anchors_and_scores(data):
    anchors = json.loads((GOLDEN / data / "anchors.json").read_text())
    real, design, options = opened(data, anchors["config"])
    genes = options["target_genes"]
    baselines = {}
    for emission in ("tile", "dispersed"):
        cells = metrics.mean_response(real, design, emission=emission, seed=260, target_genes=genes)
        baselines[emission] = metrics.vcc2026(cells, real, design, fractional=True, **options)
        compared(baselines[emission], GOLDEN / data / f"baseline_{emission}_results.csv", atol=1e-6)
    replicates = metrics.replicates(real, design, **options)
    if not (GOLDEN / data / "anchor_splits.csv").exists():
        return  # refused by cell-eval2: a metric has no value
    compared(replicates, GOLDEN / data / "anchor_splits.csv", keys=("seed", "metric"))

    for file in sorted((GOLDEN / data).glob("*/score.json")):
        pred = anndata.read_h5ad(file.parent / "pred.h5ad")
        config = json.loads((file.parent / "case.json").read_text())["config"]
        user = metrics.vcc2026(
            pred, real, design, bulk_target_sum=config["bulk_target_sum"], target_genes=config["target_gene_map"]
        )
        for emission, expected in json.loads(file.read_text()).items():
            scaled = metrics.anchored(user, baselines[emission], replicates)
            for name, entry in expected.items():
                if isinstance(entry, dict):
                    score = np.nan if entry["score"] is None else entry["score"]
                    np.testing.assert_allclose(scaled.loc[name, "score"], score, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(scaled.loc["average", "score"], expected["mean_of_usable"], atol=1e-6)
            assert scaled.attrs["n_averaged"] == expected["n_usable"]


def test_tables_of_tests():
    anchors = json.loads((GOLDEN / "papalexi" / "anchors.json").read_text())
    real, design, _ = opened("papalexi", anchors["config"])
    pair = metrics.Pair(real, real, design, scale="counts")
    with np.load(GOLDEN / "papalexi" / "real_de.npz") as file:
        genes = pd.Index(pair.genes).get_indexer(file["genes"])
        for i, name in enumerate(file["perturbations"]):
            found = pair.see("count_tests", "real", name)
            assert set(np.flatnonzero(found.tested)) == set(genes)
            np.testing.assert_allclose(found.p_value[genes], file["p_value"][i], rtol=1e-9)
            np.testing.assert_allclose(found.p_adj[genes], file["p_adj"][i], rtol=1e-9)
            np.testing.assert_allclose(found.lfc[genes], file["log2_fold_change"][i], rtol=1e-9, atol=1e-12)


def changed(pred, name):
    """The prediction with the change that the case is named after."""
    x = pred.X.toarray()
    if name == "genes_reversed":
        return pred[:, ::-1].copy()
    if name == "gene_missing":
        return pred[:, :-1].copy()
    if name == "gene_extra":
        more = anndata.AnnData(np.zeros((pred.n_obs, 1), np.float32), obs=pred.obs, var=pd.DataFrame(index=["new"]))
        return anndata.concat([pred, more], axis=1, merge="first")
    if name == "perturbation_missing":
        return pred[pred.obs["perturbation"] != "JAK2"].copy()
    if name == "perturbation_extra":
        obs = pred.obs.astype(str)
        obs.iloc[np.flatnonzero(obs["perturbation"] == "JAK2")[:10]] = "NOTINREAL"
        return anndata.AnnData(pred.X, obs=obs, var=pred.var)
    changes = {"negative": -1.0, "nan": np.nan, "inf": np.inf, "cell_total_above_1e6": 1_000_001.0}
    changes |= {"one_fraction": 1.25, "tiny_fraction": np.float32(1.0000005)}
    if name in changes:
        x[0, 0] = changes[name]
    elif name == "lognorm":
        x = np.log1p(x)
    elif name == "fractional":
        x = x + 0.5
    elif name == "int_dtype":
        x = x.astype(np.int32)
    elif name == "dense":
        x = x.astype(np.float64)
    result = anndata.AnnData(x, obs=pred.obs, var=pred.var.copy())
    if name == "duplicate_gene":
        result.var_names = [*result.var_names[[0, 0]], *result.var_names[2:]]
    return result


def test_refusals():
    """What is refused there is refused here, but for the order of genes and the control rows, which do not matter."""
    facts = json.loads((GOLDEN / "papalexi" / "refusals.json").read_text())
    real, design, options = opened("papalexi", facts["config"])
    pred = anndata.read_h5ad(GOLDEN / "papalexi" / facts["base_case"] / "pred.h5ad")
    skipped = {"no_label_is_a_gene", "control_missing", "cells_shuffled"}
    for case in facts["outcomes"]:
        name = case["name"]
        if name in skipped:
            continue
        if case["raises"] and name != "genes_reversed":
            with pytest.raises(ValueError, match="pred"):
                metrics.vcc2026(changed(pred, name), real, design, **options)
        else:
            panel = metrics.vcc2026(changed(pred, name), real, design, **options).attrs["panel"]
            expected = case.get("means") or metrics.vcc2026(pred, real, design, **options).attrs["panel"]
            np.testing.assert_allclose([panel[key] for key in panel], [expected[key] for key in panel], atol=1e-9)
    nowhere = dict.fromkeys(options["target_genes"], "not a gene")
    with pytest.raises(ValueError, match="no perturbation is named after"):
        metrics.vcc2026(pred, real, design, target_genes=nowhere)

"""Flags: every attack raises its own, honest predictions raise none."""

import numpy as np
import pandas as pd
import pytest
from studies.attacks import ATTACKS, Prediction
from test_vcc2026 import DESIGN, GENES, REAL, screen

from invirtuo import metrics

RAISES = {
    "amplified": "amplified",
    "everything_called": "false_calls",
    "nothing_called": "few_cells",
    "extra_depth": "other_depth",
    "own_target_scatter": "own_gene_scatter",
    "pinned_sums": "same_for_all",
    "silent_genes_raised": "false_calls",  # no gene is silent here, the rarest are raised
    "other_targets_spiked": "genes_of_others",
    "collapsed": "no_spread",
    "same_for_all": "same_for_all",
}
CONTROLS = REAL[REAL.obs["gene"] == "control"]
HONEST = {"twin": screen(9), "half": screen(9, effect=0.6), "controls": screen(9, effect=0.0)}


def perturbed(cells):
    return cells[cells.obs["gene"] != "control"].copy()


def flags(pred, **options):
    found = metrics.flags(pred, REAL, DESIGN, scale="counts", target_genes="parts", **options)
    assert list(found.columns) == ["flag", "text"] and found["text"].str.len().gt(20).all()
    return set(found["flag"])


@pytest.mark.parametrize("name", HONEST)
def test_honest_predictions_are_not_flagged(name):
    assert flags(HONEST[name]) == set()


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_flagged(name):
    made = ATTACKS[name](Prediction(perturbed(HONEST["twin"]), CONTROLS, "gene"))
    assert RAISES[name] in flags(made)
    assert set(made.var_names) == set(GENES) and (made.X.toarray() >= 0).all()


def test_counts_in_genes_that_nobody_expresses():
    real, pred = ((x.copy(), x.X.toarray()) for x in (REAL, HONEST["twin"]))
    for cells, x in (real, pred):
        x[:, -6:] = 0
        cells.X = x
    controls = real[0][real[0].obs["gene"] == "control"]
    spoilt = ATTACKS["silent_genes_raised"](Prediction(perturbed(pred[0]), controls, "gene"))
    found = [metrics.flags(x, real[0], DESIGN, scale="counts", target_genes="parts")["flag"] for x in (pred[0], spoilt)]
    assert list(found[0]) == [] and "silent_genes" in set(found[1])


def test_cells_without_any_expression_are_flagged_and_scored():
    cells = screen(9)
    empty = (cells.obs["gene"] == "A").to_numpy()
    cells.X = cells.X.multiply(~empty[:, None]).tocsr()
    assert flags(cells) == {"empty_cells", "no_spread"}
    table = metrics.evaluate(cells, REAL, DESIGN, ["mse", "deg_recall"], scale="counts")
    assert table["value"].notna().any()


def test_one_profile_for_all_cells_has_no_spread():
    cells = perturbed(screen(9))
    cells.X = np.tile(CONTROLS.X.toarray().mean(axis=0).round(), (cells.n_obs, 1))
    assert "no_spread" in flags(cells)


def test_no_attack_beats_the_mean_response_unseen():
    options = {"bulk_target_sum": 500, "target_genes": "parts"}
    mean = metrics.mean_response(REAL, DESIGN, target_genes="parts")
    baseline = metrics.vcc2026(mean, REAL, DESIGN, fractional=True, **options)
    replicate = metrics.replicates(REAL, DESIGN, n_splits=2, **options)
    controls = perturbed(HONEST["controls"])
    scores = {}
    for name, spoil in ATTACKS.items():
        made = spoil(Prediction(controls, CONTROLS, "gene"))
        scaled = metrics.anchored(metrics.vcc2026(made, REAL, DESIGN, **options), baseline, replicate)
        scores[name] = scaled.loc["average", "score"] if not flags(made) else -np.inf
    assert pd.Series(scores).max() < 0.02


def test_evaluate_says_what_is_suspect(tmp_path, run):
    spoilt = ATTACKS["collapsed"](Prediction(perturbed(HONEST["twin"]), CONTROLS, "gene"))
    for name, cells in (("spoilt", spoilt), ("honest", HONEST["twin"]), ("real", REAL)):
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    columns = ["--perturbation", "gene", "--control", "control", "--scale", "counts", "--out", tmp_path / "scores.csv"]
    code, out, _ = run("evaluate", tmp_path / "spoilt.h5ad", tmp_path / "real.h5ad", *columns)
    assert code == 0 and "suspect: cells are alike in 5 of 5 conditions" in out
    code, out, _ = run("evaluate", tmp_path / "honest.h5ad", tmp_path / "real.h5ad", *columns)
    assert code == 0 and "suspect" not in out and "de_fdr" in out

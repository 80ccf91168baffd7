"""Which perturbations act in real cells: counted as the tests say, beside halves of the control cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import invirtuo as iv
from invirtuo.metrics import responses


@pytest.fixture(scope="module")
def counts():
    """Toy cells, and a label of control cells that nothing was done to."""
    cells = iv.datasets.toy()
    controls = np.flatnonzero((cells.obs["perturbation"] == "control").to_numpy())
    labels = cells.obs["perturbation"].astype(str).to_numpy()
    labels[controls[::3]] = "nothing"
    cells.obs["perturbation"] = labels
    return cells


@pytest.fixture(scope="module")
def design(counts):
    return iv.Design.from_adata(counts, perturbation="perturbation", control="control", covariates=["cell_type"])


def test_genes_are_those_of_the_profile(counts, design):
    cells = iv.preprocess.normalize(counts)
    table = responses(cells, design, n_draws=3).set_index("condition")
    scores = iv.evaluate(cells, cells, design, "de_nsig_real").set_index("condition")["value"]
    assert table["n_de"].to_dict() == scores.astype(int).to_dict()
    one = table.loc["t_cell|A"]
    means = []
    for label in ("A", "control"):
        own = (cells.obs["perturbation"] == label) & (cells.obs["cell_type"] == "t_cell")
        means.append(np.asarray(cells.X[own.to_numpy()].mean(axis=0)).ravel())
    assert one["effect"] == pytest.approx(np.sqrt(np.mean((means[0] - means[1]) ** 2)), rel=1e-5)
    assert one["n_control"] == ((cells.obs["perturbation"] == "control") & (cells.obs["cell_type"] == "t_cell")).sum()


def test_control_cells_by_another_name_do_not_act(counts, design):
    table = responses(counts, design)
    inert = table["perturbation"] == "nothing"
    assert not table.loc[inert, "acts"].any() and table.loc[~inert, "acts"].all()
    assert (table["n_de_null"] <= 2).all() and table["n_de"].is_monotonic_decreasing
    pd.testing.assert_frame_equal(table, responses(counts, design))
    assert not table["effect_null"].equals(responses(counts, design, seed=1)["effect_null"])


def test_what_cannot_be_asked(counts, design):
    few = counts[(counts.obs["perturbation"] != "control") | (counts.obs["cell_type"] != "b_cell")]
    with pytest.raises(ValueError, match=r"fewer than 4 control cells \('control'\) in b_cell"):
        responses(few, design)
    with pytest.raises(ValueError, match="names no perturbation"):
        responses(counts, iv.Design())


def test_the_shell_says_the_same(run, counts, design, tmp_path):
    counts.write_h5ad(tmp_path / "cells.h5ad")
    columns = ["--perturbation", "perturbation", "--control", "control", "--covariate", "cell_type"]
    code, said, error = run("responses", tmp_path / "cells.h5ad", *columns, "--draws", 2, "--out", tmp_path / "r.csv")
    assert code == 0 and "18 of 21 conditions change more genes" in said and "n_de_null" in said, error
    ours = responses(counts, design, n_draws=2)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "r.csv"), ours, check_dtype=False)

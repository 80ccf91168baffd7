"""Screens towards a wanted state, and interactions of pairs."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

import invirtuo as iv

GENES = [f"g{i}" for i in range(60)]
LABELS = ["ctrl", "up", "down", "none", "same", "up+down", "up+same"]


@pytest.fixture(scope="module")
def cells():
    """Cells of two types: `up` raises the first genes, `down` lowers them, `same` raises the last, `none` nothing."""
    rng = np.random.default_rng(0)
    rows, obs = [], []
    for kind, level in (("a", 3.0), ("b", 6.0)):
        for label in LABELS:
            mean = np.full(len(GENES), level)
            for part in label.split("+"):
                mean[:4] *= {"up": 3.0, "down": 0.3}.get(part, 1.0)
                mean[-4:] *= {"same": 2.0}.get(part, 1.0)
            rows.append(rng.poisson(mean, (60, len(GENES))))
            obs += [(label, kind)] * 60
    table = pd.DataFrame(obs, columns=["gene", "type"])
    adata = anndata.AnnData(np.concatenate(rows).astype(np.float32), obs=table.set_index(table.index.astype(str)),
                            var=pd.DataFrame(index=GENES))  # fmt: skip
    return iv.preprocess.normalize(adata)


@pytest.fixture(scope="module")
def design(cells):
    return iv.Design.from_adata(cells, perturbation="gene", control="ctrl", covariates=["type"])


@pytest.fixture(scope="module")
def model(cells, design):
    """Has seen all but three conditions of type b, two of them for validation."""
    val = [f"b|{label}" for label in ("down", "same")]
    split = iv.splits.hold_out(cells.obs, design, ["b|up"], val=val)
    return iv.models.PerturbationMean(design, cells.var_names, "move-cells").fit(cells, split)


SIGNATURE = dict.fromkeys(GENES[:4], 1.0)


def test_a_signature_ranks_what_raises_it(model):
    table = iv.screen(model, SIGNATURE, ["up", "down", "none", "same"])
    assert list(table["rank"]) == sorted(table["rank"]) and len(table) == 8
    assert set(table["condition"].head(2)) == {"a|up", "b|up"} and set(table["condition"].tail(2)) == {
        "a|down",
        "b|down",
    }
    assert ((table["low"] < table["change"]) & (table["change"] < table["high"])).all()
    assert table.attrs["n_calibration"] == 2
    assert (table["q_value"] >= table["p_value"] - 1e-12).all() and table["p_value"].is_monotonic_increasing
    reverse = iv.screen(model, dict.fromkeys(GENES[:4], -1.0), ["up", "down", "none", "same"])
    np.testing.assert_allclose(reverse["change"], -table["change"][::-1], atol=1e-9)


def test_changes_are_those_of_the_phenotype(model, cells, design):
    table = iv.screen(model, SIGNATURE, ["up"], cells=cells).set_index("condition")
    predicted = model.predict(table.reset_index(), 300)
    phenotype = iv.metrics.phenotype(predicted, design, signature=SIGNATURE, controls=cells).set_index("condition")
    np.testing.assert_allclose(table["change"], phenotype["effect"].reindex(table.index), rtol=1e-5)


def test_a_population_or_a_class_is_a_wanted_state(model, cells):
    wanted = cells[((cells.obs["gene"] == "up") & (cells.obs["type"] == "b")).to_numpy()].copy()
    asked = [f"b|{label}" for label in ("up", "down", "none", "same")]
    table = iv.screen(model, wanted, asked, cells=cells)
    assert table["condition"].iloc[0] == "b|up" and table["change"].iloc[0] > 0 > table["change"].iloc[-1]
    assert table["rank_mean"].iloc[0] == 1  # measured in the other type, too

    own = cells[cells.obs["gene"].isin(["up", "ctrl"]).to_numpy()]
    classifier = LogisticRegression(max_iter=500).fit(own.X.toarray(), own.obs["gene"])
    ranked = iv.screen(model, (classifier, "up"), asked, cells=cells)
    assert ranked["condition"].iloc[0] == "b|up" and 0 < ranked["change"].iloc[0] <= 1


def test_pairs_are_tried(model):
    table = iv.screen(model, SIGNATURE, ["up", "same", "none"], pairs=True)
    assert set(table["gene"]) == {"up", "same", "none", "same+up", "none+up", "none+same"}


def test_what_cannot_be_screened(model, cells):
    for arguments, options, said in (
        ((SIGNATURE, ["unknown"]), {}, "unknown"),
        (({"nowhere": 1.0},), {}, "1 of 1 genes are not in the model: nowhere"),
        (({GENES[0]: 0.0},), {}, "all weights of the signature are 0"),
        ((cells,), {}, "needs measured control cells; pass cells="),
        ((SIGNATURE, ["b|up"]), {"pairs": True}, "pairs are those of perturbations"),
        ((SIGNATURE,), {"level": 1.0}, "level is 1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            iv.screen(model, *arguments, **options)


def test_errors_of_a_known_size_are_covered():
    """Intervals cover new conditions as often as they promise, and p-values of no change are uniform."""
    from invirtuo.bench.screen import _calibrated

    rng = np.random.default_rng(0)
    covered, small = [], []
    for _ in range(2000):
        errors, new = rng.normal(size=19), rng.normal()
        half, p_values = _calibrated(np.array([new]), errors, 0.9)
        covered.append(abs(new) <= half)
        small.append(p_values[0] < 0.1)
    assert abs(np.mean(covered) - 0.9) < 0.02
    assert abs(np.mean(small) - 0.1) < 0.02


# ---- pairs -----------------------------------------------------------------------------------------------------------


def paired(strength):
    """Cells of two perturbations and of both, whose effect is so many times their sum."""
    rng = np.random.default_rng(0)
    first, second = np.zeros((2, 30))
    first[:5], second[3:9] = 1.0, -0.8
    effects = {"ctrl": 0 * first, "x": first, "y": second, "x+y": strength * (first + second)}
    values = np.concatenate([3 + rng.normal(0, 0.3, (200, 30)) + effect for effect in effects.values()])
    obs = pd.DataFrame({"gene": np.repeat(list(effects), 200)})
    adata = anndata.AnnData(values.astype(np.float32), obs=obs.set_index(obs.index.astype(str)))
    design = iv.Design.from_adata(adata, perturbation="gene", control="ctrl")
    return iv.interactions(adata, design, n_resamples=100).set_index("score")


def test_pairs_that_add_up_do_not_interact():
    additive, stronger = paired(1.0), paired(2.0)
    for score, expected in {"norm": 1.0, "magnitude": 2**0.5, "fit": 1.0}.items():
        assert additive.loc[score, "value"] == pytest.approx(expected, abs=0.05)
    assert additive.loc["norm", "low"] < 1 < additive.loc["norm", "high"]
    assert stronger.loc["norm", "low"] > 1.8 and stronger.loc["fit", "value"] > 0.98
    for score in ("additive", "bliss"):
        assert stronger.loc[score, "low"] > additive.loc[score, "high"]


def test_pairs_need_their_parts_and_controls(cells, design):
    with pytest.raises(ValueError, match="no pair has both its parts among the cells"):
        iv.interactions(cells[cells.obs["gene"].isin(["ctrl", "up"]).to_numpy()], design)
    perturbed = cells[(cells.obs["gene"] != "ctrl").to_numpy()]
    with pytest.raises(ValueError, match="no control cells .* as controls="):
        iv.interactions(perturbed, design)
    pd.testing.assert_frame_equal(iv.interactions(perturbed, design, controls=cells, n_resamples=5),
                                  iv.interactions(cells, design, n_resamples=5))  # fmt: skip


# ---- from the shell --------------------------------------------------------------------------------------------------


def test_the_shell_says_the_same(run, model, cells, tmp_path):
    model.save(tmp_path / "run")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    pd.DataFrame({"gene": list(SIGNATURE), "weight": 1.0}).to_csv(tmp_path / "signature.csv", index=False)
    screen = ["screen", tmp_path / "run", "--towards", tmp_path / "signature.csv"]
    code, said, _ = run(
        *screen, "--candidates", "up", "--candidates", "same", "--plot", tmp_path / "s.png",
        "--out", tmp_path / "s.csv", "--report", tmp_path / "s.html", "--cells", tmp_path / "cells.h5ad"
    )  # fmt: skip
    assert code == 0 and "4 conditions" in said and (tmp_path / "s.png").stat().st_size > 1000
    ours = iv.screen(model, SIGNATURE, ["up", "same"], cells=cells)
    page = (tmp_path / "s.html").read_text()
    best = ours.iloc[0]
    assert f"Best of 4: {best['condition']}" in page and f"{best['change']:.3g}" in page
    assert page.count("<svg") == 2 and "<img" not in page
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "s.csv"), ours, check_exact=False, rtol=1e-9, check_dtype=False
    )

    columns = ["--perturbation", "gene", "--control", "ctrl", "--covariate", "type"]
    shown = ["--out", tmp_path / "i.csv", "--report", tmp_path / "i.html"]
    code, said, _ = run("interactions", tmp_path / "cells.h5ad", *columns, *shown)
    assert code == 0 and "4 pairs" in said and "Of 4 pairs, " in (tmp_path / "i.html").read_text()
    assert set(pd.read_csv(tmp_path / "i.csv")["score"]) == {"additive", "bliss", "norm", "magnitude", "fit"}

    (tmp_path / "wrong.csv").write_text("name,weight\ng0,1\n")
    code, _, error = run(*screen[:-1], tmp_path / "wrong.csv", "--out", tmp_path / "none.csv")
    assert code == 2 and "expected gene and weight" in error and not (tmp_path / "none.csv").exists()

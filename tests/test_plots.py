"""Pictures show the numbers of their tables; axes go in and come out."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.spatial import distance

import invirtuo as iv

mpl.use("Agg")


@pytest.fixture(scope="module")
def cells():
    return iv.preprocess.normalize(iv.datasets.toy(n_genes=12))


@pytest.fixture(scope="module")
def design(cells):
    return iv.Design.from_adata(cells, perturbation="perturbation", control="control", covariates=["cell_type"])


@pytest.fixture
def ax():
    return Figure().subplots()


def heights(ax):
    """Points of all scatters of some axes, (n, 2)."""
    return np.concatenate([np.asarray(drawn.get_offsets()) for drawn in ax.collections])


def test_cells_lie_on_the_components_of_the_real_ones(cells, design, ax):
    own = cells[design.names(cells.obs) == "t_cell|A"]
    assert iv.pl.cells(own, cells, design, ax=ax) is ax
    background, real, predicted = (np.asarray(drawn.get_offsets()) for drawn in ax.collections)
    assert len(background) == cells.n_obs and len(real) == own.n_obs
    np.testing.assert_array_equal(real, predicted)
    assert ax.get_title() == "t_cell|A"
    with pytest.raises(ValueError, match="condition 'nobody' has no predicted cells; found t_cell"):
        iv.pl.cells(own, cells, design, "nobody", ax=ax)
    with pytest.raises(ValueError, match="other genes"):
        iv.pl.cells(own[:, :3], cells, design, ax=ax)


@pytest.mark.slow
def test_cells_that_are_like_no_real_ones_are_an_island(cells, design, ax):
    """On a UMAP of all together; on a map of the real cells alone they would land among these."""
    own = cells[design.names(cells.obs) == "t_cell|A"].copy()
    own.X = own.X.toarray() / 10 + np.tile([8, 0], cells.n_vars // 2)
    iv.pl.cells(own, cells, design, basis="umap", ax=ax)
    background, real, predicted = (np.asarray(drawn.get_offsets()) for drawn in ax.collections)
    assert (len(background) + len(real), len(predicted)) == (cells.n_obs, own.n_obs)
    to_real, among = (distance.cdist(predicted, others) for others in (np.concatenate([background, real]), predicted))
    np.fill_diagonal(among, np.inf)
    assert (among.min(axis=1) < to_real.min(axis=1)).all()
    again = Figure().subplots()
    iv.pl.cells(own, cells, design, basis="umap", ax=again)
    np.testing.assert_array_equal(np.asarray(again.collections[2].get_offsets()), predicted)
    with pytest.raises(ValueError, match="basis is 'tsne'; expected 'pca' or 'umap'"):
        iv.pl.cells(own, cells, design, basis="tsne", ax=ax)


def test_pictures_warn_of_cells_of_another_depth(cells, design, ax, caplog):
    """Real cells over a depth that was noted for more genes, others over the sum of the genes that are there."""
    counts = iv.datasets.toy(n_genes=12)
    more = np.random.default_rng(0).uniform(8, 12, counts.n_obs)
    counts.obs["depth"] = more * np.asarray(counts.X.sum(axis=1)).ravel()
    counts.obs["total"] = np.asarray(counts.X.sum(axis=1)).ravel()
    counts.uns["invirtuo"] = {"size_factor": "depth"}
    noted = iv.preprocess.normalize(counts)
    condition, name = noted[design.names(noted.obs) == "t_cell|A"], "t_cell|A"
    draw = {
        "cells": lambda other: iv.pl.cells(other, noted, design, name, ax=ax),
        "gene": lambda other: iv.pl.gene("gene_0", {"seen": noted, "made": other}, ax=ax),
        "volcano": lambda other: iv.pl.volcano(other, design, name, controls=noted, ax=ax),
    }
    for picture in draw.values():
        picture(condition)
        assert not caplog.records
        picture(cells[design.names(cells.obs) == name])
        assert "hardly brought to the same depth" in caplog.records[-1].message
        caplog.clear()
    iv.pl.gene("gene_0", {"seen": counts, "made": counts[:20]}, ax=ax)  # counts beside counts
    assert not caplog.records
    with pytest.raises(ValueError, match="seen looks like log1p values .* expected files on one scale"):
        iv.pl.gene(
            "gene_0",
            {"seen": iv.preprocess.normalize(counts, target_sum=500, size_factor="total"), "made": cells},
            ax=ax,
        )


def test_a_volcano_has_every_gene_and_names_the_strongest(cells, design, ax):
    shifted = cells.copy()
    x = shifted.X.toarray()
    x[(design.names(cells.obs) == "t_cell|A").to_numpy(), 4] += 3
    shifted.X = x
    iv.pl.volcano(shifted, design, "t_cell|A", n_labels=1, ax=ax)
    points = heights(ax)
    assert len(points) == cells.n_vars
    assert [text.get_text() for text in ax.texts] == ["gene_4"]
    assert points[points[:, 1].argmax(), 0] > 1
    with pytest.raises(ValueError, match="condition 'nobody' has no cells"):
        iv.pl.volcano(cells, design, "nobody", ax=ax)
    own = cells[design.names(cells.obs) == "t_cell|A"]
    with pytest.raises(ValueError, match="pass the cells that hold them as controls="):
        iv.pl.volcano(own, design, "t_cell|A", ax=ax)
    iv.pl.volcano(own, design, "t_cell|A", controls=cells, ax=ax)


def test_a_gene_says_in_how_many_cells_it_is(cells, ax):
    some = cells[:40].copy()
    some.X = np.zeros(some.shape, np.float32)
    silent = some.copy()
    some.X[:10, 0] = np.linspace(1, 2, 10)
    iv.pl.gene("gene_0", {"some": some, "silent": silent}, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["in 25%", "in 0%"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["some", "silent"]
    with pytest.raises(ValueError, match="gene 'STAT1' is not among the genes of some"):
        iv.pl.gene("STAT1", {"some": some}, ax=ax)


def test_effects_are_those_of_the_table(ax):
    table = pd.DataFrame({"condition": "c", "gene": ["a", "b", "d"], "effect": [0.1, -2.0, 1.0]})
    table = table.assign(low=table["effect"] - 1, high=table["effect"] + 1, real=0.0)
    iv.pl.effects(table, n_genes=2, ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["d", "b"]
    with pytest.raises(ValueError, match="condition 'x' is not in the table; found c"):
        iv.pl.effects(table, "x", ax=ax)


@pytest.mark.parametrize(("metric", "best"), [("rmse_mean", "a"), ("cosine_logfc", "b")])
def test_the_best_model_is_on_top(ax, metric, best):
    table = pd.DataFrame({"model": ["a", "b"] * 2, "metric": metric, "value": [0.1, 0.5, 0.2, 0.6]})
    iv.pl.scores(table, ax=ax)
    assert ax.get_yticklabels()[-1].get_text() == best
    assert ax.get_xlabel().split()[1] == {"a": "↓", "b": "↑"}[best]
    with pytest.raises(ValueError, match="no scores of 'mmd_gex'"):
        iv.pl.scores(table, "mmd_gex", ax=ax)


@pytest.mark.parametrize(("direction", "best"), [("lower", "a"), ("higher", "b"), (np.nan, "b")])
def test_the_table_says_what_is_better_of_metrics_from_elsewhere(ax, direction, best):
    table = pd.DataFrame({"model": ["a", "b"], "metric": "wonder", "value": [0.1, 0.5], "direction": direction})
    iv.pl.scores(table, ax=ax)
    assert ax.get_yticklabels()[-1].get_text() == best


def test_history_of_a_model_and_of_several(cells, design, ax):
    fit = iv.FitConfig(steps=4, batch_size=32, val_every=2, progress=False)
    split = iv.splits.hold_out(cells.obs, design, ["t_cell|A"], val_fraction=0.2)
    model = iv.models.LinearAdditive(design, cells.var_names).fit(cells, split, fit)
    iv.pl.history(model, ax=ax)
    assert {line.get_linestyle() for line in ax.lines} == {"-", "--"}
    both = pd.concat([model.history.assign(model=name) for name in "ab"])
    iv.pl.history(both, ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()][-2:] == ["a", "b"]
    with pytest.raises(ValueError, match="no 'kl' in the history; found total"):
        iv.pl.history(model, "kl", ax=ax)


def test_courses_and_network(ax):
    obs = pd.DataFrame({"time": [0.0, 1.0, 2.0]}, index=list("xyz"))
    import anndata

    course = anndata.AnnData(np.ones((3, 1)), obs=obs, var=pd.DataFrame(index=["g"]))
    course.layers["lower"], course.layers["upper"] = course.X - 1, course.X + 1
    iv.pl.courses(course, "g", time="time", observed=course, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), 1.0)
    edges = pd.DataFrame(
        {"regulator": ["a", "b"], "target": ["b", "a"], "sign": [1, -1], "score": [2.0, 1.0], "consistency": 1.0,
         "support": "all"}
    )  # fmt: skip
    other = Figure().subplots()
    iv.pl.network(edges, n_edges=1, ax=other)
    assert [label.get_text() for label in other.get_yticklabels()] == ["a"]
    with pytest.raises(ValueError, match="the table of edges is empty"):
        iv.pl.network(edges[:0])


def test_a_figure_is_made_if_no_axes_are_given(cells):
    from matplotlib import pyplot

    ax = iv.pl.gene("gene_0", {"cells": cells})
    assert ax.figure.get_axes() == [ax]
    pyplot.close(ax.figure)

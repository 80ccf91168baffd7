"""Contract tests over SAMPLERS, and the rules of each sampler."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import invirtuo as iv
from invirtuo.cells.samplers import SAMPLERS, Layout, Sets, cells, named, pairs, sets


@pytest.fixture
def timed():
    """60 cells, 2 groups, 3 time points; group "y" lacks the middle one. No perturbed cells at time 0."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"p": rng.choice(["ctrl", "a"], 60), "cell": ["x"] * 40 + ["y"] * 20, "hours": np.arange(60) % 3}
    )
    obs.loc[(obs["cell"] == "y") & (obs["hours"] == 1), "hours"] = 2
    obs.index = obs.index.map(str)
    design = iv.Design.from_adata(obs, perturbation="p", control="ctrl", covariates=["cell"], time="hours")
    return obs, design


@pytest.fixture
def layout(toy, design):
    rows = np.sort(np.random.default_rng(1).permutation(toy.n_obs)[:437])  # not all, so that rows and positions differ
    return Layout.of(toy.obs, design, rows)


def run(sampler, layout, size, seed=0):
    return list(sampler(layout, size, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seed_same_batches(name, timed):
    obs, design = timed
    layout = Layout.of(obs, design, np.arange(60))
    first, second, *others = (run(SAMPLERS[name], layout, 16, seed) for seed in (3, 3, 4, 5, 6, 7))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.target, b.target)
        assert (a.source is None) == (b.source is None)
        if a.source is not None:
            np.testing.assert_array_equal(a.source, b.source)
            assert len(a.source) == len(a.target)
    rows = [np.concatenate([r.target for r in batches]) for batches in (first, *others)]
    assert not all(np.array_equal(rows[0], other) for other in rows[1:])


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_come_from_the_layout(name, timed):
    obs, design = timed
    rows = np.arange(5, 55)
    for batch in run(SAMPLERS[name], Layout.of(obs, design, rows), 16):
        assert np.isin(batch.target, rows).all()
        assert batch.source is None or np.isin(batch.source, rows).all()


def test_courses_are_whole_and_in_the_order_of_time(timed):
    obs, design = timed
    layout = Layout.of(obs, design, np.arange(60))
    (batch,) = run(SAMPLERS["courses"], layout, 60)
    np.testing.assert_array_equal(obs["cell"].iloc[batch.target], ["x"] * 40 + ["y"] * 20)
    for cell in "xy":
        assert np.all(np.diff(obs["hours"].iloc[batch.target][obs["cell"].iloc[batch.target] == cell]) >= 0)
    assert sorted(len(b.target) for b in run(SAMPLERS["courses"], layout, 16)) == [20, 40]


def test_layout(toy, design, layout):
    obs = toy.obs.iloc[layout.rows]
    assert [layout.group_names[g] for g in layout.group] == obs["cell_type"].astype(str).tolist()
    np.testing.assert_array_equal(layout.is_control, obs["perturbation"] == "control")
    names = design.names(obs).to_numpy()
    assert len({*zip(names, layout.condition, strict=True)}) == len(set(names)) == layout.condition.max() + 1
    assert layout.time is None


def test_cells_covers_every_cell_once(layout):
    batches = run(cells, layout, 100)
    assert [len(batch.target) for batch in batches] == [100, 100, 100, 100, 37]
    assert all(batch.source is None and batch.set_size == 1 for batch in batches)
    np.testing.assert_array_equal(np.sort(np.concatenate([batch.target for batch in batches])), layout.rows)


def test_pairs_cover_perturbed_cells_and_share_covariates(toy, design, layout):
    batches = run(pairs, layout, 64)
    target = np.concatenate([batch.target for batch in batches])
    source = np.concatenate([batch.source for batch in batches])
    assert max(len(batch.target) for batch in batches) == 64
    np.testing.assert_array_equal(np.sort(target), layout.rows[~layout.is_control])
    assert design.is_control(toy.obs.iloc[source]).all()
    np.testing.assert_array_equal(design.groups(toy.obs.iloc[target]), design.groups(toy.obs.iloc[source]))
    assert len(np.unique(source)) > 0.8 * layout.is_control.sum()  # not a few controls again and again


def test_pairs_without_controls(toy, design):
    rows = np.flatnonzero(~((toy.obs["cell_type"] == "t_cell") & (toy.obs["perturbation"] == "control")))
    with pytest.raises(ValueError, match=r"no control cells.*t_cell"):
        run(pairs, Layout.of(toy.obs, design, rows), 64)


@pytest.mark.parametrize("sampler", [pairs, sets])
def test_groups_without_controls_use_the_spare_ones(toy, design, sampler):
    """Their own where there are some, those of the spare rows where there are none."""
    lacks = (toy.obs["cell_type"] == "t_cell") & (toy.obs["perturbation"] == "control")
    rows = np.flatnonzero(~lacks & (np.arange(600) < 300))
    spare = np.arange(300, 600)
    for batch in run(sampler, Layout.of(toy.obs, design, rows, spare), 64):
        assert design.is_control(toy.obs.iloc[batch.source]).all()
        np.testing.assert_array_equal(
            design.groups(toy.obs.iloc[batch.target]), design.groups(toy.obs.iloc[batch.source])
        )
        t_cell = toy.obs["cell_type"].iloc[batch.source] == "t_cell"
        assert np.isin(batch.source[t_cell], spare).all() and np.isin(batch.source[~t_cell], rows).all()


@pytest.mark.parametrize("size", [16, 64])
def test_sets(toy, design, layout, size):
    """Sets of one condition, without overlap but for the filling of a short last set; controls of the same group."""
    batches = run(Sets(size), layout, 2 * size)
    names, groups = design.names(toy.obs).to_numpy(), design.groups(toy.obs).to_numpy()
    control = design.is_control(toy.obs)
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        assert batch.set_size == size and len(batch.target) in (size, 2 * size)
        for target, source in zip(batch.target.reshape(-1, size), batch.source.reshape(-1, size), strict=True):
            assert len(set(names[target])) == 1
            assert control[source].all() and set(groups[source]) == set(groups[target])
            found.setdefault(names[target[0]], []).append(target)
            pool = (control & (groups == groups[target[0]]))[layout.rows].sum()
            assert len(set(source)) == size if pool >= size else len(set(source)) <= pool
    for name, chunks in found.items():
        members = layout.rows[names[layout.rows] == name]
        assert len(chunks) == -(-len(members) // size)  # a control condition has sets too
        assert set(np.concatenate(chunks)) == set(members)  # all are used
        full = [set(chunk) for chunk in chunks if len(set(chunk)) == size]
        short = [set(chunk) for chunk in chunks if len(set(chunk)) < size]
        assert len(short) <= 1
        assert sum(map(len, full + short)) == len(members)  # no overlap: the filling is from the short set itself
    assert set(found) == set(names[layout.rows])


def test_sets_are_cut_anew_every_epoch(layout):
    first, second = (np.concatenate([b.target for b in run(Sets(32), layout, 32, s)]) for s in (0, 1))
    assert not np.array_equal(first, second)


def test_courses_need_time(layout):
    with pytest.raises(ValueError, match="need a Design with time="):
        run(SAMPLERS["courses"], layout, 8)


def test_named(layout):
    assert named("pairs", 16) is pairs
    assert {batch.set_size for batch in run(named("sets", 16), layout, 32)} == {16}

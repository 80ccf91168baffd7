"""Judge generated populations of counts beside each other: class by class and together, with floor and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.bench.entry import FLOOR
from invirtuo.bench.panels import panels
from invirtuo.bench.run import software, write_page, write_table
from invirtuo.cells.files import read_h5ad
from invirtuo.cells.multimodal import PEAK
from invirtuo.cells.values import looks_like_counts
from invirtuo.errors import preview, whole_number
from invirtuo.metrics import Pair, noise_floor, score
from invirtuo.metrics.cells import per_10k
from invirtuo.verbs.model import track

if TYPE_CHECKING:
    import os

    from anndata import AnnData

    from invirtuo.design import Design

__all__ = ["judge", "logged", "marker_correlation"]

REAL = "training cells"  # as an origin: real ones
REAL_NOTE = f"{REAL}: real cells too, what a generator would reach that copies them; a mark like the noise floor."
DRAWN = 2000  # cells whose empty genes are drawn
BY_CLASS, TOGETHER = "class by class", "all cells together"


def judge(
    generated: Mapping[str, AnnData | str | os.PathLike[str]],
    real: AnnData | str | os.PathLike[str],
    design: Design,
    out: str | os.PathLike[str],
    *,
    metrics: Sequence[str] | str = "generation",
    n_pcs: int = 30,
    min_cells: int = 20,
    max_cells: int | None = 2000,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Score generated cells of several origins against the same real cells; write tables, pictures and a report.

    Counts are brought to log1p of counts per 10,000, all files alike. Give real cells that no generator was trained on,
    about as many generated cells, and real training cells as the origin "training cells": what they reach is the mark
    to meet.

    Parameters
    ----------
    generated
        Name to cells, AnnData or h5ad, raw counts (or log1p of counts per 10,000) in X.
    real
        The cells to be like.
    design
        Its covariates (and perturbation) are the classes.
    out
        Folder for ``scores.csv``, ``genes.csv`` (mean, variance and share of zeros by origin), ``cells.csv`` (share of
        zeros of single cells), ``panels.csv``, ``run.json`` and ``report.html``.
    metrics
        Metrics or profiles that need no control cells.
    n_pcs
        Principal components of metrics in that space.
    min_cells
        Classes with fewer real cells are not scored by themselves; they count in all cells together.
    max_cells
        Most cells of each class and origin that are scored, and most of all cells together; the rest is left out at
        random. Kernels and neighbourhoods take a time that grows with the square of the number of cells, optimal
        transport more. None scores all.
    seed
        Of the halves of the noise floor, and of the cells that are drawn.
    about
        More facts for ``run.json``.
    progress
        Show a progress bar.

    Returns
    -------
    pd.DataFrame
        As from `evaluate`, with the columns `model` and `task`: class by class, and all cells together.

    Raises
    ------
    ValueError
        If nothing is given to judge, or a file cannot be compared; the message says which.
    """
    seed = whole_number("seed", seed, 0)
    if not generated:
        raise ValueError("no generated cells are given; expected a name and an AnnData or a file for each origin")
    if max_cells is not None and max_cells < 1:
        raise ValueError(f"max_cells is {max_cells}; expected at least 1, or None to score all cells")
    out, truth = Path(out), logged(real)
    origins = {name: logged(cells) for name, cells in generated.items()}

    # a table for each origin and for the noise floor, class by class and of all cells
    tables = _scored(origins, truth, design, metrics, n_pcs, min_cells, max_cells, seed)
    n_tables = 2 * (len(origins) + 1)
    scores = pd.concat(track(tables, "scores", progress, n_tables), ignore_index=True)

    # what the report draws, real cells first
    with_real = {"real": truth, **origins}
    write_table(out / "scores.csv", scores)
    write_table(out / "genes.csv", _genes(with_real))
    write_table(out / "cells.csv", _cells(with_real, seed))
    write_table(out / "panels.csv", panels(truth, truth, origins, design, seed))

    # facts for the reader, then the page
    about = {"title": "Do generated cells look real?", **(about or {})}
    facts = {**about, "baselines": ["independent_nb"], "floor": [FLOOR, REAL], "seed": seed, "n_pcs": n_pcs}
    facts["cells"] = {name: cells.n_obs for name, cells in with_real.items()}
    facts["notes"] = [*about.get("notes", ()), *([REAL_NOTE] if REAL in origins else ())]
    if max_cells is not None and max(facts["cells"].values()) > max_cells:
        facts["notes"].append(
            f"Of each class and origin, and of all cells together, at most {max_cells:,} cells were scored, "
            f"drawn at random with seed {seed}."
        )
    write_page(out, facts | {"software": software()})
    return scores


def _scored(
    origins: Mapping[str, AnnData],
    truth: AnnData,
    design: Design,
    metrics: Sequence[str] | str,
    n_pcs: int,
    min_cells: int,
    max_cells: int | None,
    seed: int,
) -> Iterator[pd.DataFrame]:
    """Scores of every origin and of the noise floor, class by class, then of all cells together."""
    for task, roles in ((BY_CLASS, design), (TOGETHER, _without_classes(design))):
        real = _at_most(max_cells, _of_large_classes(truth, roles, min_cells), roles, seed)
        classes = roles.names(real.obs).unique()
        pair: Pair | None = None
        for name, cells in origins.items():
            known = cells[roles.names(cells.obs).isin(classes).to_numpy()]
            if not known.n_obs:
                raise ValueError(f"{name} has none of the classes of the real cells: {preview(classes)}")
            known = _at_most(max_cells, known, roles, seed)
            pair = Pair(known, real, roles, n_pcs=n_pcs) if pair is None else pair.against(known)
            yield score(pair, metrics).assign(model=name, task=task)
        floor = noise_floor(real, roles, metrics, n_pcs=n_pcs, seed=seed)
        yield floor.assign(model=FLOOR, task=task)


def marker_correlation(
    generated: AnnData, real: AnnData, by: str, markers: Sequence[str] | None = None, *, min_cells: int = 20
) -> pd.DataFrame:
    """Pearson correlation over markers between the profiles of each class in generated and in real cells.

    A profile holds the mean of log1p of counts per 10,000 of genes, and the share of cells in which peaks are open.

    Parameters
    ----------
    generated, real
        Raw counts (and open peaks) in X, `by` in obs.
    by
        Column of obs with the classes.
    markers
        Genes or peaks; None takes all features of `real`.
    min_cells
        Classes with fewer real or generated cells are left out.

    Returns
    -------
    DataFrame: the class in the column `by`, ``pearson``, and ``pearson_centred``, after the mean over the real classes
    is taken off both: the former is high as soon as features differ in their levels, the latter only if classes do.

    Raises
    ------
    ValueError
        If no class has enough cells in both.

    References
    ----------
    CFGen, arXiv:2407.11734, appendix G.4.
    """
    markers = list(real.var_names if markers is None else markers)
    real_profiles = _profiles(real, by, markers, min_cells)
    profiles = _profiles(generated, by, markers, min_cells)
    classes = real_profiles.index.intersection(profiles.index)
    if not len(classes):
        known = preview(real_profiles.index) or "none"
        raise ValueError(f"no class of {by!r} has {min_cells} cells in both; real has {known}")

    mean = real_profiles.mean()
    rows = []
    for name in classes:
        real_profile, profile = real_profiles.loc[name], profiles.loc[name]
        correlation = profile.corr(real_profile)
        centred = (profile - mean).corr(real_profile - mean)
        rows.append({by: name, "pearson": correlation, "pearson_centred": centred})
    return pd.DataFrame(rows)


def _profiles(cells: AnnData, by: str, markers: list[str], min_cells: int) -> pd.DataFrame:
    """(classes, markers) mean log expression of genes and share of open peaks."""
    # genes, then peaks
    is_peak = cells.var_names.str.startswith(PEAK)
    genes = per_10k(cells.X[:, ~is_peak])
    peaks = sparse.csr_matrix(cells.X[:, is_peak])
    x = sparse.hstack([genes, peaks], format="csr")
    names = [*cells.var_names[~is_peak], *cells.var_names[is_peak]]

    label = cells.obs[by].astype(str).to_numpy()
    means = {}
    for name in sorted(set(label)):
        members = x[label == name]
        if members.shape[0] >= min_cells:
            means[name] = np.asarray(members.mean(axis=0)).ravel()
    return pd.DataFrame.from_dict(means, orient="index", columns=names)[markers]


def logged(cells: AnnData | str | os.PathLike[str]) -> AnnData:
    """Log1p of counts per 10,000 in X, sparse; counts stay in ``layers["counts"]``; empty cells stay empty."""
    import anndata

    adata = cells if isinstance(cells, anndata.AnnData) else read_h5ad(cells)
    x = sparse.csr_matrix(adata.X, dtype=np.float32)
    found = anndata.AnnData(x, obs=adata.obs.copy(), var=adata.var[[]].copy())
    if looks_like_counts(x):
        found.X, found.layers["counts"] = per_10k(x), x
    return found


def _without_classes(design: Design) -> Design:
    return replace(design, perturbation=None, control=None, perturbations=(), covariates={}, features=())


def _of_large_classes(real: AnnData, design: Design, min_cells: int) -> AnnData:
    names = design.names(real.obs)
    large = names.value_counts().loc[lambda n: n >= min_cells].index
    if not len(large):
        raise ValueError(f"no class has {min_cells} real cells; found {preview(names.unique())}. Lower min_cells")
    return real[names.isin(large).to_numpy()].copy()


def _at_most(max_cells: int | None, cells: AnnData, design: Design, seed: int) -> AnnData:
    """The cells, or so many of each class at random."""
    names = design.names(cells.obs).reset_index(drop=True)
    if max_cells is None or names.value_counts().max() <= max_cells:
        return cells
    order = pd.Series(np.random.default_rng(seed).permutation(cells.n_obs))
    rank = order.groupby(names.to_numpy()).rank()
    return cells[(rank <= max_cells).to_numpy()]


def _values(adata: AnnData) -> sparse.csr_matrix:
    return adata.layers["counts"] if "counts" in adata.layers else adata.X


def _genes(origins: Mapping[str, AnnData]) -> pd.DataFrame:
    """Mean, variance and share of zeros of every gene of the real cells, by origin."""
    genes = next(iter(origins.values())).var_names
    tables = []
    for name, adata in origins.items():
        x = sparse.csc_matrix(_values(adata[:, genes]), dtype=np.float64)
        mean = np.asarray(x.mean(axis=0)).ravel()
        variance = np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2
        zeros = 1 - np.diff(x.indptr) / x.shape[0]
        tables.append(pd.DataFrame({"model": name, "gene": genes, "mean": mean, "variance": variance, "zeros": zeros}))
    return pd.concat(tables, ignore_index=True)


def _cells(origins: Mapping[str, AnnData], seed: int) -> pd.DataFrame:
    """Share of zeros and total of a sample of cells, by origin."""
    genes = next(iter(origins.values())).var_names
    tables = []
    for name, adata in origins.items():
        rows = np.sort(np.random.default_rng(seed).permutation(adata.n_obs)[:DRAWN])
        x = sparse.csr_matrix(_values(adata[rows][:, genes]))
        zeros = 1 - np.diff(x.indptr) / x.shape[1]
        tables.append(pd.DataFrame({"model": name, "zeros": zeros, "total": np.asarray(x.sum(axis=1)).ravel()}))
    return pd.concat(tables, ignore_index=True)

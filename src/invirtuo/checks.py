"""Checks of a cell matrix: are these counts, log values, log values twice, or nothing that a model could use.

Works on sparse and dense matrices in memory or on disk and on views; the scale is judged on a sample of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design

__all__ = [
    "check",
    "check_genes",
    "check_values",
    "labels",
    "looks_like_counts",
    "matrix",
    "require_counts",
    "require_log",
    "some",
    "with_likely",
]

LOG_MAX = 15.0  # log1p(1e6) = 13.8; counts and CP10k lie above
TWICE_MAX = float(np.log1p(np.log1p(1e4))) + 0.1
FEW_CELLS = 20


def check(
    adata: AnnData, design: Design | None = None, *, expect: Literal["log", "counts"] | None = None
) -> pd.DataFrame:
    """List everything about a data set that would trip a model, worst first; raises nothing.

    Parameters
    ----------
    adata
        Cells to look at; not changed.
    design
        Which columns mean what; None leaves the conditions out.
    expect
        What X should hold: "log" for log1p of depth-normalised counts, "counts" for raw counts.

    Returns
    -------
    DataFrame with columns ``level`` ("error", "warning" or "note"), ``about`` and ``finding``.

    Examples
    --------
    >>> import invirtuo as iv
    >>> iv.preprocess.check(iv.datasets.toy(), expect="counts")["level"].unique().tolist()
    ['note']
    """
    rows: list[tuple[str, str, str]] = [("note", "shape", f"{adata.n_obs:,} cells x {adata.n_vars:,} genes")]
    checks: list[tuple[str, Callable[[], object]]] = [
        ("genes", lambda: check_genes(adata)),
        ("values", lambda: check_values(adata, allow_negative=True)),
    ]
    if expect is not None:
        checks.append(("scale", lambda: (require_log if expect == "log" else require_counts)(adata)))
    if design is not None:
        checks.append(("design", lambda: design.encode(adata.obs)))
    for about, test in checks:
        try:
            test()
        except ValueError as error:
            rows.append(("error", about, str(error)))
    if not any(level == "error" for level, *_ in rows):
        rows.append(("note", "scale", f"X looks like {_scale(adata.X).text}"))
        if adata.obs_names.has_duplicates:
            rows.append(("warning", "cells", "cell names repeat; call adata.obs_names_make_unique()"))
        rows += _condition_findings(adata.obs, design) if design is not None else []
    order = {"error": 0, "warning": 1, "note": 2}
    rows.sort(key=lambda row: order[row[0]])
    return pd.DataFrame(rows, columns=["level", "about", "finding"])


def check_genes(adata: AnnData) -> None:
    """Raise ValueError if there are no cells or genes, or gene names are empty, missing or repeated."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"the data hold {adata.n_obs} cells and {adata.n_vars} genes; expected at least one of each")
    names = pd.Index(adata.var_names)
    empty = int((names.isna() | (names.astype(str).str.strip() == "")).sum())
    if empty:
        raise ValueError(f"{empty} genes have no name in var_names; name or remove them")
    if names.has_duplicates:
        repeated = names[names.duplicated()].unique()
        raise ValueError(
            f"{len(repeated)} gene names occur more than once (for example {', '.join(map(str, repeated[:5]))}); "
            "expected unique names. Sum or drop the copies, or call adata.var_names_make_unique()"
        )


def check_values(adata: AnnData, *, layer: str | None = None, allow_negative: bool = False) -> None:
    """Raise ValueError if X (or a layer) holds NaN or infinity, or, unless allowed, negative values.

    Looks at every value in memory; of a matrix on disk, at a sample of the cells.
    """
    values = _stored(matrix(adata, layer))
    name = _name(layer)
    if not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{name} holds values of type {values.dtype}; expected numbers")
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad:,} NaN or infinite values; expected finite numbers. Remove these cells or genes"
        )
    if not allow_negative and values.size and values.min() < 0:
        raise ValueError(
            f"{name} holds negative values (min {values.min():.3g}), as scaled or batch-corrected data do; expected "
            "values >= 0. Start from the raw counts"
        )


def looks_like_counts(X) -> bool:
    """Whether all values of a sample of the rows are whole numbers >= 0, some above 0.

    Parameters
    ----------
    X
        (n, g), sparse or dense, in memory or on disk.
    """
    return _scale(X).kind == "counts"


def require_counts(adata: AnnData, *, layer: str | None = None) -> None:
    """Raise ValueError unless X (or a layer) holds raw counts."""
    check_values(adata, layer=layer)
    scale = _scale(matrix(adata, layer))
    if scale.kind != "counts":
        has = [name for name in adata.layers if layer is None and _scale(adata.layers[name]).kind == "counts"]
        advice = f"pass layer={has[0]!r}, which holds counts" if has else "put the raw counts there"
        raise ValueError(f"{_name(layer)} looks like {scale.text}; expected raw counts (whole numbers >= 0): {advice}")


def require_log(adata: AnnData, *, layer: str | None = None, allow_negative: bool = False) -> None:
    """Raise ValueError unless X (or a layer) may be log1p of depth-normalised counts, the log taken once.

    Predicted cells may dip below zero: `allow_negative`.
    """
    check_values(adata, layer=layer, allow_negative=allow_negative)
    scale = _scale(matrix(adata, layer))
    expected = f"{_name(layer)} looks like {scale.text}; expected log1p of counts per 10,000"
    if scale.kind in ("counts", "linear"):
        raise ValueError(f"{expected}: call iv.preprocess.normalize on the raw counts")
    if scale.kind == "log1p twice":
        raise ValueError(f"{expected}: undo one logarithm with np.expm1, or start again from the raw counts")
    if scale.kind == "zeros":
        raise ValueError(f"{expected}: all values are zero")


@dataclass(frozen=True)
class _Scale:
    kind: Literal["counts", "log1p", "log1p twice", "linear", "negative", "zeros"]
    maximum: float
    whole: float

    @property
    def text(self) -> str:
        names = {
            "counts": "raw counts",
            "log1p": "log1p values",
            "log1p twice": "log1p taken twice",
            "linear": "normalised values without logarithm",
            "negative": "scaled or predicted values, some negative",
            "zeros": "nothing but zeros",
        }
        return f"{names[self.kind]} (max {self.maximum:.4g}, {self.whole:.0%} of the non-zero values whole numbers)"


def _scale(X) -> _Scale:
    rows = _sample(X)
    values = rows.data[rows.data != 0]
    if not values.size:
        return _Scale("zeros", 0.0, 1.0)
    maximum, whole = float(values.max()), float((np.abs(values - np.rint(values)) < 1e-3).mean())
    if values.min() < 0:
        return _Scale("negative", maximum, whole)
    if whole > 0.999:
        return _Scale("counts", maximum, whole)
    if maximum > LOG_MAX:
        return _Scale("linear", maximum, whole)
    return _Scale("log1p twice" if maximum < TWICE_MAX and _logged_twice(rows) else "log1p", maximum, whole)


def _logged_twice(rows: sparse.csr_array) -> bool:
    """Whether undoing two logarithms, and not one, gives what depth-normalised counts look like."""
    once = rows.copy()
    once.data = np.expm1(once.data)
    twice = once.copy()
    twice.data = np.expm1(twice.data)
    return _normalised(twice) and not _normalised(once)


def _normalised(rows: sparse.csr_array) -> bool:
    """Whether all rows have the same sum, or hold whole multiples of their smallest value."""
    sums = rows.sum(axis=1)
    sums = sums[sums > 0]
    if len(sums) > 1 and sums.std() < 0.01 * sums.mean():
        return True
    filled = np.flatnonzero(np.diff(rows.indptr))
    smallest = np.ones(rows.shape[0])
    smallest[filled] = np.minimum.reduceat(rows.data, rows.indptr[filled])
    multiples = rows.data / np.repeat(smallest, np.diff(rows.indptr))
    multiples = multiples[(multiples > 1.5) & (multiples < 100)]
    return multiples.size >= FEW_CELLS and bool((np.abs(multiples - np.rint(multiples)) < 0.02).mean() > 0.9)


def _sample(X, n: int = 1000) -> sparse.csr_array:
    """Up to n rows, evenly spaced, as float64 in memory; explicit zeros removed."""
    rows = np.unique(np.linspace(0, X.shape[0] - 1, min(n, X.shape[0])).astype(int)) if X.shape[0] else np.arange(0)
    part = sparse.csr_array(X[rows] if len(rows) < X.shape[0] else X[:], dtype=np.float64)
    part.eliminate_zeros()
    return part


def _stored(X) -> np.ndarray:
    """All stored values of a matrix in memory, those of a sample of rows of one on disk."""
    if sparse.issparse(X):
        return X.data
    return X if isinstance(X, np.ndarray) else _sample(X).data


def matrix(adata: AnnData, layer: str | None):
    """X, or the layer of that name."""
    if layer is None:
        if adata.X is None:
            raise ValueError("the AnnData has no X; expected cells x genes. Put the matrix into adata.X")
        return adata.X
    if layer not in adata.layers:
        raise ValueError(f"there is no layer {layer!r}; found {', '.join(adata.layers) or 'no layers'}")
    return adata.layers[layer]


def _name(layer: str | None) -> str:
    return "X" if layer is None else f"layers[{layer!r}]"


def _condition_findings(obs: pd.DataFrame, design: Design) -> list[tuple[str, str, str]]:
    is_control, groups, names = design.is_control(obs), design.groups(obs), design.names(obs)
    sizes = names.value_counts()
    few = sizes[sizes < FEW_CELLS]
    lonely = sorted(set(groups) - set(groups[is_control]))
    found = [
        (
            "note",
            "conditions",
            f"{len(design.perturbations)} single perturbations, {names[~is_control].nunique()} perturbed conditions in "
            f"{groups.nunique()} covariate groups, {int(is_control.sum()):,} control cells",
        )
    ]
    if lonely:
        found.append(("warning", "controls", f"no control cells in {len(lonely)} covariate groups: {some(lonely)}"))
    if len(few):
        text = f"{len(few)} conditions have fewer than {FEW_CELLS} cells: {some(few.index)}; their scores are noise"
        found.append(("warning", "conditions", text))
    return found


def labels(adata: AnnData, by: str, name: str = "the data") -> np.ndarray:
    """(n,) labels of the cells as text.

    Raises
    ------
    ValueError
        If obs has no such column.
    """
    if by not in adata.obs:
        raise ValueError(f"{name} has no column {by!r} in obs; found {some(adata.obs.columns)}")
    return adata.obs[by].astype(str).to_numpy()


def some(values, limit: int = 5) -> str:
    """Join the first few values, for messages."""
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (f", ... ({len(values)} in all)" if len(values) > limit else "")


def with_likely(wanted: str, known: Iterable[str]) -> str:
    """The first few known names for a message, and those that may have been meant."""
    names = list(map(str, known))
    likely = [name for name in names if name.casefold() == wanted.casefold()]
    likely += [name for name in get_close_matches(wanted, names, n=3) if name not in likely]
    return f"{some(names)}; did you mean {' or '.join(map(repr, likely))}?" if likely else some(names)

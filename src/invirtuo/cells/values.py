"""What a matrix of cells holds: raw counts, log values (to which base), or nothing that a model could use.

:func:`look` is asked by `check`, `prepare`, `fit` and `evaluate` alike. It reads sparse and dense matrices in memory or
on disk and views; the scale is judged on a sample of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "AnyMatrix",
    "Values",
    "canonical_csr",
    "check_values",
    "log_normalised",
    "look",
    "looks_like_counts",
    "matrix",
    "require_counts",
    "require_log",
    "require_same_scale",
]

AnyMatrix: TypeAlias = Any  # (n, g), CSR or a dense array; SciPy ships no types, so that a checker could tell neither
Kind = Literal["counts", "log1p", "log2", "log10", "log1p twice", "linear", "unit variance", "negative", "zeros"]

LOG_MAX = 15.0  # log1p(1e6) = 13.8; counts and CP10k lie above
LOG2_MAX = 21.0  # log2(1 + 1e6) = 19.9
TWICE_MAX = float(np.log1p(np.log1p(1e4))) + 0.1
BASES: dict[Kind, float] = {"log1p": np.e, "log2": 2.0, "log10": 10.0}
SAMPLE = 1000  # rows that are looked at
FEW_VALUES = 20  # below this many nothing is said of a scale
SAME_SUM = 1e-3  # relative spread of row sums that count as equal

TEXTS: dict[Kind, str] = {
    "counts": "raw counts",
    "log1p": "log1p values",
    "log2": "log2(1 + x), another logarithm than log1p",
    "log10": "log10(1 + x), another logarithm than log1p",
    "log1p twice": "log1p taken twice",
    "linear": "normalised values without logarithm",
    "unit variance": "genes scaled to unit variance",
    "negative": "scaled or predicted values, some negative",
    "zeros": "nothing but zeros",
}
NORMALIZE = "call iv.preprocess.normalize on the raw counts"
REMEDIES: dict[Kind, str] = {
    "counts": NORMALIZE,
    "linear": NORMALIZE,
    "log1p twice": "undo one logarithm with np.expm1, or start again from the raw counts",
    "log2": "multiply by np.log(2), or start again from the raw counts",
    "log10": "multiply by np.log(10), or start again from the raw counts",
    "unit variance": f"the scale of every gene is lost; {NORMALIZE}",
    "zeros": "all values are zero",
}


@dataclass(frozen=True)
class Values:
    """What :func:`look` found.

    Parameters
    ----------
    kind
        On which scale the values are.
    maximum
        The largest value.
    whole
        Share of whole numbers among the values that are not zero.
    target_sum
        Total of every cell, the logarithm undone; None where it differs from cell to cell.
    certain
        Whether counts can be recognised behind the logarithm, as in measured cells and not in predicted ones.
    """

    kind: Kind
    maximum: float
    whole: float
    target_sum: float | None = None
    certain: bool = False

    @property
    def is_usual(self) -> bool:
        """Whether models and metrics know what to do with such values: counts, log1p, predictions."""
        return self.kind in ("counts", "log1p", "negative")

    @property
    def text(self) -> str:
        """For messages."""
        total = "" if self.target_sum is None else f", {self.target_sum:,.0f} a cell"
        return (
            f"{TEXTS[self.kind]} (max {self.maximum:.4g}, {self.whole:.0%} of the non-zero values whole numbers{total})"
        )


def look(X: AnyMatrix, n_rows: int = SAMPLE) -> Values:
    """Say what a matrix holds.

    Parameters
    ----------
    X
        (n, g), sparse or dense, in memory or on disk.
    n_rows
        Number of rows to look at, evenly spaced.
    """
    rows = _sample(X, n_rows)
    values = rows.data
    if not values.size:
        return Values("zeros", 0.0, 1.0)
    maximum = float(values.max())
    whole = float((np.abs(values - np.rint(values)) < 1e-3).mean())
    # signs first, then whole numbers, then which logarithm was taken
    if values.min() < 0:
        return Values("negative", maximum, whole)
    if whole > 0.999:
        return Values("counts", maximum, whole)
    kind, target_sum, certain = _logarithm(rows, maximum)
    if target_sum is None and not certain and _has_unit_variance(X if _in_memory(X) else rows):
        kind = "unit variance"
    return Values(kind, maximum, whole, target_sum, certain)


def looks_like_counts(X: AnyMatrix) -> bool:
    """Whether all values of a sample of the rows are whole numbers >= 0, and not all 0.

    Parameters
    ----------
    X
        (n, g), sparse or dense, in memory or on disk.
    """
    return look(X).kind == "counts"


def check_values(adata: AnnData, *, layer: str | None = None, allow_negative: bool = False) -> None:
    """Raise ValueError if X (or a layer) holds NaN or infinity, or, unless allowed, negative values.

    Looks at every value in memory; of a matrix on disk, at a sample of the cells.
    """
    values = _stored(matrix(adata, layer))
    name = _name(layer)
    if not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{name} holds values of type {values.dtype}; expected numbers")
    # one pass over all values, not over a sample
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


def require_counts(adata: AnnData, *, layer: str | None = None) -> None:
    """Raise ValueError unless X (or a layer) holds raw counts."""
    check_values(adata, layer=layer)
    found = look(matrix(adata, layer))
    if found.kind == "counts":
        return

    # where counts may be instead
    has = [name for name in adata.layers if layer is None and looks_like_counts(adata.layers[name])]
    in_raw = layer is None and getattr(adata, "raw", None) is not None and looks_like_counts(adata.raw.X)
    if has:
        advice = f"pass layer={has[0]!r}, which holds counts"
    elif in_raw:
        advice = "adata.raw holds counts: pass adata.raw.to_adata()"
    elif found.kind in ("linear", "log1p") and not found.certain:
        advice = "put the raw counts there; counts corrected for background are to be rounded first"
    else:
        advice = "put the raw counts there"
    raise ValueError(f"{_name(layer)} looks like {found.text}; expected raw counts (whole numbers >= 0): {advice}")


def require_log(adata: AnnData, *, layer: str | None = None, allow_negative: bool = False) -> None:
    """Raise ValueError unless X (or a layer) may be log1p of depth-normalised counts, the log taken once.

    Predicted cells may dip below zero: `allow_negative`.
    """
    check_values(adata, layer=layer, allow_negative=allow_negative)
    found = look(matrix(adata, layer))
    if found.kind in REMEDIES:
        raise ValueError(
            f"{_name(layer)} looks like {found.text}; expected log1p of counts per 10,000: {REMEDIES[found.kind]}"
        )


def require_same_scale(found: Iterable[tuple[str, Values]]) -> None:
    """Raise ValueError if the values of several files cannot be put together.

    Parameters
    ----------
    found
        Names of the files, and what :func:`look` says of each.
    """
    known = [(name, values) for name, values in found if values.kind not in ("zeros", "negative")]
    for name, values in known[1:]:
        first_name, first = known[0]
        sums = [side.target_sum for side in (first, values) if side.target_sum is not None]
        is_other = len(sums) == 2 and abs(sums[0] - sums[1]) > 0.05 * max(sums)
        if values.kind != first.kind or (is_other and first.certain and values.certain):
            raise ValueError(
                f"{first_name} looks like {first.text}, and {name} like {values.text}; expected files on one scale. "
                "Normalise all of them alike"
            )


def matrix(adata: AnnData, layer: str | None) -> AnyMatrix:
    """X, or the layer of that name."""
    if layer is None:
        if adata.X is None:
            raise ValueError("the AnnData has no X; expected cells x genes. Put the matrix into adata.X")
        return adata.X
    if layer not in adata.layers:
        raise ValueError(f"there is no layer {layer!r}; found {', '.join(adata.layers) or 'no layers'}")
    return adata.layers[layer]


def canonical_csr(x: AnyMatrix, dtype: Any = None) -> sparse.csr_matrix:
    """A sparse or dense matrix in memory as CSR, every entry stored once; a copy only where it must be one."""
    rows = sparse.csr_matrix(x, dtype=dtype)
    if rows.has_canonical_format:
        return rows
    rows = rows.copy()  # the arrays may be the caller's
    rows.sum_duplicates()
    return rows


def log_normalised(counts: sparse.csr_matrix, depth: np.ndarray, target_sum: float) -> sparse.csr_matrix:
    """(n, g) log1p(target_sum x counts / depth), CSR in float32; cells without depth (n,) stay empty."""
    per_count = np.divide(target_sum, depth, out=np.zeros(len(depth)), where=depth > 0)
    values = np.log1p(counts.data * np.repeat(per_count, np.diff(counts.indptr))).astype(np.float32)
    return sparse.csr_matrix((values, counts.indices.copy(), counts.indptr.copy()), counts.shape)


def _logarithm(rows: sparse.csr_matrix, maximum: float) -> tuple[Kind, float | None, bool]:
    """Which logarithm was taken, the total of every cell before, and whether counts can be recognised behind it."""
    # one of few genes may make up the sum of a cell, so that other bases fit as well
    bases: Mapping[Kind, float] = BASES if rows.shape[1] >= FEW_VALUES else {"log1p": np.e}
    for kind, base in bases.items():
        if maximum > (LOG2_MAX if kind == "log2" else LOG_MAX):
            continue
        # with the right base undone, cells have equal sums, or are counts over a depth
        undone = rows.copy()
        undone.data = np.expm1(undone.data * np.log(base))
        target_sum, certain = _common_sum(undone), _in_multiples(undone)
        if target_sum is not None or certain:
            return kind, target_sum, certain
    if maximum > LOG_MAX:
        return "linear", None, False
    if maximum < TWICE_MAX:
        twice = rows.copy()
        twice.data = np.expm1(np.expm1(twice.data))
        if _common_sum(twice) is not None or _in_multiples(twice):
            return "log1p twice", None, True
    return "log1p", None, False


def _in_multiples(rows: sparse.csr_matrix) -> bool:
    """Whether all rows hold whole multiples of their smallest value, as counts do after division by a depth."""
    nonempty = np.flatnonzero(np.diff(rows.indptr))
    smallest = np.ones(rows.shape[0])
    smallest[nonempty] = np.minimum.reduceat(rows.data, rows.indptr[nonempty])
    multiples = rows.data / np.repeat(smallest, np.diff(rows.indptr))
    # 1 is a multiple of itself, and large ones are near a whole number whatever they are
    multiples = multiples[(multiples > 1.5) & (multiples < 100)]
    is_whole = np.abs(multiples - np.rint(multiples)) < 0.02
    return multiples.size >= FEW_VALUES and bool(is_whole.mean() > 0.9)


def _common_sum(rows: sparse.csr_matrix) -> float | None:
    """Sum of every row that is not empty, if it is the same for all."""
    sums = np.asarray(rows.sum(axis=1)).ravel()
    sums = sums[sums > 0]
    is_common = len(sums) > 1 and sums.std() < SAME_SUM * sums.mean()
    return float(sums.mean()) if is_common else None


def _has_unit_variance(x: AnyMatrix) -> bool:
    """Whether most genes vary by about 1, as after division by their standard deviation."""
    n, g = x.shape
    if n < FEW_VALUES or g < FEW_VALUES:
        return False
    mean = np.asarray(x.mean(axis=0), dtype=np.float64).ravel()
    square = x.multiply(x) if sparse.issparse(x) else np.square(x)
    variance = np.asarray(square.mean(axis=0), dtype=np.float64).ravel() - mean**2
    variance = variance[variance > 1e-9]
    if len(variance) < FEW_VALUES:
        return False
    near = (variance > 0.5) & (variance < 2)
    return bool(near.mean() > 0.9) and bool(0.9 < np.median(variance) < 1.1)


def _in_memory(X: AnyMatrix) -> bool:
    return sparse.issparse(X) or isinstance(X, np.ndarray)


def _sample(X: AnyMatrix, n: int) -> sparse.csr_matrix:
    """Up to n rows, evenly spaced, as float64 in memory; every entry once, no zeros."""
    n_cells = X.shape[0]
    rows = np.arange(n_cells)
    if n < n_cells:
        rows = np.unique(np.linspace(0, n_cells - 1, n).astype(int))
    sample = sparse.csr_matrix(X[rows] if len(rows) < n_cells else X[:], dtype=np.float64, copy=True)
    sample.sum_duplicates()
    sample.eliminate_zeros()
    return sample


def _stored(X: AnyMatrix) -> np.ndarray:
    """All stored values of a matrix in memory, those of a sample of rows of one on disk."""
    if isinstance(X, np.ndarray):
        return X
    values: np.ndarray = X.data if sparse.issparse(X) else _sample(X, SAMPLE).data
    return values


def _name(layer: str | None) -> str:
    return "X" if layer is None else f"layers[{layer!r}]"

"""One file of cells: which rows belong to which condition, and log1p values in a common order of genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.checks import SCORE_COLUMNS, some
from invirtuo.metrics.streamed import BLOCK, Closing, Streamed, opened
from invirtuo.store.cells import CellStore, DiskMatrix
from invirtuo.values import Values, canonical_csr, look, require_same_scale

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design
    from invirtuo.metrics.streamed import Source

__all__ = ["Cells", "Layer", "Scale", "Side", "common_scale", "compare_levels", "of_side", "per_10k"]

logger = logging.getLogger(__name__)

Side = Literal["pred", "real"]
Scale = Literal["log1p", "counts", "auto"]
Layer = str | Mapping[str, str | None] | None
MAX_LOG1P = 20.0  # log1p of 485 million: no log-normalised value is larger, most raw count tables are;
FEW, ABSURD = 1e-2, 100.0  # but a model may overshoot in this share of the values above 0, and up to here
FRACTION = 1e-3  # how far a count may lie from a whole number
SAMPLE = 1000  # cells whose scale is compared
FAR = (0.25, 2.0)  # ratios of the levels of two files that are hardly on one scale; means of logs lie below 1
DEPTH = 1e4  # total count to which :func:`per_10k` brings each cell


class Cells:
    """One file: which rows belong to which condition, and how to read them in the common gene order."""

    def __init__(
        self,
        name: str,
        source: Source,
        design: Design,
        genes: np.ndarray | None = None,
        layer: str | None = None,
    ):
        self.name = name
        self.layer = layer
        self.where = "X" if layer is None else repr(layer)
        self.adata = _checked(name, opened(source, layer=layer), layer)
        self.closing = Closing(self.adata) if self.adata is not source and self.adata.isbacked else None
        self.matrix, names = _values(name, self.adata, layer)
        obs = _checked_obs(name, self.adata.obs, design)
        control = design.is_control(obs)
        self.rows = _rows_by(design.names(obs), np.flatnonzero(~control))
        self.controls = _rows_by(design.groups(obs), np.flatnonzero(control))
        self.control_names = {group: design.names(obs.iloc[rows[:1]]).iloc[0] for group, rows in self.controls.items()}
        self.table = design.conditions(obs)
        self.table["_group"] = design.groups(self.table).to_numpy()
        self.table.index = pd.Index(design.names(self.table))
        if not names.is_unique:
            repeated = some(names[names.duplicated()].unique())
            raise ValueError(f"{name}: gene names are not unique: {repeated}; call adata.var_names_make_unique()")
        self.genes = np.array(sorted(names), dtype=object) if genes is None else genes
        self.columns = names.get_indexer(self.genes)
        _check_genes(name, names, self.genes, self.columns)
        self.scale: Literal["log1p", "counts"] = "log1p"
        self._look_at_values()

    @property
    def n_cells(self) -> int:
        return self.adata.n_obs

    def restricted(self, rows: dict[str, np.ndarray], controls: dict[str, np.ndarray] | None = None) -> Cells:
        """The same file with fewer cells per condition."""
        other = object.__new__(Cells)
        other.__dict__ |= self.__dict__ | {"rows": rows, "table": self.table.loc[sorted(rows)]}
        other.controls = self.controls if controls is None else controls
        return other

    def equal_pieces(self, rng: np.random.Generator) -> tuple[dict[str, list[np.ndarray]], set[str]]:
        """Two random halves of each condition and of the controls of each group, and what has too few cells.

        Groups and labels are visited in alphabetical order, the control at the place of its label.
        """
        of_label = [(self.table.at[name, "_group"], name, rows) for name, rows in self.rows.items()]
        of_control = [(group, self.control_names[group], rows) for group, rows in self.controls.items()]
        pieces: dict[str, list[np.ndarray]] = {}
        single: set[str] = set()
        for group, name, rows in sorted([*of_label, *of_control], key=lambda entry: entry[:2]):
            key = f"controls of {group}" if self.control_names.get(group) == name else name
            if len(rows) < 2:
                single.add(key)
                continue
            shuffled, n = rng.permutation(rows), len(rows) // 2
            pieces[key] = [shuffled[:n], shuffled[n : 2 * n]]
        return pieces, single

    def on_scale(self, scale: Literal["log1p", "counts"]) -> Cells:
        """The same file, its values log1p already or counts to be normalised; an error if they cannot be that."""
        if scale == "log1p" and (self.too_large > FEW or self.largest > ABSURD or (self.whole and self.largest >= 2)):
            raise ValueError(
                f"{self.name}: {self.where} looks like raw counts (largest value {self.largest:.4g}); expected "
                "log1p-normalised expression. Normalise both files alike, for example with "
                "scanpy.pp.normalize_total(adata, target_sum=1e4) and scanpy.pp.log1p(adata); if both hold counts, "
                "scale='counts' does it here, to the median depth of each file"
            )
        if scale == "counts" and (not self.whole or self.smallest < 0):
            raise ValueError(
                f"{self.name}: {self.where} does not hold counts (values from {self.smallest:.4g} to "
                f"{self.largest:.4g}, {'whole' if self.whole else 'some with a fraction'}); expected whole numbers "
                ">= 0 for scale='counts'. Pass scale='log1p' if both files hold log1p values"
            )
        other = object.__new__(Cells)
        other.__dict__ |= self.__dict__ | {"scale": scale}
        return other

    def read(self, rows: np.ndarray):
        """(n, g) CSR or dense, log1p, genes in the common order."""
        block = self._stored(rows)
        if self.scale == "counts":
            block = _log_normalised(block, self.size_factors[rows])
        in_order = len(self.columns) == block.shape[1] and (np.diff(self.columns) == 1).all()
        return block if in_order else block[:, self.columns]

    def matrix_of(self, rows: np.ndarray):
        """Like :meth:`read`; of a file on disk many rows are not read but streamed."""
        on_disk = self.matrix is None or isinstance(self.matrix, DiskMatrix)
        return Streamed(self.read, rows, len(self.genes)) if on_disk and len(rows) > BLOCK else self.read(rows)

    @cached_property
    def size_factors(self) -> np.ndarray:
        """(n,) depth of each cell over the median depth of the file, as scanpy's normalize_total; 1 for empty cells."""
        depths = self.depths.astype(np.float32)
        factors = depths / np.median(depths[depths > 0])
        return np.where(factors == 0, np.float32(1), factors)

    @cached_property
    def looks_like(self) -> tuple[Values, float]:
        """What a sample of the cells holds, and the median of their totals, the logarithm undone."""
        rows = np.unique(np.linspace(0, self.n_cells - 1, min(self.n_cells, SAMPLE)).astype(int))
        block = sparse.csr_matrix(self._stored(rows))[:, self.columns]
        found = look(block)
        block.data = np.expm1(np.clip(block.data, 0, MAX_LOG1P))
        return found, float(np.median(np.asarray(block.sum(axis=1))))

    def _stored(self, rows: np.ndarray):
        if self.matrix is None:
            return _in_rows(self.adata[rows].X)  # type: ignore[index]
        return _in_rows(self.matrix[rows]) if isinstance(self.matrix, DiskMatrix) else self.matrix[rows]

    def _look_at_values(self) -> None:
        """Check that all are finite; range, share above any log1p value, whether all are whole, depth of each cell."""
        self.largest, self.smallest, self.whole = -np.inf, 0.0, True
        above, positive = 0, 0
        self.depths = np.empty(self.n_cells)
        for start in range(0, self.n_cells, BLOCK):
            rows = np.arange(start, min(start + BLOCK, self.n_cells))
            block = self._stored(rows)
            values = block.data if sparse.issparse(block) else block
            if not np.isfinite(values).all():
                bad = int((~np.isfinite(values)).sum())
                raise ValueError(
                    f"{self.name}: {self.where} holds {bad} NaN or infinite values (cells from row {start}); "
                    "remove or repair"
                )
            if values.size:
                self.largest = max(self.largest, float(values.max()))
                self.smallest = min(self.smallest, float(values.min()))
            above, positive = above + int((values > MAX_LOG1P).sum()), positive + int(np.count_nonzero(values))
            self.whole = self.whole and bool((np.abs(values - np.round(values)) <= FRACTION).all())
            self.depths[rows] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
        self.too_large = above / max(positive, 1)


def common_scale(scale: Scale, *sides: Cells) -> Literal["log1p", "counts"]:
    """The stated scale, or the one that all files seem to be on."""
    if scale not in ("log1p", "counts", "auto"):
        raise ValueError(f"scale must be 'log1p', 'counts' or 'auto'; found {scale!r}")
    if scale != "auto":
        return scale
    found = {side.name: "counts" if side.whole and side.smallest >= 0 else "log1p" for side in sides}
    if len(set(found.values())) > 1:
        kinds = " and ".join(f"{name} seems to hold {kind}" for name, kind in found.items())
        raise ValueError(
            f"scale='auto': {kinds}. Bring both to log1p of the same depth and pass scale='log1p', or both to counts"
        )
    return "counts" if "counts" in found.values() else "log1p"


def compare_levels(pred: Cells, real: Cells) -> None:
    """Refuse two files of log values that were surely made in different ways, and say so where it only seems so.

    Raises
    ------
    ValueError
        If measured cells of one file are on another logarithm or another depth than those of the other.
    """
    if "counts" in (pred.scale, real.scale):
        return
    (of_pred, pred_total), (of_real, real_total) = pred.looks_like, real.looks_like
    if of_pred.certain and of_real.certain:
        require_same_scale([("real", of_real), ("pred", of_pred)])
    for name, found in (("real", of_real), ("pred", of_pred)):
        if not found.is_usual and found.kind != "zeros":
            logger.warning("%s looks like %s; expected log1p values", name, found.text)
    ratio = pred_total / real_total if real_total > 0 else 1.0
    if not FAR[0] < ratio < FAR[1]:
        logger.warning(
            "cells of pred add up to %.2g times those of real, logarithms undone; were both normalised alike?",
            ratio,
        )


def of_side(layer: Layer, side: Side) -> str | None:
    """Where the values of a file stand."""
    if isinstance(layer, Mapping):
        if unknown := set(layer) - {"pred", "real"}:
            raise ValueError(f"layer= by file has the keys 'pred' and 'real'; found {some(sorted(unknown))}")
        return layer.get(side)
    return layer


def _checked(name: str, source: AnnData | CellStore, layer: str | None) -> AnnData | CellStore:
    if isinstance(source, CellStore) and layer is not None:
        raise ValueError(
            f"{name}: layer={layer!r}, but of a store only X is read; put the values into X, or pass one h5ad file"
        )
    if source.n_obs == 0 or (layer is None and (source.n_vars == 0 or source.X is None)):
        held = [*source.layers, *source.obsm]
        raise ValueError(
            f"{name}: expected cells and genes with log1p expression in X; found {(source.n_obs, source.n_vars)}"
            + ("" if source.n_obs == 0 or not held else f". If it stands in {some(held)}, name it with layer=")
        )
    return source


def _values(name: str, adata: AnnData | CellStore, layer: str | None) -> tuple[Any, pd.Index]:
    """X, a layer or an entry of obsm as CSR or dense (None where X stays on disk), and the names of its genes."""
    if isinstance(adata, CellStore):
        return adata.X, adata.var_names
    names = adata.var_names.astype(str)
    if layer is None:
        return _matrix(adata), names
    if layer in adata.layers:
        return _in_rows(adata.layers[layer]), names
    if layer not in adata.obsm:
        raise ValueError(
            f"{name}: there is no layer and no obsm {layer!r}; found layers {some(adata.layers) or 'none'}, "
            f"obsm {some(adata.obsm) or 'none'}"
        )
    values = adata.obsm[layer]
    if isinstance(values, pd.DataFrame):
        return values.to_numpy(), values.columns.astype(str)
    chosen = adata.var["highly_variable"].to_numpy(dtype=bool) if "highly_variable" in adata.var else np.zeros(0, bool)
    if values.shape[1] == len(names):
        return _in_rows(values), names
    if values.shape[1] == chosen.sum():
        return _in_rows(values), names[chosen]
    raise ValueError(
        f"{name}: obsm[{layer!r}] has {values.shape[1]} columns without gene names, var_names has {len(names)}, and "
        f"var['highly_variable'] marks {int(chosen.sum())}. Store it as a DataFrame whose columns are gene names"
    )


def _check_genes(name: str, names: pd.Index, genes: np.ndarray, columns: np.ndarray) -> None:
    """Every gene of the real file must have a column."""
    missing = genes[columns < 0]
    nameless = [
        side for side, found in ((name, names), ("real", genes)) if set(found) == set(map(str, range(len(found))))
    ]
    if len(missing) and nameless:
        raise ValueError(
            f"{' and '.join(nameless)}: no gene names (var_names are 0, 1, 2, ...), and {len(names)} columns cannot be "
            f"matched with {len(genes)} genes of real. Put the names, in the order of the columns, into adata.var_names"
        )
    if nameless and name == "pred":
        logger.warning("neither file has gene names; the columns are taken to be in the same order")
    if len(missing):
        raise ValueError(f"{name} lacks {len(missing)} of the {len(genes)} genes of real: {some(missing)}")


def _checked_obs(name: str, obs: pd.DataFrame, design: Design) -> pd.DataFrame:
    if taken := SCORE_COLUMNS & set(design.columns) - {design.perturbation}:
        raise ValueError(f"covariate columns {some(sorted(taken))} clash with columns of the score table; rename them")
    for column in design.columns:
        if column not in obs.columns:
            raise ValueError(f"{name}: obs has no column {column!r}, which the design names; found {some(obs.columns)}")
        if obs[column].isna().any():
            missing = int(obs[column].isna().sum())
            raise ValueError(f"{name}: obs[{column!r}] has {missing} missing values; remove these cells or label them")
    return obs[design.columns]


def _rows_by(keys: pd.Series, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Key to the rows that carry it, keys sorted, rows ascending."""
    keys = keys.to_numpy()[rows]
    return {str(key): rows[index] for key, index in sorted(pd.Series(keys).groupby(keys).indices.items())}


def _matrix(adata: AnnData):
    """X as CSR or dense, quick to take rows of; None where X stays on disk."""
    if adata.isbacked and not adata.is_view and getattr(adata[:1].X, "format", None) != "csc":
        return None  # a backed view cannot be indexed again, and rows of CSC are slow to find: both are read whole
    return _in_rows(adata.to_memory().X if adata.isbacked else adata.X)


def _in_rows(x):
    """CSR without duplicates, or dense."""
    return canonical_csr(x) if sparse.issparse(x) else np.asarray(x)


def per_10k(counts) -> sparse.csr_matrix:
    """(n, g) log1p of counts per 10,000, CSR in float32; empty cells stay empty."""
    logged = canonical_csr(counts, np.float32).copy()
    total = np.asarray(logged.sum(axis=1), dtype=np.float64).ravel()
    scale = np.divide(DEPTH, total, out=np.zeros_like(total), where=total > 0)
    logged.data = np.log1p(logged.data * np.repeat(scale, np.diff(logged.indptr)).astype(np.float32))
    return logged


def _log_normalised(block, size_factors: np.ndarray):
    """log1p of counts over size factors, (n, g) and (n,) in float32."""
    if not sparse.issparse(block):
        return np.log1p(block.astype(np.float32) / size_factors[:, None])
    block = sparse.csr_array(block, dtype=np.float32, copy=True)
    block.data = np.log1p(block.data / np.repeat(size_factors, np.diff(block.indptr)))
    return block

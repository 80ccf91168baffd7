"""One file of cells: which rows belong to which condition, and log1p values in a common order of genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from invirtuo.cells.checks import SCORE_COLUMNS
from invirtuo.cells.source import AnyCells, BackedSource, Source, StoreSource, opened, source_of
from invirtuo.cells.values import AnyMatrix, Values, canonical_csr, log_normalised, look, require_same_scale
from invirtuo.design import Design
from invirtuo.errors import preview, require_column
from invirtuo.metrics.numerics.streamed import BLOCK, Streamed

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "Cells",
    "Layer",
    "Scale",
    "Side",
    "common_scale",
    "compare_levels",
    "compare_populations",
    "labels_of",
    "of_side",
    "per_10k",
    "read_cells",
    "read_scaled",
]

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


@dataclass(frozen=True)
class ValueRange:
    """What a pass over all values found.

    Parameters
    ----------
    largest, smallest
        Of all values; the smallest is at most 0.
    above
        Share of the values other than 0 that no log1p value reaches.
    fraction
        Largest distance of a value from a whole number, in the precision of the file.
    depths
        (n,) sum of each cell.
    """

    largest: float
    smallest: float
    above: float
    fraction: float
    depths: np.ndarray

    @property
    def is_whole(self) -> bool:
        """Whether all are whole numbers, up to rounding by whoever wrote them."""
        return self.fraction <= FRACTION


@dataclass(frozen=True, eq=False)
class Cells:
    """One file: which rows belong to which condition, and how to read them in the common gene order.

    Made by :func:`read_cells`.

    Parameters
    ----------
    name
        Of the file in messages: "real" or "pred".
    source, layer
        Where values are read from, and which.
    genes, columns
        (g,) names in the common order, and the column of each.
    found
        What the values look like.
    rows, controls
        Condition to rows, and covariate group to rows of its control cells.
    control_labels
        Covariate group to the label of its control cells, as the file writes it.
    table
        Conditions by name, with the Design's columns, their ``_group``, and ``_label``: the perturbation as the file
        writes it.
    scale
        "log1p", or "counts" to be normalised while they are read.
    """

    name: str
    source: Source[AnyMatrix]
    layer: str | None
    genes: np.ndarray
    columns: np.ndarray
    found: ValueRange
    rows: dict[str, np.ndarray]
    controls: dict[str, np.ndarray]
    control_labels: dict[str, str]
    table: pd.DataFrame
    scale: Literal["log1p", "counts"] = "log1p"

    @property
    def n_cells(self) -> int:
        """Number of all cells."""
        return len(self.source.obs)

    def is_same_file(self, other: Cells) -> bool:
        """Whether both were made of the same object."""
        return self.source.obs is other.source.obs

    def restricted(self, rows: dict[str, np.ndarray], controls: dict[str, np.ndarray] | None = None) -> Cells:
        """The same file with fewer cells per condition."""
        controls = self.controls if controls is None else controls
        return replace(self, rows=rows, controls=controls, table=self.table.loc[sorted(rows)])

    def equal_pieces(self, rng: np.random.Generator) -> tuple[dict[str, list[np.ndarray]], set[str]]:
        """Two random halves of each condition and of the controls of each group, and what has too few cells.

        Groups and labels are visited in alphabetical order, the control by its label.
        """
        # the order of the draws is that of cell-eval
        draws = []
        for name, rows in self.rows.items():
            draws.append((*self.table.loc[name, ["_group", "_label"]], name, rows))
        for group, rows in self.controls.items():
            draws.append((group, self.control_labels[group], f"controls of {group}", rows))
        pieces: dict[str, list[np.ndarray]] = {}
        single: set[str] = set()
        for _, _, key, rows in sorted(draws, key=lambda draw: draw[:3]):
            if len(rows) < 2:
                single.add(key)
                continue
            shuffled = rng.permutation(rows)
            n = len(rows) // 2
            pieces[key] = [shuffled[:n], shuffled[n : 2 * n]]
        return pieces, single

    def on_scale(self, scale: Literal["log1p", "counts"]) -> Cells:
        """The same file, its values log1p already or counts to be normalised; an error if they cannot be that."""
        found, where = self.found, _where(self.layer)

        # a model may overshoot in a few values; counts are large or whole
        is_far_off = found.above > FEW or found.largest > ABSURD
        if scale == "log1p" and (is_far_off or (found.is_whole and found.largest >= 2)):
            raise ValueError(
                f"{self.name}: {where} looks like raw counts (largest value {found.largest:.4g}); expected "
                "log1p-normalised expression. Normalise both files alike, for example with "
                "scanpy.pp.normalize_total(adata, target_sum=1e4) and scanpy.pp.log1p(adata); if both hold counts, "
                "scale='counts' does it here, to the median depth of each file"
            )
        if scale == "counts" and not self.may_be_counts:
            fractions = "whole" if found.is_whole else "some with a fraction"
            raise ValueError(
                f"{self.name}: {where} does not hold counts (values from {found.smallest:.4g} to "
                f"{found.largest:.4g}, {fractions}); expected whole numbers "
                ">= 0 for scale='counts'. Pass scale='log1p' if both files hold log1p values"
            )
        return self.with_scale(scale)

    def with_scale(self, scale: Literal["log1p", "counts"]) -> Cells:
        """The same file, its values taken as what the scale says."""
        return replace(self, scale=scale)

    @property
    def may_be_counts(self) -> bool:
        """Whether all values are whole numbers >= 0."""
        return self.found.is_whole and self.found.smallest >= 0

    def read(self, rows: np.ndarray) -> AnyMatrix:
        """(n, g) CSR or dense, log1p, genes in the common order."""
        block = _read(self.source, rows)
        if self.scale == "counts":
            block = _over_size_factors(block, self.size_factors[rows])
        return self._in_order(block)

    def read_counts(self, rows: np.ndarray) -> sparse.csr_array:
        """(n, g) counts in float64, genes in the common order; of log1p values what they are the logarithm of."""
        block = sparse.csr_array(self._in_order(_read(self.source, rows)), dtype=np.float64, copy=True)
        if self.scale == "log1p":
            block.data = np.expm1(np.maximum(block.data, 0.0))
        block.eliminate_zeros()
        return block

    def _in_order(self, block: AnyMatrix) -> AnyMatrix:
        """The columns of a block in the common order of genes."""
        in_order = len(self.columns) == block.shape[1] and (np.diff(self.columns) == 1).all()
        return block if in_order else block[:, self.columns]

    def matrix_of(self, rows: np.ndarray) -> AnyMatrix | Streamed:
        """Like :meth:`read`; of a file on disk many rows are not read but streamed."""
        is_streamed = self.source.on_disk and len(rows) > BLOCK
        return Streamed(self.read, rows, len(self.genes)) if is_streamed else self.read(rows)

    @cached_property
    def size_factors(self) -> np.ndarray:
        """(n,) depth of each cell over the median depth of the file, as scanpy's normalize_total; 1 for empty cells."""
        depths = self.found.depths.astype(np.float32)
        factors = depths / np.median(depths[depths > 0])
        return np.where(factors == 0, np.float32(1), factors)

    @cached_property
    def looks_like(self) -> tuple[Values, float]:
        """What a sample of the cells holds, and the median of their totals, the logarithm undone."""
        return _level(sparse.csr_matrix(_read(self.source, _some_rows(self.n_cells)))[:, self.columns])


def read_cells(
    name: str, cells: AnyCells, design: Design, *, genes: np.ndarray | None = None, layer: str | None = None
) -> Cells:
    """Open a file, check it, and look at all its values once.

    Parameters
    ----------
    name
        For messages: "real" or "pred".
    cells
        Cells, or their path.
    design
        Which columns mean what.
    genes
        (g,) names in the common order; None takes those of the file, sorted.
    layer
        A layer or an entry of obsm to read instead of X.
    """
    adata = opened(cells, small_in_memory=True, layer=layer)
    source = source_of(adata, layer=layer, name=name)
    if adata is not cells and isinstance(source, BackedSource | StoreSource):
        source.close_at_the_end()
    obs = _checked_obs(name, source.obs, design)

    # rows of every perturbed condition, and of the controls of every group
    control = design.is_control(obs)
    rows = _rows_by(design.names(obs), np.flatnonzero(~control))
    controls = _rows_by(design.groups(obs), np.flatnonzero(control))
    written = _labels(obs, design)
    control_labels = {group: written[own[0]] for group, own in controls.items()}
    table = design.conditions(obs)
    table["_group"] = design.groups(table).to_numpy()
    table.index = pd.Index(design.names(table))
    table["_label"] = [written[rows[name][0]] for name in table.index]

    # columns of the genes, in the common order
    names = source.genes
    if not names.is_unique:
        repeated = preview(names[names.duplicated()].unique())
        raise ValueError(f"{name}: gene names are not unique: {repeated}; call adata.var_names_make_unique()")
    genes = np.array(sorted(names), dtype=object) if genes is None else genes
    columns = names.get_indexer(genes)
    _check_genes(name, names, genes, columns)
    found = _value_range(source, name, layer)
    return Cells(name, source, layer, genes, columns, found, rows, controls, control_labels, table)


def _value_range(source: Source[AnyMatrix], name: str, layer: str | None) -> ValueRange:
    """Look at every value once, and refuse those that are not finite."""
    n_cells = len(source.obs)
    largest, smallest, fraction = -np.inf, 0.0, 0.0
    above, positive = 0, 0
    depths = np.empty(n_cells)
    for start in range(0, n_cells, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n_cells))
        block = _read(source, rows)
        values = block.data if sparse.issparse(block) else block
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise ValueError(
                f"{name}: {_where(layer)} holds {bad} NaN or infinite values (cells from row {start}); remove or repair"
            )
        if values.size:
            largest = max(largest, float(values.max()))
            smallest = min(smallest, float(values.min()))
        # shares and sums that tell counts from logarithms
        above += int((values > MAX_LOG1P).sum())
        positive += int(np.count_nonzero(values))
        fraction = max(fraction, float(np.abs(values - np.round(values)).max(initial=0.0)))
        depths[rows] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
    return ValueRange(largest, smallest, above / max(positive, 1), fraction, depths)


def _labels(obs: pd.DataFrame, design: Design) -> np.ndarray:
    """(n,) perturbations as the file writes them; "" for a design without."""
    if design.perturbation is None:
        return np.full(len(obs), "", dtype=object)
    return np.asarray(obs[design.perturbation].astype(str), dtype=object)


def _read(source: Source[AnyMatrix], rows: np.ndarray) -> AnyMatrix:
    """Values of rows; genes of files may come in any order, and sums shall not depend on it."""
    block = source.read(rows)
    return canonical_csr(block) if source.on_disk and sparse.issparse(block) else block


def _where(layer: str | None) -> str:
    return "X" if layer is None else repr(layer)


def common_scale(scale: Scale, *sides: Cells) -> Literal["log1p", "counts"]:
    """The stated scale, or the one that all files seem to be on."""
    if scale not in ("log1p", "counts", "auto"):
        raise ValueError(f"scale must be 'log1p', 'counts' or 'auto'; found {scale!r}")
    if scale != "auto":
        return scale
    found = {side.name: "counts" if side.may_be_counts else "log1p" for side in sides}
    if len(set(found.values())) > 1:
        kinds = " and ".join(f"{name} seems to hold {kind}" for name, kind in found.items())
        raise ValueError(
            f"scale='auto': {kinds}. Bring both to log1p of the same depth and pass scale='log1p', or both to counts"
        )
    return "counts" if "counts" in found.values() else "log1p"


def read_scaled(real: AnyCells, design: Design, scale: Scale, layer: Layer) -> Cells:
    """The real file on the stated scale."""
    cells = read_cells("real", real, design, layer=of_side(layer, "real"))
    return cells.on_scale(common_scale(scale, cells))


def compare_levels(pred: Cells, real: Cells) -> None:
    """Refuse two files of log values that were surely made in different ways, and say so where it only seems so.

    Raises
    ------
    ValueError
        If measured cells of one file are on another logarithm or another depth than those of the other.
    """
    if "counts" not in (pred.scale, real.scale):
        _compare({"real": real.looks_like, "pred": pred.looks_like})


def compare_populations(populations: Mapping[str, AnnData]) -> None:
    """Like :func:`compare_levels`, of cells that are drawn beside each other; counts beside counts may be.

    Parameters
    ----------
    populations
        Words for messages to cells; all are held against the first, over the genes that they share.

    Raises
    ------
    ValueError
        As there.
    """
    first, *others = populations
    for other in others:
        genes = populations[first].var_names.intersection(populations[other].var_names)
        found = {}
        for name in (first, other):
            cells = populations[name]
            if cells.n_obs:
                found[name] = _level(sparse.csr_matrix(cells[_some_rows(cells.n_obs), genes].X, copy=True))
        are_counts = all(values.kind in ("counts", "zeros") for values, _ in found.values())
        if len(found) == 2 and not are_counts:
            _compare(found)


def _some_rows(n_cells: int) -> np.ndarray:
    """Up to 1,000 rows, evenly spaced."""
    return np.unique(np.linspace(0, n_cells - 1, min(n_cells, SAMPLE)).astype(int))


def _level(block: sparse.csr_matrix) -> tuple[Values, float]:
    """What some cells (n, g) hold, and the median of their totals, the logarithm undone, in place."""
    found = look(block)
    block.data = np.expm1(np.clip(block.data, 0, MAX_LOG1P))
    return found, float(np.median(np.asarray(block.sum(axis=1))))


def _compare(found: Mapping[str, tuple[Values, float]]) -> None:
    """Errors and warnings about two populations of log values, the second held against the first."""
    (first, (of_first, first_total)), (second, (of_second, second_total)) = found.items()
    # an error where a scale is certain, else a warning
    if of_first.certain and of_second.certain:
        require_same_scale([(first, of_first), (second, of_second)])
    for name, (values, _) in found.items():
        if values.kind not in ("log1p", "negative", "zeros"):
            logger.warning("%s looks like %s; expected log1p values", name, values.text)
    # one logarithm, but other depths
    ratio = second_total / first_total if first_total > 0 else 1.0
    if not FAR[0] < ratio < FAR[1]:
        logger.warning(
            "cells of %s add up to %.2g times those of %s, logarithms undone: they were hardly brought to the same "
            "depth, so that differences between them mean little. Normalise both alike: iv.preprocess.normalize "
            'divides by the column that uns["invirtuo"]["size_factor"] names, where none is noted by the sum of the '
            "genes",
            *(second, ratio, first),
        )


def of_side(layer: Layer, side: Side) -> str | None:
    """Where the values of a file stand."""
    if isinstance(layer, Mapping):
        if unknown := set(layer) - {"pred", "real"}:
            raise ValueError(f"layer= by file has the keys 'pred' and 'real'; found {preview(sorted(unknown))}")
        return layer.get(side)
    return layer


def _check_genes(name: str, names: pd.Index, genes: np.ndarray, columns: np.ndarray) -> None:
    """Every gene of the real file must have a column."""
    missing = genes[columns < 0]
    nameless = [side for side, found in ((name, names), ("real", genes)) if _are_numbers(found)]
    if len(missing) and nameless:
        raise ValueError(
            f"{' and '.join(nameless)}: no gene names (var_names are 0, 1, 2, ...), and {len(names)} columns cannot be "
            f"matched with {len(genes)} genes of real. Put the names, in the order of the columns, into adata.var_names"
        )
    if nameless and name == "pred":
        logger.warning("neither file has gene names; the columns are taken to be in the same order")
    if len(missing):
        raise ValueError(f"{name} lacks {len(missing)} of the {len(genes)} genes of real: {preview(missing)}")


def _are_numbers(names: pd.Index | np.ndarray) -> bool:
    """Whether names of genes only number the columns from 0, as those of a table without a header do."""
    return set(names) == set(map(str, range(len(names))))


def _checked_obs(name: str, obs: pd.DataFrame, design: Design) -> pd.DataFrame:
    """The columns of the Design, complete, none of which a table of scores needs for itself."""
    if taken := SCORE_COLUMNS & set(design.columns) - {design.perturbation}:
        raise ValueError(
            f"covariate columns {preview(sorted(taken))} clash with columns of the score table; rename them"
        )
    for column in design.columns:
        require_column(obs, column, name)
    return obs[design.columns]


def _rows_by(keys: pd.Series, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Key to the rows that carry it, keys sorted, rows ascending."""
    keys = keys.to_numpy()[rows]
    return {str(key): rows[index] for key, index in sorted(pd.Series(keys).groupby(keys).indices.items())}


def labels_of(table: pd.DataFrame, design: Design, *, as_written: bool = False) -> pd.DataFrame:
    """Columns `condition`, `perturbation` (or its label in the file) and covariates of a table of conditions."""
    perturbation = "_label" if as_written or design.perturbation is None else design.perturbation
    labels = table[[name for name in design.columns if name != design.perturbation]].reset_index(drop=True)
    labels.insert(0, "condition", table.index)
    labels.insert(1, "perturbation", table[perturbation].to_numpy())
    return labels


def per_10k(counts: AnyMatrix) -> sparse.csr_matrix:
    """(n, g) log1p of counts per 10,000, CSR in float32; empty cells stay empty."""
    rows = canonical_csr(counts, np.float32)
    return log_normalised(rows, np.asarray(rows.sum(axis=1), dtype=np.float64).ravel(), DEPTH)


def _over_size_factors(block: AnyMatrix, size_factors: np.ndarray) -> AnyMatrix:
    """log1p of counts over size factors, (n, g) and (n,) in float32 throughout, as scanpy computes it."""
    if not sparse.issparse(block):
        return np.log1p(block.astype(np.float32) / size_factors[:, None])
    block = sparse.csr_array(block, dtype=np.float32, copy=True)
    block.data = np.log1p(block.data / np.repeat(size_factors, np.diff(block.indptr)))
    return block

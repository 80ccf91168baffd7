"""Pair: predicted cells beside real ones, condition by condition, and the views that metrics take of them.

It knows files and conditions, not models. A view is a plain function with a decorator::

    @view("mean")                                       # what can be seen of the cells of one condition
    def mean_view(pair, side, condition): ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from invirtuo.cells.source import AnyCells
from invirtuo.cells.values import AnyMatrix
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.metrics.cells import (
    Cells,
    Layer,
    Scale,
    Side,
    common_scale,
    compare_levels,
    of_side,
    read_cells,
    read_scaled,
)
from invirtuo.metrics.numerics.streamed import Streamed, dense, moments

if TYPE_CHECKING:
    from scipy import sparse

__all__ = ["VIEWS", "CountOptions", "Moments", "Pair", "TargetGenes", "view"]

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])
Value = TypeVar("Value")
View: TypeAlias = "Callable[[Pair, Side, str], Any]"  # of (pair, side, condition); metrics on it know what it gives
Moments: TypeAlias = tuple[np.ndarray, np.ndarray, int]  # mean (g,), variance (g,) with n - 1, number of cells
Key: TypeAlias = tuple[str, ...]
TargetGenes: TypeAlias = Mapping[str, str | None] | Literal["parts"]

VIEWS: dict[str, View] = {}
OF_MEANS: set[str] = set()  # views that see nothing but means
_UNCACHED: set[str] = set()


def view(name: str, *, cached: bool = True, of_means: bool = False) -> Callable[[Function], Function]:
    """Register a function (pair, side, condition) -> array as a view of one condition.

    Parameters
    ----------
    name
        What metrics name in `on`.
    cached
        Keep the array in the Pair. False for arrays as large as the cells.
    of_means
        Whether it sees nothing of this condition but the mean over cells.
    """

    def register(function: Function) -> Function:
        VIEWS[name] = function
        if not cached:
            _UNCACHED.add(name)
        if of_means:
            OF_MEANS.add(name)
        return function

    return register


@dataclass(frozen=True)
class CountOptions:
    """How metrics on counts take pseudobulks and which gene a perturbation acts on by itself.

    Parameters
    ----------
    target_sum
        Counts to which a pseudobulk is brought before the logarithm.
    target_genes
        Label to the gene that it targets, None for no measured gene; the label "*" stands for all that are not named.
        Labels without an entry are looked up among the genes. "parts": the parts of a combination are looked up.
    """

    target_sum: float = 50_000.0
    target_genes: TargetGenes | None = None


class Pair:
    """A predicted and a real file, condition by condition; what several metrics need is computed once.

    Genes are matched by name and kept in alphabetical order, so that the order of cells and genes in the files never
    matters. Cells become dense one condition at a time; those on disk are read condition by condition, as often as
    they are needed, and released.

    Parameters
    ----------
    pred, real
        AnnData (dense, CSR or CSC, in memory, backed, or a view), CellStore, or path, see
        :func:`invirtuo.metrics.evaluate`; X holds log1p-normalised expression, in both on the same scale.
    design
        Says which columns of obs hold perturbation and covariates.
    n_pcs
        Principal components of the real cells, controls included, for metrics in that space.
    controls
        "real": the real control cells stand on both sides. "pred": each file's own.
    scale, layer
        What the values are and where they stand, see :func:`invirtuo.metrics.evaluate`.
    counts
        How metrics on counts see the cells.

    Raises
    ------
    ValueError
        If a column or gene is missing, a value is not finite or not on the stated scale, or no condition is in both
        files.
    """

    def __init__(
        self,
        pred: AnyCells | Cells,
        real: AnyCells | Cells,
        design: Design,
        *,
        n_pcs: int = 30,
        controls: Literal["real", "pred"] = "real",
        scale: Scale = "log1p",
        layer: Layer = None,
        counts: CountOptions = CountOptions(),
    ):
        if controls not in ("real", "pred"):
            raise ValueError(f"controls must be 'real' or 'pred'; found {controls!r}")
        if not (isinstance(pred, Cells) and isinstance(real, Cells)):
            pred, real = _sides(pred, real, design, scale, layer)
        if not pred.is_same_file(real):
            compare_levels(pred, real)

        # what is asked for, and what is computed once
        self.design = design
        self.n_pcs = n_pcs
        self.counts = counts
        self.genes = real.genes
        self._cells: dict[Side, Cells] = {"pred": pred, "real": real}
        self._control_side: dict[Side, Side] = {"pred": controls, "real": "real"}
        self._cache: dict[Side, dict[Key, Any]] = {"pred": {}, "real": {}}

        # conditions of both files are scored, the others listed
        both = [name for name in real.rows if name in pred.rows]
        if not both:
            raise ValueError(
                f"no condition is in both files: pred has {preview(pred.rows)}; real has {preview(real.rows)}. "
                f"Conditions are named by {' | '.join(design.columns)}"
            )
        self.skipped: dict[str, str] = {}
        self._skip({name: "not in pred" for name in real.rows if name not in pred.rows})
        self._skip({name: "not in real" for name in pred.rows if name not in real.rows})
        self.conditions = real.table.loc[sorted(both)]

    @classmethod
    def halves(
        cls,
        real: AnyCells,
        design: Design,
        *,
        n_pcs: int = 30,
        seed: int = 0,
        scale: Scale = "log1p",
        layer: Layer = None,
    ) -> Pair:
        """Two disjoint random halves of each real condition, as prediction and truth; the controls are not divided."""
        scaled = read_scaled(real, design, scale, layer)
        single = {name: "only one cell" for name, rows in scaled.rows.items() if len(rows) < 2}
        if len(single) == len(scaled.rows):
            raise ValueError(
                f"real: no condition has two or more cells to divide; found {preview(single) or 'no conditions'}"
            )
        rng = np.random.default_rng(seed)

        # the larger half is the truth
        rest, pred = {}, {}
        for name, rows in scaled.rows.items():
            if name not in single:
                first, second = np.array_split(rng.permutation(rows), 2)
                rest[name] = np.sort(first)
                pred[name] = np.sort(second)
        pair = cls(scaled.restricted(pred), scaled.restricted(rest), design, n_pcs=n_pcs)
        pair._skip(single)
        return pair

    @classmethod
    def equal_halves(
        cls,
        real: AnyCells | Cells,
        design: Design,
        *,
        n_pcs: int = 30,
        seed: int = 0,
        scale: Scale = "log1p",
        layer: Layer = None,
        counts: CountOptions = CountOptions(),
    ) -> Pair:
        """Two disjoint random halves of equal size of each real condition and of the controls, as cell-eval does it.

        Unlike :meth:`halves`, each side is compared with its own half of the controls; an odd cell is left out.
        """
        scaled = real if isinstance(real, Cells) else read_scaled(real, design, scale, layer)
        pieces, single = scaled.equal_pieces(np.random.default_rng(seed))
        if all(name in single for name in scaled.rows):
            raise ValueError("real: no condition has two or more cells to divide")

        # both halves need controls of their own
        if no_control := [f"controls of {name}" for name in scaled.controls if f"controls of {name}" in single]:
            raise ValueError(f"real: {preview(no_control)}: fewer than two cells to divide")
        sides = []
        for i in (0, 1):
            rows = {name: pieces[name][i] for name in scaled.rows if name in pieces}
            controls = {name: pieces[f"controls of {name}"][i] for name in scaled.controls}
            sides.append(scaled.restricted(rows, controls))
        rest, pred = sides
        pair = cls(pred, rest, design, n_pcs=n_pcs, controls="pred", counts=counts)
        pair._skip(dict.fromkeys(single, "only one cell"))
        return pair

    def against(self, pred: AnyCells | Cells) -> Pair:
        """Another prediction of the same real data; what was computed of the real data is not computed again."""
        real = self._cells["real"]
        layer = self._cells["pred"].layer
        other = pred
        if not isinstance(other, Cells):
            other = read_cells("pred", other, self.design, genes=real.genes, layer=layer).on_scale(real.scale)
        controls = self._control_side["pred"]
        pair = type(self)(other, real, self.design, n_pcs=self.n_pcs, controls=controls, counts=self.counts)
        pair._cache["real"] = self._cache["real"]
        return pair

    def against_means(self, means: Mapping[str, np.ndarray]) -> Pair:
        """A prediction of which nothing is known but the (g,) mean of each condition: for metrics of means alone."""
        no_cells = self._cells["real"].restricted({name: np.empty(0, dtype=int) for name in means})
        pair = self.against(no_cells)
        for name, mean in means.items():
            pair._cache["pred"]["moments", name] = (mean, np.full(len(mean), np.nan), 0)
        return pair

    def _skip(self, reasons: dict[str, str]) -> None:
        self.skipped |= reasons
        if reasons:
            reason = next(iter(reasons.values()))
            logger.warning("%d conditions are not scored, %s: %s", len(reasons), reason, preview(reasons))

    @property
    def scale(self) -> Literal["log1p", "counts"]:
        """What the values of the real file are."""
        return self._cells["real"].scale

    @property
    def has_controls(self) -> bool:
        """Whether every covariate group has control cells to compare with, on both sides."""
        sides = {self._control_side["pred"], "real"}
        return all(group in self._cells[side].controls for side in sides for group in self.groups)

    @property
    def groups(self) -> list[str]:
        """Names of the covariate groups with scored conditions, sorted."""
        return sorted(set(self.conditions["_group"]))

    def names(self, group: str) -> list[str]:
        """Names of the scored conditions of a group, sorted."""
        return list(self.conditions.index[self.conditions["_group"] == group])

    def all_names(self, side: Side, group: str) -> list[str]:
        """Names of the conditions that this file has in the group, scored or not."""
        table = self._cells[side].table
        return list(table.index[table["_group"] == group])

    def n_cells(self, side: Side, condition: str) -> int:
        """Number of cells of a condition."""
        return len(self._cells[side].rows[condition])

    def cells(self, side: Side, condition: str) -> np.ndarray:
        """(n, g) dense log1p expression of the cells of a condition, genes in alphabetical order."""
        return dense(self.stored(side, condition))

    def control_cells(self, side: Side, group: str) -> np.ndarray:
        """(n, g) dense log1p expression of the control cells that this side is compared with."""
        return dense(self.stored_control(side, group))

    def stored(self, side: Side, condition: str) -> AnyMatrix:
        """Like `cells`, CSR or dense as the file holds them."""
        return self._cells[side].read(self._cells[side].rows[condition])

    def count_matrix(self, side: Side, condition: str) -> sparse.csr_array:
        """(n, g) counts of the cells of a condition in float64; of log1p values what they are the logarithm of."""
        cells = self._cells[side]
        return cells.read_counts(cells.rows[condition])

    def control_count_matrix(self, side: Side, group: str) -> sparse.csr_array:
        """Like `count_matrix`, of the control cells that this side is compared with."""
        cells, rows = self._controls(side, group)
        return cells.read_counts(rows)

    def own_genes(self, condition: str) -> np.ndarray:
        """Positions of the genes that a perturbation acts on by itself, see :class:`CountOptions`."""
        return np.flatnonzero(~self.counted_genes(condition))

    def counted_genes(self, condition: str) -> np.ndarray:
        """(g,) whether a gene counts: it is none that the perturbation acts on by itself."""

        def compute() -> np.ndarray:
            return ~np.isin(self.genes, list(self.targets(condition)))

        return self.once("real", ("counted genes", condition), compute)

    def targets(self, condition: str) -> set[str]:
        """Names of the genes that a perturbation may target, measured or not; empty if it is known to have none."""
        known = self.counts.target_genes
        label = self.conditions.at[condition, self.design.perturbation]
        spellings = (self.conditions.at[condition, "_label"], label)
        if known == "parts":
            return {*spellings, *self.design.parts(label)}
        for name in (*spellings, "*"):
            if known is not None and name in known:
                gene = known[name]
                return set() if gene is None else {gene}
        return set(spellings)

    def moments(self, side: Side, condition: str) -> Moments:
        """Mean (g,), variance (g,) with n - 1 (NaN for one cell), and number of cells of a condition."""
        cells = self._cells[side]
        return self.once(side, ("moments", condition), lambda: moments(cells.matrix_of(cells.rows[condition])))

    def control_moments(self, side: Side, group: str) -> Moments:
        """Like `moments`, of the control cells that this side is compared with."""
        cells, rows = self._controls(side, group)
        key = ("moments of control", group)
        return self.once(self._control_side[side], key, lambda: moments(cells.matrix_of(rows)))

    def once_of_control(self, side: Side, key: Key, compute: Callable[[], Value]) -> Value:
        """Like `once`, of something that depends on the control cells that this side is compared with."""
        return self.once(self._control_side[side], key, compute)

    def group_moments(self, side: Side, group: str) -> list[Moments]:
        """Moments of every condition that this file has in the group, scored or not, and of the controls."""
        conditions = self.all_names(side, group)
        return [*(self.moments(side, name) for name in conditions), self.control_moments(side, group)]

    def group_of(self, condition: str) -> str:
        """Name of the covariate group of a condition."""
        return str(self.conditions.at[condition, "_group"])

    def real_matrix(self) -> AnyMatrix | Streamed:
        """All real cells, scored or not, (n, g) CSR, dense or streamed from disk, genes in alphabetical order."""
        return self._cells["real"].matrix_of(np.arange(self._cells["real"].n_cells))

    def seeded_order(self, side: Side, condition: str) -> np.ndarray:
        """Positions of the cells of a condition in a random order that does not depend on their order in the file.

        The cells are sorted by a fixed random combination of their genes, then permuted with a fixed seed.
        """
        cells = self._cells[side].read(self._cells[side].rows[condition])
        # sort by a random projection, then shuffle: both depend on the values alone
        key = cells @ np.random.default_rng(0).standard_normal(len(self.genes))
        return np.argsort(key, kind="stable")[np.random.default_rng(1).permutation(len(key))]

    def scored_half(self, condition: str) -> np.ndarray:
        """Positions of a random half of the real cells of a condition, the odd cell included, sorted."""
        order = self.seeded_order("real", condition)
        return np.sort(order[: (len(order) + 1) // 2])

    def unscored_matrix(self) -> AnyMatrix | Streamed:
        """The real cells outside of every `scored_half`, and the control cells; form as of `real_matrix`."""
        cells = self._cells["real"]
        others = [np.delete(rows, self.scored_half(name)) for name, rows in cells.rows.items()]
        return cells.matrix_of(np.sort(np.concatenate([*others, *cells.controls.values()])))

    @property
    def file_order(self) -> np.ndarray:
        """(g,) position in `genes` of each gene of the real file, in the order of that file."""
        return np.argsort(self._cells["real"].columns)

    def view(self, name: str, side: Side, group: str) -> Sequence[Any]:
        """The named view of each scored condition of a group, made when it is looked at."""
        return _Views(self, name, side, self.names(group))

    def see(self, name: str, side: Side, condition: str) -> Any:
        """The named view of one condition."""
        if name not in VIEWS:
            raise ValueError(f"unknown view {name!r}; known: {preview(sorted(VIEWS), 99)}")
        if name in _UNCACHED:
            return VIEWS[name](self, side, condition)
        return self.once(side, ("view", name, condition), lambda: VIEWS[name](self, side, condition))

    def both(self, name: str, condition: str) -> tuple[Any, Any]:
        """The named view of one condition, predicted and real."""
        return self.see(name, "pred", condition), self.see(name, "real", condition)

    def once(self, side: Side, key: Key, compute: Callable[[], Value]) -> Value:
        """The value kept under a key; computed when it is first asked for.

        The side is "pred" if the value depends on the prediction; what is kept for "real" is shared by :meth:`against`.
        """
        cache = self._cache[side]
        if key not in cache:
            cache[key] = compute()
        kept: Value = cache[key]
        return kept

    def keep(self, side: Side, key: Key, value: object) -> None:
        """Put a value under a key, as if it were computed."""
        self._cache[side][key] = value

    def has(self, side: Side, key: Key) -> bool:
        """Whether a value is kept under a key."""
        return key in self._cache[side]

    def stored_control(self, side: Side, group: str) -> AnyMatrix:
        """Like `control_cells`, CSR or dense as the file holds them."""
        cells, rows = self._controls(side, group)
        return cells.read(rows)

    def _controls(self, side: Side, group: str) -> tuple[Cells, np.ndarray]:
        """The file and the rows of the control cells that this side is compared with."""
        cells = self._cells[self._control_side[side]]
        rows = cells.controls.get(group)
        if rows is None and self.design.perturbation is None:
            raise ValueError(
                "a metric compares with control cells, and the design names none; name metrics of populations, for "
                "example metrics='generation'"
            )
        if rows is None:
            design = self.design
            others = preview(cells.controls) or "none"
            raise ValueError(
                f"{cells.name}: group {group!r} has no control cells (label {design.control!r} in "
                f"obs[{design.perturbation!r}]); groups with controls: {others}. "
                "Add them, or name only metrics that need no control, for example metrics=['rmse_mean', 'mmd_gex']"
            )
        return cells, rows


def _sides(pred: AnyCells, real: AnyCells, design: Design, scale: Scale, layer: Layer) -> tuple[Cells, Cells]:
    """Both files on one scale, genes in the order of the real one."""
    real_cells = read_cells("real", real, design, layer=of_side(layer, "real"))
    pred_cells = read_cells("pred", pred, design, genes=real_cells.genes, layer=of_side(layer, "pred"))
    stated = common_scale(scale, real_cells, pred_cells)
    return pred_cells.on_scale(stated), real_cells.on_scale(stated)


@dataclass(frozen=True)
class _Views(Sequence[Any]):
    """Views of several conditions, made when looked at."""

    pair: Pair
    name: str
    side: Side
    conditions: list[str]

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, index: Any) -> Any:
        return self.pair.see(self.name, self.side, self.conditions[index])

"""Windows: the parts of a store that are in memory at a time, in random order and mixed from all over the files.

An epoch is a random sequence of windows, a window a random set of blocks of neighbouring rows; samplers run within a
window. What a window holds follows from labels and the seed alone, so that an epoch is entered anywhere
without reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from invirtuo.cells.samplers import Layout, Sampler
from invirtuo.cells.store import ROW, VALUE, CellStore

if TYPE_CHECKING:
    from scipy import sparse

__all__ = ["ControlCache", "LoadedRows", "Window", "prefetched", "windows"]

MOST_CONTROLS = 2000  # of a group in the cache


class LoadedRows:
    """Rows of a store that were read into memory.

    Parameters
    ----------
    rows
        (m,), rising.
    matrix
        (m, g), their values.
    """

    def __init__(self, rows: np.ndarray, matrix: sparse.csr_matrix):
        self.rows, self.matrix = rows, matrix

    def dense(self, rows: np.ndarray, otherwise: Callable[[np.ndarray], torch.Tensor] | None = None) -> torch.Tensor:
        """(n, g) values of rows; those that are not in memory come from `otherwise`."""
        position = np.searchsorted(self.rows, rows)
        inside = self.rows.take(position, mode="clip") == rows if len(self.rows) else np.zeros(len(rows), bool)
        if inside.all():
            return torch.from_numpy(self.matrix[position].toarray())
        if otherwise is None:
            raise ValueError(f"{int((~inside).sum())} of {len(rows)} rows are not in memory; this is a fault of ours")
        x = torch.empty(len(rows), self.matrix.shape[1])
        x[torch.from_numpy(inside)] = torch.from_numpy(self.matrix[position[inside]].toarray())
        x[torch.from_numpy(~inside)] = otherwise(rows[~inside])
        return x


class ControlCache:
    """Control cells of every group that stay in memory, for windows with few of them; read at first use.

    Parameters
    ----------
    store
        The files.
    layout
        Of the training cells.
    """

    def __init__(self, store: CellStore, layout: Layout):
        self.store = store
        self._loaded: LoadedRows | None = None
        # an eighth of the memory, divided among the groups
        controls = np.random.default_rng(0).permutation(np.flatnonzero(layout.is_control))
        groups = layout.group[controls]
        n_groups = max(len(np.unique(groups)), 1)
        cost = float(store.lengths[layout.rows[controls]].mean() * VALUE + ROW) if len(controls) else 1.0
        most = int(np.clip(store.memory // 8 / cost / n_groups, 1, MOST_CONTROLS))

        # a random choice of each
        self.rows: dict[int, np.ndarray] = {}
        for g in np.unique(groups):
            chosen = controls[groups == g][:most]
            self.rows[int(g)] = np.sort(layout.rows[chosen])

    def dense(self, rows: np.ndarray) -> torch.Tensor:
        """(n, g) values of control cells of the cache."""
        if self._loaded is None:
            every = np.sort(np.concatenate([*self.rows.values()]))
            self._loaded = LoadedRows(every, self.store.read(every))
        return self._loaded.dense(rows)


class Window:
    """Cells that are in memory together.

    Parameters
    ----------
    layout
        What samplers may know of them.
    seed
        Of the sampler.
    read
        Reads their values.
    controls
        Cells beside them.
    """

    def __init__(self, layout: Layout, seed: Sequence[int], read: Callable[[], LoadedRows], controls: ControlCache):
        self.layout = layout
        self.seed = seed
        self.controls = controls
        self.following: Window | None = None
        self.reader: ThreadPoolExecutor | None = None
        self._read = read
        self._loaded: LoadedRows | None = None
        self._future: Future[LoadedRows] | None = None

    @property
    def rng(self) -> np.random.Generator:
        """A new generator for the sampler."""
        return np.random.default_rng(self.seed)

    def prefetch(self) -> None:
        """Begin to read in the background."""
        if self._future is None and self.reader is not None:
            self._future = self.reader.submit(self._read)

    def dense(self, rows: np.ndarray) -> torch.Tensor:
        """(n, g) values of rows; waits for them, and lets the next window be read."""
        if self._loaded is None:
            self.prefetch()
            self._loaded = self._read() if self._future is None else self._future.result()
            self._future = None
            if self.following is not None:
                self.following.prefetch()
        return self._loaded.dense(rows, self.controls.dense)


def prefetched(planned: Iterator[tuple[int, Window]]) -> Iterator[tuple[int, Window]]:
    """Numbered windows; while one is used, a thread reads the one that follows."""
    with ThreadPoolExecutor(1, "reading") as reader:
        now = next(planned, None)
        while now is not None:
            following = next(planned, None)
            now[1].reader = reader
            if following is not None:
                now[1].following = following[1]
                following[1].reader = reader
            yield now
            now[1].following = None  # else every window would keep the next alive
            now = following


def windows(
    store: CellStore,
    layout: Layout,
    controls: ControlCache,
    sampler: Sampler,
    seed: Sequence[int],
    *,
    rank: int = 0,
    n_ranks: int = 1,
) -> Iterator[Window]:
    """One epoch: all rows of a layout, in windows that fit into the memory of the store.

    Parameters
    ----------
    layout
        Rows (rising) to pass over once.
    controls
        Control cells beside them.
    sampler
        Cells that it puts together are read together: those of a condition, if its ``groups_conditions`` is set.
    seed
        Same seed, same windows.
    rank, n_ranks
        Of several devices each takes every n-th block.

    Raises
    ------
    ValueError
        If the sampler needs more of a time course than a window may hold.
    """
    rng = np.random.default_rng([*seed, 0])
    order, starts = _blocks(store, layout, sampler, rng, n_ranks)
    if len(starts) < n_ranks:
        raise ValueError(f"{len(layout.rows)} cells make {len(starts)} blocks, too few for {n_ranks} devices")

    # bytes of every block
    lengths = store.lengths[layout.rows[order]].astype(np.int64)
    cost = np.add.reduceat(lengths * VALUE + ROW, starts)
    ends = np.append(starts[1:], len(order))

    # shuffle the blocks, deal them to ranks, cut where the memory of a window is full; two are held at a time
    share = rng.permutation(len(starts))[rank::n_ranks]
    limit = store.memory * 7 // 16
    number = np.cumsum(cost[share]) // max(limit, 1)
    for k, members in enumerate(np.split(share, np.flatnonzero(np.diff(number)) + 1)):
        positions = np.sort(np.concatenate([order[starts[b] : ends[b]] for b in members]))
        rows = layout.rows[positions]
        spare = {g: pool[~_among(pool, rows)] for g, pool in controls.rows.items()}
        yield Window(layout.only(positions, spare), [*seed, k + 1, rank], partial(_load, store, rows), controls)


def _load(store: CellStore, rows: np.ndarray) -> LoadedRows:
    return LoadedRows(rows, store.read(rows))


def _among(wanted: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which of the wanted rows are among rows that rise."""
    is_among: np.ndarray = rows.take(np.searchsorted(rows, wanted), mode="clip") == wanted
    return is_among


def _blocks(
    store: CellStore, layout: Layout, sampler: Sampler, rng: np.random.Generator, n_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the layout in the order of blocks, and where blocks begin."""
    if getattr(sampler, "whole_courses", False):
        name = getattr(sampler, "__name__", type(sampler).__name__.lower())
        raise ValueError(f"the sampler {name!r} needs whole time courses and reads from memory only; pass an AnnData")
    n = len(layout.rows)
    size = max(min(store.block, n // (8 * n_ranks)), 1)  # eight blocks or more for every rank
    if not getattr(sampler, "groups_conditions", False):
        # blocks of neighbouring rows of a file
        file = np.searchsorted(store.starts, layout.rows, side="right") - 1
        block = (layout.rows - store.starts[file]) // size
        starts = np.flatnonzero((np.diff(file, prepend=-1) != 0) | (np.diff(block, prepend=-1) != 0))
        return np.arange(n), starts

    # blocks of cells of one condition, in random order, that hold whole sets
    set_size = getattr(sampler, "set_size", 1)
    size = -(-size // set_size) * set_size
    order = np.lexsort([rng.random(n), layout.condition])
    condition = layout.condition[order]
    first = np.flatnonzero(np.diff(condition, prepend=-1) != 0)
    within = np.arange(n) - np.repeat(first, np.diff(np.append(first, n)))
    return order, np.flatnonzero(within % size == 0)

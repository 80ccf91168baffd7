"""CellDataset: cells in memory or in files, and a Design, read batch by batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from invirtuo.batch import Batch, Condition
from invirtuo.cells.preprocess import check_genes
from invirtuo.cells.pseudobulk import Pseudobulk, group_sums
from invirtuo.cells.samplers import Layout, Rows, Sampler
from invirtuo.cells.source import MemorySource, TrainingSource, opened, training_source
from invirtuo.cells.windows import ControlCache, LoadedRows, Window, prefetched, windows
from invirtuo.design import Design
from invirtuo.errors import preview

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.cells.store import CellStore

__all__ = ["CellDataset", "EncodedConditions"]

Dense = Callable[[np.ndarray], torch.Tensor]  # (n,) rows to their (n, g) values
FewBatches = tuple[Sampler, int, int, str, int]  # sampler, cells of a batch, number of batches, part, seed


class CellDataset:
    """Cells in memory as CSR, or in files, dense only inside a batch. The caller's AnnData is never written to.

    Parameters
    ----------
    adata
        Cells in the data space of the model (log1p of counts per 10 000, or counts); sparse or dense, view or backed.
        A :class:`CellStore` stays on disk and is read in windows.
    design
        Which columns of obs mean what.
    split
        (n,) "train", "val", "test" for each cell, indexed like obs; None puts every cell into "train".
    signed
        Whether values below zero are data, as in synthetic systems.
    obsm
        Entry of obsm with an embedding of the cells, which batches hold beside expression; None leaves it out.

    Raises
    ------
    ValueError
        If genes are not unique, values are not finite or negative, labels are unknown, or the split does not fit.

    Examples
    --------
    >>> import invirtuo as iv
    >>> adata = iv.datasets.toy()
    >>> design = iv.Design.from_adata(adata, perturbation="perturbation", control="control")
    >>> dataset = iv.CellDataset(adata, design)
    >>> batch = next(dataset.batches(iv.samplers.cells, 32, seed=0))
    >>> tuple(batch.target.shape) == (32, adata.n_vars)
    True
    """

    def __init__(
        self,
        adata: AnnData | CellStore,
        design: Design,
        split: pd.Series | None = None,
        *,
        signed: bool = False,
        obsm: str | None = None,
    ):
        # what cells hold, and how it is read
        check_genes(adata)
        self.source: TrainingSource = training_source(adata, signed=signed)
        self.design = design
        self.obs = adata.obs
        self.genes = self.source.genes.to_numpy()
        self.values: torch.Tensor | None = None  # (n, d), read instead of expression
        self.embedding = None if obsm is None else _embedding(adata, obsm)
        self.condition = EncodedConditions(design, adata.obs)
        self.split = _aligned(split, adata.obs)
        size = _size_factors(self.source.depth(signed=signed), self.split == "train")
        self.size_factor = torch.from_numpy(size)
        # made when they are first asked for
        self._layouts: dict[str, Layout] = {}
        self._controls: ControlCache | None = None
        self._first: dict[FewBatches, tuple[list[Rows], LoadedRows]] = {}
        self._extremes: dict[str, tuple[float, float]] = {}
        self.looked_at_batches = False  # whether effects were taken beside control cells of the same batch

    @classmethod
    def open(
        cls,
        paths: str | Path | Sequence[str | Path],
        design: Design,
        split: pd.Series | None = None,
        *,
        signed: bool = False,
        **options: Any,
    ) -> Self:
        """Cells of files, left on disk; `options` as for :meth:`CellStore.open`."""
        return cls(opened(paths, design, **options), design, split, signed=signed)

    @property
    def on_disk(self) -> bool:
        """Whether batches are read from files."""
        return self.values is None and self.source.on_disk

    def with_values(self, values: torch.Tensor, size_factor: torch.Tensor) -> Self:
        """The same cells with other values (n, d), such as latent vectors, and depths (n,) than the measured ones."""
        other = copy.copy(self)
        other.values, other.size_factor, other._first = values, size_factor, {}
        return other

    def with_validation(self, share: float) -> Self:
        """The same cells, a share of the training cells set aside for validation; always the same ones."""
        other = copy.copy(self)
        rows = self.rows("train")
        other.split = self.split.copy()
        other.split[np.random.default_rng(0).permutation(rows)[: int(share * len(rows))]] = "val"
        other._layouts, other._controls, other._first, other._extremes = {}, None, {}, {}
        return other

    def rows(self, part: str) -> np.ndarray:
        """Rows of one part of the split."""
        return np.flatnonzero(self.split == part)

    def layout(self, part: str = "train") -> Layout:
        """What samplers may know of one part of the split; groups without controls there use those of training."""
        if part not in self._layouts:
            spare = None if part == "train" else self.rows("train")
            self._layouts[part] = Layout.of(self.obs, self.design, self.rows(part), spare)
        return self._layouts[part]

    def windows(
        self,
        sampler: Sampler,
        seeds: Iterable[int | Sequence[int]],
        *,
        part: str = "train",
        rank: int = 0,
        n_ranks: int = 1,
    ) -> Iterator[tuple[int, Layout, np.random.Generator, Dense]]:
        """Cells among which samplers draw: all at once where they are in memory, windows of them from files.

        Parameters
        ----------
        sampler
            What will draw: cells that it puts together are read together.
        seeds
            A seed for every pass.
        rank, n_ranks
            Of several devices each reads its own files' share; cells in memory are for all of them.

        Returns
        -------
        For every window the number of the pass, a layout, a generator for the sampler, and what reads rows.
        """
        layout = self.layout(part)
        if self.values is not None or isinstance(self.source, MemorySource):
            for number, seed in enumerate(seeds):
                yield number, layout, np.random.default_rng(seed), self.dense
            return
        # from files: windows that fit into memory, read ahead
        store = self.source.store
        self._controls = controls = self._controls or ControlCache(store, self.layout())

        def planned() -> Iterator[tuple[int, Window]]:
            for number, seed in enumerate(seeds):
                epoch = windows(store, layout, controls, sampler, _as_list(seed), rank=rank, n_ranks=n_ranks)
                yield from ((number, window) for window in epoch)

        for number, window in prefetched(planned()):
            yield number, window.layout, window.rng, window.dense

    def batches(
        self,
        sampler: Sampler,
        batch_size: int,
        *,
        part: str = "train",
        seed: int | Sequence[int] = 0,
        skip: int = 0,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> Iterator[Batch]:
        """Pass once over a part of the split; `skip` leaves out the first batches without reading them.

        Of several devices (`rank` of `n_ranks`) each gets batches of its own.
        """
        # windows are dealt to ranks already; in memory every rank draws all batches and takes its own
        number, shares = 0, 1 if self.on_disk else n_ranks
        for _, layout, rng, dense in self.windows(sampler, [seed], part=part, rank=rank, n_ranks=n_ranks):
            for rows in sampler(layout, batch_size, rng):
                if number >= skip * shares and (shares == 1 or number % shares == rank):
                    yield self.take(rows, dense)
                number += 1

    def first_batches(
        self, sampler: Sampler, batch_size: int, n_batches: int, *, part: str, seed: int
    ) -> Iterable[Batch]:
        """The same few batches at every call, drawn from all cells of a part; those of files are read once."""
        if not self.on_disk:
            return islice(self.batches(sampler, batch_size, part=part, seed=seed), n_batches)
        key = (sampler, batch_size, n_batches, part, seed)
        if key not in self._first:
            # read all rows that the batches need at once
            drawn = sampler(self.layout(part), batch_size, np.random.default_rng(seed))
            batches = list(islice(drawn, n_batches))
            wanted = [rows.target for rows in batches]
            wanted += [rows.source for rows in batches if rows.source is not None]
            needed = np.unique(np.concatenate(wanted)) if wanted else np.zeros(0, np.int64)
            self._first[key] = batches, LoadedRows(needed, self.source.read(needed))
        batches, loaded = self._first[key]
        return (self.take(rows, loaded.dense) for rows in batches)

    def take(self, rows: Rows | np.ndarray, dense: Dense | None = None) -> Batch:
        """Read rows as a Batch, with `dense` where they are in a window."""
        rows = rows if isinstance(rows, Rows) else Rows(np.asarray(rows))
        target, source = rows.target, rows.source
        dense = dense or self.dense
        index = torch.from_numpy(target.astype(np.int64))
        expression = {"target": dense(target), "source": None if source is None else dense(source)}
        embedding = {"embedding": self._embedded(target), "source_embedding": self._embedded(source)}
        return Batch(
            condition=self.condition[index],
            size_factor=self.size_factor[index],
            index=index,
            set_size=rows.set_size,
            **expression,
            **embedding,
        )

    def _embedded(self, rows: np.ndarray | None) -> torch.Tensor | None:
        """(n, d) embedding of rows."""
        return None if self.embedding is None or rows is None else self.embedding[torch.from_numpy(rows)]

    def dense(self, rows: np.ndarray) -> torch.Tensor:
        """(n, g) values of rows, float32."""
        if self.values is not None:
            return self.values[torch.from_numpy(np.asarray(rows, dtype=np.int64))]
        return torch.from_numpy(self.source.read(rows).toarray())

    def blocks(self, part: str | np.ndarray = "train") -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Pass over the cells of a part, or given rows (rising): rows and values; at once where they are in memory."""
        yield from self.source.blocks(self.rows(part) if isinstance(part, str) else part)

    def totals(self, rows: np.ndarray, n_columns: int | None = None) -> np.ndarray:
        """(n,) float32 sums of rows (rising) over the first columns; None: over all."""
        sums = []
        for _, x in self.blocks(rows):
            total = x[:, :n_columns].sum(axis=1) if n_columns else x.sum(axis=1)
            sums.append(np.asarray(total, dtype=np.float32).ravel())
        return np.concatenate(sums)

    def extremes(self, part: str = "train") -> tuple[float, float]:
        """Smallest value above zero of a part, infinity if there is none, and the largest value.

        Found in one pass, and kept.
        """
        if part not in self._extremes:
            smallest, largest = np.inf, 0.0
            for _, x in self.blocks(part):
                positive = x.data[x.data > 0]
                smallest = min(smallest, float(positive.min(initial=np.inf)))
                largest = max(largest, float(positive.max(initial=0.0)))
            self._extremes[part] = smallest, largest
        return self._extremes[part]

    def pseudobulk(self, part: str | np.ndarray = "train", *, linear: bool = False) -> Pseudobulk:
        """Mean and variance of every condition of a part, or of given rows (rising), in the order of their names.

        `linear`: of what the log1p values are the logarithm of. With technical batches in the Design the means of
        perturbed conditions differ from those of all control cells of the group as they do from those of their batches.
        """
        rows = self.rows(part) if isinstance(part, str) else part

        # number of the condition of every row, conditions sorted by name
        obs = self.obs.iloc[rows]
        table, position = self.design.unique_conditions(obs)
        codes, names = pd.factorize(self.design.names(table), sort=True)
        number = np.zeros(len(self.split), dtype=np.int64)
        number[rows] = codes[position]
        n_cells = np.bincount(number[rows], minlength=len(names)) if len(rows) else np.zeros(0, dtype=np.int64)

        # sums and sums of squares, block by block
        total, square = np.zeros((2, len(names), len(self.genes)))
        for own, values in self.blocks(rows):
            x = values.astype(np.float64)
            if linear:
                x = x.expm1()
            total += group_sums(x, number[own], len(names))
            square += group_sums(x.multiply(x), number[own], len(names))
        mean = total / n_cells[:, None]
        variance = np.maximum(square / n_cells[:, None] - mean**2, 0)
        batch = self.design.batches(obs)
        if batch is not None:
            self.looked_at_batches = True
            mean = np.maximum(mean + self._between_batches(rows, batch, number[rows], len(names), linear=linear), 0)

        _, first = np.unique(codes, return_index=True)
        table = table.iloc[first].reset_index(drop=True)
        moments = [torch.from_numpy(array) for array in (mean, variance, n_cells)]
        return Pseudobulk(table, self.design.encode(table), *moments)

    def _between_batches(
        self, rows: np.ndarray, batch: np.ndarray, condition: np.ndarray, n: int, *, linear: bool
    ) -> np.ndarray:
        """What the batches of n conditions, (n, g), lack to all batches of their group, in means of control cells."""
        obs = self.obs.iloc[rows]
        is_control = self.design.is_control(obs)
        group, _ = pd.factorize(self.design.groups(obs))
        place, pairs = pd.factorize(pd.MultiIndex.from_arrays([group, batch]))
        group_of = pairs.get_level_values(0).to_numpy()

        # mean control cell of every batch, and of every group, which stands for batches without control cells
        number = np.zeros(len(self.split), dtype=np.int64)
        number[rows] = place
        total = np.zeros((len(pairs), len(self.genes)))
        for own, values in self.blocks(rows[is_control]):
            x = values.astype(np.float64)
            total += group_sums(x.expm1() if linear else x, number[own], len(pairs))
        n_cells = np.bincount(place[is_control], minlength=len(pairs))[:, None]
        n_of_group = np.bincount(group[is_control], minlength=group.max() + 1)[:, None]
        pooled = (group_sums(total, group_of, len(n_of_group)) / np.maximum(n_of_group, 1))[group_of]
        lacking = pooled - np.divide(total, n_cells, out=pooled.copy(), where=n_cells > 0)

        # by how many cells of a condition are in each batch; control cells are not held against themselves
        cells = sparse.csr_matrix((~is_control * 1.0, (condition, place)), (n, len(pairs)))
        shift: np.ndarray = cells @ lacking / np.maximum(np.bincount(condition, minlength=n), 1)[:, None]
        return shift

    def overdispersion(self, part: str = "train") -> np.ndarray:
        """(g,) inverse of the dispersion r of counts with variance m + m^2 / r, m = depth x share; by moments."""
        total, square, weighted = np.zeros((3, len(self.genes)))
        depths, depth_square = 0.0, 0.0
        for _, values in self.blocks(part):
            x = values.astype(np.float64)
            depth = np.asarray(x.sum(axis=1)).ravel()
            total += np.asarray(x.sum(axis=0)).ravel()
            square += np.asarray(x.multiply(x).sum(axis=0)).ravel()
            weighted += x.T @ depth
            depths = depths + depth.sum()
            depth_square = depth_square + (depth**2).sum()
        # the residual variance beyond that of a Poisson, summed over cells
        share = total / max(depths, 1.0)
        expected = share**2 * depth_square
        residual = square - 2 * share * weighted + expected
        return np.divide(np.maximum(residual - total, 0), expected, out=np.zeros_like(expected), where=expected > 0)

    def fingerprint(self) -> str:
        """Short hash of genes, labels and values, to tell one data set from another, however it is stored.

        Files have a hash of their own, in which the memory and the block they are read with count too.
        """
        digest = hashlib.blake2b(digest_size=8)
        self.source.add_to(digest)
        if self.embedding is not None:
            digest.update(self.embedding.numpy().data)
        table, position = self.design.unique_conditions(self.obs)
        names = self.design.names(table).to_numpy()
        labels = names if self.source.on_disk else names[position]
        for text in (*self.genes, *labels):
            digest.update(str(text).encode() + b"\0")
        if self.source.on_disk:
            digest.update(position.data)
        return digest.hexdigest()


class EncodedConditions:
    """Conditions of n cells, each distinct one encoded once: taking rows gives a :class:`Condition`.

    Parameters
    ----------
    design
        Which columns mean what.
    obs
        (n,) labels of the cells.
    """

    def __init__(self, design: Design, obs: pd.DataFrame):
        table, position = design.unique_conditions(obs)
        self.distinct = design.encode(table)
        self.position = torch.from_numpy(position)  # (n,), of the condition of a cell among the distinct ones

    def __getitem__(self, rows: slice | torch.Tensor) -> Condition:
        return self.distinct[self.position[rows].long()]

    def __len__(self) -> int:
        return len(self.position)

    def map(self, function: Callable[[Condition], torch.Tensor]) -> torch.Tensor:
        """What a function makes of every condition, (n, ...) for the cells."""
        return function(self.distinct)[self.position.long()]


def _embedding(adata: AnnData | CellStore, key: str) -> torch.Tensor:
    """(n, d) float32, an entry of obsm."""
    if key not in adata.obsm:
        raise ValueError(f"there is no obsm[{key!r}]; found {preview(adata.obsm) or 'no obsm'}. Embed the cells first")
    return torch.from_numpy(np.array(adata.obsm[key], dtype=np.float32))


def _as_list(seed: int | Sequence[int]) -> list[int]:
    return [seed] if isinstance(seed, int) else list(seed)


def _aligned(split: pd.Series | None, obs: pd.DataFrame) -> np.ndarray:
    """The split as an array in the order of obs, checked."""
    if split is None:
        return np.full(len(obs), "train", dtype=object)
    if isinstance(split, pd.DataFrame):
        raise ValueError(f"split is a DataFrame with {preview(split.columns)}; expected one of its columns, a Series")
    if not isinstance(split, pd.Series):
        split = pd.Series(np.asarray(split), index=obs.index) if len(split) == len(obs) else pd.Series(split)
    if len(split) != len(obs) or not split.index.equals(obs.index):
        if not split.index.is_unique or not obs.index.is_unique or not obs.index.isin(split.index).all():
            raise ValueError(
                f"the split has {len(split)} entries and does not name every one of the {len(obs)} cells once; "
                "make it with a function of invirtuo.splits from the same obs"
            )
        split = split.loc[obs.index]

    # cells without a part are unassigned
    values: np.ndarray = split.astype(object).where(split.notna(), "").to_numpy(dtype=object)
    unknown = sorted(set(values) - {"train", "val", "test", ""})
    if unknown:
        raise ValueError(f'the split holds {", ".join(map(repr, unknown[:5]))}; expected "train", "val", "test" or ""')
    if not (values == "train").any():
        raise ValueError('the split has no "train" cells; nothing to fit')
    return values


def _size_factors(depth: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Depth of each cell over the median depth of the training cells."""
    median = np.median(depth[train])
    return (depth / (median if median > 0 else 1.0)).astype(np.float32)

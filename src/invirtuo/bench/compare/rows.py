"""A row of a comparison: an entry in a folder of its own, by which a comparison that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from invirtuo.bench.cell import as_json
from invirtuo.bench.entry import Entry
from invirtuo.bench.foreign import Foreign
from invirtuo.bench.run import write_table
from invirtuo.cells import preprocess
from invirtuo.cells.files import writing
from invirtuo.cells.values import looks_like_counts
from invirtuo.errors import preview
from invirtuo.fit import FitConfig

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.bench.question import Asked
    from invirtuo.cells.dataset import CellDataset
    from invirtuo.design import Design
    from invirtuo.verbs.model import Model

__all__ = ["Row", "as_asked", "described", "normalized", "of_part", "rows_of", "write_history"]

logger = logging.getLogger(__name__)


def rows_of(
    out: Path,
    entries: Sequence[Entry],
    dataset: CellDataset,
    split: pd.Series,
    asked: Sequence[Any],
    *,
    overwrite: bool,
) -> list[Row]:
    """A row for each entry, what earlier calls computed read; `asked`: what other numbers would follow from.

    They also follow from the version of this package, whatever was asked.

    Raises
    ------
    ValueError
        If the folder holds a row with other settings, unless it may be overwritten.
    """
    split_hash = hashlib.sha256("|".join(split).encode()).hexdigest()[:16]
    plan = {"data": dataset.fingerprint(), "split": split_hash, "asked": [*asked, version("invirtuo")]}
    rows = [Row(out, entry, plan) for entry in entries]
    for row in rows:
        row.check(overwrite=overwrite)
    return rows


def write_history(rows: Sequence[Row], out: Path) -> None:
    """Losses of all rows in a table, if something was trained."""
    history = pd.concat([row.table("history.csv") for row in rows], ignore_index=True)
    if "step" in history:
        write_table(out / "history.csv", history)


def normalized(adata: AnnData, n_genes: int | None, size_factor: str | None, split: pd.Series) -> AnnData:
    """Raw counts as log1p values of genes chosen on training cells; other values as they are, without such choices."""
    if looks_like_counts(adata.X):
        return preprocess.normalize(adata, n_genes=n_genes, size_factor=size_factor, split=split)
    if n_genes is not None or size_factor is not None:
        raise ValueError(
            "n_genes and size_factor act on raw counts, and X holds other values; give counts, or leave them out"
        )
    return adata


def of_part(adata: AnnData, split: pd.Series, part: str) -> AnnData:
    """The cells of a part; it is an error if there are none."""
    chosen = (split == part).to_numpy()
    if not chosen.any():
        raise ValueError(f"the split calls no cells {part!r}; found {preview(split.unique())}")
    return adata[chosen].copy()


def described(adata: AnnData, design: Design, split: pd.Series, part: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What the page says of cells, split and models."""
    n_classes = design.groups(adata.obs).nunique()
    shape = f"{adata.n_obs:,} cells, {adata.n_vars:,} genes; {n_classes} classes by {preview(design.covariates)}"
    tested = design.groups(adata.obs[(split == part).to_numpy()]).unique()
    held_out = f"held out: {(split == part).sum():,} cells of {preview(sorted(tested))}"
    return {"dataset": shape, "split": held_out, "models": [row.record["facts"] for row in rows]}


def as_asked(entry: Entry, seed: int, *, progress: bool) -> Entry:
    """The entry, fitted with the seed unless it says how, and with progress bars only if they are wanted."""
    silent: dict[str, Any] = {} if progress else {"progress": False}
    if isinstance(entry.fit, FitConfig):
        entry = replace(entry, fit=replace(entry.fit, **silent))
    else:
        entry = replace(entry, fit={"seed": seed, **(entry.fit or {}), **silent})
    if entry.kind.verb == "forecast" or entry.is_foreign:  # without a bar
        return entry
    return replace(entry, predict={"progress": progress, **entry.predict, **silent})


class Row:
    """One entry of a comparison."""

    def __init__(self, out: Path, entry: Entry, plan: Mapping[str, Any]):
        self.out, self.entry = out, entry
        self.folder = out / "rows" / entry.label
        fields = entry.describe()
        for options in (fields["fit"], fields["predict"]):
            (options or {}).pop("progress", None)  # changes no number
        self.settings = json.loads(json.dumps({**plan, "entry": fields}))
        self.record: dict[str, Any] = {}  # empty until the row is done

    def check(self, *, overwrite: bool) -> None:
        """Read what an earlier call computed, if it asked for the same.

        Raises
        ------
        ValueError
            If the folder holds a row with other settings, unless it may be overwritten.
        """
        path = self.folder / "record.json"
        if not path.is_file():
            return
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] == self.settings:
            self.record = record
        elif not overwrite:
            other = [name for name in self.settings if record["settings"].get(name) != self.settings[name]]
            raise ValueError(
                f"{self.out} holds {self.entry.label} with another {preview(other)}; give another folder, or "
                "overwrite it"
            )

    def table(self, name: str) -> pd.DataFrame:
        """A table of the row; labels stay as they are written."""
        return pd.read_csv(self.folder / name, keep_default_na=False, na_values=[""])

    def write(self, scores: pd.DataFrame, facts: Mapping[str, Any]) -> None:
        """Write the record, after everything else: it marks the row as done."""
        self.record = {"settings": self.settings, "facts": facts, "scores": as_json(scores)}
        with writing(self.folder / "record.json") as path:
            path.write_text(json.dumps(self.record), encoding="utf-8")

    def fitted(
        self, design: Design, adata: AnnData, split: pd.Series, asked: Asked | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The model, fitted and saved, a stopped fit gone on with; and facts about it."""
        started = time.perf_counter()
        model, fit = self.entry.make(design, adata.var_names, asked)
        logger.info("fitting %s", self.entry.label)
        model.fit(adata, split=split, config=fit, folder=self.folder / "checkpoints", resume=True)
        facts = _facts(self.entry, model, fit, time.perf_counter() - started)
        model.save(self.out / "models" / self.entry.label, overwrite=True)
        return model, facts


def _facts(entry: Entry, model: Model | Foreign, fit: FitConfig, seconds: float) -> dict[str, Any]:
    trained = any(p.requires_grad for p in model.parameters())
    n_parameters = sum(p.numel() for p in model.parameters())
    facts: dict[str, Any] = {"label": entry.label, "model": entry.model, "config": asdict(model.config)}
    facts |= {"fit": asdict(fit) if trained else "closed form", "parameters": n_parameters}
    if isinstance(model, Foreign):
        facts |= {"fit": "a command", "parameters": None}
    return facts | {"fit seconds": round(seconds, 1), "data hash": model.card["data_hash"]}

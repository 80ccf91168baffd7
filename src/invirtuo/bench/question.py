"""The folder between a task and a model of any other package: what is asked, and how the answer is read and checked.

A question holds cells that may be learned from and nothing of those that are held out; the answer is one file of cells.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from invirtuo.cells.checks import check_genes
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import read_h5ad, write_h5ad, writing
from invirtuo.cells.values import canonical_csr, check_values, log_normalised, require_counts, require_log
from invirtuo.errors import preview
from invirtuo.fit import FitConfig
from invirtuo.verbs import saving
from invirtuo.verbs.wanted import wanted_conditions

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy import sparse

    from invirtuo.design import Design

__all__ = ["ANSWERS", "Asked", "Question"]

# verb to the file with the answer
ANSWERS = {"predict": "predicted.h5ad", "generate": "generated.h5ad"}
SCALES = ("log1p", "counts")
DEPTH = "total_counts"  # column of obs: what the counts of a cell were divided by


@dataclass(frozen=True)
class Asked:
    """What is asked of a model beside its training cells.

    Parameters
    ----------
    part
        Part of the split whose conditions are to be predicted.
    n_cells
        Cells of each condition.
    fold
        Which split of the task.
    controls
        Control cells from which predictions may start: those of training, or those of the predicted part.
    labels
        Of a population to generate: (n, c) the columns of the design, a row for every cell. None: cells are predicted.
    """

    part: str = "test"
    n_cells: int = 1000
    fold: int = 0
    controls: Literal["train", "evaluated"] = "train"
    labels: pd.DataFrame | None = None

    @property
    def verb(self) -> str:
        """What is asked for."""
        return "predict" if self.labels is None else "generate"


class Question:
    """A question about cells: what a model may learn from, and which conditions it is asked for.

    Parameters
    ----------
    adata
        Log values of all cells of the task; counts, if a population is asked for.
    design
        Which columns mean what.
    split
        "train", "val" and "test" for each cell.
    asked
        What is asked.
    fit
        Whose seed is asked for.

    Raises
    ------
    ValueError
        If the part holds out no conditions.
    """

    name: ClassVar[str] = "command"
    takes_unseen: ClassVar[bool] = True  # what cannot be predicted, a command has to say

    def __init__(self, adata: AnnData, design: Design, split: pd.Series, asked: Asked, fit: FitConfig | None = None):
        self.adata, self.design, self.asked = adata, design, asked
        self.fit = fit or FitConfig()
        self.card = saving.card(self.name, CellDataset(adata, design, split), self.fit)
        if asked.labels is None:
            self.wanted = wanted_conditions(asked.part, self).assign(n_cells=asked.n_cells)
        else:
            self.wanted = design.tidy(asked.labels).value_counts(sort=False).rename("n_cells").reset_index()
        parts = split.to_numpy()
        # validation cells may be looked at, unless they are what is asked for
        self.is_shown = np.isin(parts, [part for part in ("train", "val") if part != asked.part])
        self.parts = parts
        known = adata.uns.get("invirtuo", {})
        self.target_sum = float(known.get("target_sum", 0.0))  # 0: nobody knows how the values were made
        self.answer = ANSWERS[asked.verb]

    def write(self, folder: Path, minutes: float | None = None) -> None:
        """Write all files of the question; `minutes` is the limit that a command is told of."""
        folder.mkdir(parents=True, exist_ok=True)
        write_h5ad(self._cells(self.is_shown), folder / "train.h5ad")
        if self.asked.verb == "predict":
            is_control = self.design.is_control(self.adata.obs)
            started_from = "train" if self.asked.controls == "train" else self.asked.part
            write_h5ad(self._cells(is_control & (self.parts == started_from)), folder / "controls.h5ad")
        with writing(folder / "conditions.csv") as path:
            self.wanted.to_csv(path, index=False)
        facts = {"verb": self.asked.verb, "seed": self.fit.seed, "minutes": minutes}
        facts["target_sum"] = self.target_sum or None
        for name, text in (("design.json", self.design.to_json()), ("asked.json", json.dumps(facts, indent=2))):
            with writing(folder / name) as path:
                path.write_text(text, encoding="utf-8")

    def _cells(self, chosen: np.ndarray) -> AnnData:
        """Some cells with values and labels, and nothing that may have been computed from others."""
        import anndata

        own = self.adata[chosen]
        obs = self.design.tidy(own.obs).assign(split=self.parts[chosen])
        for column in (self.design.batch, DEPTH):
            if column is not None and column in own.obs:
                obs[column] = own.obs[column]
        obs.index = [f"cell_{i}" for i in range(len(obs))]
        layers = {"counts": own.layers["counts"]} if "counts" in own.layers else None
        return anndata.AnnData(own.X, obs=obs, var=pd.DataFrame(index=self.adata.var_names), layers=layers)

    def read(self, path: Path) -> AnnData:
        """Read an answer as log values of the genes of the task, a population as counts.

        Raises
        ------
        ValueError
            If genes or conditions are missing, there are more or fewer cells than were asked for, or values are not
            what the file says they are.
        """
        found = read_h5ad(path)
        try:
            return self._checked(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _checked(self, found: AnnData) -> AnnData:
        import anndata

        check_genes(found)
        genes = self.adata.var_names
        if missing := [gene for gene in genes if gene not in found.var_names]:
            raise ValueError(f"{len(missing)} of {len(genes)} genes are missing: {preview(missing)}; expected all")
        obs = self.design.tidy(found.obs)
        self._check_conditions(self.design.names(obs))

        # values as the file says, and nothing else
        found = found[:, genes].copy()
        scale = str(np.ravel(found.uns.get("scale", "not there"))[0])  # some writers make a list of one
        scales = SCALES if self.asked.verb == "predict" else SCALES[1:]
        if scale not in scales:
            raise ValueError(f'uns["scale"] is {scale!r}; expected {" or ".join(map(repr, scales))}: what X holds')
        check_values(found)
        values = self._values(found, scale)
        obs.index = [f"cell_{i}" for i in range(len(obs))]
        for column in self.design.attributes:
            obs[column] = obs[column].astype("category")
        return anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=genes))

    def _values(self, found: AnnData, scale: str) -> Any:
        """Log values of predicted cells, counts of a population."""
        if scale == "log1p":
            require_log(found)
            return found.X.astype(np.float32)
        require_counts(found)
        return self._logged(found) if self.asked.verb == "predict" else canonical_csr(found.X)

    def _check_conditions(self, names: pd.Series) -> None:
        """Every condition that was asked for, with as many cells, and no other."""
        wanted = dict(zip(self.design.names(self.wanted), self.wanted["n_cells"], strict=True))
        n_cells = names.value_counts()
        strange = sorted(set(n_cells.index) - set(wanted))
        wrong = [name for name, n in wanted.items() if n_cells.get(name, 0) != n]
        said = [f"{preview(strange)}: not asked for"] if strange else []
        said += [f"{name} has {n_cells.get(name, 0)} cells, not {wanted[name]}" for name in wrong[:1]]
        if said:
            raise ValueError(
                f"{', '.join(said)}; expected n_cells of each condition of conditions.csv ({preview(wanted)}), with "
                "its columns in obs, and no others"
            )

    def _logged(self, found: AnnData) -> sparse.csr_matrix:
        """Counts as log values on the scale of the task."""
        if not self.target_sum:
            raise ValueError('uns["scale"] is "counts", and the cells of this task are not counts; give log1p values')
        counts = canonical_csr(found.X)
        if DEPTH in found.obs:
            depth = found.obs[DEPTH].to_numpy(float)
        else:
            depth = np.asarray(counts.sum(axis=1)).ravel() * self._depth_over_sum()
        return log_normalised(counts, depth, self.target_sum)

    def _depth_over_sum(self) -> float:
        """Depth of a training cell over the sum of the genes that are kept."""
        train = self.adata[self.is_shown]
        if DEPTH not in train.obs or "counts" not in train.layers:
            return 1.0
        sums = np.asarray(train.layers["counts"].sum(axis=1)).ravel()
        return float(np.median(train.obs[DEPTH].to_numpy(float)[sums > 0] / sums[sums > 0]))

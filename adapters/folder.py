"""What every adapter reads and writes: the question in a folder, and the answer to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse


@dataclass(frozen=True)
class Question:
    """What is in the folder."""

    folder: Path
    train: anndata.AnnData  # cells to fit to, without those for validation
    validation: anndata.AnnData
    controls: anndata.AnnData
    wanted: pd.DataFrame  # conditions, with `n_cells`
    perturbation: str  # column of obs
    control: str  # label of control cells in it
    covariates: list[str]
    seed: int

    def is_control(self, obs: pd.DataFrame) -> np.ndarray:
        """(n,) whether cells are control cells."""
        return (obs[self.perturbation].astype(str) == self.control).to_numpy()

    def groups(self, obs: pd.DataFrame) -> np.ndarray:
        """(n,) covariates of cells, joined."""
        joined = pd.Series("", index=obs.index)
        for name in self.covariates:
            joined = joined + "|" + obs[name].astype(str)
        return joined.to_numpy()


def read(folder: str) -> Question:
    """Read the question in a folder."""
    path = Path(folder)
    design: dict[str, Any] = json.loads((path / "design.json").read_text())
    asked = json.loads((path / "asked.json").read_text())
    cells = anndata.read_h5ad(path / "train.h5ad")
    is_train = (cells.obs["split"] == "train").to_numpy()
    return Question(
        path,
        cells[is_train].copy(),
        cells[~is_train].copy(),
        anndata.read_h5ad(path / "controls.h5ad"),
        pd.read_csv(path / "conditions.csv"),
        design["perturbation"],
        design["control"],
        list(design["covariates"]),
        asked["seed"],
    )


def starting_cells(question: Question) -> tuple[pd.DataFrame, anndata.AnnData]:
    """Labels of all wanted cells, and for each a control cell of its covariates, drawn at random."""
    rng = np.random.default_rng(question.seed)
    wanted = question.wanted
    obs = wanted.loc[wanted.index.repeat(wanted["n_cells"])].reset_index(drop=True)
    groups, known = question.groups(obs), question.groups(question.controls.obs)
    rows = np.empty(len(obs), dtype=int)
    for group in np.unique(groups):
        pool = np.flatnonzero(known == group)
        if not len(pool):
            raise SystemExit(f"no control cells of {group}")
        rows[groups == group] = rng.choice(pool, (groups == group).sum())
    cells = question.controls[rows]
    return obs, anndata.AnnData(cells.X, cells.obs.reset_index(drop=True).rename(str), cells.var, layers=cells.layers)


def write(question: Question, x: Any, obs: pd.DataFrame, scale: str) -> None:
    """Write the answer: (n, g) "log1p" values or "counts" of the genes of the training cells."""
    answer = anndata.AnnData(
        sparse.csr_matrix(x, dtype=np.float32),
        obs=obs.rename(str),
        var=pd.DataFrame(index=question.train.var_names),
        uns={"scale": scale},
    )
    answer.write_h5ad(question.folder / "predicted.h5ad")

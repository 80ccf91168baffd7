"""What every adapter reads and writes: the question in a folder, and the answer to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

ANSWERS = {"predict": "predicted.h5ad", "generate": "generated.h5ad"}


@dataclass(frozen=True)
class Question:
    """What is in the folder."""

    folder: Path
    train: anndata.AnnData  # cells to fit to, without those for validation
    validation: anndata.AnnData
    controls: anndata.AnnData  # of cells to predict
    wanted: pd.DataFrame  # conditions, with `n_cells`
    perturbation: str  # column of obs; of populations there is none
    control: str  # label of control cells in it
    covariates: list[str]
    separator: str  # between the parts of a combination
    seed: int
    target_sum: float | None  # to which cells were brought before the logarithm
    verb: str  # "predict" or "generate"

    def is_control(self, obs: pd.DataFrame) -> np.ndarray:
        """(n,) whether cells are control cells."""
        return (obs[self.perturbation].astype(str) == self.control).to_numpy()

    def groups(self, obs: pd.DataFrame) -> np.ndarray:
        """(n,) covariates of cells, joined."""
        joined = pd.Series("", index=obs.index)
        for name in self.covariates:
            joined = joined + "|" + obs[name].astype(str)
        return joined.to_numpy()

    def parts(self, label: str) -> list[str]:
        """What a combination is made of; nothing of control cells."""
        return [part for part in str(label).split(self.separator) if part != self.control]

    def multi_hots(self, labels: pd.Series) -> np.ndarray:
        """(n, k) a one for every part of a perturbation, of those that training cells have."""
        trained = sorted({part for label in self.train.obs[self.perturbation].unique() for part in self.parts(label)})
        unknown = {part for label in labels.unique() for part in self.parts(label)}.difference(trained)
        if unknown:
            raise SystemExit(f"no training cell has {', '.join(sorted(unknown))}")
        rows = {label: np.isin(trained, self.parts(label)).astype(np.float32) for label in labels.unique()}
        return np.stack([rows[label] for label in labels])

    def epochs(self, steps: int, batch_size: int) -> int:
        """Epochs that take about so many steps."""
        return max(1, round(steps * batch_size / self.train.n_obs))

    def conditions(self) -> Iterator[tuple[pd.Series, slice]]:
        """Every wanted condition, and the rows of :func:`starting_cells` that are its."""
        ends = self.wanted["n_cells"].cumsum()
        for (_, row), end in zip(self.wanted.iterrows(), ends, strict=True):
            yield row, slice(end - row["n_cells"], end)


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
        anndata.read_h5ad(path / ("controls.h5ad" if asked["verb"] == "predict" else "train.h5ad")),
        pd.read_csv(path / "conditions.csv"),
        design["perturbation"],
        design["control"],
        list(design["covariates"]),
        design["separator"],
        asked["seed"],
        asked["target_sum"],
        asked["verb"],
    )


def starting_rows(question: Question, pool: anndata.AnnData) -> tuple[pd.DataFrame, np.ndarray]:
    """Labels of all wanted cells, and for each the row of a control cell of its covariates, drawn at random."""
    rng = np.random.default_rng(question.seed)
    wanted = question.wanted
    obs = wanted.loc[wanted.index.repeat(wanted["n_cells"])].reset_index(drop=True)
    groups, known = question.groups(obs), question.groups(pool.obs)
    is_control = question.is_control(pool.obs)
    rows = np.empty(len(obs), dtype=int)
    for group in np.unique(groups):
        own = np.flatnonzero(is_control & (known == group))
        if not len(own):
            raise SystemExit(f"no control cells of {group}")
        rows[groups == group] = rng.choice(own, (groups == group).sum())
    return obs, rows


def starting_cells(question: Question) -> tuple[pd.DataFrame, anndata.AnnData]:
    """Labels of all wanted cells, and for each a control cell to start from."""
    obs, rows = starting_rows(question, question.controls)
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
    answer.write_h5ad(question.folder / ANSWERS[question.verb])

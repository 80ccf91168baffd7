"""Task: what is held out of which data, and how predictions of it are judged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from invirtuo.cells import datasets, features, preprocess
from invirtuo.cells.files import is_zarr_folder, read_h5ad
from invirtuo.cells.one_matrix import contents
from invirtuo.cells.packed import plain
from invirtuo.design import Design
from invirtuo.errors import preview
from invirtuo.splits import from_csv

if TYPE_CHECKING:
    import os

    from anndata import AnnData

__all__ = ["DISCRIMINATING", "FALSE_CALLS", "JUDGED", "PUBLISHED", "Task", "digest"]

logger = logging.getLogger(__name__)

PUBLISHED = ("mmd_gex", "mmd_pca", "deg_recall", "cosine_logfc", "rmse_mean")  # columns of PRiMeFlow's tables
FALSE_CALLS = ("de_false_calls", "de_fdr", "de_recall_at_fdr")  # what deg_recall does not see
DISCRIMINATING = ("energy_distance", "mse_degs", "pearson_degs")  # on validation conditions of five tasks, all above .6
JUDGED = (*PUBLISHED, *FALSE_CALLS, *DISCRIMINATING)

Split = Callable[[pd.DataFrame, Design], pd.Series]


@dataclass(frozen=True)
class Task:
    """A frozen question to models: predict these conditions, knowing those.

    Functions are module-level ones or partials of them, so that a task can be sent to another process.

    Parameters
    ----------
    name
        Short name, used in tables and file names.
    title
        One line for readers.
    dataset
        Name in `invirtuo.datasets`, or path of an h5ad file with log1p expression in X (then `design` is needed).
    splits
        Functions (obs, design) -> "train" / "val" / "test" per cell. Several: a model is fitted on each, and the
        held-out conditions of all are scored together.
    design
        None: that of the named data set.
    covariates
        Columns that replace the covariates of the named data set; empty keeps them.
    keep
        Function obs -> which cells take part, (n,) bool; None keeps all.
    n_genes
        Variable genes kept, chosen on training cells; None keeps all.
    unseen
        Also score held-out conditions with perturbations that no training cell has, which most models cannot predict.
        Otherwise their cells take no part.
    published
        Take expression as the file has it instead of normalising its counts, for files with published processing.
    metrics
        What is scored.
    n_cells
        Predicted cells per condition.
    n_pcs
        Principal components of metrics in that space.
    split_file
        File of the data folder with the published split, which is taken instead of that of `splits` where it is there;
        without it that is drawn, and a warning says so. Empty: there is none.
    figures
        Conditions whose cells the paper draws.
    features
        What is known of perturbations, for models that take it: names of files in the data folder, or "coexpression";
        see `invirtuo.features`. Perturbations that a source lacks have its mean.

    Examples
    --------
    >>> from invirtuo.bench import TASKS
    >>> adata, design, split = TASKS["kang-demo"].load()
    >>> sorted(adata.obs["cell_type"][(split == "test") & ~design.is_control(adata.obs)].unique())
    ['B cell', 'CD14 monocyte']
    """

    name: str
    title: str
    dataset: str
    splits: tuple[Split, ...]
    design: Design | None = None
    covariates: tuple[str, ...] = ()
    keep: Callable[[pd.DataFrame], pd.Series] | None = None
    n_genes: int | None = None
    unseen: bool = False
    published: bool = False
    metrics: tuple[str, ...] = JUDGED
    n_cells: int = 1000
    n_pcs: int = 30
    split_file: str = ""
    figures: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse names that cannot be file names, and tasks without a split."""
        if not self.name or set(self.name) & set("/\\ \t\n"):
            raise ValueError(f"task name {self.name!r}; expected a short name without spaces and slashes")
        if not self.splits:
            raise ValueError(f"task {self.name!r} has no split; expected one function or more")
        if self.split_file and len(self.splits) > 1:
            raise ValueError(f"task {self.name!r} has {len(self.splits)} splits and a file of one; give it one split")

    def load(
        self,
        fold: int = 0,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        file: str | os.PathLike[str] | None = None,
    ) -> tuple[AnnData, Design, pd.Series]:
        """Cells in log1p space, their Design, and the part of each cell.

        Parameters
        ----------
        fold
            Which of the splits.
        data_dir
            Folder with data files, as in `invirtuo.datasets.load`.
        file
            The file to take; None looks for it.

        Raises
        ------
        ValueError
            If the file is missing or is not what it should be.
        """
        adata = self._cells(data_dir, file)
        if self.keep is not None:
            adata = adata[self.keep(adata.obs).to_numpy()].copy()
        design, split = self._roles(adata.obs, fold, data_dir)
        if not self.is_normalised:
            adata = preprocess.normalize(adata, n_genes=self.n_genes, split=split)
        return adata, self._with_features(adata, design, data_dir), split

    def _with_features(self, adata: AnnData, design: Design, data_dir: str | os.PathLike[str] | None) -> Design:
        """The Design with what is known of its perturbations."""
        if not self.features:
            return design
        sources = self._sources(data_dir)
        tables = {name: features.read(source, adata, design) for name, source in sources.items()}
        return design.with_features(features.join(tables, design.perturbations, missing="mean"))

    def _sources(self, data_dir: str | os.PathLike[str] | None) -> dict[str, str | Path]:
        """Where each of the features is read from."""
        folder = datasets.folder(data_dir)
        sources = {name: name if name == "coexpression" else folder / name for name in self.features}
        if missing := [name for name, source in sources.items() if isinstance(source, Path) and not source.is_file()]:
            raise ValueError(
                f"task {self.name!r} reads features from {preview(missing)}, not in {folder}; put it there"
            )
        return sources

    def look(self, data_dir: str | os.PathLike[str] | None = None) -> tuple[str | os.PathLike[str], list[str]]:
        """Find the data and try all splits on their labels; matrices are not read.

        Returns
        -------
        The file (one that is packed is unpacked as long as this is held), and the names of the tested conditions; of a
        zarr folder none.

        Raises
        ------
        ValueError
            As :meth:`load`, for whatever is wrong with more than single values.
        """
        if self.dataset in datasets.DATASETS:
            file, found = datasets.look(self.dataset, data_dir=data_dir)
        elif is_zarr_folder(self.dataset):
            return self.dataset, []
        else:
            self._check_design()
            file = plain(self.dataset)
            found = contents(file)
        self._sources(data_dir)
        obs = found.obs if self.keep is None else found.obs[self.keep(found.obs).to_numpy()]
        tested: list[str] = []
        for fold in range(len(self.splits)):
            design, split = self._roles(obs, fold, data_dir)
            is_tested = (split == "test").to_numpy() & ~design.is_control(obs)
            if not is_tested.any():
                raise ValueError(f"task {self.name!r}: there is nothing to test, its split holds out no cell of {file}")
            tested += design.names(obs[is_tested]).unique().tolist()
        return file, tested

    def _roles(self, obs: pd.DataFrame, fold: int, data_dir: str | os.PathLike[str] | None) -> tuple[Design, pd.Series]:
        """Which columns mean what, and the part of each cell."""
        design = self.design or datasets.design(self.dataset, obs, covariates=self.covariates or None)
        published = self.published_split(data_dir)
        if note := self.split_note(data_dir):
            logger.warning(note)
        split = self.splits[fold](obs, design) if published is None else from_csv(published, obs)
        return design, split if self.unseen else _without_unseen(obs, design, split)

    def published_split(self, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
        """The file with the published split, if it lies in the data folder."""
        file = datasets.folder(data_dir) / self.split_file
        return file if self.split_file and file.is_file() else None

    def split_note(self, data_dir: str | os.PathLike[str] | None = None) -> str:
        """What to know of where the split comes from; empty if there is nothing to know."""
        if not self.split_file or self.published_split(data_dir) is not None:
            return ""
        return (
            f"{self.name}: the published split {self.split_file} is not in {datasets.folder(data_dir)}; the split is "
            "drawn by the same rules, with other conditions in validation and test"
        )

    @property
    def is_normalised(self) -> bool:
        """Whether X of the source is log1p expression that is used as it is."""
        return self.published or self.dataset not in datasets.DATASETS

    def describe(self, data_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """All fields that the numbers depend on, as text and numbers; two tasks that differ here are different."""
        facts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "splits":
                value = [_text(split) for split in value]
            elif isinstance(value, Design):
                value = value.to_json()
            elif callable(value):
                value = _text(value)
            if field.name == "figures" or (field.name in ("split_file", "features") and not value):
                continue  # changes no number; results of before there were such files stay valid
            facts[field.name] = list(value) if isinstance(value, tuple) else value
        if self.dataset not in datasets.DATASETS and Path(self.dataset).is_file():
            facts["file"] = digest(Path(self.dataset))
        if published := self.published_split(data_dir):
            facts["split"] = digest(published)
        return facts

    def _cells(self, data_dir: str | os.PathLike[str] | None, file: str | os.PathLike[str] | None) -> AnnData:
        if self.dataset in datasets.DATASETS:
            return datasets.load(self.dataset, file, data_dir=data_dir, counts=not self.published)
        self._check_design()
        return read_h5ad(self.dataset if file is None else file)

    def _check_design(self) -> None:
        if self.design is None:
            raise ValueError(
                f"task {self.name!r}: {self.dataset!r} is not a named data set ({preview(datasets.DATASETS)}); for "
                "a file give design= as well"
            )


def _without_unseen(obs: pd.DataFrame, design: Design, split: pd.Series) -> pd.Series:
    """Held-out cells with a perturbation that no training cell has belong to no part."""
    labels = design.tidy(obs)[design.perturbation]
    trained: set[str] = set()
    for label in labels[split == "train"].unique():
        trained |= set(design.parts(label))
    unseen = {label for label in labels.unique() if not set(design.parts(label)) <= trained}
    if unseen:
        logger.info("not trained on, so not scored: %s", preview(sorted(unseen)))
    return split.mask(labels.isin(unseen), "")


def digest(file: Path) -> str:
    """Of the content of a file, read once for all cells of a benchmark unless it changes."""
    found = file.stat()
    return _digest(str(file), found.st_size, found.st_mtime_ns)


@cache
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _text(function: Callable[..., Any]) -> str:
    """A function and its fixed arguments, the same in every process."""
    if isinstance(function, partial):
        arguments = [repr(value) for value in function.args]
        arguments += [f"{key}={value!r}" for key, value in function.keywords.items()]
        return f"{_text(function.func)}({', '.join(arguments)})"
    return f"{function.__module__}.{function.__qualname__}"

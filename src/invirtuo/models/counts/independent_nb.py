"""Independent negative binomials: every gene by itself, by class; what every generator of counts must beat.

A class is a combination of labels. In it, gene i of a cell with depth l has mean l p_i and variance
l p_i + (l p_i)^2 / r_i with, by moments over the cells of the class,

    p_i = sum x_i / sum l,    1 / r_i = max(sum (x_i - l p_i)^2 - sum x_i, 0) / sum (l p_i)^2,

and depths are log-normal. Genes are independent, so that there is no variation of cells within a class but in
depth. Marginal distances hardly distinguish this from real cells; correlations of genes do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invirtuo.batch import Batch, Condition
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.pseudobulk import group_sums
from invirtuo.errors import preview
from invirtuo.nn import CountLikelihood, SizeFactor
from invirtuo.settings import Settings
from invirtuo.verbs.generate import CountGenerator, check_depths
from invirtuo.verbs.sampling import NoSampling

__all__ = ["Config", "IndependentNB"]


@dataclass(frozen=True)
class Config(Settings):
    """No choices."""


class IndependentNB(CountGenerator):
    """Negative binomial of every gene in every class, by moments; depths are log-normal by class."""

    name = "independent_nb"
    Config = Config
    SEARCH = {}

    def build(self) -> None:
        """Room for the moments of every class."""
        if self.n_peaks:
            raise ValueError(f"{self.name} models genes alone, found {self.n_peaks} peaks; use cfgen")
        self.depth = SizeFactor()
        self.register_buffer("log_share", torch.zeros(0, len(self.genes)))
        self.register_buffer("log_dispersion", torch.zeros(0, len(self.genes)))
        self.register_buffer("labels", torch.zeros(0, len(self.design.covariates) + len(self.design.perturbations) + 1))

    def prepare(self, dataset: CellDataset) -> None:
        """Moments of the training cells, in one pass over them; of cells on disk only a window is in memory."""
        # class of every training cell: cells of equal labels
        rows = dataset.rows("train")
        table, condition = self.design.unique_conditions(dataset.obs.iloc[rows])
        self.labels, group = torch.unique(_codes(self.design.encode(table)), dim=0, return_inverse=True)
        class_of_row = np.zeros(len(dataset.split), dtype=np.int64)
        class_of_row[rows] = group.numpy()[condition]

        # by class and gene: sums of counts x, of x^2, and of x times the depth l
        total, square, weighted = np.zeros((3, len(self.labels), len(self.genes)))
        size = np.zeros(len(dataset.split))
        for own, values in dataset.blocks(rows):
            x, classes = values.astype(np.float64), class_of_row[own]
            size[own] = np.asarray(x.sum(axis=1)).ravel()
            total += group_sums(x, classes, len(total))
            square += group_sums(x.multiply(x), classes, len(total))
            x_times_depth = x.multiply(size[own][:, None]).tocsr()
            weighted += group_sums(x_times_depth, classes, len(total))

        classes, depth = class_of_row[rows], size[rows]
        sizes = torch.from_numpy(depth).float()
        check_depths(sizes)
        self.depth.fit(sizes, torch.from_numpy(classes), len(self.labels))
        depths = np.bincount(classes, depth**1)[:, None]
        depth_squares = np.bincount(classes, depth**2)[:, None]
        self._keep(total / depths, total, square - 2 * total / depths * weighted, depth_squares)

    def _keep(self, share: np.ndarray, total: np.ndarray, rest: np.ndarray, depth_squares: np.ndarray) -> None:
        """Shares and dispersions of the classes, (k, g); `rest` is sum x^2 - 2 p sum l x."""
        expected = share**2 * depth_squares
        excess = np.maximum(rest + expected - total, 0.0)
        inverse = np.divide(excess, expected, out=np.zeros_like(excess), where=expected > 0)
        self.log_share = torch.from_numpy(np.log(np.maximum(share, 1e-30))).float()
        self.log_dispersion = torch.from_numpy(-np.log(np.maximum(inverse, 1e-6))).float()

    def likelihood(
        self, batch: Batch, weights: Tensor, generator: torch.Generator, config: NoSampling
    ) -> tuple[CountLikelihood, None]:
        """The negative binomials of the class of every cell."""
        group = self._groups(batch.condition)
        if bool((group < 0).any()):
            raise ValueError(
                f"{self.name} knows only combinations of labels that occur in the training cells, and cannot put "
                f"{preview(self.design.attributes)} together anew"
            )
        log_mean = self.log_share[group] + batch.size_factor.log()[:, None]
        return CountLikelihood(log_mean, self.log_dispersion[group]), None

    def _groups(self, condition: Condition) -> Tensor:
        """(n,) class of each cell, -1 for combinations that were never seen."""
        same = (_codes(condition)[:, None, :] == self.labels.to(condition.perturbation.device)).all(dim=2)
        return torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)


def _codes(condition: Condition) -> Tensor:
    """(n, number of covariates + p + 1), equal rows for equal labels; the last column is for cells without any."""
    empty = condition.perturbation.new_zeros(len(condition), 1)
    return torch.cat([condition.groups.float(), condition.perturbation, empty], dim=1)

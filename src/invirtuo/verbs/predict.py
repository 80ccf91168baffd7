"""PerturbationModel: predicts cells of perturbations and covariates that were never seen together."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from invirtuo.batch import Batch
from invirtuo.cells.conditions import Conditions
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import read_h5ad, writing_h5ad
from invirtuo.design import Design
from invirtuo.errors import preview, whole_number
from invirtuo.verbs import saving
from invirtuo.verbs.controls import ControlCells
from invirtuo.verbs.draw import Request, check_engine, control_pool, drawn, filled, means_of, stored
from invirtuo.verbs.effects import Calibration
from invirtuo.verbs.emission import N_CELLS, Depths
from invirtuo.verbs.model import Model, check_torch, track
from invirtuo.verbs.observed import ObservedMeans
from invirtuo.verbs.sampling import NoSampling, SampleConfig, takes_options
from invirtuo.verbs.wanted import wanted_conditions
from invirtuo.verbs.write_counts import Block, assembled, in_rows, write_cells

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["PerturbationModel"]

logger = logging.getLogger(__name__)

CHUNK = 10_000  # cells of counts that are written at once


class PerturbationModel(Model):
    """Base of the models that predict cells under perturbations, in log space; they write `sample`."""

    verb = "predict"
    Sampling: ClassVar[type[NoSampling]] = SampleConfig
    needs_source: bool = False  # whether sampling starts from control cells; `build` may choose
    deterministic: bool = False  # whether every seed gives the same cells; `build` may choose
    keeps_zeros: bool = False  # whether cells have zeros as they are drawn; `build` may choose
    groups_by_controls: bool = False  # whether control cells are all that it knows of covariates; `build` may choose

    _controls: dict[str, ControlCells]
    _observed_means: ObservedMeans | None
    _depths: Depths | None

    def __init__(self, design: Design, genes: Sequence[str], config: Any = None):
        if design.perturbation is None:
            raise ValueError(
                f"the design names no perturbation, and {self.name} predicts responses to perturbations; "
                "give perturbation= and control= to Design.from_adata, or use a model that generates populations"
            )
        super().__init__(design, genes, config)
        self._controls, self._observed_means, self._depths = {}, None, None

    # ---- what a model writes -----------------------------------------------------------------------------------

    def sample(self, batch: Batch, generator: torch.Generator, config: Any) -> Tensor:
        """Draw n cells (n, g) of one condition; `batch.source` holds control cells if needed.

        `config` is a record of the class `Sampling`: all its options must act. Noise comes from the generator, on the
        CPU, and networks are given at most `config.batch_size` cells at once (`in_batches`).
        """
        raise NotImplementedError

    # ---- predicting --------------------------------------------------------------------------------------------

    @takes_options()
    def predict(
        self,
        conditions: Conditions,
        n_cells: int | Sequence[int] = 1000,
        *,
        seed: int = 0,
        controls: AnnData | str | Path | None = None,
        effect_level: float | None = None,
        output: Literal["log", "counts"] = "log",
        out: str | Path | None = None,
        engine: str = "local",
        n_jobs: int | None = None,
        device: str | None = None,
        progress: bool = False,
        **options: Any,
    ) -> AnnData:
        """Draw cells for conditions.

        Parameters
        ----------
        conditions
            A condition (``"B cell|IFN-beta"`` or a mapping of column to value), several, or a table with the columns of
            the Design; or "test" / "val": the conditions held out by the split of the fit.
        n_cells
            Cells per condition: one number, or one for each condition in its order.
        seed
            Same seed, same cells, whatever the device, the batch size and the other conditions.
        controls
            Control cells (or their h5ad) to start from, for models that need them; None takes those of the fitted data.
            For models that know covariates by their control cells alone (`with_controls`) they may be of groups that
            were never seen.
        effect_level
            Also give the effect on every gene with an interval, which shall cover this share of all genes. Intervals
            are conformal and calibrated on the conditions that the split of the fit held out for validation, drawn
            in the same way (`invirtuo.effects`): they hold for conditions that are like those.
        output
            "log": values in the model's data space. "counts": whole counts of these cells, for models of log1p values
            of counts per depth. Cells that start from control cells have the depths of these, others together those of
            the control cells of their group; a model that draws no zeros draws with ``zeros="moved"``, unless another
            way is chosen.
        out
            h5ad to write while cells are drawn; memory then does not grow with their number.
        engine, n_jobs
            "local" draws in this process. "ray" spreads conditions over the Ray cluster of this session or of
            ``RAY_ADDRESS``, or over `n_jobs` processes of this machine: the same cells; those of a lost worker are
            drawn again.
        device
            "cpu", "cuda" or "cuda:1"; None or "auto": a GPU if there is one and `FitConfig.accelerator` of the fit
            allowed it.
        progress
            Show a progress bar.
        {options}

        Returns
        -------
        AnnData with the columns of the Design in obs, X in the model's data space (float32) or counts (CSR, int32), and
        ``uns["invirtuo"]``: how it was made. With `out` it reads from the file (backed). With `effect_level` varm holds
        ``effect``, ``effect_low`` and ``effect_high``, (g, c): change of the mean to the control cells of the same
        covariates; conditions in the order of obs, and named in ``uns["invirtuo"]["conditions"]``.

        Raises
        ------
        ValueError
            If the model is not fitted, a condition has an unknown perturbation or covariate, an option is unknown or
            cannot act, the device is not there, intervals are asked for and the fit held out no conditions for
            validation, or counts are asked for and the training values do not come from counts.
        """
        import anndata

        check_engine(engine, n_jobs)
        self._check_fitted()
        check_torch()
        seed = whole_number("seed", seed, 0)
        config = self._sampling(options)
        if output not in ("log", "counts"):
            raise ValueError(f"output is {output!r}; expected log or counts")
        if output == "counts":
            config = self._sampling_of_counts(config, effect_level)
        smallest = self._smallest(config.zeros)

        # what to draw, with which model
        if isinstance(controls, str | Path):
            controls = read_h5ad(controls)
        model = self if controls is None else self.with_controls(controls)
        table = model.wanted(conditions)
        sizes = _sizes(n_cells, table)
        calibration = None if effect_level is None else model._calibration(effect_level, controls)
        pool = model._pool(controls)
        depths = self._depths if output == "counts" else None
        if depths is not None and controls is not None:
            depths = depths.with_groups(pool)
        request = Request(table, sizes, seed, config, pool, device, smallest=smallest, depths=depths)

        # cells are drawn when they are written; effects need their means
        cells: Iterable[tuple[int, np.ndarray]] = drawn(model, request, engine, n_jobs)
        means = np.empty((len(table), len(self.genes)))
        if calibration is not None:
            cells = means_of(cells, means)
        cells = track(cells, "predicting", progress, len(table))

        # what is known of the cells before they are drawn
        obs = table.loc[table.index.repeat(sizes)].reset_index(drop=True)
        obs.index = [f"cell_{i}" for i in range(len(obs))]
        for column in self.design.attributes:
            obs[column] = obs[column].astype("category")
        var = pd.DataFrame(index=pd.Index(self.genes))
        uns = {"invirtuo": self._provenance(seed, config)}
        if calibration is not None:
            names = model.design.names(table).to_numpy(str)
            uns["invirtuo"] |= {"effect_level": effect_level, "conditions": names}

        # into a file as they come, or into memory
        if output == "counts":
            blocks = (Block(in_rows(torch.from_numpy(x)), None, None) for _, x in cells)
            if out is not None:
                write_cells(Path(out), obs, var, uns["invirtuo"], blocks, CHUNK, latent=False)
                return read_h5ad(out, backed=True)
            return assembled(list(blocks), obs, var, uns["invirtuo"], output, latent=False)
        shape = (len(obs), len(self.genes))
        if out is not None:
            with writing_h5ad(out, obs, var, uns) as file:
                filled(stored(file, shape), cells, sizes)
                if calibration is not None:
                    anndata.io.write_elem(file, "varm", calibration.intervals(request, means))
            return read_h5ad(out, backed=True)
        x = filled(np.empty(shape, np.float32), cells, sizes)
        varm = None if calibration is None else calibration.intervals(request, means)
        return anndata.AnnData(x, obs=obs, var=var, uns=uns, varm=varm)

    def _sampling_of_counts(self, config: Any, effect_level: float | None) -> Any:
        """Options with which cells that become counts are drawn: with zeros."""
        if effect_level is not None:
            raise ValueError(
                "effect_level asks for effects in log space, and output is 'counts'; leave one of them out"
            )
        if self._depths is None:
            raise ValueError("output is 'counts', and this model was fitted before it could be asked for; fit it again")
        if config.zeros is not None or self.keeps_zeros:
            return config
        return replace(config, zeros="moved")

    def _smallest(self, zeros: str | None) -> float:
        """Smallest positive training value, where an option asks for zeros that the model can have."""
        if zeros is None:
            return 0.0
        if self.keeps_zeros:
            raise ValueError(f"zeros is {zeros!r}, and {self.name} draws cells with zeros by itself; leave zeros out")
        if "smallest" not in self.card or (zeros == "moved" and not self._controls):
            raise ValueError(
                f"zeros is {zeros!r}, and this model was fitted before it could be asked for; fit it again"
            )
        return float(self.card["smallest"])

    def _calibration(self, level: float, controls: AnnData | None) -> Calibration:
        """Calibration of the intervals of effects; with further control cells, for groups that the fit did not see."""
        observed, design = self._observed_means, self.design
        if observed is not None and controls is not None:
            cells = self._with_genes(controls[design.is_control(controls.obs)])
            observed = observed.with_groups(ObservedMeans.of(CellDataset(cells, design)))
        known = pd.DataFrame(self.card["held_out"]["val"], columns=design.columns)
        return Calibration(self, observed, known, level)

    def with_controls(self, controls: AnnData) -> Self:
        """The model, or a copy that also knows the covariate groups of these control cells, if it can learn of them.

        Raises
        ------
        ValueError
            If control cells mean nothing to the model.
        """
        if not self.needs_source:
            raise ValueError(
                f"{self.name}, as it is configured, neither starts from control cells nor learns of covariates by "
                "them; leave controls= out"
            )
        controls = controls[self.design.is_control(controls.obs)]
        design = self.design.with_levels(controls.obs)
        if not self.groups_by_controls or design == self.design:
            return self

        # the same, parameters too, but for labels
        new = copy.copy(self)
        groups, _ = design.unique_conditions(controls.obs)
        known = {name: sorted({*labels, *groups[name]}) for name, labels in self.card["covariates"].items()}
        new.design, new.card = design, self.card | {"covariates": known}
        return new

    def wanted(self, conditions: Conditions) -> pd.DataFrame:
        """The wanted conditions as a tidy table, each once, checked."""
        return wanted_conditions(conditions, self)

    def _pool(self, controls: AnnData | None) -> dict[str, ControlCells]:
        """Control cells of every covariate group: those that are given, or of the fit."""
        if controls is None:
            return self._controls
        self._check_space(controls)
        dataset = CellDataset(self._with_genes(controls), self.design, obsm=self.obsm)
        return control_pool(dataset)

    # ---- fitting -----------------------------------------------------------------------------------------------

    def check_labels(self, dataset: CellDataset) -> None:
        """All labels are known, there are responses to learn from, and those that are held out can be predicted."""
        covariates = dataset.condition.distinct.covariates
        unknown = [name for name, codes in covariates.items() if bool((codes < 0).any())]
        if unknown:
            raise ValueError(
                f"{self.name} needs the labels of all cells; {preview(unknown)} is unknown for some. Remove these cells"
            )
        super().check_labels(dataset)
        self._check_responses(dataset)

    def _check_responses(self, dataset: CellDataset) -> None:
        """There are responses to learn from, and those that are held out can be predicted."""
        # single perturbations in each part of the split
        design, column = self.design, self.design.perturbation
        perturbed: dict[str, set[str]] = {}
        for part in ("train", "val", "test"):
            conditions, _ = design.unique_conditions(dataset.obs.iloc[dataset.rows(part)])
            labels = conditions[column].unique()
            perturbed[part] = {single for label in labels for single in design.parts(label)}
        if not perturbed["train"]:
            n_cells = len(dataset.rows("train"))
            raise ValueError(
                f"no perturbed cell is left to train on: all {n_cells:,} training cells are controls. Hold out less"
            )

        unseen = sorted((perturbed["val"] | perturbed["test"]) - perturbed["train"])
        if unseen and not self.takes_unseen:
            logger.warning(
                "perturbations %s are held out everywhere; %s cannot predict what it never saw",
                preview(unseen),
                self.name,
            )

    def remember(self, dataset: CellDataset) -> None:
        """Keep control cells to start from, and means of them and of the conditions held out for validation."""
        design = self.design
        keeps = self.needs_source or not self.keeps_zeros  # control cells to start from, or to move
        pool = control_pool(dataset) if keeps else control_pool(dataset, N_CELLS)
        smallest, largest = dataset.extremes()
        self._controls = pool if keeps else {}
        self._depths = Depths.of(pool, largest)
        self.card["smallest"] = smallest

        # controls, and conditions held out as a whole, of all cells that are not for testing
        table, condition = design.unique_conditions(dataset.obs)
        held_out = pd.DataFrame(self.card["held_out"]["val"], columns=design.columns)
        is_held_out = design.names(table).isin(design.names(held_out)).to_numpy()
        wanted = design.is_control(table) | is_held_out
        rows = np.flatnonzero(wanted[condition] & np.isin(dataset.split, ("train", "val")))
        self._observed_means = ObservedMeans.of(dataset, rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """Transforms, control cells and pseudobulks."""
        arrays = super().arrays()
        for group, cells in self._controls.items():
            arrays |= {f"controls/{group}/{field}": array for field, array in cells.state().items()}
        if self._depths is not None:
            for name, state in self._depths.state().items():
                arrays |= {f"depths/{name}/{field}": array for field, array in state.items()}
        if self._observed_means is not None:
            state = self._observed_means.state()
            arrays |= {f"pseudobulks/all/{field}": array for field, array in state.items()}
        return arrays

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load_arrays(arrays)
        states = saving.by_owner(arrays)
        for (owner, name), state in states.items():
            if owner == "controls":
                self._controls[name] = ControlCells.load(state, len(self.genes), self.obsm_width)
            elif owner == "pseudobulks":
                self._observed_means = ObservedMeans.load(state)
        depths = {name: state for (owner, name), state in states.items() if owner == "depths"}
        self._depths = Depths.load(depths) if depths else None

    def replaced_by_fits(self) -> list[Any]:
        return [*super().replaced_by_fits(), self._observed_means, self._depths, *self._controls.values()]


def _sizes(n_cells: int | Sequence[int], table: pd.DataFrame) -> list[int]:
    """Number of cells of every condition of a table."""
    if np.ndim(n_cells) == 0:
        return [whole_number("n_cells", n_cells)] * len(table)
    sizes = [whole_number("n_cells", n) for n in cast("Sequence[int]", n_cells)]
    if len(sizes) != len(table):
        raise ValueError(f"n_cells has {len(sizes)} numbers for {len(table)} conditions; expected one for each")
    return sizes

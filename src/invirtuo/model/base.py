"""Model: a Config, `loss(batch)` and `sample(batch, generator)`; the rest of a model's life is written here once."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from invirtuo import fit as fitting
from invirtuo.batch import Batch
from invirtuo.checks import label_findings, some, whole
from invirtuo.conditions import Conditions, as_table
from invirtuo.dataset import CellDataset
from invirtuo.design import Design
from invirtuo.errors import ExistsError
from invirtuo.files import check_writable, read_h5ad, writing_h5ad
from invirtuo.fit import FitConfig
from invirtuo.model import saving
from invirtuo.model.controls import ControlCells
from invirtuo.model.device import chosen
from invirtuo.model.drawing import Request, check_engine, control_pool, drawn, filled, means_of, stored
from invirtuo.model.effects import Calibration
from invirtuo.model.pseudobulks import Pseudobulks
from invirtuo.model.sampling import NoSampling, SampleConfig, check_names, takes_options
from invirtuo.samplers import Sampler
from invirtuo.source import opened
from invirtuo.transforms import Transform
from invirtuo.values import require_counts, require_log

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.store import CellStore

__all__ = ["Model", "Preset", "track"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """A published (or our own) setting: the model's Config, how it is fitted, and where it stands."""

    config: Any
    fit: FitConfig = field(default_factory=FitConfig)
    source: str = ""


class Model(nn.Module):
    """Base of all models: fit, predict, save and load.

    A model declares its `Config` and writes `loss` and `sample` (or `encode`). `prepare` may compute statistics of the
    training cells into buffers; a model without parameters is fitted by that alone.

    Parameters
    ----------
    design
        Which columns of obs mean what.
    genes
        Names of the g genes, in the order of every tensor.
    config
        A Config, the name of a preset, or None for the defaults.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    PRESETS: ClassVar[Mapping[str, Preset]] = {}
    SEARCH: ClassVar[Mapping[str, Any]] = {"fit.lr": (1e-4, 1e-2)}  # what `bench.tune` varies, and between which values
    space: ClassVar[str] = "log"  # data space of X: "log" (log1p) or "counts"
    Sampling: ClassVar[type[NoSampling]] = SampleConfig  # options of drawing cells from it
    cpu_only: ClassVar[bool] = False  # whether it computes on CPUs alone
    takes_features: ClassVar[bool] = False  # whether features of the Design let it predict unseen perturbations
    sampler: str | Sampler = "cells"  # forms training batches: a name in SAMPLERS, or a sampler; `build` may choose
    set_size: int = 64  # cells of a set, for the sampler "sets"; `build` may choose
    needs_source: bool = False  # whether sampling starts from control cells; `build` may choose
    signed: bool = False  # whether values below zero are data; `build` may choose
    obsm: str | None = None  # entry of obsm that is read beside expression; `build` may choose
    obsm_width: int = 0  # its width
    verb: ClassVar[str] = "predict"  # what it is for; to "generate", "embed" or "forecast" needs no perturbation
    stage: str = ""  # the part that is being trained, while `fit` runs and the model has stages

    history: pd.DataFrame
    _pseudobulks: Pseudobulks | None
    _accelerator: str = "auto"  # until there is a card

    def __init__(self, design: Design, genes: Sequence[str], config: Any = None):
        super().__init__()
        self.design = design
        if design.perturbation is None and self.verb == "predict":
            raise ValueError(
                f"the design names no perturbation, and {self.name} predicts responses to perturbations; "
                "give perturbation= and control= to Design.from_adata, or use a model that generates populations"
            )
        self.genes = [str(gene) for gene in genes]
        if len(set(self.genes)) != len(self.genes):
            raise ValueError("gene names are not unique; call adata.var_names_make_unique() first")
        preset = self.preset_of(config)
        self.config = preset.config
        self.fit_config = preset.fit
        self.preset = config if isinstance(config, str) else None
        self.transforms: dict[str, Transform] = {}
        self.history = pd.DataFrame()
        self.card: dict[str, Any] = {}
        self._controls: dict[str, ControlCells] = {}
        self._pseudobulks = None
        with fitting.GENERATOR_LOCK:  # layers draw their first weights
            self.build()
        self.eval()

    # ---- what a model writes -----------------------------------------------------------------------------------

    def build(self) -> None:
        """Make the layers from `self.config`, `self.design` and `self.genes`."""

    def prepare(self, dataset: CellDataset) -> None:
        """Compute what the model needs to know of the training cells before the first step."""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch, among them "total", which is minimised."""
        raise NotImplementedError

    def update(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of an optimiser step (counted from 0), among them "total".

        Models with two objectives override it. Parameters that get no gradient in a step keep their values and the
        state of their optimiser.
        """
        return self.loss(batch)

    def stages(self, config: FitConfig) -> dict[str, FitConfig]:
        """Parts that are trained one after the other, each a submodule of that name, and how each is trained.

        The budget of `config` is divided among them. A model that is trained as a whole has the one stage "".
        """
        return {"": config}

    def trained(self, stage: str) -> Iterator[nn.Parameter]:
        """Parameters that a stage trains: those of the submodule of that name."""
        return self.parameters() if not stage else self.get_submodule(stage).parameters()

    def proximal_step(self, lr: float) -> None:
        """Bring parameters to where they may be, after an optimiser step of this learning rate: proximal steps."""

    def stage_data(self, stage: str, dataset: CellDataset) -> CellDataset:
        """The cells as the stage sees them: the model may put latent vectors of an earlier stage in their place."""
        return dataset

    def facts(self, dataset: CellDataset) -> dict[str, Any]:
        """What else of the training cells the card of the fitted model keeps, as JSON."""
        return {}

    def sample(self, batch: Batch, generator: torch.Generator, config: Any) -> Tensor:
        """Draw n cells (n, g) of one condition; `batch.source` holds control cells if needed.

        `config` is a record of the class `Sampling`: all its options must act. Noise comes from the generator, on the
        CPU, and networks are given at most `config.batch_size` cells at once (`in_batches`).
        """
        raise NotImplementedError

    # ---- fitting -----------------------------------------------------------------------------------------------

    def fit(
        self,
        adata: AnnData | CellStore | str | Path | Sequence[str | Path],
        split: pd.Series | None = None,
        config: FitConfig | None = None,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        callbacks: Sequence[Any] = (),
        loggers: Sequence[Any] = (),
    ) -> Self:
        """Fit to the training cells of an AnnData, or of files.

        Parameters
        ----------
        adata
            Cells in the data space of the model. Paths of files, or a folder of them, or a :class:`CellStore`: cells
            that stay on disk and are read in windows, in bounded memory.
        split
            "train", "val", "test" per cell, as the functions of `invirtuo.splits` give it; None trains on all cells.
        config
            How to train; None takes the preset's.
        folder
            Where checkpoints and history go while the fit runs; None writes nothing. A fit that ends well removes them,
            unless ``FitConfig.keep_checkpoints`` is set.
        resume
            Go on from the last checkpoint in `folder`; ends with the numbers of an uninterrupted fit. Without a
            checkpoint the fit begins anew.
        overwrite
            Begin anew though there is a checkpoint in `folder`, which is lost.
        callbacks, loggers
            Handed to the Lightning Trainer.

        Raises
        ------
        ValueError
            If the data are not in the model's space, genes are missing, or labels are unknown; if `folder` cannot be
            written, or holds a checkpoint, and neither `resume` nor `overwrite` is set.

        Notes
        -----
        A first fit that fails or is interrupted leaves an unfitted model, a later one the model as it was.
        """
        config = config or self.fit_config
        if not isinstance(config, FitConfig):
            raise ValueError(f"config is a {type(config).__name__}; expected a FitConfig")
        _check_torch()
        if torch.is_inference_mode_enabled():
            raise ValueError("torch.inference_mode is on, in which nothing can be trained; call fit outside of it")
        places = {} if folder is None else {stage: Path(folder) / stage for stage in self.stages(config)}
        if folder is not None:
            self._check_folder(Path(folder), places.values(), free=resume or overwrite)
        adata = opened(adata, self.design)
        self._check_space(adata)
        adata = self._with_genes(adata)
        dataset = CellDataset(adata, self.design, split, signed=self.signed, obsm=self.obsm)
        self._check_labels(dataset)
        with self._unchanged_on_failure():
            self.card = {}
            self.prepare(dataset)
            if self.needs_source:
                self._controls = control_pool(dataset)
            for place in () if resume else places.values():
                fitting.remove(place)
            if any(p.requires_grad for p in self.parameters()):
                with fitting.seeded(config.seed):
                    self._reset()
                options = {"resume": resume, "callbacks": callbacks, "loggers": loggers}
                runs = [
                    self._train(stage, plan, dataset, places.get(stage), options)
                    for stage, plan in self.stages(config).items()
                ]
                self.history = pd.concat(runs, ignore_index=True)
            self.card = saving.card(self, dataset, config) | self.facts(dataset)
            self._pseudobulks = self._observe(dataset) if self.verb == "predict" else None
        if not config.keep_checkpoints and fitting.is_main():
            for place in reversed(places.values()):
                fitting.remove(place)
        return self.eval()

    def _check_folder(self, folder: Path, places: Iterable[Path], *, free: bool) -> None:
        """Checkpoints can be written into a folder, and replace neither those of another fit nor a model."""
        check_writable(folder, folder=True)
        if saving.holds_model(folder):
            raise ExistsError(
                f"{folder} holds a saved model; give checkpoints a folder of their own, like {folder / 'checkpoints'}"
            )
        there = [place / fitting.LAST for place in places if (place / fitting.LAST).exists()]
        if there and not free:
            raise ExistsError(
                f"{there[0]} is the checkpoint of a fit that did not end; go on from it with resume=True (--resume), "
                "begin anew with overwrite=True (--overwrite), or give another name"
            )

    @contextmanager
    def _unchanged_on_failure(self) -> Iterator[None]:
        """Bring a fitted model back to what it was, if it cannot be fitted again."""
        replaced = [self.design, self.config, self.fit_config, self._pseudobulks, *self._controls.values()]
        shared = {id(value): value for value in replaced}  # a fit puts others in their place, and changes none
        before = copy.deepcopy(self.__dict__, shared) if self.card else None
        try:
            yield
        except BaseException:
            if before is not None:
                self.__dict__ = before
            raise

    def _train(
        self, stage: str, plan: FitConfig, dataset: CellDataset, folder: Path | None, options: dict[str, Any]
    ) -> pd.DataFrame:
        """Train the parameters of one stage; gives its history."""
        with self._training(stage):
            data = self.stage_data(stage, dataset)
            self.train()
            history = fitting.run(self, data, plan, folder=folder, **options)
        return history.assign(stage=stage) if stage else history

    def _observe(self, dataset: CellDataset) -> Pseudobulks:
        """Means of the control cells, and of the conditions that were held out for validation."""
        design, held_out = self.design, pd.DataFrame(self.card["held_out"]["val"], columns=self.design.columns)
        table, kind = design.kinds(dataset.obs)
        wanted = design.is_control(table) | design.names(table).isin(design.names(held_out)).to_numpy()
        rows = np.flatnonzero(wanted[kind] & np.isin(dataset.split, ("train", "val")))
        return Pseudobulks.of(dataset, rows)

    @contextmanager
    def _training(self, stage: str) -> Iterator[None]:
        """Let only the parameters of one stage be trained; "" trains all."""
        learned = [p for p in self.parameters() if p.requires_grad]
        chosen = set(map(id, self.trained(stage)))
        self.stage = stage
        for parameter in learned:
            parameter.requires_grad_(id(parameter) in chosen)
        try:
            yield
        finally:
            self.stage = ""
            for parameter in learned:
                parameter.requires_grad_(True)

    def _reset(self) -> None:
        """Draw the first weights anew, so that they depend on the seed of the fit alone."""
        fresh = type(self)(self.design, self.genes, self.config)
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), fresh.parameters(), strict=True):
                mine.copy_(theirs)

    # ---- using -------------------------------------------------------------------------------------------------

    @takes_options(needs="sample")
    def predict(
        self,
        conditions: Conditions,
        n_cells: int = 1000,
        *,
        seed: int = 0,
        controls: AnnData | str | Path | None = None,
        effect_level: float | None = None,
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
            Cells per condition.
        seed
            Same seed, same cells, whatever the device, the batch size and the other conditions.
        controls
            Control cells (or their h5ad) to start from, for models that need them; None takes those of the fitted data.
            For models that know covariates by their control cells (`with_controls`) they may be of groups that were
            never seen.
        effect_level
            Also give the effect on every gene with an interval, which shall cover this share of all genes. Intervals
            are conformal and calibrated on the conditions that the split of the fit held out for validation, drawn
            in the same way (`invirtuo.effects`): they hold for conditions that are like those.
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
        AnnData with the columns of the Design in obs, X in the model's data space (float32), and
        ``uns["invirtuo"]``: how it was made. With `out` it reads from the file (backed). With `effect_level` varm holds
        ``effect``, ``effect_low`` and ``effect_high``, (g, c): change of the mean to the control cells of the same
        covariates; conditions in the order of obs, and named in ``uns["invirtuo"]["conditions"]``.

        Raises
        ------
        ValueError
            If the model is not fitted, a condition has an unknown perturbation or covariate, an option is unknown or
            cannot act, the device is not there, or intervals are asked for and the fit held out no conditions for
            validation.
        """
        import anndata

        check_engine(engine, n_jobs)
        self._check_fitted()
        _check_torch()
        n_cells, seed = whole("n_cells", n_cells), whole("seed", seed, 0)
        config = self._sampling(options)
        controls = read_h5ad(controls) if isinstance(controls, str | Path) else controls
        model = self if controls is None else self.with_controls(controls)
        table = model._conditions(conditions)
        request = Request(table, n_cells, seed, config, model._pool(controls), device)
        calibration = None if effect_level is None else Calibration(model, effect_level, controls)
        means = np.empty((len(table), len(self.genes)))
        cells = drawn(model, request, engine, n_jobs)
        cells = track(cells if calibration is None else means_of(cells, means), "predicting", progress, len(table))
        obs = table.loc[table.index.repeat(n_cells)].reset_index(drop=True)
        obs.index = [f"cell_{i}" for i in range(len(obs))]
        for column in self.design.attributes:
            obs[column] = obs[column].astype("category")
        var, uns = pd.DataFrame(index=pd.Index(self.genes)), {"invirtuo": self._provenance(seed, config)}
        if calibration is not None:
            uns["invirtuo"] |= {"effect_level": effect_level, "conditions": model.design.names(table).to_numpy(str)}

        shape = (len(obs), len(self.genes))
        if out is not None:
            with writing_h5ad(out, obs, var, uns) as file:
                filled(stored(file, shape), cells, n_cells)
                if calibration is not None:
                    anndata.io.write_elem(file, "varm", calibration.intervals(request, means))
            return read_h5ad(out, backed=True)
        x = filled(np.empty(shape, np.float32), cells, n_cells)
        varm = None if calibration is None else calibration.intervals(request, means)
        return anndata.AnnData(x, obs=obs, var=var, uns=uns, varm=varm)

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
        return self

    @property
    def accelerator(self) -> str:
        """`FitConfig.accelerator` of the fit."""
        return self.card.get("fit", {}).get("accelerator", self._accelerator)

    def device_of(self, name: str | None) -> torch.device:
        """The device of this name; of None or "auto" that of the fit, if there is one like it."""
        return chosen(name, self.accelerator, model=self.name, cpu_only=self.cpu_only)

    @contextmanager
    def on_device(self, name: str | None = None) -> Iterator[torch.device]:
        """Move the model to a device to be used there, and back to the CPU."""
        device = self.device_of(name)
        self.eval().to(device)
        try:
            yield device
        finally:
            self.cpu()

    @classmethod
    def check_options(cls, verb: str, options: Mapping[str, Any], config: Any) -> None:
        """Refuse, before a fit, options that a verb of a model with this Config would refuse.

        Raises
        ------
        ValueError
            If the model has not got the verb, or an option is unknown or cannot act.
        """
        if not hasattr(cls, verb):
            raise ValueError(f"{cls.name} cannot {verb}")
        check_names(getattr(cls, verb), cls.name, options)
        own = {f.name for f in fields(cls.Sampling)}
        sampling = cls.Sampling(**{name: value for name, value in options.items() if name in own})
        sampling.check(cls.name, config)

    def _sampling(self, options: Mapping[str, Any], kind: type[NoSampling] | None = None) -> Any:
        """The record of sampling options, by default that of the class, checked."""
        sampling = (kind or self.Sampling)(**options)
        sampling.check(self.name, self.config)
        return sampling

    # ---- saving ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write config, design, transforms, weights, history and card into a folder; nothing is pickled.

        Of several processes that fitted together only the first writes.

        Parameters
        ----------
        folder
            What else lies there stays. If saving fails, or the process is killed, the folder holds what it held before,
            or all of the model.
        overwrite
            Replace a model that is saved there.

        Raises
        ------
        ValueError
            If a model is saved there and `overwrite` is not set.
        """
        if fitting.is_main():
            saving.save(self, Path(folder), overwrite=overwrite)

    @classmethod
    def restore(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote; `invirtuo.load` finds the class by itself.

        Raises
        ------
        ValueError
            If a file is missing, damaged, or contradicts the others.
        """
        return saving.restore(cls, Path(folder))

    # ---- checks ------------------------------------------------------------------------------------------------

    @classmethod
    def preset_of(cls, config: Any) -> Preset:
        """Config and FitConfig that a Config, a preset name or None stand for."""
        if config is None:
            return cls.PRESETS.get("default", Preset(cls.Config()))
        if isinstance(config, str):
            if config not in cls.PRESETS:
                known = ", ".join(cls.PRESETS) or "none"
                raise ValueError(f"{cls.name} has no preset {config!r}; known: {known}")
            return cls.PRESETS[config]
        if not isinstance(config, cls.Config):
            raise ValueError(f"config is a {type(config).__name__}; {cls.name} takes {cls.__name__}.Config or a preset")
        same = [preset.fit for preset in cls.PRESETS.values() if preset.config == config]
        return Preset(config, same[0]) if same else Preset(config)

    def _check_fitted(self) -> None:
        if not self.card:
            raise ValueError(f"this {type(self).__name__} is not fitted yet; call fit, or invirtuo.load a saved model")

    def _check_labels(self, dataset: CellDataset) -> None:
        """Unknown labels are for models that do not predict responses."""
        unknown = [name for name, codes in dataset.condition.distinct.covariates.items() if bool((codes < 0).any())]
        if unknown and self.verb == "predict":
            raise ValueError(
                f"{self.name} needs the labels of all cells; {some(unknown)} is unknown for some. Remove these cells"
            )
        for finding in label_findings(dataset.obs, self.design):
            logger.warning(finding)
        if self.verb == "predict":
            self._check_responses(dataset)

    def _check_responses(self, dataset: CellDataset) -> None:
        """There are responses to learn from, and those that are held out can be predicted."""
        design, column = self.design, self.design.perturbation
        parts: dict[str, set[str]] = {}
        for part in ("train", "val", "test"):
            labels = design.kinds(dataset.obs.iloc[dataset.rows(part)])[0][column].unique()
            parts[part] = {single for label in labels for single in design.parts(label)}
        if not parts["train"]:
            n_cells = len(dataset.rows("train"))
            raise ValueError(
                f"no perturbed cell is left to train on: all {n_cells:,} training cells are controls. Hold out less"
            )
        unseen = sorted((parts["val"] | parts["test"]) - parts["train"])
        if unseen and not self._takes_unseen():
            logger.warning(
                "perturbations %s are held out everywhere; %s cannot predict what it never saw", some(unseen), self.name
            )

    def _check_space(self, adata: AnnData) -> None:
        (require_log if self.space == "log" else require_counts)(adata)

    def _with_genes(self, adata: AnnData) -> AnnData:
        known = set(adata.var_names)
        missing = [gene for gene in self.genes if gene not in known]
        if missing:
            raise ValueError(
                f"{len(missing)} of the model's {len(self.genes)} genes are not in the data: {some(missing)}; "
                "use the gene set that the model was made with"
            )
        if list(adata.var_names) == self.genes:
            return adata
        if not adata.var_names.is_unique:
            raise ValueError("gene names are not unique; call adata.var_names_make_unique() first")
        return adata[:, self.genes]

    def _conditions(self, conditions: Conditions) -> pd.DataFrame:
        """The wanted conditions as a tidy table, each once."""
        if isinstance(conditions, str):
            held_out = self.card["held_out"]
            if conditions in held_out and not held_out[conditions]:
                raise ValueError(f"the split of the fit held out no conditions for {conditions!r}; name conditions")
            if conditions in held_out:
                conditions = pd.DataFrame(held_out[conditions])
            elif "|" not in conditions and len(self.design.columns) > 1:
                like = "|".join(self.design.columns)
                raise ValueError(
                    f"conditions is {conditions!r}; expected a DataFrame or one of {', '.join(held_out)}, or {like!r}"
                )
        conditions = as_table(conditions, self.design)
        encoded = self.design.encode(conditions)  # names unknown labels and missing columns
        unseen = [p for i, p in enumerate(self.design.perturbations) if p not in self.card["perturbations"]
                  and bool((encoded.perturbation[:, i] != 0).any())]  # fmt: skip
        if unseen and not self._takes_unseen():
            raise ValueError(
                f"perturbation(s) {some(unseen)} do not occur in the training cells of this model; "
                f"trained: {some(self.card['perturbations'])}. Only models that take perturbation features "
                "(features= of Design.from_adata) predict others"
            )
        for name, levels in self.card["covariates"].items():
            strange = sorted(set(conditions[name]) - set(levels))
            if strange:
                raise ValueError(
                    f"covariate {name!r}: {some(strange)} do not occur in the training cells; trained: {some(levels)}"
                )
        return conditions

    def _takes_unseen(self) -> bool:
        """Whether perturbations that are not among the training cells can be predicted."""
        return self.takes_features and bool(self.design.features)

    def _pool(self, controls: AnnData | None) -> dict[str, ControlCells]:
        if controls is None:
            return self._controls
        self._check_space(controls)
        dataset = CellDataset(self._with_genes(controls), self.design, obsm=self.obsm)
        return control_pool(dataset)

    def _provenance(self, seed: int, config: NoSampling) -> dict[str, Any]:
        return {
            "model": self.name,
            "preset": self.preset or "",
            "config": json.dumps(asdict(self.config)),
            "sampling": json.dumps(asdict(config)),
            "seed": seed,
            "version": version("invirtuo"),
            "data_hash": self.card["data_hash"],
            "perturbation": self.design.perturbation or "",
            "control": self.design.control or "",
        }


def _check_torch() -> None:
    """Refuse a default type in which models cannot compute."""
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"torch's default dtype is {torch.get_default_dtype()}; models compute in float32. Call "
            "torch.set_default_dtype(torch.float32)"
        )


def track(items, label: str, progress: bool, total: int | None = None):
    """The items, with a progress bar if it is wanted."""
    if not progress:
        return items
    from rich.progress import track as bar

    return bar(items, description=label, total=total)

"""Model: a Config, layers and a loss; how it is fitted, saved and read again is written here once."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from invirtuo import fit as fitting
from invirtuo.cells.checks import label_findings
from invirtuo.cells.dataset import CellDataset
from invirtuo.cells.files import check_writable
from invirtuo.cells.samplers import Pairs, Sets, named
from invirtuo.cells.source import opened
from invirtuo.cells.transforms import TRANSFORMS, Transform
from invirtuo.cells.values import require_counts, require_log
from invirtuo.design import Design
from invirtuo.display import Rows, Shown
from invirtuo.errors import ExistsError, preview
from invirtuo.fit import FitConfig, Trainable
from invirtuo.fit.checkpoint import write_tensors
from invirtuo.settings import comparable
from invirtuo.verbs import saving
from invirtuo.verbs.device import chosen
from invirtuo.verbs.sampling import NoSampling, check_names

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.cells.store import CellStore

__all__ = ["Model", "Preset", "check_torch", "track"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Preset:
    """A published (or our own) setting: the model's Config, how it is fitted, and its source."""

    config: Any
    fit: FitConfig = field(default_factory=FitConfig)
    source: str = ""


class Model(Shown, Trainable):
    """Base of all models: fit, save and load. What a model can be asked beyond that is written in classes on this one.

    A model declares its `Config` and writes `build` and `loss`. `prepare` may compute statistics of the training cells
    into buffers; a model without parameters is fitted by that alone.

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
    SEARCH: ClassVar[Mapping[str, Any]] = {"fit.lr": (1e-6, 1e-2)}  # what `bench.tune` varies, and between which values
    space: ClassVar[str] = "log"  # data space of X: "log" (log1p) or "counts"
    Sampling: ClassVar[type[NoSampling]] = NoSampling  # options of drawing cells from it
    takes_features: ClassVar[bool] = False  # whether it predicts unseen perturbations from features of the Design
    any_target: ClassVar[bool] = False  # whether it predicts the same for every perturbation
    signed: bool = False  # whether values below zero are data; `build` may choose
    obsm: str | None = None  # entry of obsm that is read beside expression; `build` may choose
    obsm_width: int = 0  # its width
    verb: ClassVar[str]  # what it is for: the name of a method
    stage: str = ""  # the part that is being trained, while `fit` runs and the model has stages

    history: pd.DataFrame
    _accelerator: str = "auto"  # until there is a card

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "sample" in vars(cls) and not hasattr(cls, "predict"):
            raise TypeError(f"{cls.__name__} writes `sample`; derive it from invirtuo.PerturbationModel")

    def __init__(self, design: Design, genes: Sequence[str], config: Any = None):
        super().__init__()
        self.design = design
        self.genes = [str(gene) for gene in genes]
        if len(set(self.genes)) != len(self.genes):
            raise ValueError("gene names are not unique; call adata.var_names_make_unique() first")

        # a preset, or settings that may be those of one
        preset = self.preset_of(config)
        self.config = preset.config
        self.fit_config = preset.fit
        self.preset = config if isinstance(config, str) else None

        # empty until the model is fitted
        self.transforms: dict[str, Transform] = {}
        self.history = pd.DataFrame()
        self.card: dict[str, Any] = {}
        self._start: Mapping[str, Tensor] = {}  # weights of another model with which fits begin

        with fitting.GENERATOR_LOCK:  # layers draw their first weights
            self.build()
        self.eval()

    # ---- what a model writes -----------------------------------------------------------------------------------

    def build(self) -> None:
        """Make the layers from `self.config`, `self.design` and `self.genes`."""

    def prepare(self, dataset: CellDataset) -> None:
        """Compute statistics of the training cells that the model needs before the first step."""

    def stages(self, config: FitConfig) -> dict[str, FitConfig]:
        """Parts that are trained one after the other, each a submodule of that name, and how each is trained.

        The budget of `config` is divided among them. A model that is trained all at once has the one stage "".
        """
        return {"": config}

    def trained(self, stage: str) -> Iterator[nn.Parameter]:
        """Parameters that a stage trains: those of the submodule of that name."""
        return self.parameters() if not stage else self.get_submodule(stage).parameters()

    def stage_data(self, stage: str, dataset: CellDataset) -> CellDataset:
        """The cells as the stage sees them: the model may replace them by latent vectors of an earlier stage."""
        return dataset

    def facts(self, dataset: CellDataset) -> dict[str, Any]:
        """What else of the training cells the card of the fitted model keeps, as JSON."""
        return {}

    # ---- what a verb writes ------------------------------------------------------------------------------------

    def check_labels(self, dataset: CellDataset) -> None:
        """Refuse labels with which the verb can do nothing, and warn of those that may be meant otherwise."""
        for finding in label_findings(dataset.obs, self.design):
            logger.warning(finding)

    def remember(self, dataset: CellDataset) -> None:
        """Keep what the verb needs of the training cells, when the fit has ended."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved beside weights and card, by path: transforms, and what `remember` kept."""
        arrays: dict[str, np.ndarray] = {}
        for key, transform in self.transforms.items():
            path = f"{key}/{type(transform).__name__}"
            arrays |= {f"{path}/{name}": array for name, array in transform.state().items()}
        return arrays

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take up what :meth:`arrays` gave."""
        for (key, kind), state in saving.by_owner(arrays).items():
            if kind in TRANSFORMS:
                self.transforms[key] = TRANSFORMS[kind].load(state)

    def shown(self) -> Rows:
        """What it shows of itself."""
        n_parameters = sum(parameter.numel() for parameter in self.parameters())
        rows = [("model", f"{self.name}{'' if self.preset is None else ', preset ' + self.preset}")]
        rows += [("genes", preview(self.genes)), ("parameters", f"{n_parameters:,}")]
        rows += self.design.shown()
        if not self.card:
            return [*rows, ("fitted", "no")]
        steps = int(self.history["step"].max()) if "step" in self.history else 0
        rows.append(("fitted", f"{steps:,} steps" if steps else "in closed form"))
        for part in ("val", "test"):
            table = pd.DataFrame(self.card["held_out"][part], columns=self.design.columns)
            if len(table):
                rows.append((f"held out, {part}", preview(list(self.design.names(table)))))
        return rows

    def replaced_by_fits(self) -> list[Any]:
        """Objects that a fit replaces and never changes: a copy of the model may share them."""
        return [self.design, self.config, self.fit_config]

    @property
    def takes_unseen(self) -> bool:
        """Whether perturbations that are not among the training cells can be asked for."""
        return (self.takes_features or self.any_target) and bool(self.design.features)

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
        check_torch()
        if torch.is_inference_mode_enabled():
            raise ValueError("torch.inference_mode is on, in which nothing can be trained; call fit outside of it")

        # a folder of checkpoints for every stage
        folders: dict[str, Path] = {}
        if folder is not None:
            folders = {stage: Path(folder) / stage for stage in self.stages(config)}
            _check_folder(Path(folder), folders.values(), free=resume or overwrite)

        # the cells, in the space and with the genes of this model
        adata = opened(adata, self.design)
        self._check_space(adata)
        adata = self._with_genes(adata)
        dataset = CellDataset(adata, self.design, split, signed=self.signed, obsm=self.obsm)
        self.check_labels(dataset)

        # a fit that fails leaves the model as it was
        with self._unchanged_on_failure():
            self.card = {}
            self.prepare(dataset)
            if not resume:
                for checkpoints in folders.values():
                    fitting.remove(checkpoints)
            # closed forms have nothing to train
            if any(p.requires_grad for p in self.parameters()):
                options = {"resume": resume, "callbacks": callbacks, "loggers": loggers}
                self.history = self._train_stages(dataset, config, folders, options)
            self._warn_of_batches(dataset)
            self.card = saving.card(self.name, dataset, config) | self.facts(dataset)
            self.remember(dataset)

        # nothing is left to go on from
        if not config.keep_checkpoints and fitting.is_main():
            for checkpoints in reversed(folders.values()):
                fitting.remove(checkpoints)
        return self.eval()

    def _warn_of_batches(self, dataset: CellDataset) -> None:
        """Say so if technical batches that the Design names made no difference."""
        if self.design.batch is None or dataset.looked_at_batches:
            return
        is_paired = isinstance(named(self.sampler, self.set_size), Pairs | Sets) and not dataset.on_disk
        if not is_paired or dataset.layout().batch is None:
            logger.warning(
                "%s pairs no cells with control cells%s: the batches in %r make no difference to it",
                self.name,
                " of files" if dataset.on_disk else "",
                self.design.batch,
            )

    @contextmanager
    def _unchanged_on_failure(self) -> Iterator[None]:
        """Bring a fitted model back to what it was, if it cannot be fitted again."""
        unchanging = {id(value): value for value in self.replaced_by_fits()}
        before = copy.deepcopy(self.__dict__, unchanging) if self.card else None
        try:
            yield
        except BaseException:
            if before is not None:
                self.__dict__ = before
            raise

    def _train_stages(
        self, dataset: CellDataset, config: FitConfig, folders: Mapping[str, Path], options: dict[str, Any]
    ) -> pd.DataFrame:
        """Train from fresh weights, stage after stage; gives the history of all."""
        with fitting.seeded(config.seed):
            self._reset()
        histories = []
        for stage, plan in self.stages(config).items():
            histories.append(self._train(stage, plan, dataset, folders.get(stage), options))
        return pd.concat(histories, ignore_index=True)

    def _train(
        self, stage: str, plan: FitConfig, dataset: CellDataset, folder: Path | None, options: dict[str, Any]
    ) -> pd.DataFrame:
        """Train the parameters of one stage; gives its history."""
        with self._training(stage):
            data = self.stage_data(stage, dataset)
            self.train()
            history = fitting.run(self, data, plan, folder=folder, **options)
        return history.assign(stage=stage) if stage else history

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
        self.begin_with(self._start)

    @torch.no_grad()
    def begin_with(self, start: Mapping[str, Tensor]) -> None:
        """Take weights of another model, now and whenever a fit begins; where they are NaN, the own ones stay."""
        self._start = start
        for name, parameter in self.named_parameters():
            if name in start:
                parameter.copy_(torch.where(start[name].isnan(), parameter, start[name]))

    # ---- using -------------------------------------------------------------------------------------------------

    @property
    def accelerator(self) -> str:
        """`FitConfig.accelerator` of the fit."""
        accelerator: str = self.card.get("fit", {}).get("accelerator", self._accelerator)
        return accelerator

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
        values = {name: value for name, value in options.items() if name in own}
        cls.Sampling(**values).check(cls.name, config)

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
            saving.write_folder(Path(folder), self._write, overwrite=overwrite)

    def _write(self, folder: Path) -> dict[str, Any]:
        """Write all files but config.json, whose content is returned."""
        (folder / "design.json").write_text(self.design.to_json())
        (folder / "card.json").write_text(json.dumps(self.card, indent=2))
        arrays: dict[str, Any] = self.arrays()
        np.savez_compressed(folder / "transforms.npz", **arrays)
        self.history.to_csv(folder / "history.csv", index=False)
        write_tensors(folder / "weights.safetensors", self.state_dict())
        return {"model": self.address(), "preset": self.preset, "config": asdict(self.config), "genes": self.genes}

    @classmethod
    def address(cls) -> str:
        """By what `invirtuo.models.model_class` finds it: its name, or ``module:Class`` in another package."""
        return cls.name if cls.__module__.startswith("invirtuo.") else f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def restore(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote; `invirtuo.load` finds the class by itself.

        Raises
        ------
        ValueError
            If a file is missing, damaged, or contradicts the others.
        """
        folder = Path(folder)

        # what the model was made with
        with saving.reading(folder, "config.json") as path:
            facts = json.loads(path.read_text())
            genes, preset = facts["genes"], facts["preset"]
            config = saving.config_from(cls.Config, facts["config"])
        saving.check_hashes(folder, facts.get("sha256", {}))
        with saving.reading(folder, "design.json") as path:
            design = Design.from_json(path.read_text())
        model = cls(design, genes, config)
        model.preset = preset

        # what the fit made
        with saving.reading(folder, "card.json") as path:
            model.card = json.loads(path.read_text())
        history = saving.path_of(folder, "history.csv")
        if history.exists() and history.stat().st_size > 2:
            model.history = pd.read_csv(history)
        with saving.reading(folder, "transforms.npz") as path, path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            model.load_arrays({key: arrays[key] for key in arrays.files})
        with saving.reading(folder, "weights.safetensors") as path:
            tensors = load_file(path)
            saving.size_buffers(model, tensors)
            model.load_state_dict(tensors)
        return model.eval()

    # ---- checks ------------------------------------------------------------------------------------------------

    @classmethod
    def preset_of(cls, config: Any) -> Preset:
        """Config and FitConfig that a Config, a preset name or None stand for.

        A Config that no preset has is fitted as the default is.
        """
        default = cls.PRESETS.get("default", Preset(cls.Config()))
        if config is None:
            return default
        if isinstance(config, str):
            if config not in cls.PRESETS:
                known = ", ".join(cls.PRESETS) or "none"
                raise ValueError(f"{cls.name} has no preset {config!r}; known: {known}")
            return cls.PRESETS[config]
        if not isinstance(config, cls.Config):
            raise ValueError(f"config is a {type(config).__name__}; {cls.name} takes {cls.__name__}.Config or a preset")
        same = [preset.fit for preset in cls.PRESETS.values() if preset.config == config]
        return Preset(config, same[0] if same else default.fit)

    def _check_fitted(self) -> None:
        if not self.card:
            raise ValueError(f"this {type(self).__name__} is not fitted yet; call fit, or invirtuo.load a saved model")

    def _check_space(self, adata: AnnData) -> None:
        require_space = require_log if self.space == "log" else require_counts
        require_space(adata)

    def _with_genes(self, adata: AnnData) -> AnnData:
        """The cells with the genes of the model, in its order."""
        known = set(adata.var_names)
        missing = [gene for gene in self.genes if gene not in known]
        if missing:
            raise ValueError(
                f"{len(missing)} of the model's {len(self.genes)} genes are not in the data: {preview(missing)}; "
                "use the gene set that the model was made with"
            )
        if list(adata.var_names) == self.genes:
            return adata
        if not adata.var_names.is_unique:
            raise ValueError("gene names are not unique; call adata.var_names_make_unique() first")
        return adata[:, self.genes]

    def identity(self) -> dict[str, Any]:
        """Name, settings (those of earlier versions among them), Design, genes and stage."""
        facts = {"config": comparable(self.config), "design": self.design.to_json(), "genes": self.genes}
        if self.stage:
            facts["stage"] = self.stage
        identity: dict[str, Any] = json.loads(json.dumps(super().identity() | facts))
        return identity

    def _provenance(self, seed: int, config: NoSampling) -> dict[str, Any]:
        """How cells were made, for ``uns["invirtuo"]``."""
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


def _check_folder(folder: Path, checkpoints: Iterable[Path], *, free: bool) -> None:
    """Checkpoints can be written into a folder, and replace neither those of another fit nor a model."""
    check_writable(folder, folder=True)
    if saving.holds_model(folder):
        raise ExistsError(
            f"{folder} holds a saved model; give checkpoints a folder of their own, like {folder / 'checkpoints'}"
        )
    last = [path / fitting.LAST for path in checkpoints]
    existing = [path for path in last if path.exists()]
    if existing and not free:
        raise ExistsError(
            f"{existing[0]} is the checkpoint of a fit that did not end; go on from it with resume=True (--resume), "
            "begin anew with overwrite=True (--overwrite), or give another name"
        )


def check_torch() -> None:
    """Refuse a default type in which models cannot compute."""
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        raise ValueError(
            f"torch's default dtype is {dtype}; models compute in float32. Call torch.set_default_dtype(torch.float32)"
        )


def track(items: Iterable[Item], label: str, progress: bool, total: int | None = None) -> Iterable[Item]:
    """The items, with a progress bar if it is wanted."""
    if not progress:
        return items
    from rich.progress import track as bar

    return bar(items, description=label, total=total)

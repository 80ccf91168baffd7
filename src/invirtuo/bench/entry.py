"""Entry: one row of a comparison, a model with its settings."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from invirtuo.bench.foreign import Command, Foreign
from invirtuo.bench.question import Asked
from invirtuo.bench.task import digest
from invirtuo.errors import preview
from invirtuo.fit import FitConfig
from invirtuo.metrics.scores import FLOOR
from invirtuo.models import model_class, model_names
from invirtuo.settings import comparable
from invirtuo.verbs.generate import CountGenerator
from invirtuo.verbs.model import Model
from invirtuo.verbs.predict import PerturbationModel
from invirtuo.verbs.saving import config_from

if TYPE_CHECKING:
    from invirtuo.design import Design

__all__ = ["BASELINES", "FLOOR", "Entry", "Predictor", "Spec", "as_entries", "as_entry"]

HEEDED = ("seed", "keep_checkpoints", "progress")  # fields of a FitConfig that act on a command

Predictor: TypeAlias = PerturbationModel | CountGenerator | Foreign  # what has `predict`
Spec: TypeAlias = "Entry | type[Model] | str | Path"  # what stands for one entry, or for those of a file


@dataclass(frozen=True)
class Entry:
    """One row of a comparison.

    Parameters
    ----------
    label
        Name of the row.
    model
        Name in ``MODELS``, of a model that an installed package offers, ``module:Class``, or the class itself.
    config
        Config, preset name, mapping of fields to replace in the defaults, or None for the defaults.
    fit
        How to train: a FitConfig, a mapping of fields to replace in the preset's, or None for the preset's.
    predict
        Options of ``PerturbationModel.predict``.
    variants
        Further rows from the same fit: label to options of ``PerturbationModel.predict``.
    task
        Name of the only task that the entry is for, where settings were chosen task by task; None: every task.
    command
        In place of a model: a command of any environment, program and arguments. ``{folder}`` becomes the folder with
        the question, in which it leaves ``predicted.h5ad``; ``{seed}`` the seed, ``{python}`` this Python.
    minutes
        Limit on the time of a command.
    predicted
        In place of both: a file with predicted cells. ``{seed}`` and ``{fold}`` (the split of the task) are filled in.
    """

    label: str
    model: str | type[Model] = Foreign.name
    config: Any = None
    fit: FitConfig | Mapping[str, Any] | None = None
    predict: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    task: str | None = None
    command: Sequence[str] = ()
    minutes: float = 60.0
    predicted: str | None = None

    def __post_init__(self) -> None:
        """A class is known by its name or address."""
        if not isinstance(self.model, str):
            object.__setattr__(self, "model", self.model.address())
        if isinstance(self.command, str) or not all(isinstance(text, str) for text in self.command):
            raise ValueError(f"command is {self.command!r}; expected a list of strings, program and arguments")
        if self.is_foreign == (self.command == () and self.predicted is None):
            raise ValueError(f"entry {self.label!r}: expected one of model, command and predicted")
        object.__setattr__(self, "command", tuple(self.command))

    @property
    def is_foreign(self) -> bool:
        """Whether a command or a file stands in place of a model."""
        return self.model == Foreign.name

    @property
    def kind(self) -> type[Any]:
        """The class of the model."""
        return Foreign if self.is_foreign else model_class(str(self.model))

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Label of every row to its options of ``PerturbationModel.predict``."""
        return {self.label: self.predict, **self.variants}

    def settings(self) -> tuple[Any, FitConfig]:
        """The Config and FitConfig that the fields describe."""
        if self.is_foreign:
            if self.config is not None:
                raise ValueError("a command takes no config; write its settings into it")
            fit = self.fit if isinstance(self.fit, FitConfig) else config_from(FitConfig, self.fit or {})
            if idle := [name for name in _changed(fit) if name not in HEEDED]:
                raise ValueError(
                    f"a command trains by its own settings, so that {preview(idle)} of the fit would have no effect; "
                    "write it into the command, which is told the seed alone"
                )
            return Command(tuple(self.command), self.minutes, self.predicted), fit

        # a mapping replaces fields of the defaults
        model, replaces = self.kind, isinstance(self.config, Mapping)
        preset = model.preset_of(None if replaces else self.config)
        config = preset.config
        if replaces:
            config = config_from(model.Config, {**asdict(preset.config), **self.config})
        if isinstance(self.fit, FitConfig):
            return config, self.fit
        return config, config_from(FitConfig, {**asdict(preset.fit), **(self.fit or {})})

    def make(self, design: Design, genes: Sequence[str], asked: Asked | None = None) -> tuple[Predictor, FitConfig]:
        """The unfitted model, and how to fit it; a command must know what will be asked."""
        config, fit = self.settings()
        if self.is_foreign:
            return Foreign(design, genes, config, asked or Asked()), fit
        return cast("Predictor", self.kind(design, genes, config)), fit

    def describe(self) -> dict[str, Any]:
        """All fields as JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.is_foreign:
            own["files"] = self._files()
        else:
            for name in ("command", "minutes", "predicted"):
                del own[name]  # of records from before there were commands
        described: dict[str, Any] = json.loads(json.dumps(own, default=_plain))
        return described

    def _files(self) -> dict[str, str]:
        """Digests of the files that a command names, or of the predictions: with others the numbers are others."""
        files: dict[str, str] = {}
        for text in (*self.command[1:], self.predicted or ""):
            pattern = glob.escape(text).replace("{seed}", "*").replace("{fold}", "*")
            files |= {name: digest(Path(name)) for name in sorted(glob.glob(pattern)) if Path(name).is_file()}
        return files


BASELINES = (
    Entry("perturbation_mean", "perturbation_mean", "profile"),
    Entry("perturbation_mean:shift-cells", "perturbation_mean", "shift-cells"),
    Entry("perturbation_mean:move-cells", "perturbation_mean", "move-cells"),
    Entry("fold_change", "fold_change"),
    Entry("context_mean", "context_mean"),
    Entry("no_change", "no_change"),
)


def as_entries(spec: Spec, verb: str | None = "predict") -> list[Entry]:
    """Entries from an Entry, a class, from ``model``, ``model:preset``, ``module:Class``, or from a JSON file of some.

    ``command:FILE.json`` is such a file, too, and ``predicted:FILE.h5ad`` an entry of predicted cells.

    Parameters
    ----------
    spec
        What stands for them.
    verb
        What they are wanted for, and whose options their field `predict` holds; None: what each model is for.

    Raises
    ------
    ValueError
        If the model, its preset, a field, or an option of the verb is unknown, or the model has not got the verb.
    """
    if isinstance(spec, Entry):
        entries = [spec]
    elif isinstance(spec, type):
        entries = [Entry(spec.name, spec)]
    elif str(spec).startswith("predicted:"):
        file = str(spec).removeprefix("predicted:")
        entries = [Entry(Path(file).stem, predicted=file)]
    elif Path(spec).suffix == ".json":
        entries = _read(Path(str(spec).removeprefix("command:")))
    else:
        entries = [_named(str(spec))]

    # what cannot be made or predicted with is refused before anything is fitted
    for entry in entries:
        kind = entry.kind
        try:
            config, _ = entry.settings()
            for options in entry.rows.values():
                kind.check_options(verb or kind.verb, options, config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"entry {entry.label!r}: {error}") from error
    return entries


def as_entry(spec: Spec) -> Entry:
    """The one entry that :func:`as_entries` gives."""
    entries = as_entries(spec)
    if len(entries) != 1:
        raise ValueError(f"{spec} holds {len(entries)} entries; expected one")
    return entries[0]


def _named(spec: str) -> Entry:
    """An entry from ``model``, ``model:preset``, ``module:Class`` or ``module:Class:preset``."""
    parts = spec.split(":")
    n_name = 1 if parts[0] in model_names() or len(parts) == 1 else 2
    return Entry(spec, ":".join(parts[:n_name]), ":".join(parts[n_name:]) or None)


def _changed(fit: FitConfig) -> list[str]:
    """Fields that are not as they are by default."""
    default = FitConfig()
    return [field.name for field in fields(fit) if getattr(fit, field.name) != getattr(default, field.name)]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return comparable(value) if is_dataclass(value) and not isinstance(value, type) else dict(value)


def _read(path: Path) -> list[Entry]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a JSON file with label, model or command, and so on")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found if isinstance(found, list) else [found]
        return [Entry(**{"label": path.stem, **facts}) for facts in rows]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the JSON of entries (label, model, config, fit, predict): {error}") from error

"""The folder of a saved model: config, design, transforms, weights, history and card; nothing in it is pickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from invirtuo.cells.files import making
from invirtuo.errors import ExistsError

if TYPE_CHECKING:
    import numpy as np

    from invirtuo.cells.dataset import CellDataset
    from invirtuo.fit import FitConfig

__all__ = [
    "by_owner",
    "card",
    "check_free",
    "check_hashes",
    "config_from",
    "holds_model",
    "path_of",
    "reading",
    "size_buffers",
    "write_folder",
]

PENDING = ".saved"  # folder with the files of a model that is completely written, until they replace those of another


def write_folder(folder: Path, write: Callable[[Path], dict[str, Any]], *, overwrite: bool = False) -> None:
    """Write a model into a folder; at any moment the model that was there, or the new one, is complete.

    A new folder appears when all files are written. In a folder that exists they are written into a folder within it,
    of which the renaming decides: from then on its files are read, until each has been moved out of it.

    Parameters
    ----------
    write
        Writes all files into the folder that it is given but config.json, and returns what that holds; it comes last
        and knows the others by their hashes.
    """
    check_free(folder, overwrite=overwrite)
    _settle(folder)
    target = folder / PENDING if folder.exists() else folder
    with making(target) as unfinished:
        facts = write(unfinished)
        hashes = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
        config = json.dumps(facts | {"sha256": hashes}, indent=2)
        (unfinished / "config.json").write_text(config)
    _settle(folder)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse to save over a file, or, unless that is wanted, over a model.

    Raises
    ------
    ExistsError
        If a model is there, and `overwrite` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is saved as a folder, give another name")
    if holds_model(folder) and not overwrite:
        raise ExistsError(
            f"{folder} holds a saved model; give another name, or replace it with overwrite=True (--overwrite)"
        )


def holds_model(folder: Path) -> bool:
    """Whether a model is saved in a folder."""
    return path_of(folder, "config.json").is_file()


def path_of(folder: Path, name: str) -> Path:
    """Path of a file of the model that a folder holds."""
    pending = folder / PENDING / name
    return pending if pending.exists() else folder / name


def _settle(folder: Path) -> None:
    """Move the files of a model that is completely written out of the folder of pending ones."""
    pending = folder / PENDING
    if pending.is_dir():
        for path in sorted(pending.iterdir()):
            os.replace(path, folder / path.name)
        pending.rmdir()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Path, hashes: Mapping[str, str]) -> None:
    """Refuse files that were not saved together; models that were saved before there were hashes have none."""
    for name, expected in hashes.items():
        with reading(folder, name) as path:
            found = _sha256(path)
        if found != expected:
            raise ValueError(
                f"{path} is not the file that was saved with config.json: it is damaged, was changed, or files of two "
                "models are mixed. Copy the folder as a whole, or save the model again"
            )


def by_owner(arrays: Mapping[str, np.ndarray]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Saved arrays grouped by owner and name, from paths ``owner/name/field``; the name may hold slashes."""
    states: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        owner, rest = path.split("/", 1)
        name, field = rest.rsplit("/", 1)
        states.setdefault((owner, name), {})[field] = array
    return states


def size_buffers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give buffers that have no rows before a fit the number of rows that was saved."""
    for key, buffer in list(model.named_buffers()):
        has_no_rows = buffer.ndim > 0 and not len(buffer)
        if has_no_rows and key in tensors and tensors[key].shape[1:] == buffer.shape[1:]:
            path, _, name = key.rpartition(".")
            setattr(model.get_submodule(path), name, torch.empty_like(tensors[key]))


def card(name: str, dataset: CellDataset, config: FitConfig) -> dict[str, Any]:
    """Facts about the fit, for users of the saved model."""
    design = dataset.design
    rows = {part: dataset.rows(part) for part in ("train", "val", "test")}
    train, _ = design.unique_conditions(dataset.obs.iloc[rows["train"]])

    # held out: conditions of which no cell is trained on
    trained = set(design.names(train))
    held_out = {}
    for part in ("val", "test"):
        table = design.conditions(design.unique_conditions(dataset.obs.iloc[rows[part]])[0])
        held_out[part] = table[~design.names(table).isin(trained)].to_dict("records")

    # labels that are trained on, those of combinations one by one
    perturbations: set[str] = set()
    if design.perturbation is not None:
        for label in train[design.perturbation].unique():
            perturbations |= set(design.parts(label))
    covariates = {column: sorted(set(train[column]) - {design.unknown}) for column in design.covariates}
    return {
        "model": name,
        "version": version("invirtuo"),
        "seed": config.seed,
        "fit": asdict(config),
        "data_hash": dataset.fingerprint(),
        "n_cells": {part: len(own) for part, own in rows.items()},
        "perturbations": sorted(perturbations),
        "covariates": covariates,
        "held_out": held_out,
    }


def config_from(cls: type, values: Mapping[str, Any]) -> Any:
    """A Config from JSON: lists become tuples, and retired fields are left out.

    Raises
    ------
    ValueError
        If a field is unknown, or a retired one has another value than the one that still holds.
    """
    known = {f.name for f in fields(cls)}
    retired = getattr(cls, "RETIRED", {})
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if unknown := sorted(set(values) - known - set(retired)):
        names = ", ".join(sorted(known))
        raise ValueError(f"unknown field(s) {', '.join(unknown)} for {cls.__qualname__}; known: {names}")

    # a retired field may hold only the value that still applies
    changed = []
    for name, value in retired.items():
        if values.get(name, value) != value:
            changed.append(f"{name}={values[name]!r}")
    if changed:
        raise ValueError(
            f"{cls.__qualname__} has no field(s) {', '.join(changed)} any more; use the version that saved it"
        )
    return cls(**{name: value for name, value in values.items() if name in known})


@contextmanager
def reading(folder: Path, name: str) -> Iterator[Path]:
    """Turn whatever goes wrong while a file of a saved model is read into one clear error."""
    damage = (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        BadZipFile,
        SafetensorError,
    )
    path = path_of(folder, name)
    try:
        with path.open("rb"):  # safetensors takes what may not be read for missing
            pass
        yield path
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; ask its owner to change the permissions") from error
    except damage as error:
        reason = " ".join(str(error).split())[:300] if path.exists() else "it is missing"
        raise ValueError(f"{path} is damaged: {reason}; save the model again") from error

"""The folder of a saved model: config, design, transforms, weights, history and card; nothing in it is pickled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import Tensor

from invirtuo.design import Design
from invirtuo.files import writing
from invirtuo.model.pseudobulks import Pseudobulks
from invirtuo.transforms import TRANSFORMS

if TYPE_CHECKING:
    from invirtuo.dataset import CellDataset
    from invirtuo.fit import FitConfig
    from invirtuo.model.base import Model

__all__ = ["card", "config_from", "restore", "save", "size_buffers"]


def save(model: Model, folder: Path) -> None:
    """Write a model into a folder; the file by which it is found comes last."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is saved as a folder, give another name")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"model": model.name, "preset": model.preset, "config": asdict(model.config), "genes": model.genes}
    _write_text(folder / "design.json", model.design.to_json())
    _write_text(folder / "card.json", json.dumps(model.card, indent=2))
    with writing(folder / "transforms.npz") as path:
        np.savez_compressed(path, **_arrays(model))
    with writing(folder / "history.csv") as path:
        model.history.to_csv(path, index=False)
    with writing(folder / "weights.safetensors") as path:
        save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    _write_text(folder / "config.json", json.dumps(facts, indent=2))


def restore(cls: type[Model], folder: Path) -> Any:
    """Read what :func:`save` wrote."""
    with _reading(folder / "config.json") as path:
        facts = json.loads(path.read_text())
        genes, preset, config = facts["genes"], facts["preset"], config_from(cls.Config, facts["config"])
    with _reading(folder / "design.json") as path:
        design = Design.from_json(path.read_text())
    model = cls(design, genes, config)
    model.preset = preset
    with _reading(folder / "card.json") as path:
        model.card = json.loads(path.read_text())
    history = folder / "history.csv"
    model.history = pd.read_csv(history) if history.exists() and history.stat().st_size > 2 else pd.DataFrame()
    with _reading(folder / "transforms.npz") as path, path.open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        _load_arrays(model, {key: arrays[key] for key in arrays.files})
    with _reading(folder / "weights.safetensors") as path:
        tensors = load_file(path)
        size_buffers(model, tensors)
        model.load_state_dict(tensors)
    return model.eval()


def _arrays(model: Model) -> dict[str, Any]:
    """What a model knows beside its weights, by room, name and part."""
    arrays = {f"{k}/{type(t).__name__}/{n}": a for k, t in model.transforms.items() for n, a in t.state().items()}
    for group, x in model._controls.items():
        arrays |= {f"controls/{group}/{part}": getattr(x, part) for part in ("data", "indices", "indptr")}
    if model._pseudobulks is not None:
        arrays |= {f"pseudobulks/all/{part}": array for part, array in model._pseudobulks.state().items()}
    return arrays


def _load_arrays(model: Model, arrays: dict[str, np.ndarray]) -> None:
    states: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        head, rest = key.split("/", 1)
        middle, tail = rest.rsplit("/", 1)
        states.setdefault((head, middle), {})[tail] = array
    for (head, middle), state in states.items():
        if head == "controls":
            shape = (len(state["indptr"]) - 1, model.n_columns)
            cells = sparse.csr_matrix((state["data"], state["indices"], state["indptr"]), shape)
            cells.check_format(full_check=True)  # indices out of bounds would read foreign memory
            model._controls[middle] = cells
        elif head == "pseudobulks":
            model._pseudobulks = Pseudobulks.load(state)
        else:
            model.transforms[head] = TRANSFORMS[middle].load(state)


def size_buffers(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Give buffers that have no rows before a fit the number of rows that was saved."""
    for key, buffer in list(model.named_buffers()):
        if buffer.ndim and not len(buffer) and key in tensors and tensors[key].shape[1:] == buffer.shape[1:]:
            path, _, name = key.rpartition(".")
            setattr(model.get_submodule(path), name, torch.empty_like(tensors[key]))


def card(model: Model, dataset: CellDataset, config: FitConfig) -> dict[str, Any]:
    """What a user of the saved model needs to know of its fit."""
    design = model.design
    kinds = {part: design.kinds(dataset.obs.iloc[dataset.rows(part)])[0] for part in ("train", "val", "test")}
    train = kinds["train"]
    seen = set(design.names(train))
    held_out = {}
    for part in ("val", "test"):
        table = design.conditions(kinds[part])
        held_out[part] = table[~design.names(table).isin(seen)].to_dict("records")
    labels = [] if design.perturbation is None else train[design.perturbation].unique()
    return {
        "model": model.name,
        "version": version("invirtuo"),
        "seed": config.seed,
        "fit": asdict(config),
        "data_hash": dataset.fingerprint(),
        "n_cells": {part: len(dataset.rows(part)) for part in ("train", "val", "test")},
        "perturbations": sorted({part for label in labels for part in design.parts(label)}),
        "covariates": {name: sorted(set(train[name]) - {design.unknown}) for name in design.covariates},
        "held_out": held_out,
    }


def config_from(cls: type, values: Mapping[str, Any]) -> Any:
    """A Config from JSON: lists become tuples, unknown fields are an error."""
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"unknown field(s) {', '.join(unknown)} for {cls.__qualname__}; known: {', '.join(sorted(known))}"
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turn whatever goes wrong while a file of a saved model is read into one clear error."""
    trouble = (
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
    try:
        yield path
    except trouble as error:
        reason = " ".join(str(error).split())[:300] if path.exists() else "it is missing"
        raise ValueError(f"{path} is damaged: {reason}; save the model again") from error


def _write_text(path: Path, text: str) -> None:
    with writing(path) as partial:
        partial.write_text(text)

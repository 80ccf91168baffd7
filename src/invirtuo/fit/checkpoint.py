"""Checkpoints: safetensors + JSON, and whether one belongs to a fit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from invirtuo.fit.config import FitConfig

if TYPE_CHECKING:
    from invirtuo.dataset import CellDataset
    from invirtuo.model import Model

__all__ = ["BEST", "LAST", "check_same", "data_hash", "identity", "read"]

LAST = "last.safetensors"  # everything that a resumed fit needs
BEST = "best.safetensors"  # weights with the lowest validation loss so far


def identity(model: Model) -> dict[str, Any]:
    """What a checkpoint must agree with to belong to a model."""
    facts = {"name": model.name, "config": asdict(model.config), "design": model.design.to_json(), "genes": model.genes}
    if model.stage:
        facts["stage"] = model.stage
    return json.loads(json.dumps(facts))


def data_hash(dataset: CellDataset) -> str:
    """Hash of cells and split."""
    digest = hashlib.blake2b(dataset.fingerprint().encode(), digest_size=8)
    digest.update("|".join(map(str, dataset.split)).encode())
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["invirtuo"]), {k: file.get_tensor(k) for k in file.keys()}
    except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"the checkpoint {path} is damaged ({error}); remove it and fit again") from error


def check_same(saved: dict[str, Any], config: FitConfig, path: Path) -> None:
    """Refuse to resume with settings that would change the result."""
    free = {"progress", "checkpoint_every", "accelerator", "devices", "nodes", "compile"}
    now = json.loads(json.dumps(asdict(config)))
    changed = [f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in now.items() if k not in free and saved.get(k) != v]
    if changed:
        raise ValueError(
            f"the checkpoint {path} was made with another FitConfig ({'; '.join(changed)}); "
            "resume with the same settings or fit into a new folder"
        )

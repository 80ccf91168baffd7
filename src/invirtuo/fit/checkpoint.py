"""Checkpoints: safetensors + JSON, in one file or with a file of rows for every device; whether one belongs to a fit.

``last.safetensors`` holds the facts and all tensors that are not sharded. Of sharded tensors every device first writes
its rows to a file of its own; the facts name these files, so that a checkpoint is complete when ``last.safetensors``
takes its name, and the earlier one until then.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from invirtuo.cells.files import writing
from invirtuo.fit.config import FitConfig
from invirtuo.fit.devices import barrier, broadcast, is_main, rank_and_size
from invirtuo.fit.sharding import is_sharded, local, own_rows

if TYPE_CHECKING:
    from invirtuo.cells.dataset import CellDataset

__all__ = ["BEST", "LAST", "Checkpoint", "check_same", "data_hash", "remove", "write", "write_tensors"]

LAST = "last.safetensors"  # everything that a resumed fit needs
BEST = "best.safetensors"  # weights with the lowest validation loss so far
SHARDS = "last-*-of-*.safetensors"  # rows of sharded tensors


def write(folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint in place of the last one; if tensors are sharded, every device must take part."""
    # sharded tensors: every device writes its rows
    rows = {k: local(v) for k, v in tensors.items() if is_sharded(v)}
    rank, n_devices = rank_and_size()
    names = []
    if rows:
        name = broadcast(uuid.uuid4().hex[:8])  # of this checkpoint alone: no file of an earlier one is touched
        names = [f"last-{name}-{i:05d}-of-{n_devices:05d}.safetensors" for i in range(1, n_devices + 1)]
        write_tensors(folder / names[rank], rows)
        barrier()

    # the others, and the names of the files of rows
    if is_main():
        facts = {**facts, "shards": names, "shapes": {k: list(tensors[k].shape) for k in rows}}
        others = {k: v for k, v in tensors.items() if k not in rows}
        write_tensors(folder / LAST, others, invirtuo=json.dumps(facts))
        for old in set(folder.glob(SHARDS)) - {folder / name for name in names}:
            old.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove the checkpoints of a fit that ended well, and the folder if nothing else lies there."""
    for name in (SHARDS, LAST, BEST, "history.csv", ".*.part.*"):
        for path in folder.glob(name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **about: str) -> None:
    """Write tensors as safetensors, completely or not at all."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with writing(path) as partial:
        save_file(plain, partial, metadata=about or None)


class Checkpoint:
    """A checkpoint to read from, however many devices wrote it.

    Raises
    ------
    ValueError
        If a file of it is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._reading(path.name):
            main = safe_open(path, framework="pt")
            self.facts = json.loads(main.metadata()["invirtuo"])
            self._shapes = {k: main.get_slice(k).get_shape() for k in main.keys()}
        # the files that hold each tensor, with their numbers of rows
        self._pieces = {k: [(main, shape[0] if shape else 1)] for k, shape in self._shapes.items()}

        # sharded tensors lie in several
        shapes = self.facts.get("shapes", {})
        self._shapes |= shapes
        self._pieces |= {k: [] for k in shapes}
        for name in self.facts.get("shards", []):
            with self._reading(name):
                file = safe_open(path.with_name(name), framework="pt")
                for k in shapes:
                    n_rows = file.get_slice(k).get_shape()[0]
                    self._pieces[k].append((file, n_rows))
        for k, shape in shapes.items():
            if (found := sum(n for _, n in self._pieces[k])) != shape[0]:
                raise ValueError(self._damaged(f"{k} has {found} of {shape[0]} rows"))

    def keys(self, part: str) -> list[str]:
        """Names of the tensors of a part of the checkpoint: "model", "average", "optimizer", "best"."""
        return [k.removeprefix(part + ".") for k in self._shapes if k.startswith(part + ".")]

    def fill(self, target: Tensor, key: str) -> Tensor:
        """Read a tensor, or the rows of it that belong on this device, into one of its shape."""
        shape, own = self._shapes.get(key), local(target)
        if shape is None or tuple(shape) != tuple(target.shape):
            raise ValueError(self._damaged(f"{key} has shape {shape}, expected {tuple(target.shape)}"))
        rows = own_rows(shape[0], *rank_and_size()) if is_sharded(target) else None
        with torch.no_grad():
            if own.numel():
                own.copy_(self.rows(key, rows))
        return target

    def rows(self, key: str, wanted: slice | None) -> Tensor:
        """Rows of a tensor, all of None, from the files that hold them."""
        pieces = self._pieces[key]
        if wanted is None and len(pieces) == 1:
            whole: Tensor = pieces[0][0].get_tensor(key)
            return whole
        wanted = wanted or slice(0, self._shapes[key][0])
        found = []
        start = 0  # of the rows of a file among all
        for file, n_rows in pieces:
            first = max(wanted.start - start, 0)
            last = min(wanted.stop - start, n_rows)
            if first < last:
                found.append(file.get_slice(key)[first:last])
            start += n_rows
        return torch.cat(found)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            with self.path.with_name(name).open("rb"):  # safetensors takes what may not be read for missing
                pass
            yield
        except PermissionError as error:
            raise ValueError(f"the checkpoint {error.filename} cannot be read: {error.strerror}") from error
        except (SafetensorError, OSError, TypeError, KeyError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(self._damaged(str(error), name)) from error

    def _damaged(self, reason: str, name: str = LAST) -> str:
        return f"the checkpoint {self.path.with_name(name)} is damaged ({reason}); remove it and fit again"


def data_hash(dataset: CellDataset) -> str:
    """Hash of cells and split."""
    digest = hashlib.blake2b(dataset.fingerprint().encode(), digest_size=8)
    digest.update("|".join(map(str, dataset.split)).encode())
    return digest.hexdigest()


def check_same(saved: dict[str, Any], config: FitConfig, path: Path) -> None:
    """Refuse to resume with settings that would change the result.

    Other devices may go on; if they are fewer or more, `accumulate` may change so that a step has as many batches.
    """
    # fields that the weights do not depend on
    free = {"progress", "checkpoint_every", "keep_checkpoints"}
    free |= {"accelerator", "devices", "nodes", "strategy", "compile"}
    now = json.loads(json.dumps(asdict(config)))
    if _batches(saved) == _batches(now) is not None:
        free |= {"accumulate"}

    changed = []
    for field, value in now.items():
        if field not in free and saved.get(field) != value:
            changed.append(f"{field}: {saved.get(field)!r} -> {value!r}")
    if changed:
        raise ValueError(
            f"{path} was made with another FitConfig ({'; '.join(changed)}); "
            "resume with the same settings or fit into a new folder"
        )


def _batches(config: dict[str, Any]) -> int | None:
    """Batches of an optimiser step on all devices, if the number of these is known beforehand."""
    devices = str(config.get("devices", 1))
    if not devices.isdigit():
        return None
    nodes: int = config.get("nodes", 1)
    accumulate: int = config["accumulate"]
    return int(devices) * nodes * accumulate

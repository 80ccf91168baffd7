"""invirtuo: train, sample and judge generative models of how single cells answer to perturbations."""

from __future__ import annotations

import importlib
from typing import Any

from invirtuo import _former

__version__ = "0.2.0"

_MODULES = {
    "bench": "bench",
    "datasets": "cells.datasets",
    "features": "cells.features",
    "files": "cells.files",
    "flow": "flow",
    "metrics": "metrics",
    "models": "models",
    "multimodal": "cells.multimodal",
    "nn": "nn",
    "pl": "plots",
    "preprocess": "cells.preprocess",
    "samplers": "cells.samplers",
    "splits": "splits",
    "transforms": "cells.transforms",
    "verbs": "verbs",
}
_NAMES = {
    "Batch": "batch",
    "CellDataset": "cells.dataset",
    "CellStore": "cells.store",
    "Condition": "batch",
    "Design": "design",
    "FitConfig": "fit",
    "Model": "verbs",
    "Pair": "metrics",
    "PerturbationModel": "verbs",
    "SampleConfig": "verbs",
    "benchmark": "bench",
    "compare": "bench",
    "evaluate": "metrics",
    "interactions": "bench",
    "load": "models",
    "mask_entries": "verbs",
    "report": "reports",
    "screen": "bench",
    "shuffle": "cells.shuffle",
}

__all__ = ["__version__", *_MODULES, *_NAMES]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing the package costs next to nothing."""
    if name in _NAMES:
        value = getattr(importlib.import_module(f"invirtuo.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"invirtuo.{_MODULES[name]}")
    elif name in _former.PACKAGES or name in _former.MODULES:
        value = importlib.import_module(f"invirtuo.{name}")
    else:
        raise AttributeError(f"module 'invirtuo' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_former.install()

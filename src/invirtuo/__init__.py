"""invirtuo: train, sample and judge generative models of how single cells answer to perturbations."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_MODULES = (
    *("bench", "datasets", "flow", "generators", "metrics", "models", "multimodal"),
    *("nn", "preprocess", "samplers", "splits", "store", "transforms"),
)
_NAMES = {
    "Batch": "batch",
    "CellDataset": "dataset",
    "CellStore": "store",
    "Condition": "batch",
    "Design": "design",
    "FitConfig": "fit",
    "Model": "model",
    "Pair": "metrics",
    "PerturbationModel": "model",
    "SampleConfig": "model",
    "benchmark": "bench",
    "evaluate": "metrics",
    "load": "models",
    "report": "reports",
}

__all__ = ["__version__", *_MODULES, *_NAMES]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str):
    """Load a public name when it is first used: importing the package costs next to nothing."""
    if name in _NAMES:
        value = getattr(importlib.import_module(f"invirtuo.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"invirtuo.{name}")
    else:
        raise AttributeError(f"module 'invirtuo' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

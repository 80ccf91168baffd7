"""Names that modules had in version 0.1 before the rooms were arranged anew; programs may still import them."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

MODULES = {
    "checks": "cells.checks",
    "conditions": "cells.conditions",
    "dataset": "cells.dataset",
    "datasets": "cells.datasets",
    "files": "cells.files",
    "genes": "cells.genes",
    "multimodal": "cells.multimodal",
    "preprocess": "cells.preprocess",
    "pseudotime": "cells.pseudotime",
    "samplers": "cells.samplers",
    "transforms": "cells.transforms",
    "values": "cells.values",
    "windows": "cells.windows",
    "store.cells": "cells.store",
    "store.parts": "cells.one_file",
    "store.shuffled": "cells.shuffle",
    "dynamics.courses": "cells.courses",
    "model.base": "verbs.model",
    "model.controls": "verbs.controls",
    "model.device": "verbs.device",
    "model.drawing": "verbs.draw",
    "model.effects": "verbs.effects",
    "model.pseudobulks": "verbs.observed",
    "model.sampling": "verbs.sampling",
    "model.saving": "verbs.saving",
    "generators.base": "verbs.generate",
    "generators.drawing": "verbs.draw_counts",
    "generators.hidden": "verbs.masking",
    "generators.labels": "verbs.labels",
    "generators.latent": "verbs.latent_flow",
    "generators.output": "verbs.write_counts",
    "dynamics.base": "verbs.forecast",
    "dynamics.baselines": "verbs.naive_forecasts",
    "dynamics.mocap": "models.sparse_ode.mocap",
    "dynamics.reading": "verbs.network",
    "dynamics.systems": "models.sparse_ode.systems",
    "dynamics.tradeoff": "models.sparse_ode.tradeoff",
    "metrics.axes": "metrics.numerics.axes",
    "metrics.baseline": "metrics.challenge.baseline",
    "metrics.copies": "metrics.applications.copies",
    "metrics.de": "metrics.measures.de",
    "metrics.discrimination": "metrics.measures.discrimination",
    "metrics.distances": "metrics.numerics.distances",
    "metrics.distribution": "metrics.measures.distribution",
    "metrics.embedding": "metrics.applications.embedding",
    "metrics.generation": "metrics.measures.generation",
    "metrics.mean": "metrics.measures.mean",
    "metrics.network": "metrics.applications.network",
    "metrics.population": "metrics.measures.population",
    "metrics.rank": "metrics.numerics.rank",
    "metrics.streamed": "metrics.numerics.streamed",
    "metrics.wilcoxon": "metrics.measures.wilcoxon",
    "models.cellflow_counts": "models.counts.cellflow_counts",
    "models.cfgen": "models.counts.cfgen",
    "models.independent_nb": "models.counts.independent_nb",
    "models.state_embedding": "models.state.state_embedding",
    "models.state_transition": "models.state.state_transition",
    "nn.anchor": "models.primeflow.anchor",
    "nn.calibrate": "nn.moved",
    "nn.attention": "models.state.attention",
    "nn.energy": "models.state.energy",
    "nn.genewise": "models.primeflow.genewise",
    "nn.norm": "models.primeflow.norm",
    "nn.sparse_field": "models.sparse_ode.field",
    "nn.sparsity": "models.sparse_ode.gates",
    "nn.unet1d": "models.primeflow.unet",
    "nn.velocity": "models.primeflow.velocity",
    "report.benchmark": "reports.benchmark",
    "report.charts": "reports.charts",
    "report.dynamics": "reports.dynamics",
    "report.effects": "reports.effects",
    "report.figures": "reports.figures",
    "report.folder": "reports.folder",
    "report.page": "reports.page",
    "report.tables": "reports.tables",
}
PACKAGES = {  # packages with names of their own: the packages and modules that have these names now
    "dynamics": ("models.sparse_ode", "cells.courses", "verbs.naive_forecasts", "verbs"),
    "generators": ("verbs",),
    "metrics.core": ("metrics.registry", "metrics.pair"),
    "model": ("verbs",),
    "report": ("reports",),
    "store": ("cells.store", "cells.shuffle"),
}


class Package(ModuleType):
    """A former package: looks its names up where they are now."""

    def __getattr__(self, attribute: str) -> object:
        is_special = attribute.startswith("__") and attribute != "__all__"  # like its own path
        if not is_special:
            for name in PACKAGES[self.__name__.removeprefix("invirtuo.")]:
                found = importlib.import_module(f"invirtuo.{name}")
                if hasattr(found, attribute):
                    return getattr(found, attribute)
        raise AttributeError(f"module {self.__name__!r} has no attribute {attribute!r}")

    def __call__(self, *arguments: object, **named: object) -> object:
        """``invirtuo.report`` was a module and is a function."""
        return getattr(self, self.__name__.removeprefix("invirtuo."))(*arguments, **named)


class Former:
    """Finds modules by their former names, after everything else was tried."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The module that has the name now, or a former package, which looks its names up."""
        package, _, name = fullname.partition(".")
        if package != "invirtuo" or name not in MODULES | PACKAGES:
            return None
        # no subclass of Loader: importing importlib.abc takes ten times what the package takes
        return ModuleSpec(fullname, self, is_package=name in PACKAGES)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module itself, under two names."""
        name = spec.name.removeprefix("invirtuo.")
        now = MODULES.get(name) or PACKAGES[name][0]
        warnings.warn(f"{spec.name} is now invirtuo.{now}", DeprecationWarning, stacklevel=2)
        if name in PACKAGES:
            return Package(spec.name)
        module = importlib.import_module(f"invirtuo.{now}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is executed again, and a module keeps the specification of its own name."""
        if module.__spec__ is not None and not isinstance(module, Package):
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let modules be found by their former names."""
    if not any(isinstance(finder, Former) for finder in sys.meta_path):
        sys.meta_path.append(Former())

"""The registry of models: one file, or folder, for each paper. Adding a model is a file and a line here.

Models of other packages are found by their entry point in the group ``invirtuo.models``, any other class as
``module:Class``.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from invirtuo.models.biolord import Biolord
from invirtuo.models.counts.cellflow_counts import CellFlowCounts
from invirtuo.models.counts.cfgen import CFGen
from invirtuo.models.counts.independent_nb import IndependentNB
from invirtuo.models.cpa import CPA
from invirtuo.models.decoder_only import DecoderOnly
from invirtuo.models.fm_pca import FMPCA
from invirtuo.models.latent_additive import LatentAdditive
from invirtuo.models.linear_additive import LinearAdditive
from invirtuo.models.means import ContextMean, FoldChange, MagnitudeOnly, NoChange, PerturbationMean, Ridge
from invirtuo.models.primeflow.model import PRiMeFlow
from invirtuo.models.sams_vae import SAMSVAE
from invirtuo.models.sparse_ode.model import SparseODE
from invirtuo.models.state.state_embedding import StateEmbedding
from invirtuo.models.state.state_transition import StateTransition
from invirtuo.verbs.model import Model
from invirtuo.verbs.saving import holds_model, path_of

__all__ = [
    "CPA",
    "FMPCA",
    "MODELS",
    "SAMSVAE",
    "Biolord",
    "CFGen",
    "CellFlowCounts",
    "ContextMean",
    "DecoderOnly",
    "FoldChange",
    "IndependentNB",
    "LatentAdditive",
    "LinearAdditive",
    "MagnitudeOnly",
    "NoChange",
    "PRiMeFlow",
    "PerturbationMean",
    "Ridge",
    "SparseODE",
    "StateEmbedding",
    "StateTransition",
    "load",
    "model_class",
    "model_names",
]

GROUP = "invirtuo.models"  # entry points of other packages: name = "module:Class"
_CLASSES: tuple[type[Model], ...] = (
    PRiMeFlow,
    FMPCA,
    StateTransition,
    StateEmbedding,
    CPA,
    SAMSVAE,
    Biolord,
    LatentAdditive,
    LinearAdditive,
    DecoderOnly,
    PerturbationMean,
    FoldChange,
    MagnitudeOnly,
    ContextMean,
    Ridge,
    NoChange,
    CFGen,
    CellFlowCounts,
    IndependentNB,
    SparseODE,
)
MODELS: dict[str, type[Model]] = {model.name: model for model in _CLASSES}
BUNDLED = {"kang-primeflow": "the IFN-beta response of blood cells; B cells and CD14 monocytes were held out"}


def model_names() -> list[str]:
    """Names of the models of this package, then of those that installed packages offer."""
    return [*MODELS, *(name for name in _offered() if name not in MODELS)]


def model_class(name: str) -> type[Model]:
    """The class of a model.

    Parameters
    ----------
    name
        In ``MODELS``; of an entry point in the group ``invirtuo.models``; or ``module:Class`` of a module that can be
        imported.

    Raises
    ------
    ValueError
        If there is no such model, or what the name leads to is no `Model`.
    """
    if name in MODELS:
        return MODELS[name]
    address = _offered().get(name, name)
    module, colon, attribute = address.partition(":")
    if not colon:
        raise ValueError(
            f"unknown model {name!r}; known: {', '.join(model_names())}; or module:Class for one of your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be imported ({error}); known: {', '.join(model_names())}") from error
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise ValueError(f"{address} is no model; expected a class derived from invirtuo.Model")
    return found


@cache
def _offered() -> dict[str, str]:
    """Name and address of the models that installed packages offer."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def load(folder: str | Path) -> Model:
    """Read a saved model of any kind.

    Parameters
    ----------
    folder
        Folder that ``save`` wrote; or the name of a model that comes with the package, see `BUNDLED`.

    Raises
    ------
    ValueError
        If the folder is not a saved model, or of a model that this version does not know and that cannot be imported.
    """
    if str(folder) in BUNDLED and not Path(folder).exists():
        folder = Path(__file__).parents[1] / "data" / str(folder)
    path = path_of(Path(folder), "config.json")
    if not holds_model(Path(folder)):
        raise ValueError(
            f"{folder} holds no saved model (no config.json); pass the folder that model.save wrote, or "
            f"{' or '.join(BUNDLED)}"
        )
    try:
        name = json.loads(path.read_text())["model"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; save the model again") from error
    try:
        kind = model_class(name)
    except ValueError as error:
        known = f"this version knows {', '.join(model_names())}"
        raise ValueError(f"{path} is a saved {name!r}; {error if ':' in name else known}") from error
    return kind.restore(folder)

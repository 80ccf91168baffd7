"""The registry of models: one file, one paper. Adding a model is a file and a line in it."""

from __future__ import annotations

import json
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
]

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


def load(folder: str | Path) -> Model:
    """Read a saved model of any kind.

    Parameters
    ----------
    folder
        Folder that ``save`` wrote; or the name of a model that comes with the package, see `BUNDLED`.

    Raises
    ------
    ValueError
        If the folder is not a saved model, or of a model that this version does not know.
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
    if name not in MODELS:
        raise ValueError(f"{path} is a saved {name!r}; this version knows {', '.join(MODELS)}")
    return MODELS[name].restore(folder)

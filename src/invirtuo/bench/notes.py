"""What goes with scores: what is suspect about predicted cells, and how well the metrics discriminate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData

    from invirtuo.design import Design
    from invirtuo.metrics import Pair

__all__ = ["DISCRIMINATION", "FLAGS", "copies", "discrimination", "flagged"]

logger = logging.getLogger(__name__)

CHOSEN = ("few_cells",)  # flags of what is chosen for all models alike
FLAGS = ["model", "flag", "text"]
DISCRIMINATION = ["metric", "drf", "drf_mean", "bds", "n", "n_nan", "positive", "negative"]


def flagged(pair: Pair, label: str) -> pd.DataFrame:
    """Flags of the predicted cells of a model, columns `FLAGS`; see :func:`invirtuo.metrics.flags`."""
    from invirtuo.metrics.trust.flags import flags_of

    return flags_of(pair, leave_out=CHOSEN).assign(model=label)[FLAGS]


def copies(predicted: AnnData, adata: AnnData, design: Design, split: pd.Series, part: str, label: str) -> pd.DataFrame:
    """Flags of predicted cells that are real cells, columns `FLAGS`; see :func:`invirtuo.metrics.copied`.

    Cells of other parts than `part` may be known to a model.
    """
    from invirtuo.metrics import copied

    is_control = design.is_control(adata.obs)
    is_known = split.isin([name for name in ("train", "val") if name != part]).to_numpy()
    groups = {"held-out": ~is_known & ~is_control, "training": is_known & ~is_control, "control": is_control}
    real = adata[:, predicted.var_names]
    return copied(predicted.X, real.X, groups).assign(model=label)[FLAGS]


def discrimination(
    real: AnnData, design: Design, metrics: Sequence[str] | None, *, n_pcs: int, seed: int
) -> pd.DataFrame:
    """How well metrics discriminate on real cells, columns `DISCRIMINATION`; no row where that cannot be known.

    See :func:`invirtuo.metrics.calibration`. It is not asked of metrics that count mistakes alone.
    """
    from invirtuo.metrics import METRICS, calibration, choose

    asked = [name for name in choose(metrics, design) if not METRICS[name].of_mistakes]
    try:
        return calibration(real, design, asked, n_pcs=n_pcs, seed=seed)[DISCRIMINATION]
    except ValueError as error:
        logger.warning("how well the metrics discriminate is not known: %s", error)
        return pd.DataFrame(columns=DISCRIMINATION)

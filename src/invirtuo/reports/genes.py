"""The part of a page in which genes are looked up: what a table and three charts show of the condition chosen."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ORIGINS", "gene_data"]

NUMBERS = ("effect", "low", "high", "real", "q", "q_real")
ORIGINS = ("control", "real", "predicted")
MOST = 60_000  # genes of conditions in a page
DIGITS = 3  # significant digits of a number


def gene_data(effects: pd.DataFrame, distributions: Mapping[str, np.ndarray] | None) -> tuple[Markup, int]:
    """Effects and distributions for the script of a page: JSON, packed with gzip, in base64.

    Parameters
    ----------
    effects
        As :func:`invirtuo.bench.compare.by_gene.by_gene` gives them; ``q`` and ``q_real`` may be NaN.
    distributions
        As it gives them; None: not known.

    Returns
    -------
    The text, and the number of conditions left out of it.
    """
    genes = list(dict.fromkeys(effects["gene"]))
    conditions = list(dict.fromkeys(effects["condition"]))
    kept = conditions[: max(MOST // len(genes), 1)]
    own = {name: table.set_index("gene") for name, table in effects.groupby("condition", sort=False)}
    found = []
    for condition in kept:
        table = own[condition].reindex(genes)
        found.append({"name": condition, **{name: _numbers(table[name]) for name in NUMBERS}})
        if distributions is not None:
            place = list(distributions["condition"]).index(condition)
            found[-1]["shares"] = {origin: _percent(distributions[origin][place]) for origin in ORIGINS}
    top = [] if distributions is None else _numbers(distributions["top"])
    text = json.dumps({"genes": genes, "top": top, "conditions": found}, separators=(",", ":"))
    packed = gzip.compress(text.encode(), mtime=0)
    return Markup(base64.b64encode(packed).decode()), len(conditions) - len(kept)


def _numbers(values: Any) -> list[float | None]:
    """Numbers with few digits, None where there is none."""
    return [float(f"{x:.{DIGITS}g}") if np.isfinite(x) else None for x in np.asarray(values, float)]


def _percent(shares: np.ndarray) -> list[list[int]] | None:
    """(g, bins) shares in percent; None if there are no cells."""
    return None if np.isnan(shares).any() else np.rint(100 * shares).astype(int).tolist()

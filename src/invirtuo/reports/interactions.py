"""A page about pairs of perturbations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from invirtuo.reports.answer import answer_page
from invirtuo.reports.charts import Interval, forest
from invirtuo.reports.tables import number

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["interactions_page"]

IN_CHART = 15  # pairs in the chart
MEANINGS = {
    "additive": "length of what the pair does beyond the sum of its parts",
    "bliss": "the same of logarithms of mean expression, where effects multiply",
    "norm": "length of the effect of the pair over that of the sum of its parts: above 1 if it is stronger than these",
    "magnitude": "length of the coefficients of the pair's effect regressed on those of its parts; 1.41 if they add up",
    "fit": "correlation of the pair's effect with what its parts give: 1 if nothing new happens",
}
BY = "norm"  # the score that says in which direction a pair departs from its parts


def interactions_page(
    table: pd.DataFrame, out: str | os.PathLike[str], *, title: str = "Which pairs do more, or less, than their parts?"
) -> Path:
    """Write one self-contained HTML page about pairs: the answer in a sentence, a chart, the scores with intervals.

    Parameters
    ----------
    table
        As :func:`invirtuo.interactions` gives it.
    out
        The page to write.
    title
        Its heading.

    Returns
    -------
    Path of the page.

    Raises
    ------
    ValueError
        If columns are missing.
    """
    if missing := [name for name in ("condition", "score", "value", "low", "high") if name not in table]:
        raise ValueError(f"the table has no column {', '.join(missing)}; expected one made by invirtuo.interactions")

    # pairs, those first that depart most from the sum of their parts
    norms = table[table["score"] == BY].set_index("condition")
    norms = norms.loc[(norms["value"] - 1).abs().sort_values(ascending=False).index]
    beyond = norms.head(IN_CHART)[["value", "low", "high"]] - 1
    chart = forest([Interval(*row) for row in beyond.itertuples()], axis=f"{BY} - 1", lower_is_better=None)

    # a row for each, a column for each score
    texts = table.assign(text=[_interval(*row) for row in table[["value", "low", "high"]].to_numpy()])
    wide = texts.pivot(index="condition", columns="score", values="text").loc[norms.index].reset_index()
    meanings = {"condition": "the two perturbations, and in which cells"}
    meanings |= {name: meaning for name, meaning in MEANINGS.items() if name in wide}
    more, less = (norms["low"] > 1).sum(), (norms["high"] < 1).sum()
    answer = (
        f"Of {len(norms):,} pair{'s' * (len(norms) != 1)}, {more} do more than the sum of their parts and {less} less, "
        "with intervals that leave the sum out."
    )
    return answer_page(out, title, answer, [("above 0: stronger than the sum of the parts", chart)], wide, meanings)


def _interval(value: float, low: float, high: float) -> str:
    return f"{number(value)} ({number(low)} to {number(high)})"

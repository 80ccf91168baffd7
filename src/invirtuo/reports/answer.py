"""The page of a question with one answer: a sentence, charts, a table whose columns are explained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invirtuo.reports.render import render
from invirtuo.reports.tables import number

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

__all__ = ["answer_page"]

MOST_ROWS = 500  # of a table in a page


def answer_page(
    out: str | os.PathLike[str],
    title: str,
    answer: str,
    charts: Iterable[tuple[str, Markup]],
    table: pd.DataFrame,
    meanings: Mapping[str, str],
    *,
    further: Iterable[str] = (),
) -> Path:
    """Write the page.

    Parameters
    ----------
    out
        The page to write.
    title, answer, further
        Heading, the sentence that matters, and sentences below it.
    charts
        Captions and charts.
    table
        Rows to show, the first column names them.
    meanings
        What each column says, in the order in which they are shown.

    Returns
    -------
    Path of the page.
    """
    rows = table[list(meanings)].head(MOST_ROWS).map(_written).to_numpy()
    shown: dict[str, Any] = {"title": title, "answer": answer, "further": list(further), "charts": list(charts)}
    shown |= {"columns": list(meanings.items()), "rows": rows.tolist(), "n_left_out": max(len(table) - MOST_ROWS, 0)}
    return render("answer.html.j2", shown, out)


def _written(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)

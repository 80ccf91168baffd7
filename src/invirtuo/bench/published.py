"""Numbers that a paper printed for tasks, set beside ours.

``published.csv`` has the means over five seeds of tables 2 to 6 of PRiMeFlow (v1), by our labels of the same models,
with their standard deviations. Where the text at hand leaves the exponent of a deviation open there is none; what the
paper does not report, and tables 7 to 9, which that text lacks, are not there.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

__all__ = ["published_numbers", "set_beside"]

FILE = Path(__file__).with_name("published.csv")
COLUMNS = ["task", "model", "name", "metric", "published", "published_sd", "ours", "ours_sd", "difference", "n_seeds"]


def published_numbers() -> pd.DataFrame:
    """What the tables print.

    Returns
    -------
    DataFrame with columns ``task``, ``model`` (our label), ``name`` (that of the paper), ``metric``, ``mean``, ``sd``,
    ``source``.

    Examples
    --------
    >>> table = published_numbers().set_index(["task", "model", "metric"])
    >>> float(table.loc[("norman19", "primeflow, guidance 3", "deg_recall"), "mean"])
    0.61
    """
    return pd.read_csv(FILE, keep_default_na=False, na_values={"sd": [""]})


def set_beside(summary: pd.DataFrame) -> pd.DataFrame:
    """Published means and ours, a row for each published number of the tasks that were run.

    Parameters
    ----------
    summary
        Columns ``task``, ``model``, ``metric``, ``mean``, ``sd`` and ``n_seeds``: mean over conditions, and over seeds.

    Returns
    -------
    DataFrame with columns ``task``, ``model``, ``name``, ``metric``, ``published``, ``published_sd``, ``ours``,
    ``ours_sd``, ``difference`` (ours minus published), ``n_seeds``, ``source``; NaN where a model was not run.
    """
    numbers = published_numbers().rename(columns={"mean": "published", "sd": "published_sd"})
    numbers = numbers[numbers["task"].isin(summary["task"])]
    keys = ["task", "model", "metric"]
    ours = summary[[*keys, "mean", "sd", "n_seeds"]].rename(columns={"mean": "ours", "sd": "ours_sd"})
    table = numbers.merge(ours, on=keys, how="left")
    table["difference"] = table["ours"] - table["published"]
    table["n_seeds"] = table["n_seeds"].astype("Int64")
    return table[[*COLUMNS, "source"]]

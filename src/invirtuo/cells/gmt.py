"""Sets of genes (GO terms, pathways) from a .gmt file."""

from __future__ import annotations

import gzip
from pathlib import Path

__all__ = ["read_gmt"]


def read_gmt(path: str | Path, *, smallest: int = 5, largest: int = 500) -> dict[str, set[str]]:
    """Name of every set to its genes.

    Parameters
    ----------
    path
        .gmt or .gmt.gz: name, description and genes of a set in each line, separated by tabs.
    smallest, largest
        Sets of other sizes are left out.

    Raises
    ------
    ValueError
        If the file cannot be read or no set is left.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = [line.rstrip("\n").split("\t") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable .gmt file: {error}") from error
    sets = {line[0]: set(line[2:]) - {""} for line in lines}
    sets = {name: genes for name, genes in sets.items() if smallest <= len(genes) <= largest}
    if not sets:
        raise ValueError(
            f"{path} holds no set of {smallest} to {largest} genes; expected name, description and genes in each line, "
            "separated by tabs"
        )
    return sets

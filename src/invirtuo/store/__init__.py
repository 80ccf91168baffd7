"""Cells in files larger than memory: opening, reading in windows, shuffling."""

from invirtuo.store.cells import CellStore
from invirtuo.store.shuffled import shuffle

__all__ = ["CellStore", "shuffle"]

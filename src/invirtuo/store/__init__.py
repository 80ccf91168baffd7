"""Cells in files larger than memory: opening, reading in windows, shuffling."""

from invirtuo.store.cells import CellStore

__all__ = ["CellStore"]

"""Errors that callers may want to tell apart; all others are plain ValueErrors."""

from __future__ import annotations

__all__ = ["ExistsError"]


class ExistsError(ValueError, FileExistsError):
    """What would be replaced is there already, and nobody said that it may be."""

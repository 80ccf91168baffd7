"""A folder of results -> one self-contained HTML page. It knows tables and pictures, not models."""

from invirtuo.reports.page import report

__all__ = ["report"]

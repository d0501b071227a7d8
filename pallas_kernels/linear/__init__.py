"""Matrix products of a few rows."""

from .reference import linear

__all__ = ["linear"]

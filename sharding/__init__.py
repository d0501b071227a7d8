"""Partition rules: which dimension of which array is split over which axis of a mesh."""

from .rules import TENSOR_PARALLEL, AxisRules, LogicalAxes

__all__ = ["TENSOR_PARALLEL", "AxisRules", "LogicalAxes"]

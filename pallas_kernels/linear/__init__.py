"""Matrix products of a few rows, with norm, bias, activation, gate and residual fused."""

from .api import gated_linear, linear
from .form import LinearForm

__all__ = ["LinearForm", "gated_linear", "linear"]

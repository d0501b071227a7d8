"""Norms over the model's width, alone and fused with the residual sum before them."""

from .api import add_norm, norm
from .form import NormForm, normalise
from .reference import layer_norm, rms_norm

__all__ = ["NormForm", "add_norm", "layer_norm", "norm", "normalise", "rms_norm"]

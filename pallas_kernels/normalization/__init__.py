"""Norms over the model's width."""

from .form import NormForm, normalise
from .reference import layer_norm, rms_norm

__all__ = ["NormForm", "layer_norm", "normalise", "rms_norm"]

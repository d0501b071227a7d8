"""Operators: one reference in plain JAX each. They import nothing of jdsi but each other."""

from .activations import ACTIVATIONS
from .attention import Alibi, AttentionForm, RoundedAlibi, attention, attention_weights
from .linear import gated_linear, linear
from .normalization import NormForm, add_norm, layer_norm, norm, rms_norm
from .rotary import Rotary, RotaryScaling, apply_rotary, base_frequencies

__all__ = [
    "ACTIVATIONS",
    "Alibi",
    "AttentionForm",
    "NormForm",
    "Rotary",
    "RotaryScaling",
    "RoundedAlibi",
    "add_norm",
    "apply_rotary",
    "attention",
    "attention_weights",
    "base_frequencies",
    "gated_linear",
    "layer_norm",
    "linear",
    "norm",
    "rms_norm",
]

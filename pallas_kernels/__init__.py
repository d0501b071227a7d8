"""Operators: one reference in plain JAX each. They import nothing of jdsi but each other."""

from .activations import ACTIVATIONS
from .attention import Alibi, AttentionForm, RoundedAlibi, attention, attention_weights
from .linear import linear
from .normalization import layer_norm, rms_norm
from .rotary import Rotary, RotaryScaling, apply_rotary, base_frequencies

__all__ = [
    "ACTIVATIONS",
    "Alibi",
    "AttentionForm",
    "Rotary",
    "RotaryScaling",
    "RoundedAlibi",
    "apply_rotary",
    "attention",
    "attention_weights",
    "base_frequencies",
    "layer_norm",
    "linear",
    "rms_norm",
]

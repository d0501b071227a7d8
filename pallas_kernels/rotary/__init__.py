"""Rotary position embedding."""

from .reference import Rotary, RotaryScaling, apply_rotary, base_frequencies, rotary_frequencies

__all__ = ["Rotary", "RotaryScaling", "apply_rotary", "base_frequencies", "rotary_frequencies"]

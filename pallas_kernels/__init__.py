"""Operators: one reference in plain JAX each, and kernels for GPUs. They import nothing of jdsi but its errors."""

from .activations import ACTIVATIONS
from .attention import Alibi, AttentionForm, RoundedAlibi, attention, attention_weights
from .decode_attention import decode_attention, paged_decode_attention
from .device import H200, Device, current_device, target
from .kv_write import rotary_kv_write, rotary_kv_write_fused
from .linear import gated_linear, linear
from .normalization import NormForm, add_norm, layer_norm, norm, rms_norm
from .operator import Implementation, default_implementation
from .prefill_attention import prefill_attention
from .quantized_linear import (
    QuantizedWeight,
    WeightFormat,
    dequantize,
    quantize,
)
from .ragged_paged_attention import ragged_paged_attention
from .rotary import Rotary, RotaryScaling, apply_rotary, base_frequencies

__all__ = [
    "ACTIVATIONS",
    "H200",
    "Alibi",
    "AttentionForm",
    "Device",
    "Implementation",
    "NormForm",
    "QuantizedWeight",
    "Rotary",
    "RotaryScaling",
    "RoundedAlibi",
    "WeightFormat",
    "add_norm",
    "apply_rotary",
    "attention",
    "attention_weights",
    "base_frequencies",
    "current_device",
    "decode_attention",
    "default_implementation",
    "dequantize",
    "gated_linear",
    "layer_norm",
    "linear",
    "norm",
    "paged_decode_attention",
    "prefill_attention",
    "quantize",
    "ragged_paged_attention",
    "rms_norm",
    "rotary_kv_write",
    "rotary_kv_write_fused",
    "target",
]

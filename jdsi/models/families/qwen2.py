"""Qwen2 and Qwen2.5 (Yang et al. 2024): a Llama with biases on q, k and v, and sliding windows in some layers."""

from typing import Any

from jdsi.models.spec import TransformerSpec

from .family import Family
from .llama_like import causal_attention, llama_like_spec, llama_like_weight_map, windows_by_layer_type


def spec(config: Any) -> TransformerSpec:
    """The spec of a `Qwen2Config`."""
    return llama_like_spec(config, causal_attention(config, qkv_bias=True), windows_by_layer_type(config))


FAMILY = Family("qwen2", spec, llama_like_weight_map)

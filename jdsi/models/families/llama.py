"""Llama 1 to 3 (Touvron et al. 2023; Grattafiori et al. 2024)."""

from typing import Any

from jdsi.models.spec import TransformerSpec

from .family import Family
from .llama_like import causal_attention, llama_like_spec, llama_like_weight_map


def spec(config: Any) -> TransformerSpec:
    """The spec of a `LlamaConfig`."""
    attention = causal_attention(config, qkv_bias=config.attention_bias, out_bias=config.attention_bias)
    return llama_like_spec(config, attention, [None] * config.num_hidden_layers, mlp_bias=config.mlp_bias)


FAMILY = Family("llama", spec, llama_like_weight_map)

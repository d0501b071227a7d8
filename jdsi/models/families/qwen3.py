"""Qwen3, dense (Yang et al. 2025): a Llama that normalises every query and key head."""

from typing import Any

from jdsi.models.spec import RmsNormSpec, TransformerSpec

from .family import Family
from .llama_like import causal_attention, llama_like_spec, llama_like_weight_map, windows_by_layer_type


def spec(config: Any) -> TransformerSpec:
    """The spec of a `Qwen3Config`."""
    attention = causal_attention(
        config,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        qk_norm=RmsNormSpec(config.rms_norm_eps),
    )
    return llama_like_spec(config, attention, windows_by_layer_type(config))


FAMILY = Family("qwen3", spec, llama_like_weight_map)

"""Gemma 2 (Riviere et al. 2024): norms on both sides of every part, soft-capped scores, every other layer windowed."""

import dataclasses
from typing import Any

from jdsi.errors import ConfigError
from jdsi.models.spec import LayerSpec, MlpSpec, RmsNormSpec, SandwichNorm, TransformerSpec
from jdsi.models.weight_map import WeightMap
from jdsi.pallas_kernels.activations import known_activation

from .family import Family
from .llama_like import causal_attention, decoder_spec, llama_like_weight_map, windows_by_layer_type, with_windows


def spec(config: Any) -> TransformerSpec:
    """The spec of a `Gemma2Config`."""
    if config.use_bidirectional_attention:
        raise ConfigError("use_bidirectional_attention must be false: gemma2 models are run as causal language models")
    norm = RmsNormSpec(config.rms_norm_eps, weight_offset=1.0)
    attention = dataclasses.replace(
        causal_attention(config, qkv_bias=config.attention_bias, out_bias=config.attention_bias),
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
    )
    activation = known_activation(config.hidden_activation, "hidden_activation")
    mlp = MlpSpec(config.intermediate_size, activation, gated=True)
    layers = with_windows(LayerSpec((attention, mlp), SandwichNorm(norm)), windows_by_layer_type(config))
    # The scale is rounded to the model's dtype where it is applied, as the original does.
    scale, softcap = config.hidden_size**0.5, config.final_logit_softcapping
    return decoder_spec(config, layers, norm, scale=scale, softcap=softcap)


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `Gemma2ForCausalLM`."""
    norms = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_out_norm": "post_feedforward_layernorm",
    }
    return llama_like_weight_map(spec, norms=norms)


FAMILY = Family("gemma2", spec, weight_map)

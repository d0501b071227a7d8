"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024): a Llama stored fused, with partial rotary and LongRoPE."""

from typing import Any

from jdsi.models.spec import TransformerSpec
from jdsi.models.weight_map import WeightMap

from .family import Family
from .llama_like import causal_attention, llama_like_spec, llama_like_weight_map


def spec(config: Any) -> TransformerSpec:
    """The spec of a `Phi3Config`."""
    attention = causal_attention(config, partial_rotary=True)
    return llama_like_spec(config, attention, [config.sliding_window] * config.num_hidden_layers)


def weight_map(spec: TransformerSpec) -> WeightMap:
    """Names of `Phi3ForCausalLM`, whose fused tensors order their rows as ours do."""
    return llama_like_weight_map(spec, qkv=("qkv_proj",), gate_up=("gate_up_proj",))


FAMILY = Family("phi3", spec, weight_map)

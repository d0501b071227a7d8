"""Mistral (Jiang et al. 2023): a Llama whose every layer sees a sliding window."""

from typing import Any

from jdsi.models.spec import TransformerSpec

from .family import Family
from .llama_like import causal_attention, llama_like_spec, llama_like_weight_map


def spec(config: Any) -> TransformerSpec:
    """The spec of a `MistralConfig`."""
    return llama_like_spec(config, causal_attention(config), [config.sliding_window] * config.num_hidden_layers)


FAMILY = Family("mistral", spec, llama_like_weight_map)

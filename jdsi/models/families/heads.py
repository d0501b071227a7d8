"""Head width from a Hugging Face config."""

from typing import Any

from jdsi.errors import ConfigError


def even_head_dim(config: Any) -> int:
    """`hidden_size / num_attention_heads`, for families whose heads exactly tile the model's width."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ConfigError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads

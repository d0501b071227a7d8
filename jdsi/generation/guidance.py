"""Classifier-free guidance of language models (arXiv:2306.17806)."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from . import vocabulary

ROWS = 2
"""Of the model for each row that is guided: one behind the prompt, beside it one behind the negative prompt."""


def guided(logits: Float32[Array, "R V"], scale: Float32[Array, " B"]) -> Float32[Array, "B V"]:
    """Log-probabilities behind the prompt, `scale` times as far from those behind the negative prompt; 1 is neutral."""
    log_probs = logits - vocabulary.logsumexp(logits)[:, None]
    own, other = log_probs[0::ROWS], log_probs[1::ROWS]
    away = jnp.where(own == -jnp.inf, own, scale[:, None] * (own - other) + other)
    return jnp.where((scale == 1)[:, None], logits[0::ROWS], away)

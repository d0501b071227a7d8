"""Processors that make tokens less probable or more. See `processors`, also for what all of them have in common."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

Logits = Float32[Array, "B V"]


def penalise_repetition(logits: Logits, seen: Bool[Array, "B V"], penalty: Float32[Array, " B"]) -> Logits:
    """Divides positive and multiplies negative logits of `seen` tokens by `penalty`; 1 is neutral."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalise_counts(
    logits: Logits,
    counts: Int32[Array, "B V"],
    presence: Float32[Array, " B"],
    frequency: Float32[Array, " B"],
) -> Logits:
    """Subtracts `presence` from every token with a count and `frequency` times its count; 0 and 0 are neutral."""
    return logits - (presence[:, None] * (counts > 0) + frequency[:, None] * counts)

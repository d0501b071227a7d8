"""Processors that make tokens less probable or more. See `processors`, also for what all of them have in common."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from .phrases import Phrases

Logits = Float32[Array, "B V"]
First = Int32[Array, ""] | int


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


def add_biases(logits: Logits, phrases: Phrases, due: Bool[Array, "B N"], first: First = 0) -> Logits:
    """Adds the values of the phrases that are `due` to the logits of their last tokens.

    Column 0 of the logits is token `first`. No two phrases of one rank end alike where they are due, so that the order
    of the sum is given.
    """
    rows, columns = jnp.arange(logits.shape[0])[:, None], logits.shape[1]

    def add(rank: jax.Array | int, bias: Logits) -> Logits:
        here = due & (phrases.rank == rank) & (phrases.last >= first)
        return bias.at[rows, jnp.where(here, phrases.last - first, columns)].add(phrases.value, mode="drop")

    bias = add(0, jnp.zeros_like(logits))
    if phrases.before.shape[2]:
        bias = lax.fori_loop(1, jnp.max(phrases.rank) + 1, add, bias)
    return jnp.where(bias == 0, logits, logits + bias)


def penalise_length(
    logits: Logits, stop_tokens: Int32[Array, "B N"], factor: Float32[Array, " B"], first: First = 0
) -> Logits:
    """Raises the logits of `stop_tokens` (-1: none) by `factor` times their distance from 0, which is neutral at 0."""
    rows, columns = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
    own = (stop_tokens >= first) & (stop_tokens - first < columns)
    column = jnp.where(own, stop_tokens - first, columns)
    old = jnp.take_along_axis(logits, jnp.minimum(column, columns - 1), axis=1)
    new = jnp.where(jnp.isfinite(old) & (factor != 0)[:, None], old + jnp.abs(old) * factor[:, None], old)
    return logits.at[rows, column].set(new, mode="drop")

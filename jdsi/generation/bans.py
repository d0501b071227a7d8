"""Processors that rule tokens out. See `processors`, also for what all of them have in common."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

Logits = Float32[Array, "B V"]
First = Int32[Array, ""] | int


def ban_ngrams(
    logits: Logits, history: Int32[Array, "B L"], length: Int32[Array, " B"], n: Int32[Array, " B"], first: First = 0
) -> Logits:
    """Bans each token that would complete an `n`-gram already in the first `length` tokens of `history`; 0 is neutral.

    A position of the history is banned if the `n - 1` tokens before it equal the last `n - 1` tokens. Column 0 of the
    logits is token `first`.
    """
    rows, size = history.shape
    position = jnp.arange(size)[None]
    match = (n[:, None] > 0) & (position >= n[:, None] - 1) & (position < length[:, None])

    def compare(back, match):
        shifted = jnp.roll(history, back, axis=1)
        last = jnp.take_along_axis(history, jnp.maximum(length - back, 0)[:, None], axis=1)
        return match & ((back >= n[:, None]) | (shifted == last))

    # A row whose history is shorter than one n-gram matches nowhere and must not make the loop longer.
    match = lax.fori_loop(1, jnp.max(jnp.where(n <= length, n, 0)), compare, match)
    banned = jnp.where(match & (history >= first), history - first, logits.shape[1])
    return logits.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")


def ban_tokens(logits: Logits, token_ids: Int32[Array, "B N"], where: Bool[Array, " B"], first: First = 0) -> Logits:
    """Bans `token_ids` (-1: none) in the rows that `where` marks. Column 0 of the logits is token `first`."""
    banned = jnp.where(where[:, None] & (token_ids >= first), token_ids - first, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], banned].set(-jnp.inf, mode="drop")

"""Processors that rule tokens out. See `processors`, also for what all of them have in common."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from . import vocabulary

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


def ban_tokens(logits: Logits, token_ids: Int32[Array, "B N"], where: Bool[Array, "B N"], first: First = 0) -> Logits:
    """Bans those of `token_ids` (-1: none) that `where` marks. Column 0 of the logits is token `first`."""
    banned = jnp.where(where & (token_ids >= first), token_ids - first, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], banned].set(-jnp.inf, mode="drop")


def force_tokens(logits: Logits, token_ids: Int32[Array, "B N"], where: Bool[Array, " B"], first: First = 0) -> Logits:
    """Leaves nothing but `token_ids` (-1: none), equally probable, in the rows that `where` marks and that have any."""
    rows = jnp.arange(logits.shape[0])[:, None]
    column = jnp.where(token_ids >= first, token_ids - first, logits.shape[1])
    only = jnp.full_like(logits, -jnp.inf).at[rows, column].set(0.0, mode="drop")
    return jnp.where((where & jnp.any(token_ids >= 0, axis=1))[:, None], only, logits)


def allow_only(logits: Logits, allowed: Bool[Array, "B V"], where: Bool[Array, " B"], together: int = 1) -> Logits:
    """Bans all but `allowed` tokens in the rows that `where` marks.

    Where that leaves nothing in any of `together` neighbouring rows, since all were banned already, those are equally
    probable that are allowed: this goes before other bans, as in `transformers`.
    """
    kept = jnp.where(allowed, logits, -jnp.inf)
    empty = vocabulary.largest(kept) == -jnp.inf
    empty = jnp.repeat(jnp.all(empty.reshape(-1, together), axis=1), together)
    kept = jnp.where(empty[:, None], jnp.where(allowed, 0.0, -jnp.inf), kept)
    return jnp.where(where[:, None], kept, logits)

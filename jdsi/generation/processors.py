"""Changes to a batch of logits, each with one setting per row: `[B, V]` float32 in, `[B, V]` float32 out.

The order in which `transformers` applies them, and we too, is the order of this file. A row whose setting is neutral
leaves every function bit for bit as it came, so a program that holds a processor and one that does not agree on it.

Truncation finds its threshold by bisecting the ordered bit patterns of float32, in 32 passes of compare and sum.
Against a sort of the vocabulary that is 10 to 20 times faster on a CPU, and the passes are reductions, which turn into
small all-reduces where the vocabulary is split over devices. Tokens tied at the threshold are all kept: which of them
stay never depends on their ids.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
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


def ban_ngrams(
    logits: Logits, history: Int32[Array, "B L"], length: Int32[Array, " B"], n: Int32[Array, " B"]
) -> Logits:
    """Bans each token that would complete an `n`-gram already in the first `length` tokens of `history`; 0 is neutral.

    A position of the history is banned if the `n - 1` tokens before it equal the last `n - 1` tokens.
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
    banned = jnp.where(match, history, logits.shape[1])
    return logits.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")


def ban_tokens(logits: Logits, token_ids: Int32[Array, "B N"], where: Bool[Array, " B"]) -> Logits:
    """Bans `token_ids` (-1: none) in the rows that `where` marks."""
    banned = jnp.where(where[:, None] & (token_ids >= 0), token_ids, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], banned].set(-jnp.inf, mode="drop")


def scale_temperature(logits: Logits, temperature: Float32[Array, " B"]) -> Logits:
    """Distance from the row's largest logit over `temperature`; 0 is neutral.

    Taking the distance first keeps the largest at 0 for any temperature, where plain division would overflow.
    """
    greedy = (temperature == 0)[:, None]
    distance = logits - jnp.max(logits, axis=1, keepdims=True)
    return jnp.where(greedy, logits, distance / jnp.where(greedy, 1.0, temperature[:, None]))


def keep_top_k(logits: Logits, k: Int32[Array, " B"]) -> Logits:
    """Keeps the tokens that fewer than `k` exceed; 0 is neutral."""

    def fewer_than_k(above: Bool[Array, "B V"]) -> Bool[Array, " B"]:
        return jnp.sum(above.astype(jnp.int32), axis=1) < k

    return jnp.where((k == 0)[:, None] | _at_least(logits, fewer_than_k), logits, -jnp.inf)


def keep_top_p(logits: Logits, p: Float32[Array, " B"]) -> Logits:
    """Keeps the tokens that are exceeded by less than `p` of the probability (arXiv:1904.09751); 1 is neutral."""
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    limit = p * jnp.sum(weights, axis=1)

    def less_than_p(above: Bool[Array, "B V"]) -> Bool[Array, " B"]:
        return jnp.sum(jnp.where(above, weights, 0.0), axis=1) < limit

    return jnp.where((p >= 1)[:, None] | _at_least(logits, less_than_p), logits, -jnp.inf)


def keep_min_p(logits: Logits, p: Float32[Array, " B"]) -> Logits:
    """Keeps the tokens at least `p` times as probable as the most probable (arXiv:2407.01082); 0 is neutral."""
    relative = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return jnp.where(relative < p[:, None], -jnp.inf, logits)


def _at_least(logits: Logits, holds: Callable[[Bool[Array, "B V"]], Bool[Array, " B"]]) -> Bool[Array, "B V"]:
    """Marks the logits from the smallest value `t` on for which `holds(logits > t)`.

    `holds` is true of the empty set and, once false, stays false as the set grows.
    """
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        held = holds(ordered > middle[:, None])
        return jnp.where(held, low, middle + 1), jnp.where(held, middle, high)

    high = jnp.max(ordered, axis=1)
    _, threshold = lax.fori_loop(0, 32, halve, (jnp.full_like(high, -(2**31)), high))
    return ordered >= threshold[:, None]

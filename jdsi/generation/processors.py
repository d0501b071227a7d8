"""Changes to a batch of logits, each with one setting per row: `[B, V]` float32 in, `[B, V]` float32 out.

The order in which `transformers` applies them, and we too, is the order of this file. A row whose setting is neutral
leaves every function bit for bit as it came, so a program that holds a processor and one that does not agree on it.

Truncation finds its threshold by bisecting the ordered bit patterns of float32, in 32 passes of compare and sum.
Against a sort of the vocabulary that is 10 to 20 times faster on a CPU. Tokens tied at the threshold are all kept:
which of them stay never depends on their ids.

Where the mesh axis "tensor" is bound, the logits are a rank's share of the vocabulary, see `vocabulary`, and only a few
numbers per row are exchanged: truncation takes 8 all-reduces. Sums of probabilities are then added up in another order,
so top-p may decide otherwise about tokens within rounding of its limit. All else is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Num

from jdsi.generation import vocabulary
from jdsi.sharding import TENSOR, all_reduce, is_split

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


def scale_temperature(logits: Logits, temperature: Float32[Array, " B"]) -> Logits:
    """Distance from the row's largest logit over `temperature`; 0 is neutral.

    Taking the distance first keeps the largest at 0 for any temperature, where plain division would overflow.
    """
    greedy = (temperature == 0)[:, None]
    distance = logits - vocabulary.largest(logits)[:, None]
    return jnp.where(greedy, logits, distance / jnp.where(greedy, 1.0, temperature[:, None]))


def keep_top_k(logits: Logits, k: Int32[Array, " B"]) -> Logits:
    """Keeps the tokens that fewer than `k` exceed; 0 is neutral."""

    def count(above: Bool[Array, "*N B V"]) -> Int32[Array, "*N B"]:
        return jnp.sum(above.astype(jnp.int32), axis=-1)

    return jnp.where((k == 0)[:, None] | _at_least(logits, count, k), logits, -jnp.inf)


def keep_top_p(logits: Logits, p: Float32[Array, " B"]) -> Logits:
    """Keeps the tokens that are exceeded by less than `p` of the probability (arXiv:1904.09751); 1 is neutral."""
    weights = jnp.exp(logits - vocabulary.largest(logits)[:, None])
    limit = p * vocabulary.total(weights)

    def weight(above: Bool[Array, "*N B V"]) -> Float32[Array, "*N B"]:
        return jnp.sum(jnp.where(above, weights, 0.0), axis=-1)

    return jnp.where((p >= 1)[:, None] | _at_least(logits, weight, limit), logits, -jnp.inf)


def keep_min_p(logits: Logits, p: Float32[Array, " B"]) -> Logits:
    """Keeps the tokens at least `p` times as probable as the most probable (arXiv:2407.01082); 0 is neutral."""
    relative = jnp.exp(logits - vocabulary.largest(logits)[:, None])
    return jnp.where(relative < p[:, None], -jnp.inf, logits)


Measure = Callable[[Bool[Array, "*N B V"]], Num[Array, "*N B"]]


def _at_least(logits: Logits, measure: Measure, limit: Num[Array, " B"]) -> Bool[Array, "B V"]:
    """Marks the logits from the smallest value `t` on for which `measure(logits > t)` is less than `limit`.

    `measure` sums over this rank's columns, is 0 of the empty set and does not fall as the set grows.
    """
    ordered = vocabulary.ordered_bits(jnp.where(logits == 0, 0.0, logits))
    search = _search_shares if is_split(TENSOR) else _bisect
    return ordered >= search(ordered, measure, limit)[:, None]


def _bisect(ordered: Int32[Array, "B V"], measure: Measure, limit: Num[Array, " B"]) -> Int32[Array, " B"]:
    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        held = measure(ordered > middle[:, None]) < limit
        return jnp.where(held, low, middle + 1), jnp.where(held, middle, high)

    high = jnp.max(ordered, axis=1)
    _, threshold = lax.fori_loop(0, 32, halve, (jnp.full_like(high, -(2**31)), high))
    return threshold


def _search_shares(ordered: Int32[Array, "B V"], measure: Measure, limit: Num[Array, " B"]) -> Int32[Array, " B"]:
    """The same threshold, 4 bits at a time: an all-reduce takes as long for 15 numbers as for one."""

    steps = jnp.arange(1, 16, dtype=jnp.int32)[:, None]

    def digit(i: jax.Array, low: jax.Array) -> jax.Array:
        shift = 28 - 4 * i
        below = low + (steps << shift) - 1  # [15, B]; wraps around, for `low` starts at the least integer
        measured = all_reduce(measure(ordered > below[:, :, None]), TENSOR)
        # With a limit that underflowed to 0 too, the largest logit stays.
        fails = (measured > 0) & (measured >= limit)
        return low + (jnp.sum(fails.astype(jnp.int32), axis=0) << shift)

    return lax.fori_loop(0, 8, digit, jnp.full(ordered.shape[0], -(2**31), jnp.int32))

"""Processors for sampling: temperature, and which of the less probable tokens are kept. See `processors`.

Truncation finds its threshold by bisecting the ordered bit patterns of float32, in 32 passes of compare and sum.
Against a sort of the vocabulary that is 10 to 20 times faster on a CPU. Tokens tied at the threshold are all kept:
which of them stay never depends on their ids.

Where the vocabulary is divided, truncation takes 8 all-reduces. Sums of probabilities are then added up in another
order, so top-p may decide otherwise about tokens within rounding of its limit. All else is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Num

from jdsi.generation import vocabulary
from jdsi.sharding import TENSOR, all_reduce

Logits = Float32[Array, "B V"]
Least = Int32[Array, " B"] | None
"""How many tokens are kept in any case; `None` is one."""


def scale_temperature(logits: Logits, temperature: Float32[Array, " B"]) -> Logits:
    """Distance from the row's largest logit over `temperature`; 0 is neutral.

    Taking the distance first keeps the largest at 0 for any temperature, where plain division would overflow.
    """
    greedy = (temperature == 0)[:, None]
    distance = logits - vocabulary.largest(logits)[:, None]
    return jnp.where(greedy, logits, distance / jnp.where(greedy, 1.0, temperature[:, None]))


def keep_top_k(logits: Logits, k: Int32[Array, " B"], least: Least = None) -> Logits:
    """Keeps the tokens that fewer than `k` exceed; 0 is neutral."""
    wanted = k if least is None else jnp.maximum(k, least)
    return jnp.where((k == 0)[:, None] | _at_least(logits, _count, wanted), logits, -jnp.inf)


def keep_top_p(logits: Logits, p: Float32[Array, " B"], least: Least = None) -> Logits:
    """Keeps the tokens that are exceeded by less than `p` of the probability (arXiv:1904.09751); 1 is neutral."""
    weights = jnp.exp(logits - vocabulary.largest(logits)[:, None])
    kept = (p >= 1)[:, None] | _at_least(logits, _sum_of(weights), p * vocabulary.total(weights))
    return _cut(logits, kept, logits, least)


def keep_min_p(logits: Logits, p: Float32[Array, " B"], least: Least = None) -> Logits:
    """Keeps the tokens at least `p` times as probable as the most probable (arXiv:2407.01082); 0 is neutral."""
    relative = jnp.exp(logits - vocabulary.largest(logits)[:, None])
    return _cut(logits, ~(relative < p[:, None]), logits, least)


def keep_typical(logits: Logits, p: Float32[Array, " B"], least: Least = None) -> Logits:
    """Keeps the tokens than which less than `p` of the probability is more typical (arXiv:2202.00666); 1 is neutral.

    Typical is what is about as surprising as the distribution is on average.
    """
    log_probs = logits - vocabulary.logsumexp(logits)[:, None]
    probs = jnp.exp(log_probs)
    typical = -jnp.abs(log_probs + _entropy(log_probs, probs)[:, None])
    kept = (p >= 1)[:, None] | _at_least(typical, _sum_of(probs), p)
    return _cut(logits, kept, typical, least)


def keep_above_epsilon(logits: Logits, epsilon: Float32[Array, " B"], least: Least = None) -> Logits:
    """Keeps the tokens at least as probable as `epsilon` (arXiv:2210.15191, section 3.2); 0 is neutral."""
    probs = jnp.exp(logits - vocabulary.logsumexp(logits)[:, None])
    return _cut(logits, _kept_or_largest(logits, ~(probs < epsilon[:, None])), logits, least)


def keep_above_eta(logits: Logits, epsilon: Float32[Array, " B"], least: Least = None) -> Logits:
    """Keeps the tokens at least as probable as `epsilon`, or less where many are (same, equation 2); 0 is neutral."""
    log_probs = logits - vocabulary.logsumexp(logits)[:, None]
    probs = jnp.exp(log_probs)
    eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(log_probs, probs)))
    return _cut(logits, _kept_or_largest(logits, ~(probs < eta[:, None])), logits, least)


def _cut(logits: Logits, kept: Bool[Array, "B V"], order: Logits, least: Least) -> Logits:
    """Without what is not `kept`, but for the `least` tokens that are first by `order`."""
    if least is not None:
        kept |= _at_least(order, _count, least)
    return jnp.where(kept, logits, -jnp.inf)


def _kept_or_largest(logits: Logits, kept: Bool[Array, "B V"]) -> Bool[Array, "B V"]:
    return kept | (logits == vocabulary.largest(logits)[:, None])


def _entropy(log_probs: Logits, probs: Logits) -> Float32[Array, " B"]:
    return -vocabulary.total(jnp.where(probs > 0, probs * log_probs, 0.0))


def _count(above: Bool[Array, "*N B V"]) -> Int32[Array, "*N B"]:
    return jnp.sum(above.astype(jnp.int32), axis=-1)


def _sum_of(weights: Logits) -> "Measure":
    def weight(above: Bool[Array, "*N B V"]) -> Float32[Array, "*N B"]:
        return jnp.sum(jnp.where(above, weights, 0.0), axis=-1)

    return weight


Measure = Callable[[Bool[Array, "*N B V"]], Num[Array, "*N B"]]


def _at_least(logits: Logits, measure: Measure, limit: Num[Array, " B"]) -> Bool[Array, "B V"]:
    """Marks the logits from the smallest value `t` on for which `measure(logits > t)` is less than `limit`.

    `measure` sums over this rank's columns, is 0 of the empty set and does not fall as the set grows.
    """
    ordered = vocabulary.ordered_bits(jnp.where(logits == 0, 0.0, logits))
    search = _search_shares if vocabulary.is_divided() else _bisect
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

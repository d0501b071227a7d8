"""Which blocks of keys a block of queries has to visit, and which of them need no mask."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..attention.form import AttentionForm

_NONE = jnp.iinfo(jnp.int32).max


class Span(NamedTuple):
    """Blocks `first <= j < last` of keys hold all that is visible; of those, `clean_from <= j < clean_to` wholly."""

    first: Int[Array, "..."]
    clean_from: Int[Array, "..."]
    clean_to: Int[Array, "..."]
    last: Int[Array, "..."]

    def within(self, other: "Span") -> "Span":
        """Both constraints at once; the result's `last` is at least its `first`."""
        first = lax.max(self.first, other.first)
        return Span(
            first,
            lax.max(self.clean_from, other.clean_from),
            lax.min(self.clean_to, other.clean_to),
            lax.max(first, lax.min(self.last, other.last)),
        )


def geometric_span(
    form: AttentionForm, low: Int[Array, ""], high: Int[Array, ""], limit: Int[Array, ""], key_block: int
) -> Span:
    """What causality, the window and the number of keys leave to queries `low <= i < high`.

    Args:
        form: the masks.
        low, high: indices of the queries on the axis of the keys.
        limit: number of keys.
        key_block: keys of a block.
    """
    zero = jnp.int32(0)
    end, clean_end = limit, limit
    if form.causal:
        end, clean_end = lax.min(end, high), lax.min(clean_end, low + 1)
    begin = clean_begin = zero
    if form.window is not None:
        begin, clean_begin = lax.max(zero, low - (form.window - 1)), lax.max(zero, high - form.window)
        if not form.causal:
            end = lax.min(end, high - 1 + form.window)
            clean_end = lax.min(clean_end, low + form.window)
    first = lax.div(begin, jnp.int32(key_block))
    last = lax.max(first, lax.div(end + (key_block - 1), jnp.int32(key_block)))
    clean_from = lax.div(clean_begin + (key_block - 1), jnp.int32(key_block))
    return Span(first, clean_from, lax.div(clean_end, jnp.int32(key_block)), last)


def segment_spans(
    q_segments: Int[Array, "B S"], k_segments: Int[Array, "B L"], query_block: int, key_block: int
) -> Int[Array, "B blocks 4"]:
    """A `Span` for each block of queries from the smallest and largest segment in each block.

    It may visit too many blocks where segments are not in ascending order, never too few.
    """

    def blocks(segments: Array, size: int) -> tuple[Array, Array, Array]:
        padded = jnp.pad(segments, [(0, 0), (0, -segments.shape[1] % size)], constant_values=-1)
        padded = padded.reshape(segments.shape[0], -1, size)
        lowest = jnp.min(jnp.where(padded < 0, _NONE, padded), axis=-1)
        highest = jnp.max(padded, axis=-1)
        return lowest, highest, jnp.min(padded, axis=-1) == highest

    q_low, q_high, q_one = (x[:, :, None] for x in blocks(q_segments, query_block))
    k_low, k_high, k_one = (x[:, None, :] for x in blocks(k_segments, key_block))
    seen = (q_low <= k_high) & (k_low <= q_high)
    clean = seen & q_one & k_one & (q_low == k_low)
    first, last = _run(seen)
    clean_from, clean_to = _run(clean)
    gapless = jnp.sum(clean, axis=-1) == clean_to - clean_from
    return jnp.stack([first, clean_from, jnp.where(gapless, clean_to, 0), last], axis=-1).astype(jnp.int32)


def _run(blocks: Array) -> tuple[Array, Array]:
    """The first and one past the last `True`; two equal numbers if there is none."""
    count = blocks.shape[-1]
    some = jnp.any(blocks, axis=-1)
    return jnp.argmax(blocks, axis=-1), jnp.where(some, count - jnp.argmax(blocks[..., ::-1], axis=-1), 0)

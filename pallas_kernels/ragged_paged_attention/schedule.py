"""Which part of the attention each multiprocessor computes, decided on the device from the lengths of the batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..attention.form import AttentionForm
from .blocks import QueryBlocks, count_up_to, most_blocks, query_blocks, running_sum

# Columns of `Schedule.items`.
SEQUENCE, TOKEN, TOKENS, POSITION, BEGIN, END, SLOT, SPLITS = range(8)
# Of up to so many tokens keys are split as far as it is of use, of more into accordingly fewer parts: the results of
# parts are in float32, and those of many tokens would soon outweigh the keys.
_FEW = 8


class Schedule(NamedTuple):
    """Work items: a query block against a range of keys, each to be done for every group of heads ("unit").

    Arrays depend on the lengths alone, so that XLA computes them once for all layers of a step.

    Attributes:
        items: sequence, first token, tokens, position of the first token, first key (a multiple of the tile), end of
            the keys, where the first token's result goes if the keys are split, into how many parts. The parts of a
            token lie one behind another, before those of the next token.
        shares: multiprocessor `c` does items `shares[c] <= i < shares[c + 1]`, counted as `item * units + unit`.
        first_item: of each token's block.
        splits: how many items each token's keys are split among, one after another.
    """

    items: Int[Array, "items 8"]
    shares: Int[Array, " cores+1"]
    first_item: Int[Array, " T"]
    splits: Int[Array, " T"]


def most_splits(keys: int, chunk: int, splits: int) -> int:
    """How many parts the keys of one block can be split into, in tables of `keys` keys."""
    return max(1, min(splits, -(-keys // chunk)))


def most_slots(tokens: int, sequences: int, splits: int) -> int:
    """How many parts of tokens there can be; `splits` as `most_splits` says."""
    return splits * min(tokens, _FEW * sequences)


def make_schedule(
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    tokens: int,
    keys: int,
    block: int,
    tile: int,
    chunk: int,
    splits: int,
    units: int,
    cores: int,
) -> Schedule:
    """Splits the keys of long sequences and gives each multiprocessor a run of items of nearly equal cost.

    How a sequence is split depends on its own two lengths, never on the batch: keys `[i * c, (i + 1) * c)` are one
    split, with `c` the chunk, or more for so long a sequence that it would have more than `splits` of them. Sequences
    of several blocks, which fill the multiprocessors by themselves, get accordingly fewer splits, and so do those of
    more than `_FEW` tokens.

    Args:
        tokens: of the packed batch, padding included.
        keys: that a block table has room for.
        block: tokens of a query block.
        tile, chunk: keys read at a time, a multiple of it.
        units: groups of heads.
    """
    blocks = query_blocks(q_offsets, k_lengths, tokens, block)
    lengths = jnp.append(jnp.minimum(k_lengths, keys), 0).astype(jnp.int32)
    new = jnp.append(q_offsets[1:], tokens).astype(jnp.int32) - q_offsets.astype(jnp.int32)
    limit = jnp.minimum(splits // jnp.maximum(blocks.per_sequence, 1), splits * _FEW // jnp.maximum(new, 1))
    limit = jnp.maximum(1, limit)
    chunks = jnp.maximum(chunk, -(-lengths // (limit * tile)) * tile)[blocks.sequence]
    begin, end = _visible(blocks, lengths[blocks.sequence], form)
    first = begin // chunks
    parts = jnp.where(blocks.tokens > 0, jnp.maximum(1, -(-end // chunks) - first), 0)

    slots = jnp.where(parts > 1, parts * blocks.tokens, 0)
    first_slot = running_sum(slots) - slots

    ends = running_sum(parts)
    most = most_splits(keys, chunk, splits)
    index = jnp.arange(most_blocks(tokens, len(k_lengths), block) + len(k_lengths) * (most - 1), dtype=jnp.int32)
    at = jnp.minimum(count_up_to(ends, index), len(ends) - 1)
    split = index - (ends - parts)[at]
    start = jnp.maximum(begin[at], (first[at] + split) * chunks[at]) // tile * tile
    stop = jnp.minimum(end[at], (first[at] + split + 1) * chunks[at])
    items = (
        blocks.sequence[at],
        blocks.token[at],
        blocks.tokens[at],
        blocks.position[at],
        start,
        stop,
        first_slot[at] + split,
        parts[at],
    )

    # An item costs its tiles and about one more for its queries and results.
    cost = jnp.where(index < ends[-1], -(-jnp.maximum(stop - start, 0) // tile) + 1, 0)
    until = running_sum(cost)
    share, rest = until[-1] * units // cores, until[-1] * units % cores
    core = jnp.arange(cores + 1, dtype=jnp.int32)
    bound = core * share + core * rest // cores
    item = count_up_to(until * units, bound)
    inside = jnp.minimum(item, len(index) - 1)
    unit = -(-(bound - (until - cost)[inside] * units) // jnp.maximum(cost[inside], 1))
    shares = jnp.where(core == cores, ends[-1] * units, jnp.minimum(item, ends[-1]) * units + unit)
    return Schedule(
        jnp.stack(items, axis=1).astype(jnp.int32),
        shares.astype(jnp.int32),
        (ends - parts)[blocks.of_token],
        parts[blocks.of_token],
    )


def _visible(
    blocks: QueryBlocks, lengths: Int[Array, " blocks"], form: AttentionForm
) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
    """The keys from the first to the last that any query of each block can see, by the form's masks."""
    last = blocks.position + blocks.tokens - 1
    begin, end = jnp.zeros_like(last), lengths
    if form.causal:
        end = jnp.minimum(end, last + 1)
    if form.window is not None:
        begin = jnp.maximum(begin, blocks.position - form.window + 1)
        end = jnp.minimum(end, last + form.window)
    return begin, jnp.maximum(begin, end)

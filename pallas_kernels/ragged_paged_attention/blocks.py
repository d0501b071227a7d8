"""The query blocks of a ragged batch: runs of consecutive tokens of one sequence."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class QueryBlocks(NamedTuple):
    """The blocks a packed batch falls into, in the order of its tokens; those past the last one are empty.

    Attributes:
        sequence: whose tokens; `B` is the padding behind the last sequence, which counts as one without keys.
        token: index of the first token.
        tokens: how many.
        position: index among the sequence's keys at which the first token stands.
        of_token: the block each token is in.
        per_sequence: how many blocks each sequence has.
    """

    sequence: Int[Array, " blocks"]
    token: Int[Array, " blocks"]
    tokens: Int[Array, " blocks"]
    position: Int[Array, " blocks"]
    of_token: Int[Array, " T"]
    per_sequence: Int[Array, " sequences"]


def query_blocks(q_offsets: Int[Array, " B+1"], k_lengths: Int[Array, " B"], tokens: int, size: int) -> QueryBlocks:
    """The blocks of at most `size` tokens, counted from each sequence's first token, of a batch of `tokens` tokens."""
    starts = q_offsets.astype(jnp.int32)
    lengths = jnp.append(q_offsets[1:], tokens).astype(jnp.int32) - starts
    per_sequence = -(-lengths // size)
    ends = running_sum(per_sequence)
    index = jnp.arange(most_blocks(tokens, len(k_lengths), size), dtype=jnp.int32)
    sequence = jnp.minimum(count_up_to(ends, index), len(k_lengths))
    first = (index - (ends - per_sequence)[sequence]) * size
    count = jnp.where(index < ends[-1], jnp.clip(lengths[sequence] - first, 0, size), 0)
    before = jnp.append(k_lengths, 0).astype(jnp.int32) - lengths
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = jnp.minimum(count_up_to(starts[1:], token), len(k_lengths))
    of_token = (ends - per_sequence)[owner] + (token - starts[owner]) // size
    return QueryBlocks(sequence, starts[sequence] + first, count, before[sequence] + first, of_token, per_sequence)


def most_blocks(tokens: int, sequences: int, size: int) -> int:
    """How many blocks there can be: each sequence, and the padding, may have one that is not full."""
    return min(tokens, tokens // size + sequences + 1)


# One kernel each on a GPU, where a scan and a binary search are several; the arrays are so short that the squares of
# their lengths do not matter.


def running_sum(x: Int[Array, " n"]) -> Int[Array, " n"]:
    """What `jnp.cumsum` gives."""
    index = jnp.arange(len(x))
    return jnp.sum(jnp.where(index <= index[:, None], x, 0), axis=1)


def count_up_to(x: Int[Array, " n"], bounds: Int[Array, " m"]) -> Int[Array, " m"]:
    """How many elements of `x` are at most each bound."""
    return jnp.sum((x <= bounds[:, None]).astype(jnp.int32), axis=1)

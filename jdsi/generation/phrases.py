"""Sequences of tokens that something happens to when a row is about to complete them, and tables of sets of tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from .padding import NO_TOKEN, pad_rows, power_of_two

_NOWHERE = -2  # what stands before the first token of a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Phrases:
    """`N` phrases of each row.

    Attributes:
        before: all but their last tokens, at the right end, behind `NO_TOKEN`.
        last: their last tokens; `NO_TOKEN` where a row has fewer phrases.
        value: of each.
        rank: which phrases of a row are as long as each other: single tokens are 0, other lengths count as they come.
    """

    before: Int32[Array, "B N P"]
    last: Int32[Array, "B N"]
    value: Float32[Array, "B N"]
    rank: Int32[Array, "B N"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[Sequence[int], float]]]) -> Self:
        """Those of tokens and values. Numbers and lengths are padded to powers of two, to compile rarely."""
        count = power_of_two(max(1, *map(len, rows)))
        width = power_of_two(max((len(tokens) - 1 for row in rows for tokens, _ in row), default=0))
        before = np.full((len(rows), count, width), NO_TOKEN, np.int32)
        rank = np.zeros((len(rows), count), np.int32)
        value = np.zeros((len(rows), count), np.float32)
        for i, row in enumerate(rows):
            lengths = {1: 0}
            for j, (tokens, own) in enumerate(row):
                before[i, j, width - len(tokens) + 1 :] = tokens[:-1]
                rank[i, j] = lengths.setdefault(len(tokens), len(lengths))
                value[i, j] = own
        last = pad_rows([[tokens[-1] for tokens, _ in row] for row in rows], count, NO_TOKEN)
        return cls(*map(jnp.asarray, (before, last, value, rank)))

    def due(self, tokens: Int32[Array, "B L"] | None, length: Int32[Array, " B"] | None) -> Bool[Array, "B N"]:
        """Which of them lack no more than their last token behind the first `length` of `tokens`."""
        exists = self.last != NO_TOKEN
        width = self.before.shape[2]
        if not width:
            return exists
        if tokens is None or length is None:
            raise ValueError("phrases of several tokens need the tokens that are written so far")
        place = length[:, None] - width + jnp.arange(width)
        end = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
        end = jnp.where(place < 0, _NOWHERE, end)[:, None]
        return exists & jnp.all((self.before == NO_TOKEN) | (self.before == end), axis=2)


def token_rows(rows: Sequence[Sequence[int]]) -> Int32[Array, "B N"]:
    """Tokens of each row, then `NO_TOKEN`; N is a power of two, to compile rarely."""
    return jnp.asarray(pad_rows(rows, power_of_two(max(1, *map(len, rows))), NO_TOKEN))

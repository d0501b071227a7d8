"""How the entries of a dimension are dealt out, whatever the number of ranks: what a parameter's declaration says."""

import dataclasses
from typing import Protocol

from .split import Split, joined, split_evenly, split_heads


class Division(Protocol):
    """How a dimension is divided among any number of ranks; hashable."""

    def among(self, ranks: int, dim: int) -> Split:
        """The dimension divided among so many; `dim` says which one of its array it is."""
        ...


@dataclasses.dataclass(frozen=True)
class Evenly:
    """Consecutive equal shares, see `split_evenly`.

    Attributes:
        size: of the dimension, or of each of its stretches.
        stretches: equal ones that lie one behind another, each divided for itself.
        multiple: where shares come out uneven, they are padded to one of these: kernels load 16 values at a time.
    """

    size: int
    stretches: int = 1
    multiple: int = 16

    def among(self, ranks: int, dim: int) -> Split:
        """See `Division.among`."""
        one = split_evenly(self.size, ranks, dim=dim, multiple=self.multiple)
        if self.stretches == 1:
            return one
        bounds = [(runs[0].start, runs[0].stop) if runs else (0, 0) for runs in one.runs]
        return joined(dim, [(i * self.size, one.size, bounds) for i in range(self.stretches)])


@dataclasses.dataclass(frozen=True)
class ByHeads:
    """Entries of attention heads, so that every query head lies with the KV head it reads, see `split_heads`.

    Attributes:
        num_heads, num_kv_heads, head_dim: of the whole.
        fused: behind the entries of the query heads come those of the keys' heads, and of the values'.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    fused: bool = False

    def among(self, ranks: int, dim: int) -> Split:
        """See `Division.among`."""
        heads = split_heads(self.num_heads, self.num_kv_heads, ranks)
        q, k = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        pieces = [(0, heads.num_heads, heads.heads)]
        if self.fused:
            pieces += [(q, heads.num_kv_heads, heads.kv_heads), (q + k, heads.num_kv_heads, heads.kv_heads)]
        return joined(dim, [(first, count * self.head_dim, self._entries(own)) for first, count, own in pieces])

    def _entries(self, heads: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
        return [(start * self.head_dim, stop * self.head_dim) for start, stop in heads]

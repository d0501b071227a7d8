"""How a dimension is divided among the ranks of an axis when it does not come out even, or has parts of its own.

JAX gives every device of an axis an equal share. A dimension is therefore first laid out anew, rank by rank: each
rank's share is made of runs of the plain dimension, and where it has fewer than others, of padding, which holds zeros.
"""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Run:
    """Entries `start` to `stop` of the plain dimension lie at `target` of a rank's share."""

    start: int
    stop: int
    target: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Split:
    """One dimension of an array divided among ranks.

    Attributes:
        dim: which dimension.
        size: of every rank's share.
        runs: per rank, what its share holds; places that no run fills are padding.
    """

    dim: int
    size: int
    runs: tuple[tuple[Run, ...], ...]

    @property
    def ranks(self) -> int:
        """How many ranks."""
        return len(self.runs)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a rank's share of an array of `shape`."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def global_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of all shares of an array of `shape`, joined."""
        return (*shape[: self.dim], self.ranks * self.size, *shape[self.dim + 1 :])


def split_evenly(size: int, ranks: int, *, dim: int = 0, multiple: int = 1) -> Split:
    """Consecutive shares, all full but the last ones: rank r's starts at r times the size of a share.

    Args:
        size: of the dimension.
        ranks: among how many.
        dim: which dimension it is.
        multiple: where the shares come out uneven, they are padded to one of these, for kernels like round sizes.
    """
    share = -(-size // ranks)
    local = share if size % ranks == 0 else -(-share // multiple) * multiple
    bounds = [(min(rank * local, size), min((rank + 1) * local, size)) for rank in range(ranks)]
    return Split(dim, local, tuple((Run(a, b, 0),) if b > a else () for a, b in bounds))


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """Attention heads divided among ranks, so that every query head lies with the KV head it reads.

    Attributes:
        num_heads, num_kv_heads: of every rank, the padding included.
        heads, kv_heads: per rank the first head that it has and the one after the last.
    """

    num_heads: int
    num_kv_heads: int
    heads: tuple[tuple[int, int], ...]
    kv_heads: tuple[tuple[int, int], ...]


def split_heads(num_heads: int, num_kv_heads: int, ranks: int) -> HeadSplit:
    """Whole groups of query heads to each rank; with fewer groups than ranks, KV heads are held by several.

    Args:
        num_heads: a multiple of `num_kv_heads`.
        num_kv_heads: KV head i belongs to `num_heads / num_kv_heads` query heads from i times as many on.
        ranks: among how many.
    """
    group = num_heads // num_kv_heads
    if num_kv_heads >= ranks:
        share = -(-num_kv_heads // ranks)
        kv = [(min(r * share, num_kv_heads), min((r + 1) * share, num_kv_heads)) for r in range(ranks)]
        return HeadSplit(share * group, share, tuple((a * group, b * group) for a, b in kv), tuple(kv))
    owner = [rank * num_kv_heads // ranks for rank in range(ranks)]
    share = max(-(-group // owner.count(head)) for head in range(num_kv_heads))
    heads = []
    for rank, head in enumerate(owner):
        among = split_evenly(group, owner.count(head)).runs[rank - owner.index(head)]
        first = head * group
        heads.append((first + among[0].start, first + among[0].stop) if among else (first, first))
    return HeadSplit(share, 1, tuple(heads), tuple((head, head + 1) for head in owner))


def joined(dim: int, pieces: Iterable[tuple[int, int, list[tuple[int, int]]]]) -> Split:
    """Several stretches of one dimension, each divided for itself, one behind another in every rank's share.

    Args:
        dim: which dimension.
        pieces: per stretch where it starts, what it takes of every share, and per rank its first and last-plus-one
            entry, counted from that start.
    """
    runs: list[list[Run]] = []
    target = 0
    for first, size, bounds in pieces:
        runs = runs or [[] for _ in bounds]
        for rank, (start, stop) in enumerate(bounds):
            if stop > start:
                runs[rank].append(Run(first + start, first + stop, target))
        target += size
    return Split(dim, target, tuple(map(tuple, runs)))

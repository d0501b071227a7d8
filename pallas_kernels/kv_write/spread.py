"""How the numbers of some heads are spread over the threads of a warpgroup."""

import dataclasses
from typing import Any, Self

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..mosaic import store

THREADS = 128  # of a warpgroup
_WARPS, _LANES = 4, 32  # of a warpgroup, of a warp


@dataclasses.dataclass(frozen=True)
class Spread:
    """How `[heads, numbers]` goes over a warpgroup, in chunks of `rows` heads with `lanes` threads to each.

    Where `rows` does not divide the heads, the last chunk overlaps the one before it. Threads that are too many do
    what others do.

    Attributes:
        vector: numbers that a thread reads or writes at once.
        paired: the array has a third axis of two, and they go to the same thread.
    """

    heads: int
    numbers: int
    rows: int
    lanes: int
    vector: int
    paired: bool = False

    @classmethod
    def best(cls, heads: int, numbers: int, widest: int, paired: bool = False, whole: int = 0) -> Self:
        """The fewest accesses to memory; among those the fewest idle threads, then the longest contiguous accesses.

        `whole`: numbers that as many lanes are to divide too.
        """
        found = [cls(heads, max(numbers, 1), 1, 1, 1, paired)]
        for vector in (1 << i for i in range(widest.bit_length())):
            for lanes in (1 << i for i in range(_LANES.bit_length())):
                if numbers % (lanes * vector) == 0 and whole % lanes == 0:
                    rows = min(THREADS // lanes, 1 << (heads.bit_length() - 1))
                    found.append(cls(heads, numbers, rows, lanes, vector, paired))
        return min(found, key=lambda s: (s.accesses, -s.rows * s.lanes, -s.lanes * s.vector))

    def same_lanes(self, numbers: int, widest: int, paired: bool = False) -> Self:
        """Other numbers of the same heads, with the widest accesses of the same lanes.

        Mosaic wants one layout for all that has one number for each head: constants are shared among them.
        """
        vector = max(1 << i for i in range(widest.bit_length()) if numbers % (self.lanes << i) == 0)
        return dataclasses.replace(self, numbers=numbers, vector=vector, paired=paired)

    @property
    def starts(self) -> list[int]:
        """First head of every chunk."""
        return [min(first, self.heads - self.rows) for first in range(0, self.heads, self.rows)]

    @property
    def accesses(self) -> int:
        """How often a thread reads or writes."""
        return len(self.starts) * self.numbers // (self.lanes * self.vector)

    @property
    def layout(self) -> Any:
        """Of a chunk."""
        return _public(self._layout)

    @property
    def _layout(self) -> TiledLayout:
        """Heads go over warps and lanes, numbers over the lanes of a head."""
        in_warp = min(self.rows, _LANES // self.lanes)
        warps, idle = self.rows // in_warp, _LANES // self.lanes // in_warp
        last = (2,) if self.paired else ()
        return _canonical(
            ((self.rows, self.lanes * self.vector, *last), (in_warp, self.vector, *last)),
            (plgpu.Replicated(_WARPS // warps), -6 if self.paired else -4),
            (plgpu.Replicated(idle), *((-3, -5) if self.paired else (-2, -3))),
        )

    def load(self, ref: Any, index: tuple[Any, ...]) -> list[Array]:
        """The chunks of `ref[:, *index]`."""
        return [
            plgpu.load(ref.at[(pl.ds(start, self.rows), *index)], layout=self.layout, optimized=False)
            for start in self.starts
        ]

    def load_each(self, ref: Any, start: int) -> Array:
        """One number of `ref` for each head of the chunk from `start` on."""
        layout = self._layout.reduce((2,)) if self.paired else self._layout
        return plgpu.load(ref.at[pl.ds(start, self.rows)], layout=_public(layout.reduce((1,))), optimized=False)

    def over_heads(self, numbers: Array) -> Array:
        """A chunk in which all numbers of a head are the one that `load_each` gave for it."""
        shape = (self.rows, self.numbers, 2) if self.paired else (self.rows, self.numbers)
        return plgpu.layout_cast(lax.broadcast_in_dim(numbers, shape, (0,)), self.layout)

    def shared(self, ref: Any) -> Array:
        """A chunk in which all heads have the numbers of `ref`."""
        numbers = plgpu.load(ref, layout=_public(self._layout.reduce((0,))), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (self.rows, self.numbers), (1,)), self.layout)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some numbers of all heads, `[:, *index]`, in registers."""

    index: tuple[Any, ...]
    spread: Spread
    chunks: list[Array]

    def store(self, ref: Any) -> None:
        """Writes them to `ref`, in its dtype."""
        for start, chunk in zip(self.spread.starts, self.chunks, strict=True):
            store(ref.at[(pl.ds(start, self.spread.rows), *self.index)], chunk.astype(ref.dtype))


def one_each() -> Any:
    """The layout of an array with one number for each thread, or a multiple."""
    return _public(_canonical(((THREADS,), (_LANES,), (1,)), (-3,), (-2,)))


def _canonical(tiles: tuple[tuple[int, ...], ...], warps: tuple[Any, ...], lanes: tuple[Any, ...]) -> TiledLayout:
    """A layout in Mosaic's canonical form, without what is trivial."""
    warps, lanes = (tuple(d for d in dims if d != plgpu.Replicated(1)) for dims in (warps, lanes))
    return TiledLayout(plgpu.Tiling(tiles), warps, lanes, -1, _check_canonical=False).canonicalize()


def _public(layout: TiledLayout) -> Any:
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)

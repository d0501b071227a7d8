"""Where keys and values lie while they are not on a device: host memory, or a spill file.

A slab's slots come first, `[L, B, K, D]`: what is in use of it is one contiguous range, read and copied as one, and the
new tokens of all rows lie together.
"""

import dataclasses
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from jdsi.converters.direct_io import PAGE, round_up
from jdsi.errors import JdsiError

from ..pinned import PinnedPages
from .spill_file import SpillFile


@dataclasses.dataclass(frozen=True)
class Slab:
    """One device's share of one layer's keys, or values, of a batch.

    Attributes:
        shape: `(L, B, K, D)`: slots, as many as fill whole pages; rows, kv heads, dim.
        dtype: any, bfloat16 included.
        place: where its home has it.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    place: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of all rows."""
        return self.nbytes // self.shape[0]


class SlabHome(Protocol):
    """Holds slabs. What was never saved may read as anything. Methods may be called from several threads.

    Attributes:
        bytes_read, bytes_written: taken from it and given to it so far.
    """

    bytes_read: int
    bytes_written: int

    def allocate(self, shapes: Sequence[tuple[int, int, int, int]], dtype: np.dtype) -> list[Slab]:
        """Slabs of these shapes, all or none.

        Raises:
            CapacityError: there is no room for them.
            JdsiError: a file that they would lie in is closed.
        """
        ...

    def load(self, slabs: Sequence[Slab], slots: int) -> list[np.ndarray]:
        """Memory `[L, B, K, D]` of each slab, page-aligned, with the first `slots` slots as they were saved.

        It must be given back with `release`, and only one may be out for a slab.

        Raises:
            JdsiError: reading failed.
        """
        ...

    def save(
        self,
        slabs: Sequence[Slab],
        memories: Sequence[np.ndarray],
        lengths: Int[np.ndarray, " B"],
        new_lengths: Int[np.ndarray, " B"],
    ) -> None:
        """Keeps what changed in memories that were loaded: `new_lengths[b]` slots of row b from `lengths[b]` on.

        Raises:
            JdsiError: writing failed.
        """
        ...

    def release(self, memories: Sequence[np.ndarray]) -> None:
        """Takes memories back."""
        ...

    def free(self, slabs: Sequence[Slab]) -> None:
        """Lets the room be used again."""
        ...

    def close(self) -> None:
        """Frees everything; the second time does nothing."""
        ...


class HostSlabs:
    """See `SlabHome`: in host memory, pinned for a GPU. What is loaded is the slab itself."""

    def __init__(self) -> None:
        self.bytes_read = self.bytes_written = 0
        self._pages, self._lock = PinnedPages(), threading.Lock()

    def allocate(self, shapes: Sequence[tuple[int, int, int, int]], dtype: np.dtype) -> list[Slab]:
        """See `SlabHome.allocate`."""
        sized = [_whole_pages(shape, dtype) for shape in shapes]
        memories = self._pages.take([math.prod(shape) * dtype.itemsize for shape in sized])
        return [
            Slab(shape, dtype, memory.view(dtype).reshape(shape)) for shape, memory in zip(sized, memories, strict=True)
        ]

    def load(self, slabs: Sequence[Slab], slots: int) -> list[np.ndarray]:
        """See `SlabHome.load`."""
        with self._lock:
            self.bytes_read += sum(slots * slab.slot_bytes for slab in slabs)
        return [slab.place for slab in slabs]

    def save(
        self,
        slabs: Sequence[Slab],
        memories: Sequence[np.ndarray],
        lengths: Int[np.ndarray, " B"],
        new_lengths: Int[np.ndarray, " B"],
    ) -> None:
        """See `SlabHome.save`."""
        nbytes = sum(int(new_lengths.sum()) * slab.slot_bytes // slab.shape[1] for slab in slabs)
        with self._lock:
            self.bytes_written += nbytes

    def release(self, memories: Sequence[np.ndarray]) -> None:
        """See `SlabHome.release`."""

    def free(self, slabs: Sequence[Slab]) -> None:
        """See `SlabHome.free`."""
        self._pages.give([_flat(slab.place) for slab in slabs])

    def close(self) -> None:
        """See `SlabHome.close`."""
        self._pages.close()


class FileSlabs:
    """See `SlabHome`: in an unnamed file in a folder. What is loaded is a copy in pinned memory.

    Of a loaded slab's memory only the pages that hold new slots are written: it has all that they share those with.

    Raises:
        ConfigError: `folder` is absent or not writable.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.bytes_read = self.bytes_written = 0
        self.file = SpillFile(folder)
        self._pages = PinnedPages()
        self._largest, self._lock = 0, threading.Lock()
        self._loaded: dict[int, np.ndarray] = {}

    def allocate(self, shapes: Sequence[tuple[int, int, int, int]], dtype: np.dtype) -> list[Slab]:
        """See `SlabHome.allocate`."""
        sized = [_whole_pages(shape, dtype) for shape in shapes]
        offsets = self.file.reserve([math.prod(shape) * dtype.itemsize for shape in sized])
        return [Slab(shape, dtype, offset) for shape, offset in zip(sized, offsets, strict=True)]

    def load(self, slabs: Sequence[Slab], slots: int) -> list[np.ndarray]:
        """See `SlabHome.load`."""
        # Of one size, whatever slab they are for, so that there are never more than are in use at once.
        with self._lock:
            largest = self._largest = max([self._largest, *(slab.nbytes for slab in slabs)])
        pages = self._pages.take([largest] * len(slabs))
        self._loaded |= {one.ctypes.data: one for one in pages}
        memories = [
            one[: slab.nbytes].view(slab.dtype).reshape(slab.shape) for slab, one in zip(slabs, pages, strict=True)
        ]
        pieces = [
            (slab.place, one[: round_up(slots * slab.slot_bytes)]) for slab, one in zip(slabs, pages, strict=True)
        ]
        try:
            self.file.read(pieces)
        except JdsiError:
            self.release(memories)
            raise
        with self._lock:
            self.bytes_read += sum(memory.nbytes for _, memory in pieces)
        return memories

    def save(
        self,
        slabs: Sequence[Slab],
        memories: Sequence[np.ndarray],
        lengths: Int[np.ndarray, " B"],
        new_lengths: Int[np.ndarray, " B"],
    ) -> None:
        """See `SlabHome.save`."""
        pieces = [
            (slab.place + start, _flat(memory)[start:stop])
            for slab, memory in zip(slabs, memories, strict=True)
            for start, stop in _changed_pages(slab, lengths, new_lengths)
        ]
        self.file.write(pieces)
        with self._lock:
            self.bytes_written += sum(memory.nbytes for _, memory in pieces)

    def release(self, memories: Sequence[np.ndarray]) -> None:
        """See `SlabHome.release`."""
        self._pages.give([self._loaded.pop(memory.ctypes.data) for memory in memories])

    def free(self, slabs: Sequence[Slab]) -> None:
        """See `SlabHome.free`."""
        for slab in slabs:
            self.file.free(slab.place, slab.nbytes)

    def close(self) -> None:
        """See `SlabHome.close`."""
        self.file.close()
        self._pages.close()


def _whole_pages(shape: tuple[int, int, int, int], dtype: np.dtype) -> tuple[int, int, int, int]:
    slots, rows, kv_heads, dim = shape
    step = PAGE // math.gcd(PAGE, rows * kv_heads * dim * dtype.itemsize)
    return round_up(slots, step), rows, kv_heads, dim


def _flat(memory: np.ndarray) -> np.ndarray:
    return memory.reshape(-1).view(np.uint8)


def _changed_pages(
    slab: Slab, lengths: Int[np.ndarray, " B"], new_lengths: Int[np.ndarray, " B"]
) -> Iterator[tuple[int, int]]:
    """First byte and last byte + 1 of every run of pages of a slab that new slots lie in."""
    rows, piece = slab.shape[1], slab.slot_bytes // slab.shape[1]
    total, ends = int(new_lengths.sum()), np.cumsum(new_lengths)
    row = np.repeat(np.arange(rows), new_lengths)
    slot = np.arange(total) - np.repeat(ends - new_lengths - lengths, new_lengths)
    first = (slot * rows + row) * piece
    marks = np.zeros(slab.nbytes // PAGE + 1, np.int64)
    np.add.at(marks, first // PAGE, 1)
    np.add.at(marks, (first + piece - 1) // PAGE + 1, -1)
    changed = np.cumsum(marks[:-1]) > 0
    edges = np.flatnonzero(np.diff(changed, prepend=False, append=False)) * PAGE
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)

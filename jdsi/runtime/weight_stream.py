"""Weights that arrive while the layers before them compute."""

import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jdsi.converters.block_store import Block
from jdsi.converters.direct_io import DirectReader, PageBuffer
from jdsi.errors import CheckpointError


class BlockSource(Protocol):
    """Where a stream takes blocks from."""

    def read(self, block: Block, memory: np.ndarray) -> Mapping[str, np.ndarray | jax.Array]:
        """The block's parameters, in `memory` or elsewhere on the host; called from the stream's thread."""
        ...

    def close(self) -> None:
        """Frees what the source holds."""
        ...


class DiskSource:
    """Blocks straight from their files, every time they are asked for."""

    def __init__(self) -> None:
        self.reader = DirectReader()

    def read(self, block: Block, memory: np.ndarray) -> dict[str, np.ndarray]:
        self.reader.read(block.segments, memory)
        return block.arrays(memory)

    def close(self) -> None:
        self.reader.close()


@dataclasses.dataclass
class StreamReport:
    """What a stream has done so far; take the difference of two to see one generation.

    Attributes:
        blocks: read.
        bytes_streamed: taken from the files or from host memory for them.
        read_seconds: that reading and placing them took.
        wait_seconds: that layers waited for them.
        seconds: since the first block was asked for.
    """

    blocks: int = 0
    bytes_streamed: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    seconds: float = 0.0

    def since(self, start: "StreamReport") -> "StreamReport":
        """What came after `start`."""
        mine, other = dataclasses.astuple(self), dataclasses.astuple(start)
        return StreamReport(*(a - b for a, b in zip(mine, other, strict=True)))

    def as_dict(self) -> dict[str, float]:
        """All figures by name, and those that follow: GB/s, and the share of the time in which the link was busy."""
        seconds = self.seconds or 1.0
        return {
            **dataclasses.asdict(self),
            "gigabytes_per_second": self.bytes_streamed / seconds / 1e9,
            "link_busy": min(1.0, self.read_seconds / seconds),
        }


@dataclasses.dataclass
class Delivery:
    """A block that has arrived on the device.

    Attributes:
        name: of the block.
        arrays: its parameters. They are gone once the delivery is released and what was computed from them is done.
    """

    name: str
    arrays: Mapping[str, jax.Array]
    slot: int


class WeightStream:
    """Reads blocks in a fixed cyclic order, ahead of their use, into a ring of host buffers.

    A buffer is filled again only after the computation that its weights went into has finished: on the CPU JAX uses
    the buffer itself, so an earlier refill would change weights under a running layer. The same rule bounds how far
    the host runs ahead of a GPU.

    Args:
        source: where blocks come from.
        blocks: in the order in which a pass takes them.
        slots: buffers, hence blocks on their way or in use at once; at least 2 for any overlap.
        device: where the arrays go; by default JAX's default device.

    Attributes:
        nbytes: of all buffers.
        report: what it has done, kept up to date.
    """

    def __init__(self, source: BlockSource, blocks: Sequence[Block], slots: int, device: Any = None) -> None:
        self._blocks = tuple(blocks)
        self.report = StreamReport()
        self._began: float | None = None
        self._ready: queue.SimpleQueue[Delivery | BaseException] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        largest = max((block.nbytes for block in self._blocks), default=0)
        memory = [PageBuffer(largest).bytes for _ in range(min(slots, len(self._blocks) + 1))]
        for slot in range(len(memory)):
            self._free.put((slot, None))
        self.nbytes = sum(m.size for m in memory)
        closing = threading.Event()
        # The thread must not keep the stream alive, else a stream that is dropped would never be closed.
        self._thread = threading.Thread(
            target=_deliver,
            args=(source, self._blocks, memory, self._free, self._ready, closing, device, self.report),
            daemon=True,
            name="jdsi-stream",
        )
        self._close = weakref.finalize(self, _stop, closing, self._free, self._thread, source)
        self._thread.start()

    def take(self, name: str) -> Delivery:
        """The next block, which must be `name`; waits until it is there.

        Raises:
            CheckpointError: reading failed; every later call raises the same.
        """
        began = time.perf_counter()
        self._began = self._began or began
        while True:
            if self._failed is not None:
                raise self._failed
            item = self._ready.get()
            now = time.perf_counter()
            self.report.wait_seconds += now - began
            self.report.seconds, began = now - self._began, now
            if isinstance(item, BaseException):
                self._failed = item
                continue
            if item.name == name:
                return item
            jax.block_until_ready(item.arrays)  # of a pass that was given up half-way
            self.release(item, None)

    def release(self, delivery: Delivery, after: Any) -> None:
        """Gives the delivery's memory back, to be used again once the arrays in `after` have been computed."""
        delivery.arrays = {}
        self._free.put((delivery.slot, after))

    def close(self) -> None:
        """Stops reading. Deliveries must not be used afterwards."""
        self._close()


def _deliver(
    source: BlockSource,
    blocks: Sequence[Block],
    memory: Sequence[np.ndarray],
    free: "queue.SimpleQueue[tuple[int, Any] | None]",
    ready: "queue.SimpleQueue[Delivery | BaseException]",
    closing: threading.Event,
    device: Any,
    report: StreamReport,
) -> None:
    try:
        for block in _forever(blocks):
            turn = free.get()
            if turn is None or closing.is_set():
                return
            slot, after = turn
            jax.block_until_ready(after)
            began = time.perf_counter()
            arrays = source.read(block, memory[slot][: block.nbytes])
            placed = jax.block_until_ready(jax.device_put(arrays, device))
            report.read_seconds += time.perf_counter() - began
            report.blocks += 1
            report.bytes_streamed += block.bytes_stored
            ready.put(Delivery(block.name, placed, slot))
    except Exception as error:
        ready.put(error if isinstance(error, CheckpointError) else _wrapped(error))


def _wrapped(error: Exception) -> CheckpointError:
    wrapped = CheckpointError(f"streaming weights failed: {error}")
    wrapped.__cause__ = error
    return wrapped


def _forever(blocks: Sequence[Block]) -> Iterator[Block]:
    while blocks:
        yield from blocks


def _stop(closing: threading.Event, free: "queue.SimpleQueue", thread: threading.Thread, source: BlockSource) -> None:
    closing.set()
    free.put(None)  # wakes a thread that waits for a buffer
    if thread is not threading.current_thread():
        thread.join(timeout=60)
    source.close()

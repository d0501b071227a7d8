"""Weights that arrive while the layers before them compute."""

import collections
import contextlib
import dataclasses
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jdsi.converters.block_store import Block
from jdsi.errors import CheckpointError, JdsiError

from .placement import Streamed
from .weight_sources import BlockSource


@dataclasses.dataclass
class StreamReport:
    """What a stream has done so far; take the difference of two to see one generation.

    Attributes:
        passes: over the whole model.
        blocks: read.
        bytes_streamed: taken from the files or from host memory for them.
        read_seconds: while at least one was being read, or its copy to the devices started.
        wait_seconds: that layers waited for them.
        kv_bytes_read, kv_bytes_written: of offloaded keys and values, from and to where they lie.
        kv_wait_seconds: that layers waited for those.
    """

    passes: int = 0
    blocks: int = 0
    bytes_streamed: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    kv_bytes_read: int = 0
    kv_bytes_written: int = 0
    kv_wait_seconds: float = 0.0

    def since(self, start: "StreamReport") -> "StreamReport":
        """What came after `start`."""
        names = [field.name for field in dataclasses.fields(self)]
        return StreamReport(**{name: getattr(self, name) - getattr(start, name) for name in names})


class Delivery:
    """A block on its way to the devices. Its memory is used again once it is released, or forgotten.

    Attributes:
        name: of the block.
        arrays: what its `Streamed` takes, until it is released; the copies to the devices may be under way.
    """

    def __init__(self, name: str, arrays: Any, slot: int, free: "queue.SimpleQueue") -> None:
        self.name, self.arrays = name, arrays
        self._slot: int | None = slot
        self._free = free
        self._after = arrays  # at the least, the memory must have been copied from

    def used_by(self, result: jax.Array) -> None:
        """The memory must stay until `result`, and all that was handed in before, has been computed."""
        self._after = result

    def release(self) -> None:
        """Gives the memory back; the second time does nothing."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self.arrays = None
            self._free.put((slot, self._after))
            self._after = None

    def __del__(self) -> None:  # an interrupt may come between any two lines, and a lost buffer would never return
        self.release()


class WeightStream:
    """Reads blocks in a fixed cyclic order, ahead of their use, into a ring of buffers.

    A buffer is filled again only after the computation that its weights went into has finished: on the CPU, and where
    files are read into device memory, JAX uses the buffer itself, so an earlier refill would change weights under a
    running layer. The same rule bounds how far the host runs ahead of a GPU.

    Args:
        source: where blocks come from, and what the buffers are; closed with the stream.
        blocks: in the order in which a pass takes them, each with what it becomes.
        slots: buffers, hence blocks on their way or in use at once; at least 2 for any overlap.

    Raises:
        ValueError: there is no buffer.

    Attributes:
        report: what it has done, kept up to date.
    """

    def __init__(self, source: BlockSource, blocks: Sequence[tuple[Block, Streamed]], slots: int) -> None:
        if slots < 1:
            raise ValueError(f"{slots} buffers for {len(blocks)} blocks")
        self.report = StreamReport()
        self._ready: queue.SimpleQueue[Delivery | JdsiError] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._failed: JdsiError | None = None
        self._closing = threading.Event()
        source.prepare(blocks)
        buffers = [source.buffer(blocks) for _ in range(slots)]
        for slot in range(slots):
            self._free.put((slot, None))
        # The thread must not keep the stream alive, else a stream that is dropped would never be closed.
        worker = _Worker(source, blocks, buffers, self._free, self._ready, self._closing, self.report)
        thread = threading.Thread(target=worker.run, daemon=True, name="jdsi-stream")
        self._close = weakref.finalize(self, _stop, self._closing, self._free, self._ready, thread, source)
        thread.start()

    def take(self, name: str) -> Delivery:
        """The next block, which must be `name`; waits until it is there.

        Raises:
            CheckpointError: reading failed; every later call raises the same.
            JdsiError: the stream is closed.
        """
        began = time.perf_counter()
        while True:
            if self._failed is not None:
                # Without the old traceback, which would keep a whole pass's arrays alive.
                raise type(self._failed)(*self._failed.args) from self._failed.__cause__
            if self._closing.is_set():
                raise JdsiError("this engine is closed")
            item = self._ready.get()
            if isinstance(item, JdsiError):
                self._failed = item
            elif item.name == name:
                self.report.wait_seconds += time.perf_counter() - began
                return item
            else:
                item.release()  # of a pass that was given up half-way

    def close(self) -> None:
        """Stops reading. Deliveries must not be used afterwards."""
        self._close()


@dataclasses.dataclass
class _Coming:
    """A block that was begun."""

    block: Block
    slot: int
    finish: Callable[[], Any]
    began: float


class _Worker:
    def __init__(
        self,
        source: BlockSource,
        blocks: Sequence[tuple[Block, Streamed]],
        buffers: Sequence[Any],
        free: "queue.SimpleQueue[tuple[int, Any] | None]",
        ready: "queue.SimpleQueue[Delivery | JdsiError]",
        closing: threading.Event,
        report: StreamReport,
    ) -> None:
        self._source, self._blocks, self._buffers = source, itertools.cycle(blocks), buffers
        self._free, self._ready, self._closing, self._report = free, ready, closing, report
        self._coming: collections.deque[_Coming] = collections.deque()
        self._used: tuple[int, Any] | None = None  # a buffer whose weights are still being computed with
        self._delivered = 0.0

    def run(self) -> None:
        try:
            while not self._closing.is_set():
                slot = self._next_slot()
                if slot is not None:
                    block, weights = next(self._blocks)
                    finish = self._source.begin(block, self._buffers[slot], weights)
                    self._coming.append(_Coming(block, slot, finish, time.perf_counter()))
                elif self._coming:
                    self._deliver(self._coming.popleft())
        except JdsiError as error:
            self._ready.put(error)
        except Exception as error:  # whatever it is, whoever waits for a block must hear of it
            wrapped = CheckpointError(f"streaming weights failed: {error}")
            wrapped.__cause__ = error
            self._ready.put(wrapped)

    def _next_slot(self) -> int | None:
        """A buffer that can be filled; where blocks are coming, which it does not keep waiting, maybe none."""
        waits = not self._coming
        if self._used is None:
            try:
                self._used = self._free.get(block=waits)
            except queue.Empty:
                return None
        if self._used is None:  # closing
            return None
        slot, after = self._used
        if not waits and not all(array.is_ready() for array in jax.tree.leaves(after)):
            return None
        with contextlib.suppress(RuntimeError):  # a computation that failed has finished too; its caller hears of it
            jax.block_until_ready(after)
        self._used = None
        return slot

    def _deliver(self, coming: _Coming) -> None:
        placed = coming.finish()
        now = time.perf_counter()
        self._report.read_seconds += now - max(coming.began, self._delivered)
        self._report.blocks += 1
        self._report.bytes_streamed += coming.block.bytes_stored
        self._delivered = now
        self._ready.put(Delivery(coming.block.name, placed, coming.slot, self._free))


def _stop(
    closing: threading.Event,
    free: "queue.SimpleQueue",
    ready: "queue.SimpleQueue",
    thread: threading.Thread,
    source: BlockSource,
) -> None:
    closing.set()
    free.put(None)  # wakes the thread if it waits for a buffer
    ready.put(JdsiError("this engine is closed"))  # and whoever waits for a block
    if thread is not threading.current_thread():
        thread.join(timeout=60)
    source.close()

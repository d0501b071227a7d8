"""Where streamed weights come from: files, or host memory."""

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import DirectReader, PageBuffer

from .pinned import pin
from .placement import Streamed


class BlockSource(Protocol):
    """Where a stream takes blocks from."""

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """Called once, before anything is begun, with all that will be."""
        ...

    def buffer(self, blocks: Sequence[tuple[Block, Streamed]]) -> Any:
        """A buffer for the stream's ring, whatever the source needs for any one of the blocks on its way and in use."""
        ...

    def begin(self, block: Block, buffer: Any, weights: Streamed) -> Callable[[], Any]:
        """Begins to bring a block; several may be on their way. Called from the stream's thread.

        Args:
            block: which one.
            buffer: one that `buffer` made, which nothing uses any more; it is not handed in again until all that has
                been computed with the weights is done.
            weights: where they go.

        Returns:
            What waits until the block is here, and gives what `weights` takes of it, on its way to the devices.
        """
        ...

    def close(self) -> None:
        """Frees what the source holds."""
        ...


class MemorySource(abc.ABC):
    """A `BlockSource` whose buffers are host memory, pinned where the devices are GPUs, that it reads blocks into."""

    def buffer(self, blocks: Sequence[tuple[Block, Streamed]]) -> np.ndarray:
        """See `BlockSource.buffer`."""
        return pin(PageBuffer(max(weights.memory_bytes(block.nbytes) for block, weights in blocks)).bytes)

    @abc.abstractmethod
    def read(self, block: Block, memory: np.ndarray) -> None:
        """Fills the memory with the block's bytes."""

    def begin(self, block: Block, buffer: np.ndarray, weights: Streamed) -> Callable[[], Any]:
        """See `BlockSource.begin`; reads only when waited for."""

        def finish() -> Any:
            self.read(block, buffer)
            return weights.put(buffer, block.nbytes)

        return finish


class DiskSource(MemorySource):
    """Blocks straight from their files, every time they are asked for.

    Args:
        store: that the blocks are of.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store, self._reader = store, DirectReader(known=store.files)

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """See `BlockSource.prepare`; reads nothing ahead."""

    def read(self, block: Block, memory: np.ndarray) -> None:
        """See `MemorySource.read`."""
        self._reader.read(block.segments, memory)
        self._store.look(block, memory)

    def begin(self, block: Block, buffer: np.ndarray, weights: Streamed) -> Callable[[], Any]:
        """See `BlockSource.begin`; so that the disk has something to do between two blocks."""
        arrived = self._reader.start(block.segments, buffer)

        def finish() -> Any:
            arrived()
            self._store.look(block, buffer)
            return weights.put(buffer, block.nbytes)

        return finish

    def close(self) -> None:
        """See `BlockSource.close`."""
        self._reader.close()


class HostSource:
    """Blocks that stay in host memory, pinned where the devices are GPUs, and go to the devices for every pass.

    Args:
        store: that the blocks are of.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store, self._blocks = store, dict[str, Any]()

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """See `BlockSource.prepare`; reads all of them."""
        with contextlib.closing(DirectReader(known=self._store.files)) as reader:
            for block, weights in blocks:
                if block.name not in self._blocks:
                    memory = PageBuffer(weights.memory_bytes(block.nbytes)).bytes
                    reader.read(block.segments, memory)
                    self._store.look(block, memory)
                    # The driver copies from pinned memory at the link's speed, from other memory at a tenth of it.
                    self._blocks[block.name] = jax.block_until_ready(weights.put(memory, block.nbytes, "pinned_host"))

    def buffer(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """See `BlockSource.buffer`; the blocks are in memory of their own."""

    def begin(self, block: Block, buffer: None, weights: Streamed) -> Callable[[], Any]:
        """See `BlockSource.begin`."""
        placed = jax.device_put(self._blocks[block.name], weights.shardings("device"))
        return lambda: placed

    def close(self) -> None:
        """See `BlockSource.close`."""
        self._blocks.clear()

"""Where streamed weights come from: files, or host memory."""

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import DirectReader, PageBuffer

from .placement import Streamed


class BlockSource(Protocol):
    """Where a stream takes blocks from."""

    needs_memory: bool
    """Whether it fills the memory it is given; otherwise it has memory of its own."""

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """Called once, before anything is begun, with all that will be."""
        ...

    def begin(self, block: Block, memory: np.ndarray, weights: Streamed) -> Callable[[], Any]:
        """Begins to bring a block; several may be on their way. Called from the stream's thread.

        Args:
            block: which one.
            memory: to read it into, where that is needed; it stays untouched until the weights have been used.
            weights: where they go.

        Returns:
            What waits until the block is here, and gives what `weights` takes of it, on its way to the devices.
        """
        ...

    def close(self) -> None:
        """Frees what the source holds."""
        ...


class MemorySource(abc.ABC):
    """A `BlockSource` that reads into the memory it is given."""

    needs_memory = True

    @abc.abstractmethod
    def read(self, block: Block, memory: np.ndarray) -> None:
        """Fills the memory with the block's bytes."""

    def begin(self, block: Block, memory: np.ndarray, weights: Streamed) -> Callable[[], Any]:
        """See `BlockSource.begin`; reads only when waited for."""

        def finish() -> Any:
            self.read(block, memory)
            return weights.put(memory, block.nbytes)

        return finish


class DiskSource(MemorySource):
    """Blocks straight from their files, every time they are asked for.

    Args:
        store: that the blocks are of.
    """

    def __init__(self, store: BlockStore) -> None:
        self._reader = DirectReader(known=store.files)

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """See `BlockSource.prepare`; reads nothing ahead."""

    def read(self, block: Block, memory: np.ndarray) -> None:
        """See `MemorySource.read`."""
        self._reader.read(block.segments, memory)

    def begin(self, block: Block, memory: np.ndarray, weights: Streamed) -> Callable[[], Any]:
        """See `BlockSource.begin`; so that the disk has something to do between two blocks."""
        arrived = self._reader.start(block.segments, memory)

        def finish() -> Any:
            arrived()
            return weights.put(memory, block.nbytes)

        return finish

    def close(self) -> None:
        """See `BlockSource.close`."""
        self._reader.close()


class HostSource:
    """Blocks that stay in host memory, pinned where the devices are GPUs, and go to the devices for every pass.

    Args:
        store: that the blocks are of.
    """

    needs_memory = False

    def __init__(self, store: BlockStore) -> None:
        self._files, self._blocks = store.files, dict[str, Any]()

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """See `BlockSource.prepare`; reads all of them."""
        with contextlib.closing(DirectReader(known=self._files)) as reader:
            for block, weights in blocks:
                if block.name not in self._blocks:
                    memory = PageBuffer(weights.memory_bytes(block.nbytes)).bytes
                    reader.read(block.segments, memory)
                    # The driver copies from pinned memory at the link's speed, from other memory at a tenth of it.
                    self._blocks[block.name] = jax.block_until_ready(weights.put(memory, block.nbytes, "pinned_host"))

    def begin(self, block: Block, memory: np.ndarray, weights: Streamed) -> Callable[[], Any]:
        """See `BlockSource.begin`."""
        placed = jax.device_put(self._blocks[block.name], weights.shardings("device"))
        return lambda: placed

    def close(self) -> None:
        """See `BlockSource.close`."""
        self._blocks.clear()

"""What takes turns in the offload benchmark: the disk alone, and passes of our executors."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import DirectReader, PageBuffer, Segment
from jdsi.runtime import Executor, Step
from jdsi.runtime.placement import Streamed
from jdsi.runtime.residency import Residency
from jdsi.runtime.weight_sources import MemorySource

from .rounds import seconds

PROMPT = 16
"""Tokens of a prompt."""

_LEAST_VOCABULARY = 2000  # of the models that `sized_config` makes
_CHUNK = 16 << 20
_CHUNKS = 8  # more than the reader's threads


def prompts(rows: int) -> np.ndarray:
    """The prompts of a batch, `[rows, PROMPT]`."""
    return (np.arange(rows * PROMPT, dtype=np.int32) % _LEAST_VOCABULARY).reshape(rows, PROMPT)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one pass took.

    Attributes:
        seconds: wall time.
        bytes_read: that its process had fetched from storage in it.
    """

    seconds: float
    bytes_read: int


class Contender(Protocol):
    """One that takes turns with others."""

    def turn(self) -> Turn:
        """Runs one pass until it is finished, after what has to be done before and is not timed."""
        ...


def timed(run: Callable[[], object]) -> Turn:
    """Calls `run` once."""
    before = storage_bytes()
    taken = seconds(run)
    return Turn(taken, storage_bytes() - before)


def storage_bytes() -> int:
    """Bytes that this process has had fetched from storage; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def drop_cache(files: Iterable[Path]) -> None:
    """Makes the next reading of files that are written out, and mapped by nobody, come from storage."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Disk:
    """Reads what a pass streams, in the same order with O_DIRECT, and does nothing else.

    All of it is asked for at once, so that the disk's queue never runs empty between blocks.
    """

    def __init__(self, store: BlockStore, residency: Residency) -> None:
        self._reader = DirectReader()
        self._memory = PageBuffer(_CHUNK * _CHUNKS).bytes
        stored = [segment for name in residency.streamed for segment in store.blocks[name].segments]
        pieces = [
            (file, start, min(_CHUNK, stop - start))
            for file, first, stop in _ranges(stored)
            for start in range(first, stop, _CHUNK)
        ]
        self._segments = [
            Segment(file, start, size, i % _CHUNKS * _CHUNK) for i, (file, start, size) in enumerate(pieces)
        ]

    def turn(self) -> Turn:
        """See `Contender.turn`."""
        return timed(lambda: self._reader.read(self._segments, self._memory))

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()


def _ranges(segments: Sequence[Segment]) -> list[tuple[Path, int, int]]:
    """File, first byte and end of runs of segments that lie one behind another."""
    found: list[tuple[Path, int, int]] = []
    for s in segments:
        if found and found[-1][0] == s.file and found[-1][2] == s.offset:
            found[-1] = (s.file, found[-1][1], s.offset + s.nbytes)
        else:
            found.append((s.file, s.offset, s.offset + s.nbytes))
    return found


class Decoding:
    """Passes of an executor over `count` batches of `rows` rows, each decoding a token for every row.

    Before every turn goes a pass of its own: what the stream has read ahead while others had their turn is used up.

    Args:
        executor: runs the model.
        rows: of a batch.
        count: batches that share a pass.
        turns: the most that will be taken.

    Attributes:
        tokens: those of the first batch so far, `[rows]` each.
        margins: how far the logits of each were ahead of the next best, `[rows]` each.
    """

    def __init__(self, executor: Executor, rows: int, count: int, turns: int) -> None:
        self._executor = executor
        self.tokens: list[np.ndarray] = []
        self.margins: list[np.ndarray] = []
        lengths = np.full(rows, PROMPT, np.int32)
        caches = [executor.new_cache(rows, PROMPT + 2 * turns + 1) for _ in range(count)]
        prompted = [cache.begin(lengths, PROMPT) for cache in caches]
        last = np.arange(1, rows + 1, dtype=np.int32) * PROMPT - 1
        self._step([Step(prompts(rows).reshape(-1), context, last, _greedy, ()) for context in prompted])

    def turn(self) -> Turn:
        """See `Contender.turn`."""
        self._pass()
        return timed(self._pass)

    def _pass(self) -> None:
        ones = np.ones(len(self.tokens[0]), np.int32)
        self._step([Step(tokens, context.begin(ones, 1), None, _greedy, ()) for tokens, context in self._state])

    def _step(self, steps: list[Step]) -> None:
        done = self._executor.steps(steps)
        self._state = [(tokens, context) for (tokens, _), context, _ in done]
        jax.block_until_ready([tokens for tokens, _ in self._state])
        self.tokens.append(np.asarray(done[0][0][0]))
        self.margins.append(np.asarray(done[0][0][1]))


def _greedy(logits: jax.Array, carry: Any) -> tuple[Any, Any]:
    best, tokens = jax.lax.top_k(logits, 2)
    return (tokens[:, 0].astype(jnp.int32), best[:, 0] - best[:, 1]), carry


class MappedSource(MemorySource):
    """Blocks copied out of memory-mapped files whose cache is dropped first: the simplest way to run from disk."""

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """See `BlockSource.prepare`."""

    def read(self, block: Block, memory: np.ndarray) -> None:
        """See `MemorySource.read`."""
        for segment in block.segments:
            descriptor = os.open(segment.file, os.O_RDONLY)
            # Pages that are mapped stay, so the mapping is made anew.
            os.posix_fadvise(descriptor, segment.offset, segment.nbytes, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            mapped = np.memmap(segment.file, np.uint8, "r", segment.offset, segment.nbytes)
            memory[segment.target : segment.target + segment.nbytes] = mapped
            del mapped

    def close(self) -> None:
        """See `BlockSource.close`."""

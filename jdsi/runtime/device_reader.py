"""Reading files straight into the memory of GPUs, with kvikio.

kvikio (https://docs.rapids.ai/api/kvikio) has GPUDirect Storage do it. This has not run on a GPU yet: tests put a
module of their own in kvikio's place, which does the same to the memory of JAX's CPU devices.
"""

import collections
import contextlib
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jdsi.converters.direct_io import SameFile, Segment
from jdsi.errors import CheckpointError, ConfigError, JdsiError

_CHUNK = 4 << 20  # what kvikio gives one of its threads by default


class DeviceReader:
    """Reads segments of files to addresses. Segments may begin and end anywhere.

    Args:
        known: what `identity` said of files, which must still be those when they are first read.

    Raises:
        ConfigError: kvikio cannot be imported.
    """

    def __init__(self, *, known: Mapping[Path, tuple[int, ...]]) -> None:
        try:
            self._kvikio: Any = importlib.import_module("kvikio")
        except ImportError as error:
            raise ConfigError(
                f"gpu_direct needs kvikio, which cannot be imported ({error}); `pip install kvikio-cu13`, or "
                "kvikio-cu12 for CUDA 12"
            ) from error
        self._known = known
        self._files: dict[Path, _File] = {}
        self._under_way: set[_Transfer] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, segments: Iterable[Segment], owner: Any) -> Callable[[], None]:
        """Begins to read; several may be under way.

        Args:
            segments: whose targets are addresses.
            owner: of the memory, kept until nothing is written to it any more.

        Returns:
            What waits for the end, and raises CheckpointError, once nothing is written any more, if a file ends early,
            fails, or is not the one that was read before.

        Raises:
            CheckpointError: a file is absent, or not the one that was read before.
        """
        segments = list(segments)
        transfer = _Transfer(owner)
        with self._lock:
            if self._closed:
                raise JdsiError("this engine is closed")
            files = {path: self._open(path) for path in {segment.file for segment in segments}}
            for file in files.values():
                file.same.check()
            self._under_way.add(transfer)
            for segment in segments:
                for chunk in _chunks(segment):
                    transfer.start(files[chunk.file].handle, chunk)

        def finish() -> None:
            try:
                transfer.wait()
            finally:
                with self._lock:
                    self._under_way.discard(transfer)
            for file in files.values():  # while they were read
                file.same.check()

        return finish

    def close(self) -> None:
        """Closes the files; reads in progress finish first."""
        with self._lock:
            self._closed = True
            under_way = list(self._under_way)
        for transfer in under_way:
            with contextlib.suppress(CheckpointError):  # whoever waits for it hears of it
                transfer.wait()
        self._under_way.clear()
        for file in self._files.values():
            file.handle.close()
        self._files.clear()

    def _open(self, path: Path) -> "_File":
        if path not in self._files:
            self._files[path] = _File(self._kvikio, path, self._known.get(path))
        return self._files[path]


def _chunks(segment: Segment) -> Iterator[Segment]:
    """Small reads, all but the first of which begin on a page of the file."""
    done = 0
    while done < segment.nbytes:
        offset = segment.offset + done
        size = min(segment.nbytes - done, _CHUNK - offset % _CHUNK)
        yield Segment(segment.file, offset, size, segment.target + done)
        done += size


class _File:
    """A file that kvikio has open."""

    def __init__(self, kvikio: Any, path: Path, known: tuple[int, ...] | None) -> None:
        with _named(f"{path} cannot be read"):
            self.handle = kvikio.CuFile(str(path), "r")
        try:
            self.same = SameFile(path, self.handle.fileno(), known)
        except CheckpointError:
            self.handle.close()
            raise


class _DeviceMemory:
    """Bytes at an address, in the form in which libraries for GPUs take arrays from each other."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),  # not read-only
            "strides": None,
            "version": 3,
        }


class _Transfer:
    """Reads that are under way."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._started: collections.deque[tuple[Segment, Any]] = collections.deque()
        self._failure: CheckpointError | None = None
        self._lock = threading.Lock()

    def start(self, handle: Any, chunk: Segment) -> None:
        """Begins one; if that fails, `wait` says so."""
        memory = _DeviceMemory(chunk.target, chunk.nbytes)
        with self._failures(), _named(f"{chunk.file}: reading at byte {chunk.offset}"):
            # As one task: the future of several may fail with the first of them, while others still write.
            self._started.append((chunk, handle.pread(memory, chunk.nbytes, chunk.offset, chunk.nbytes)))

    def wait(self) -> None:
        """Until nothing is written any more.

        Raises:
            CheckpointError: a read failed, or came to the end of its file.
        """
        with self._lock:  # a future can be asked only once
            while self._started:
                chunk, future = self._started.popleft()
                with self._failures():
                    with _named(f"{chunk.file}: reading at byte {chunk.offset}"):
                        count = future.get()
                    if count != chunk.nbytes:
                        raise CheckpointError(f"{chunk.file} ends at byte {chunk.offset + count}; it was cut short")
            self._owner = None
            if self._failure is not None:
                raise self._failure

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Remembers the first failure, for the other reads to go on to their end."""
        try:
            yield
        except CheckpointError as error:
            self._failure = self._failure or error


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Makes a `CheckpointError` of whatever kvikio raises: Cython has a type for each kind of C++ exception."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what}: {error}") from error

"""Reading files past the page cache into page-aligned memory."""

import dataclasses
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from jdsi.errors import CheckpointError

PAGE = 4096
_CHUNK = 16 << 20
_LEAST_CHUNK = 1 << 20
_THREADS = 4  # with chunks of 16 MiB: the fewest that kept an NVMe disk at its limit


class PageBuffer:
    """Page-aligned anonymous memory, touched once: fresh pages cost more than reading into them.

    Attributes:
        bytes: the memory, a writable array of uint8.
    """

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.frombuffer(mmap.mmap(-1, max(PAGE, round_up(nbytes))), np.uint8)
        self.bytes[::PAGE] = 0


def round_up(nbytes: int, to: int = PAGE) -> int:
    """The next multiple of `to`."""
    return -(-nbytes // to) * to


@dataclasses.dataclass(frozen=True)
class Segment:
    """Bytes of a file and where they go.

    Attributes:
        file: the file.
        offset, nbytes: the bytes in it.
        target: first byte in the destination.
    """

    file: Path
    offset: int
    nbytes: int
    target: int


class DirectReader:
    """Reads segments with O_DIRECT from a small pool of threads; buffered, with the cache dropped, where refused.

    Args:
        threads: of the pool.
        known: what `identity` said of files, which must still be those when they are first read.

    Attributes:
        bytes_read: bytes asked of the files so far, alignment included.
        direct: whether the page cache is avoided for every file opened so far.
    """

    def __init__(self, threads: int = _THREADS, *, known: Mapping[Path, tuple[int, ...]] | None = None) -> None:
        self._known, self._threads = known or {}, threads
        self.bytes_read = 0
        self.direct = True
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._bounce = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="jdsi-read")

    def read(self, segments: Iterable[Segment], out: np.ndarray) -> None:
        """Fills the segments' targets in `out` (uint8, page-aligned, its size a multiple of `PAGE`).

        Raises:
            CheckpointError: a file is absent, ends early, fails, or is not the one that was read before.
        """
        self.start(segments, out)()

    def start(self, segments: Iterable[Segment], out: np.ndarray) -> Callable[[], None]:
        """As `read`, but returns at once, with what waits for the end. Several may be under way.

        Raises:
            CheckpointError: as `read`; also what it returns does, once nothing writes to `out` any more.
        """
        segments = list(segments)
        size = _CHUNK
        if len(segments) < self._threads:  # small reads are cut finer, for every thread to have a part
            share = -(-sum(s.nbytes for s in segments) // self._threads)
            size = min(size, max(_LEAST_CHUNK, round_up(share)))
        chunks = [
            Segment(s.file, s.offset + start, min(size, s.nbytes - start), s.target + start)
            for s in segments
            for start in range(0, s.nbytes, size)
        ]
        files = [self._open(path) for path in {chunk.file for chunk in chunks}]
        for file in files:
            file.same.check()
        jobs = [self._pool.submit(self._read_chunk, chunk, out) for chunk in chunks]

        def finish() -> None:
            wait(jobs)
            for job in jobs:
                job.result()
            for file in files:  # while they were read
                file.same.check()

        return finish

    def close(self) -> None:
        """Closes the files; reads in progress finish first."""
        self._pool.shutdown()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, path: Path) -> "_File":
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path, self._known.get(path))
            return self._files[path]

    def _read_chunk(self, chunk: Segment, out: np.ndarray) -> None:
        file = self._open(chunk.file)
        target = out[chunk.target : chunk.target + chunk.nbytes]
        first = chunk.offset // PAGE * PAGE
        span = round_up(chunk.offset + chunk.nbytes - first)
        if not file.direct:
            count = file.read(target, chunk.offset, chunk.nbytes)
        elif first == chunk.offset and chunk.target % PAGE == 0 and chunk.nbytes % PAGE == 0:
            count = file.read(target, first, chunk.nbytes)
        else:
            if not hasattr(self._bounce, "buffer"):
                self._bounce.buffer = PageBuffer(_CHUNK + 2 * PAGE).bytes
            skip = chunk.offset - first
            count = file.read(self._bounce.buffer[:span], first, skip + chunk.nbytes)
            np.copyto(target, self._bounce.buffer[skip : skip + chunk.nbytes])
        with self._lock:
            self.bytes_read += count
            self.direct &= file.direct


class SameFile:
    """Tells whether a path still leads to the file that was opened, and nobody wrote to that.

    Args:
        path: of the file.
        descriptor: it is open as.
        known: what `identity` said of it before it was opened, if it was asked.

    Raises:
        CheckpointError: it is another one than was known.
    """

    def __init__(self, path: Path, descriptor: int, known: tuple[int, ...] | None) -> None:
        found = _identity(os.fstat(descriptor))
        self._path, self._identity = path, found if known is None else known
        if found != self._identity:
            raise CheckpointError(f"{path} was changed or replaced after it was opened; start again")

    def check(self) -> None:
        """Raises CheckpointError if it does not."""
        try:
            now = identity(self._path)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read any more: {error.strerror}") from error
        if now != self._identity:
            raise CheckpointError(f"{self._path} was changed or replaced while it is being read; start again")


class _File:
    def __init__(self, path: Path, known: tuple[int, ...] | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self.direct = hasattr(os, "O_DIRECT")
            self._descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            self.direct = False  # a file system without O_DIRECT, such as tmpfs
            self._descriptor = os.open(path, flags)
        try:
            self.same = SameFile(path, self._descriptor, known)
        except CheckpointError:
            os.close(self._descriptor)
            raise

    def read(self, out: np.ndarray, offset: int, needed: int) -> int:
        """Fills `out` from `offset`, at least its first `needed` bytes; the file may end behind those."""
        done = 0
        while done < needed:
            direct = self.direct  # other threads may be finding out that it is refused
            try:
                count = os.preadv(self._descriptor, [out[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._fall_back()
                    continue
                raise CheckpointError(f"{self.path}: reading at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} ends at byte {offset + done}; it was cut short")
            done += count
            if direct and done < needed and done % PAGE:
                done -= done % PAGE  # O_DIRECT goes on from a whole page
                if count < PAGE:
                    raise CheckpointError(f"{self.path} ends at byte {offset + done + count}; it was cut short")
        if not self.direct:
            os.posix_fadvise(self._descriptor, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def _fall_back(self) -> None:
        """Opens without O_DIRECT: some file systems refuse it only when read from."""
        with self._lock:
            if self.direct:
                replacement = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(replacement, self._descriptor, inheritable=False)
                os.close(replacement)
                self.direct = False

    def close(self) -> None:
        os.close(self._descriptor)


def identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    return _identity(os.stat(path))


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

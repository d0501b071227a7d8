"""One unnamed file for what does not fit into memory."""

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from jdsi.converters.direct_io import PAGE, round_up
from jdsi.errors import CapacityError, ConfigError, JdsiError

_CHUNK = 16 << 20
_THREADS = 4  # as many as `DirectReader` has
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Pieces = Sequence[tuple[int, np.ndarray]]
"""Offsets in the file and the memory (page-aligned uint8, of whole pages) that goes there or comes from there."""


class SpillFile:
    """A file without a name, so that nothing is left of it when the process ends, however it ends.

    Ranges of it are reserved on disk before they are used, and used again once they are freed. It is read and written
    with O_DIRECT, or through the page cache, which then drops what was read, where the file system has no O_DIRECT.
    All methods may be called from several threads.

    Args:
        folder: where it lies.

    Attributes:
        size: bytes it takes on disk.
        direct: whether the page cache is avoided.

    Raises:
        ConfigError: `folder` is absent or not writable.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self.size, self.direct = Path(folder), 0, False
        self._descriptor = _unnamed(self.folder)
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):
                self._set_direct(True)
        self._free: list[tuple[int, int]] = []  # (start, stop), ascending, none touching another
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="jdsi-spill")

    def reserve(self, sizes: Sequence[int]) -> list[int]:
        """Offsets of ranges of these many bytes, each from a page's beginning; their contents may be anything.

        Raises:
            CapacityError: the disk is full; nothing was reserved.
            JdsiError: the file is closed.
        """
        with self._lock:
            if self._descriptor < 0:
                raise JdsiError(f"the spill file in {self.folder} is closed")
            free, offsets, size = list(self._free), [], self.size
            for wanted in map(round_up, sizes):
                index = next((i for i, (start, stop) in enumerate(free) if stop - start >= wanted), None)
                if index is None:
                    offsets.append(size)
                    size += wanted
                else:
                    start, stop = free[index]
                    offsets.append(start)
                    free[index : index + 1] = [(start + wanted, stop)] if stop - start > wanted else []
            if size > self.size:
                self._grow(size)
            self._free, self.size = free, size
            return offsets

    def free(self, offset: int, nbytes: int) -> None:
        """Lets a range be reserved again."""
        with self._lock:
            merged: list[tuple[int, int]] = []
            for start, stop in sorted([*self._free, (offset, offset + round_up(nbytes))]):
                if merged and merged[-1][1] == start:
                    start = merged.pop()[0]
                merged.append((start, stop))
            self._free = merged

    def read(self, pieces: Pieces) -> None:
        """Fills the memory.

        Raises:
            JdsiError: the file cannot be read.
        """
        self._run(self._read, pieces)

    def write(self, pieces: Pieces) -> None:
        """Writes the memory to the file.

        Raises:
            CapacityError: the disk is full, in spite of the reservation.
            JdsiError: the file cannot be written.
        """
        self._run(self._write, pieces)

    def close(self) -> None:
        """Gives the disk's space back; reads and writes under way finish first. The second time does nothing."""
        self._pool.shutdown()
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _grow(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, self.size, size - self.size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)  # what it got before the disk was full
            if error.errno not in _FULL:
                raise ConfigError(f"{self.folder} cannot hold a spill file: {error.strerror}") from error
            disk = os.fstatvfs(self._descriptor)  # the folder may be gone
            raise CapacityError(
                f"keys and values need {size - self.size} bytes in {self.folder},"
                f" {disk.f_bavail * disk.f_frsize} are free ({error.strerror})"
            ) from error

    def _run(self, move: Callable[[int, np.ndarray], None], pieces: Pieces) -> None:
        chunks = [
            (offset + start, memory[start : start + _CHUNK])
            for offset, memory in pieces
            for start in range(0, memory.nbytes, _CHUNK)
        ]
        try:
            jobs = [self._pool.submit(move, *chunk) for chunk in chunks]
        except RuntimeError as error:
            # Or no thread can be started. Before it ends, the pool does all that it has, that which it has just refused
            # to give a future of too.
            self._pool.shutdown()
            raise JdsiError(f"the spill file in {self.folder} is closed: {error}") from error
        wait(jobs)  # all of them, for the memory is free to be used again once this has failed
        for job in jobs:
            job.result()

    def _read(self, offset: int, memory: np.ndarray) -> None:
        self._move(os.preadv, "reading", offset, memory)
        if not self.direct:
            os.posix_fadvise(self._descriptor, offset, memory.nbytes, os.POSIX_FADV_DONTNEED)

    def _write(self, offset: int, memory: np.ndarray) -> None:
        self._move(os.pwritev, "writing", offset, memory)

    def _move(
        self, call: Callable[[int, list[np.ndarray], int], int], what: str, offset: int, memory: np.ndarray
    ) -> None:
        done = 0
        while done < memory.nbytes:
            direct = self.direct  # other threads may be finding out that it is refused
            where = f"the spill file in {self.folder}: {what} at byte {offset + done}"
            try:
                count = call(self._descriptor, [memory[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:  # some file systems refuse it only now
                    self._set_direct(False)
                    continue
                kind = CapacityError if error.errno in _FULL else JdsiError
                raise kind(f"{where}: {error.strerror}") from error
            if direct:
                count -= count % PAGE  # O_DIRECT goes on from a whole page
            if count == 0:
                raise JdsiError(f"{where}: nothing went through; it was cut short, or its disk fails")
            done += count

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
        self.direct = direct


def _unnamed(folder: Path) -> int:
    """A descriptor of a new file that has no name, or none any more."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        if hasattr(os, "O_TMPFILE"):
            try:
                return os.open(folder, flags | os.O_TMPFILE, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
        descriptor, path = tempfile.mkstemp(prefix=".jdsi-spill-", dir=folder)
        os.unlink(path)
        return descriptor
    except OSError as error:
        raise ConfigError(f"no spill file can be made in {folder}: {error.strerror}") from error

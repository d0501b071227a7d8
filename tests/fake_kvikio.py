"""A module in kvikio's place: it reads files into the memory of JAX's CPU devices, which is the process's own.

What real futures and files would do with undefined results is an error here: a future that is asked twice, a file that
is closed while it is read from.
"""

import ctypes
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest


class FakeKvikio(types.ModuleType):
    """See the module.

    Attributes:
        reads: file, offset, size and address of those that were begun.
        open_files: that are not closed yet.
        writing: reads that are not over.
        before_read: called with file and offset by the thread that reads, before it does; may raise or wait.
        on_submit: the same, by the thread that asks.
    """

    def __init__(self) -> None:
        super().__init__("kvikio")
        self.reads: list[tuple[str, int, int, int]] = []
        self.open_files: set[CuFile] = set()
        self.writing = 0
        self.before_read: Callable[[str, int], object] = lambda file, offset: None
        self.on_submit: Callable[[str, int], object] = lambda file, offset: None
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="fake-kvikio")

    def CuFile(self, file: str, flags: str = "r") -> "CuFile":
        """Opens a file."""
        return CuFile(self, file, flags)


class CuFile:
    """A file; the part of kvikio's class of that name that is used."""

    def __init__(self, module: FakeKvikio, file: str, flags: str) -> None:
        assert flags == "r"
        self._module, self._file, self._reading = module, file, 0
        self._descriptor = os.open(file, os.O_RDONLY)
        module.open_files.add(self)

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def pread(self, buf: Any, size: int, file_offset: int, task_size: int) -> "IOFuture":
        """Begins to read."""
        interface = buf.__cuda_array_interface__
        assert (interface["shape"], interface["typestr"], interface["strides"]) == ((size,), "|u1", None)
        address, read_only = interface["data"]
        assert not read_only
        assert 0 < size <= task_size  # else the future could fail before everything is written
        self._module.on_submit(self._file, file_offset)
        with self._module.lock:
            self._module.reads.append((self._file, file_offset, size, address))
            self._module.writing += 1
            self._reading += 1
        return IOFuture(self._module.pool.submit(self._read, address, size, file_offset))

    def _read(self, address: int, size: int, offset: int) -> int:
        try:
            self._module.before_read(self._file, offset)
            found = os.pread(self._descriptor, size, offset)
            ctypes.memmove(address, found, len(found))
            return len(found)
        finally:
            with self._module.lock:
                self._module.writing -= 1
                self._reading -= 1

    def close(self) -> None:
        """Closes it."""
        assert not self._reading, "closed while it is read from"
        os.close(self._descriptor)
        self._module.open_files.remove(self)


class IOFuture:
    """A read on its way."""

    def __init__(self, job: "Future[int]") -> None:
        self._job: Future[int] | None = job

    def get(self) -> int:
        """Waits, and gives the bytes read; only once."""
        job, self._job = self._job, None
        assert job is not None, "a future was asked twice"
        return job.result()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKvikio]:
    """A fixture's: the module in kvikio's place during a test, which must leave no file open."""
    module = FakeKvikio()
    monkeypatch.setitem(sys.modules, "kvikio", module)
    yield module
    module.pool.shutdown()
    assert not module.open_files

"""Slabs in host memory and in a file without a name: contents, room, and every way a disk can disappoint."""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdsi.converters.direct_io import PAGE, PageBuffer
from jdsi.errors import CapacityError, ConfigError, JdsiError
from jdsi.runtime import pinned
from jdsi.runtime.kv_offload import spill_file
from jdsi.runtime.kv_offload.slabs import FileSlabs, HostSlabs, SlabHome
from jdsi.runtime.kv_offload.spill_file import SpillFile
from jdsi.runtime.pinned import PinnedPages, pin

SHAPES = [(128, 3, 2, 5), (256, 3, 1, 8), (128, 3, 4, 16)]
BFLOAT16 = np.dtype(jnp.bfloat16)


@pytest.fixture(params=["host", "file", "file through the cache"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    home = HostSlabs() if request.param == "host" else FileSlabs(tmp_path)
    if request.param == "file through the cache":
        home.file._set_direct(False)
    yield home
    home.close()


def put(home: SlabHome, slab: Any, lengths: np.ndarray, new: np.ndarray, rng: np.random.Generator) -> dict:
    """Saves random new slots; what they should read as."""
    (memory,) = home.load([slab], int(lengths.max()))
    found = {}
    for row, (first, count) in enumerate(zip(lengths, new, strict=True)):
        for slot in range(first, first + count):
            memory[slot, row] = rng.standard_normal(memory.shape[2:]).astype(memory.dtype)
            found[slot, row] = memory[slot, row].copy()
    home.save([slab], [memory], lengths, new)
    home.release([memory])
    return found


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16])
def test_what_is_saved_is_loaded(home: SlabHome, dtype: np.dtype) -> None:
    rng, slabs = np.random.default_rng(0), home.allocate(SHAPES, dtype)
    expected: list[dict] = [{} for _ in slabs]
    lengths = np.zeros(3, np.int64)
    for _ in range(12):
        new = rng.integers(0, 11, 3)
        for slab, slots in zip(slabs, expected, strict=True):
            slots |= put(home, slab, lengths, new, rng)
        lengths += new
        memories = home.load(slabs, int(lengths.max()))
        for memory, shape, slots in zip(memories, SHAPES, expected, strict=True):
            assert memory.shape[0] >= shape[0]
            assert memory.shape[1:] == shape[1:]
            assert memory.ctypes.data % PAGE == 0
            for (slot, row), value in slots.items():
                assert memory[slot, row].tobytes() == value.tobytes()
        home.release(memories)


def test_room_is_used_again(home: SlabHome) -> None:
    first = home.allocate(SHAPES, BFLOAT16)
    places = [slab.place if isinstance(slab.place, int) else slab.place.ctypes.data for slab in first]
    size = home.file.size if isinstance(home, FileSlabs) else 0
    home.free(first)
    del first
    again = home.allocate(SHAPES, BFLOAT16)
    assert sorted(slab.place if isinstance(slab.place, int) else slab.place.ctypes.data for slab in again) == sorted(
        places
    )
    assert size == (home.file.size if isinstance(home, FileSlabs) else 0)


def test_only_what_is_needed_is_read_and_written(tmp_path: Path) -> None:
    home = FileSlabs(tmp_path)
    (slab,) = home.allocate([(1024, 4, 8, 16)], np.dtype(np.float32))  # a row's slot is 512 bytes, two slots a page
    (memory,) = home.load([slab], 0)
    assert home.bytes_read == 0
    memory[:] = 1
    home.save([slab], [memory], np.zeros(4, int), np.array([100, 90, 100, 3]))
    assert home.bytes_written == 50 * PAGE
    home.release([memory])
    (memory,) = home.load([slab], 100)
    assert home.bytes_read == 50 * PAGE
    home.save([slab], [memory], np.array([100, 90, 100, 3]), np.ones(4, int))
    assert home.bytes_written == (50 + 3) * PAGE  # slots 100, 90 and 3
    home.release([memory])
    home.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE)), max_size=24))
def test_ranges_never_overlap(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]]) -> None:
    file = SpillFile(tmp_path_factory.getbasetemp())
    held: list[tuple[int, int]] = []
    for reserve, size in steps:
        if reserve or not held:
            held += zip(file.reserve([size, PAGE]), [size, PAGE], strict=True)
        else:
            file.free(*held.pop(size % len(held)))
        pages = [page for offset, n in held for page in range(offset // PAGE, -(-(offset + n) // PAGE))]
        assert len(pages) == len(set(pages))
        assert all(offset % PAGE == 0 and offset + size <= file.size for offset, size in held)
        assert os.fstat(file._descriptor).st_blocks * 512 >= file.size
    for offset, size in held:
        file.free(offset, size)
    assert file._free == ([(0, file.size)] if file.size else [])
    file.close()


def test_a_full_disk_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = FileSlabs(tmp_path)
    home.allocate([(128, 1, 1, 8)], np.dtype(np.float32))

    fallocate = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        fallocate(descriptor, offset, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(CapacityError, match=rf"need 8192 bytes in {tmp_path}, \d+ are free"):
            home.allocate([(128, 1, 1, 8)] * 2, np.dtype(np.float32))
    assert home.file.size == os.fstat(home.file._descriptor).st_size == PAGE
    with pytest.raises(CapacityError, match="bytes in"):
        home.allocate([(1 << 40, 1, 1, 8)], np.dtype(np.float32))
    assert os.fstat(home.file._descriptor).st_size == PAGE
    home.allocate([(128, 1, 1, 8)], np.dtype(np.float32))
    home.close()


def test_a_full_disk_is_known_where_its_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cleaned up"
    folder.mkdir()
    file = SpillFile(folder)
    folder.rmdir()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=rf"need 4096 bytes in {folder}, \d+ are free"):
        file.reserve([PAGE])
    file.close()


@pytest.mark.parametrize(
    ("call", "error", "kind", "message"),
    [
        ("preadv", errno.EIO, JdsiError, "reading at byte 0: Input/output error"),
        ("pwritev", errno.EIO, JdsiError, "writing at byte 0: Input/output error"),
        ("pwritev", errno.ENOSPC, CapacityError, "writing at byte 0: No space left"),
    ],
)
def test_a_failing_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, kind: type, message: str
) -> None:
    file, memory = SpillFile(tmp_path), PageBuffer(PAGE).bytes
    (offset,) = file.reserve([PAGE])

    def fail(*_: Any) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind, match=rf"the spill file in {tmp_path}: {message}") as caught:
        (file.read if call == "preadv" else file.write)([(offset, memory)])
    assert type(caught.value) is kind
    file.close()


def fill_late(buffers: list[np.ndarray]) -> int:
    """A part of a read that is slow."""
    time.sleep(0.2)
    buffers[0][:] = 9
    return buffers[0].size


def check_failed_read_is_over(file: SpillFile, match: str) -> None:
    memory = PageBuffer(3 * PAGE).bytes
    with pytest.raises(JdsiError, match=match):
        file.read([(0, memory)])
    then = memory.copy()
    time.sleep(0.6)  # three parts, one behind another
    np.testing.assert_array_equal(memory, then)
    file.close()


def test_a_read_that_failed_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory goes to others, in which a part that was still being read would appear."""

    def read(descriptor: int, buffers: list[np.ndarray], offset: int) -> int:
        if offset == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fill_late(buffers)

    monkeypatch.setattr(spill_file, "_CHUNK", PAGE)
    monkeypatch.setattr(os, "preadv", read)
    check_failed_read_is_over(SpillFile(tmp_path), "reading at byte 0")


def test_a_read_without_a_thread_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where the system has no thread for a part that was asked for already."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if file._pool._threads and thread.name.startswith("jdsi-spill"):
            raise RuntimeError("can't start new thread")
        start(thread)

    file = SpillFile(tmp_path)
    monkeypatch.setattr(spill_file, "_CHUNK", PAGE)
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: fill_late(buffers))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    check_failed_read_is_over(file, "can't start new thread")


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    file, data = SpillFile(tmp_path), np.random.default_rng(0).integers(0, 256, 6 * PAGE, np.uint8)
    if not direct:
        file._set_direct(False)
    source, target = PageBuffer(data.size).bytes, PageBuffer(data.size).bytes
    source[:] = data
    (offset,) = file.reserve([data.size])
    most = 2 * PAGE if direct else 2 * PAGE + 100
    for name in ("preadv", "pwritev"):
        whole = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, buffers, at, whole=whole: whole(fd, [buffers[0][:most]], at))
    monkeypatch.setattr(spill_file, "_CHUNK", 5 * PAGE)
    file.write([(offset, source)])
    file.read([(offset, target)])
    np.testing.assert_array_equal(target, data)
    os.ftruncate(file._descriptor, 3 * PAGE)
    with pytest.raises(JdsiError, match=f"reading at byte {3 * PAGE}: nothing went through; it was cut short"):
        file.read([(offset, target)])
    file.close()
    file.close()
    with pytest.raises(JdsiError, match="is closed"):
        file.read([(offset, target)])


def test_where_direct_reading_is_refused_it_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memory = SpillFile(tmp_path), PageBuffer(PAGE).bytes
    if not file.direct:
        pytest.skip("this file system has no O_DIRECT")
    write = os.pwritev

    def refuse(descriptor: int, *rest: Any) -> int:
        if file.direct:
            raise OSError(errno.EINVAL, "not aligned enough")
        return write(descriptor, *rest)

    monkeypatch.setattr(os, "pwritev", refuse)
    file.reserve([PAGE])
    memory[:] = 7
    file.write([(0, memory)])
    memory[:] = 0
    file.read([(0, memory)])
    assert (memory == 7).all()
    assert not file.direct
    file.close()


def test_a_closed_file_reserves_nothing(tmp_path: Path) -> None:
    file = SpillFile(tmp_path)
    file.free(*file.reserve([PAGE]), PAGE)
    file.close()
    for size in (PAGE, 2 * PAGE):
        with pytest.raises(JdsiError, match=f"the spill file in {tmp_path} is closed") as caught:
            file.reserve([size])
        assert type(caught.value) is JdsiError


def test_slabs_of_two_sizes_are_loaded_by_two_threads(tmp_path: Path) -> None:
    """One learns the largest size so far, and tells its own only when the other has told a larger one."""
    asked, told, late = threading.Event(), threading.Event(), threading.Event()

    class Slow(FileSlabs):
        found = 0

        @property
        def _largest(self) -> int:
            if threading.current_thread() is other:
                found = self.found
                asked.set()
                told.wait(0.3)
                return found
            if told.is_set():
                late.wait(0.3)
            return self.found

        @_largest.setter
        def _largest(self, value: int) -> None:
            self.found = value
            if threading.current_thread() is other:
                late.set()
            elif value:
                told.set()

    other = threading.Thread(target=lambda: home.release(home.load(slabs[:1], 0)))
    home = Slow(tmp_path)
    slabs = home.allocate([(128, 1, 1, 8), (128, 1, 64, 8)], np.dtype(np.float32))
    other.start()
    assert asked.wait(10)
    (memory,) = home.load(slabs[1:], 0)
    assert memory.shape == slabs[1].shape
    other.join()
    assert home.found == slabs[1].nbytes
    home.close()


def test_what_two_threads_move_is_counted(home: SlabHome) -> None:
    """One stands in the middle of it while the other goes through."""
    slabs = home.allocate(SHAPES[:1], np.dtype(np.float32))
    others = home.allocate(SHAPES[:1], np.dtype(np.float32))
    memories, lengths = home.load(slabs, 0), np.zeros(3, int)

    class Halted(np.ndarray):
        def sum(self, *arguments: Any, **options: Any) -> Any:
            other = threading.Thread(target=save, args=(others, np.ones(3, int)))
            other.start()
            other.join()
            return super().sum(*arguments, **options)

    def save(slabs: Any, new: np.ndarray) -> None:
        home.save(slabs, memories, lengths, new)

    save(others, np.ones(3, int))
    once = home.bytes_written
    save(slabs, np.ones(3, int).view(Halted))
    assert home.bytes_written == 3 * once


def test_folders_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"no spill file can be made in {tmp_path / 'absent'}: No such file"):
        SpillFile(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no spill file can be made in /proc"):
        SpillFile("/proc")

    def deny(*_: Any) -> int:  # the superuser may write everywhere
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(ConfigError, match=f"{tmp_path}: Permission denied"):
        SpillFile(tmp_path)


def test_without_unnamed_files_the_name_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    home = FileSlabs(tmp_path)
    rng, (slab,) = np.random.default_rng(0), home.allocate(SHAPES[:1], BFLOAT16)
    assert put(home, slab, np.zeros(3, int), np.full(3, 5), rng)
    assert not list(tmp_path.iterdir())
    home.close()


CRASH = """
import os, signal, sys
import numpy as np
from jdsi.runtime.kv_offload.slabs import FileSlabs
home = FileSlabs(sys.argv[1])
(slab,) = home.allocate([(1024, 4, 8, 16)], np.dtype(np.float32))
(memory,) = home.load([slab], 0)
home.save([slab], [memory], np.zeros(4, int), np.full(4, 1024))
print(home.file.size, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout) > 0
    assert not list(tmp_path.iterdir())


def test_host_memory_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    home = HostSlabs()
    monkeypatch.setattr(pinned, "available_host_memory", lambda: 10_000)
    with pytest.raises(CapacityError, match="need 16384 bytes of host memory, 10000 are free"):
        home.allocate([(128, 1, 4, 8)], np.dtype(np.float32))


class FakeClient:
    """A backend that pins, or not."""

    platform = "cuda"

    def __init__(self, error: Exception | None = None) -> None:
        self.mapped: dict[int, int] = {}
        self.error = error

    def dma_map(self, address: int, size: int) -> None:
        if self.error is not None:
            raise self.error
        self.mapped[address] = size

    def dma_unmap(self, address: int) -> None:
        del self.mapped[address]


def use(monkeypatch: pytest.MonkeyPatch, client: Any) -> Any:
    device = type("Device", (), {"client": client})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    return client


def test_memory_is_pinned_while_a_view_of_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    client = use(monkeypatch, FakeClient())
    memory = PageBuffer(3 * PAGE).bytes
    address = memory.ctypes.data
    view = pin(memory)[PAGE:].view(np.float32).reshape(2, -1)[1:]
    del memory
    gc.collect()
    assert client.mapped == {address: 3 * PAGE}
    view[:] = 1  # writable
    del view
    gc.collect()
    assert not client.mapped
    pages = PinnedPages()
    pages.give(pages.take([PAGE, PAGE]))
    assert len(client.mapped) == 2
    pages.take([2 * PAGE])  # which replaces what nobody asks for
    assert not client.mapped


def test_where_nothing_can_be_pinned_memory_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PageBuffer(PAGE).bytes
    assert pin(memory) is memory  # on the CPU
    for error in (NotImplementedError(), jax.errors.JaxRuntimeError("UNIMPLEMENTED: DmaMap is not supported.")):
        use(monkeypatch, FakeClient(error))
        assert pin(memory) is memory
    use(monkeypatch, FakeClient(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much is locked")))
    with pytest.warns(RuntimeWarning, match="4096 bytes of host memory cannot be pinned"):
        assert pin(memory) is memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(monkeypatch, type("Old", (), {"platform": "cuda"})())
        assert pin(memory) is memory

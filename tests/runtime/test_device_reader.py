"""Reading files to addresses, with a stand-in for kvikio: every alignment, every way to fail, and what happens then."""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_kvikio import FakeKvikio, stand_in
from jdsi.converters.direct_io import PAGE, Segment, identity
from jdsi.errors import CheckpointError, JdsiError
from jdsi.runtime import device_reader
from jdsi.runtime.device_reader import DeviceReader
from jdsi.runtime.gpu_direct import within

SIZE = 5 * PAGE + 123


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKvikio]:
    yield from stand_in(monkeypatch)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), min_size=1, max_size=4), st.data())
def test_segments_land_where_they_belong(
    kvikio: FakeKvikio, tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]], data: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "segments"
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    if not file.exists():
        file.write_bytes(content.tobytes())
    segments, target = [], 0
    for a, b in ranges:
        segments.append(Segment(file, min(a, b), abs(a - b), target))
        target += abs(a - b) + 7
    expected = np.full(target, 99, np.uint8)
    for s in segments:
        expected[s.target : s.target + s.nbytes] = content[s.offset : s.offset + s.nbytes]
    start = data.draw(st.integers(0, target))
    stop = data.draw(st.integers(start, target))
    memory = np.full(stop - start, 99, np.uint8)
    kvikio.reads.clear()
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(DeviceReader(known={})) as reader:
        patch.setattr(device_reader, "_CHUNK", PAGE)
        reads = [
            Segment(s.file, s.offset, s.nbytes, memory.ctypes.data + s.target)
            for s in within(segments, start, stop - start)
        ]
        reader.start(reads, memory)()
    np.testing.assert_array_equal(memory, expected[start:stop])
    assert all(offset // PAGE == (offset + size - 1) // PAGE for _, offset, size, _ in kvikio.reads)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def start(reader: DeviceReader, file: Path, size: int = 4 * PAGE) -> tuple[np.ndarray, Any]:
    memory = np.zeros(size, np.uint8)
    return memory, reader.start([Segment(file, 0, size, memory.ctypes.data)], memory)


def test_all_is_written_before_an_error_is_raised(
    file: Path, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_reader, "_CHUNK", PAGE)
    go_on = threading.Event()

    def disappoint(path: str, offset: int) -> None:
        if offset == 0:
            raise RuntimeError("cuFile error 5030")
        assert go_on.wait(60)

    kvikio.before_read = disappoint
    with contextlib.closing(DeviceReader(known={})) as reader:
        memory, finish = start(reader, file)
        later = threading.Timer(0.3, go_on.set)
        later.start()
        with pytest.raises(CheckpointError, match=r"data: reading at byte 0: cuFile error 5030"):
            finish()
        assert go_on.is_set()
        assert kvikio.writing == 0
        assert memory[PAGE:].tobytes() == file.read_bytes()[PAGE : 4 * PAGE]
        later.join()


def test_an_error_of_asking_is_raised_when_waiting(
    file: Path, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_reader, "_CHUNK", PAGE)

    def refuse(path: str, offset: int) -> None:
        if offset >= PAGE:
            raise OSError(f"no more threads at {offset}")

    kvikio.on_submit = refuse
    with contextlib.closing(DeviceReader(known={})) as reader:
        _, finish = start(reader, file)
        with pytest.raises(CheckpointError, match=r"data: reading at byte 4096: no more threads at 4096"):
            finish()
        assert kvikio.writing == 0


def test_a_file_that_ends_early(file: Path, kvikio: FakeKvikio) -> None:
    go_on = threading.Event()
    kvikio.before_read = lambda path, offset: go_on.wait(60)
    with contextlib.closing(DeviceReader(known={})) as reader:
        _, finish = start(reader, file)
        os.truncate(file, 5000)
        go_on.set()
        with pytest.raises(CheckpointError, match=r"data ends at byte 5000; it was cut short"):
            finish()


def test_a_file_that_is_changed_or_replaced(file: Path, tmp_path: Path, kvikio: FakeKvikio) -> None:
    known = {file: identity(file)}
    with contextlib.closing(DeviceReader(known=known)) as reader:
        start(reader, file)[1]()
        _, finish = start(reader, file)
        os.utime(file, ns=(1, 1))
        for attempt in (finish, lambda: start(reader, file)):  # while it is read, and before
            with pytest.raises(CheckpointError, match=r"data was changed or replaced while it is being read"):
                attempt()
        file.unlink()
        with pytest.raises(CheckpointError, match=r"data cannot be read any more"):
            start(reader, file)
    with contextlib.closing(DeviceReader(known=known)) as reader:
        with pytest.raises(CheckpointError, match=r"data cannot be read: .*No such file"):
            start(reader, file)
        (tmp_path / "other").write_bytes(bytes(4 * PAGE))
        os.replace(tmp_path / "other", file)
        with pytest.raises(CheckpointError, match=r"data was changed or replaced after it was opened"):
            start(reader, file)
        assert not kvikio.open_files  # nor is what was opened for nothing left open


def test_closing_waits_for_what_is_written(file: Path, kvikio: FakeKvikio) -> None:
    go_on, began = threading.Event(), threading.Event()

    def slowly(path: str, offset: int) -> None:
        began.set()
        assert go_on.wait(60)
        raise RuntimeError("which nobody hears of")

    kvikio.before_read = slowly
    reader = DeviceReader(known={})
    memory, _ = start(reader, file)
    kept = weakref.ref(memory)
    del memory
    assert began.wait(60)
    closing = threading.Thread(target=reader.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    assert kept() is not None  # or the reads would write to what is somebody else's
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert kvikio.writing == 0
    assert not kvikio.open_files
    with pytest.raises(JdsiError, match="closed"):
        start(reader, file)

"""Reading past the page cache: every alignment, every way a file can disappoint."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdsi.converters import direct_io
from jdsi.converters.direct_io import PAGE, DirectReader, PageBuffer, Segment
from jdsi.errors import CheckpointError

SIZE = 5 * PAGE + 123


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "data"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), min_size=1, max_size=4), st.sampled_from([0, 7]))
def test_segments_land_where_they_belong(file: Path, ranges: list[tuple[int, int]], gap: int) -> None:
    segments, target = [], 0
    for a, b in ranges:
        segments.append(Segment(file, min(a, b), abs(a - b), target))
        target += abs(a - b) + gap
    memory = PageBuffer(target + PAGE).bytes
    memory[:] = 99
    reader = DirectReader(threads=2)
    reader.read(segments, memory)
    reader.close()
    data = np.frombuffer(file.read_bytes(), np.uint8)
    expected = np.full_like(memory, 99)
    for s in segments:
        expected[s.target : s.target + s.nbytes] = data[s.offset : s.offset + s.nbytes]
    np.testing.assert_array_equal(memory, expected)


def test_chunks_and_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "_CHUNK", 2 * PAGE)
    reader, memory = DirectReader(), PageBuffer(SIZE).bytes
    reader.read([Segment(file, 0, SIZE, 0)], memory)
    assert memory[:SIZE].tobytes() == file.read_bytes()
    assert SIZE <= reader.bytes_read <= SIZE + PAGE
    reader.close()


def test_without_o_direct_it_reads_through_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    reader, memory = DirectReader(), PageBuffer(SIZE).bytes
    reader.read([Segment(file, 5, SIZE - 5, 1)], memory)
    assert memory[1 : SIZE - 4].tobytes() == file.read_bytes()[5:]
    assert not reader.direct
    reader.close()


def test_refused_at_the_first_read_it_falls_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, refused = os.preadv, []

    def refuse_once(*arguments: object) -> int:
        if not refused:
            refused.append(1)
            raise OSError(errno.EINVAL, "not aligned enough")
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", refuse_once)
    reader, memory = DirectReader(threads=1), PageBuffer(SIZE).bytes
    reader.read([Segment(file, 0, SIZE, 0)], memory)
    assert memory[:SIZE].tobytes() == file.read_bytes()
    reader.close()


def test_bad_files_are_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PageBuffer(2 * SIZE).bytes
    reader = DirectReader()
    with pytest.raises(CheckpointError, match=f"data ends at byte {SIZE}; it was cut short"):
        reader.read([Segment(file, 100, SIZE, 0)], memory)
    with pytest.raises(CheckpointError, match="absent cannot be read: No such file"):
        reader.read([Segment(tmp_path / "absent", 0, 10, 0)], memory)
    other = tmp_path / "other"
    other.write_bytes(b"x" * 100)
    reader.read([Segment(other, 0, 100, 0)], memory)
    other.write_bytes(b"y" * 100)
    os.utime(other, ns=(1, 1))
    with pytest.raises(CheckpointError, match="other was changed or replaced"):
        reader.read([Segment(other, 0, 100, 0)], memory)
    other.unlink()
    with pytest.raises(CheckpointError, match="other cannot be read any more"):
        reader.read([Segment(other, 0, 100, 0)], memory)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="reading at byte 0: Input/output error"):
        reader.read([Segment(file, 0, 10, 0)], memory)
    reader.close()

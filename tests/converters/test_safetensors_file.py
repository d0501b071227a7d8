"""Our safetensors reader and writer: against the official library, on bad files, and fuzzed."""

import json
import os
import struct
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jdsi.converters import SafetensorsWriter
from jdsi.converters.buffers import BLOCK_BYTES, all_finite
from jdsi.converters.safetensors_file import DTYPES, read_header, read_into
from jdsi.errors import CheckpointError


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int = 0, end: int = 8, *, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(path: Path, name: str, dtype: Any = None, **options: Any) -> np.ndarray:
    info = read_header(path)[0][name]
    rows = options.get("rows")
    shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
    out = np.empty(shape, dtype or info.dtype)
    read_into(info, out, **options)
    return out


def arrays_of_every_type() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for name, dtype in DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 256, (3, 5, dtype.itemsize), dtype=np.uint8)
        arrays[name] = raw.view(dtype).reshape(3, 5)
    return arrays


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_reads_what_the_official_library_writes(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(4, 3, dtype=torch.bfloat16),
        "fp8": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "fp8_wide": torch.randn(4, 3).to(torch.float8_e5m2),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "codes": torch.tensor([-3, 7], dtype=torch.int64),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"made": "here"})
    infos, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"made": "here"}
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = read(tmp_path / "a.safetensors", name)
        assert got.shape == tuple(tensor.shape)
        assert got.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_official_library_reads_what_we_write(tmp_path: Path) -> None:
    arrays = arrays_of_every_type() | {"scalar": np.array(2.5, np.float32), "empty": np.empty((0, 4), np.float16)}
    with SafetensorsWriter(tmp_path / "a.safetensors", {n: (a.dtype, a.shape) for n, a in arrays.items()}) as writer:
        for name in reversed(arrays):
            writer.write(name, arrays[name])
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        for name, array in arrays.items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == array.shape
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    for name, array in arrays.items():
        assert same_bits(read(tmp_path / "a.safetensors", name), array)


def test_writer_takes_strided_arrays_and_pieces(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, {"t": (matrix.dtype, (4, 3)), "p": (matrix.dtype, (12,))}) as writer:
        writer.write("t", matrix.T)
        writer.write_flat("p", 5, matrix.reshape(-1)[5:])
        writer.write_flat("p", 0, matrix.reshape(-1)[:5])
    loaded = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(loaded["t"], matrix.T)
    np.testing.assert_array_equal(loaded["p"], matrix.reshape(-1))


def test_writer_refuses_an_unfinished_file(tmp_path: Path) -> None:
    array = np.ones(4, np.float32)
    with (
        pytest.raises(CheckpointError, match="not fully written: lost"),
        SafetensorsWriter(tmp_path / "a", {"kept": (array.dtype, (4,)), "lost": (array.dtype, (4,))}) as writer,
    ):
        writer.write("kept", array)
    with pytest.raises(CheckpointError, match="complex64"):
        SafetensorsWriter(tmp_path / "b", {"x": (np.dtype(np.complex64), (4,))})


@pytest.mark.parametrize("rows", [(0, 0), (0, 7), (2, 5), (7, 7)])
def test_row_ranges(tmp_path: Path, rows: tuple[int, int]) -> None:
    array = np.random.default_rng(0).standard_normal((7, 3), np.float32)
    safetensors.numpy.save_file({"w": array}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors", "w", rows=rows), array[slice(*rows)])


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2), (0, 8)])
def test_row_ranges_outside_the_tensor(tmp_path: Path, rows: tuple[int, int]) -> None:
    safetensors.numpy.save_file({"w": np.ones((7, 3), np.float32)}, tmp_path / "a.safetensors")
    info = read_header(tmp_path / "a.safetensors")[0]["w"]
    with pytest.raises(ValueError, match="rows"):
        read_into(info, np.empty((2, 3), np.float32), rows=rows)


@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_casts_over_several_blocks(tmp_path: Path, wanted: Any) -> None:
    size = BLOCK_BYTES // 2 + 1001
    array = np.random.default_rng(0).standard_normal(size, np.float32).astype(ml_dtypes.bfloat16)
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, {"w": (array.dtype, array.shape)}) as writer:
        writer.write("w", array)
    blocks: list[int] = []
    got = read(path, "w", wanted, on_block=lambda block: blocks.append(block.size))
    assert same_bits(got, array.astype(wanted))
    assert sum(blocks) == size
    assert len(blocks) > 1


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_blocks_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("jdsi.converters.threads.THREADS", threads)
    monkeypatch.setattr("jdsi.converters.safetensors_file.THREADS", threads)
    monkeypatch.setattr("jdsi.converters.safetensors_file.BLOCK_BYTES", 64 * threads)
    array = np.arange(70 * 3, dtype=np.float32).reshape(70, 3)
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": array, "empty": array[:0], "one": array[:1]}, path)
    for wanted, rows in ((np.float32, None), (np.float16, None), (np.float32, (11, 68)), (np.float32, (4, 4))):
        seen: list[np.ndarray] = []
        running = {threading.current_thread().name}

        def on_block(block: np.ndarray, seen: list[np.ndarray] = seen, running: set[str] = running) -> None:
            running.add(threading.current_thread().name)
            seen.append(block.copy())

        expected = array if rows is None else array[slice(*rows)]
        assert same_bits(read(path, "w", wanted, rows=rows, on_block=on_block), expected.astype(wanted))
        values = np.sort(np.concatenate([np.empty(0, wanted), *seen]))
        assert same_bits(values, expected.astype(wanted).reshape(-1)), "each value is seen once"
        assert len(running) == 1 or (threads > 1 and expected.size)
    assert same_bits(read(path, "empty"), array[:0])
    assert same_bits(read(path, "one"), array[:1])

    info = read_header(path)[0]["w"]
    os.truncate(path, path.stat().st_size - 300)
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="in the middle of the tensor"):
        read_into(info, np.empty(info.shape, np.float32))
    assert threading.active_count() == before


def test_refuses_integers_as_floats(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(3, np.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'w' is stored as int8"):
        read(tmp_path / "a.safetensors", "w", np.float32)


def test_a_file_truncated_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.ones(100, np.float32)}, path)
    info = read_header(path)[0]["w"]
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="in the middle of the tensor"):
        read_into(info, np.empty(100, np.float32))
    with pytest.raises(CheckpointError, match="tensor 'w' ends at byte 400 of the data, which has 390"):
        read_header(path)


GOOD = entry()
BAD_HEADERS: dict[str, tuple[Any, int, str]] = {
    "not JSON": (b"{nope", 0, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not valid JSON"),
    "nested without end": (b"[" * 100_000, 0, "not valid JSON|not an object"),
    "a huge integer": (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', 8, "JSON"),
    "a list": ([], 0, "JSON list"),
    "a duplicate": (b'{"w": {}, "w": {}}', 0, "'w' occurs twice"),
    "an entry that is no object": ({"w": 5}, 0, "'w' is described by a JSON int"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, 8, "'w' lacks dtype"),
    "no shape or offsets": ({"w": {"dtype": "F32"}}, 8, "'w' lacks data_offsets, shape"),
    "an unknown dtype": ({"w": entry(dtype="F31")}, 8, "'w' has dtype 'F31'"),
    "a dtype that is a list": ({"w": entry(dtype=["F32"])}, 8, "'w' has dtype"),
    "a negative shape": ({"w": entry(shape=[-2])}, 8, "'w' has shape"),
    "a fractional shape": ({"w": entry(shape=[2.0])}, 8, "'w' has shape"),
    "a shape of flags": ({"w": entry(shape=[True, 2])}, 8, "'w' has shape"),
    "a shape that is text": ({"w": entry(shape="2")}, 8, "'w' has shape"),
    "a shape of too many axes": ({"w": entry(shape=[1] * 99 + [2])}, 8, "'w' has shape"),
    "a shape beyond any file": ({"w": entry(shape=[0, 2**40, 2**40])}, 0, "larger than any file"),
    "negative offsets": ({"w": entry(-8, 0)}, 8, "'w' has data_offsets"),
    "three offsets": ({"w": GOOD | {"data_offsets": [0, 4, 8]}}, 8, "'w' has data_offsets"),
    "reversed offsets": ({"w": entry(8, 0)}, 8, "'w' has bytes 8 to 0"),
    "a size unlike the shape": ({"w": entry(0, 4)}, 4, "'w' has bytes 0 to 4"),
    "data cut off": ({"w": entry()}, 7, "ends at byte 8 of the data, which has 7"),
    "overlapping tensors": ({"v": entry(), "w": entry(4, 12)}, 12, "'w' starts at byte 4 and overlaps 'v'"),
    "a hole between tensors": ({"v": entry(), "w": entry(12, 20)}, 20, "'w' starts at byte 12 and leaves a hole"),
    "a hole at the start": ({"w": entry(4, 12)}, 12, "leaves a hole from 0"),
    "bytes after the end": ({"w": entry()}, 9, "1 bytes after the last tensor"),
    "metadata that is no object": ({"__metadata__": 3}, 0, "__metadata__"),
    "metadata that is no text": ({"__metadata__": {"a": 3}}, 0, "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    header, size, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [3, 10**8 + 1, 2**40, 2**64 - 1])
def test_bad_header_lengths(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "bad.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_shorter_than_its_length_field(tmp_path: Path, size: int) -> None:
    (tmp_path / "short").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="too short"):
        read_header(tmp_path / "short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A valid file with parts of its header replaced, or with its bytes changed, added or cut off."""
    header: dict[str, Any] = {"__metadata__": {"a": "b"}, "v": entry(0, 8), "w": entry(8, 14, dtype="BF16", shape=[3])}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["v", "w", "x", "__metadata__"]))
        field = draw(st.sampled_from(["", "dtype", "shape", "data_offsets"]))
        value = draw(json_values | st.lists(st.integers(-3, 2**65), max_size=3))
        if field and isinstance(header.get(name), dict):
            header[name][field] = value
        else:
            header[name] = value
    raw = json.dumps(header).encode()
    data = bytearray(struct.pack("<Q", len(raw)) + raw + bytes(14))
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["set", "insert", "cut"]))
        if kind == "set" and data:
            data[position] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[position:position] = draw(st.binary(max_size=9))
        elif kind == "cut":
            del data[position:]
    return bytes(data)


@settings(max_examples=400, deadline=2000)
@given(data=damaged_files() | st.binary(max_size=100))
def test_fuzzed_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        infos, _ = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017 - both outcomes are fine
        return
    # What is accepted lies inside the file, so what it allocates is bounded by the file.
    assert sum(info.nbytes for info in infos.values()) <= len(data)
    for info in infos.values():
        read_into(info, np.empty(info.shape, info.dtype))


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_nan_and_infinity_are_found(name: str) -> None:
    bits = np.arange(256, dtype=np.uint8) if name.startswith("F8") else np.arange(65536, dtype=np.uint16)
    width = DTYPES[name].itemsize
    values = bits.view(DTYPES[name]) if width <= 2 else bits.view(np.float16).astype(DTYPES[name])
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values.astype(np.float64))
    assert all_finite(values[finite])
    for value in np.unique(values[~finite].view(f"u{width}")):
        assert not all_finite(np.array([0, value], f"u{width}").view(DTYPES[name]))
    assert not all_finite(values)

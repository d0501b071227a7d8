"""Safetensors files, read and written in bounded memory.

Our own reader, because a destination must be filled without a second full copy, by row ranges, and for the types
(fp8 among them) that NumPy alone does not know. Format: 8 bytes of little-endian header length, that many bytes of
JSON (name to dtype, shape and byte range), then the tensors back to back.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from jdsi.errors import CheckpointError

from .buffers import BLOCK_BYTES, OnBlock, cast, check_cast
from .mistaken import refuse_pointer
from .threads import THREADS, share_out

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}
"""The format's type names that we read and write."""

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format's own library accepts."""

_LEAST_BLOCK_BYTES = 1 << 20  # for less no second thread is started
_MAX_DIMENSIONS = 32
_MAX_BYTES = 1 << 62
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor of a checkpoint lies.

    Attributes:
        name: its name in the file.
        dtype, shape: as stored.
        file: the file that holds it.
        offset: of its first byte from the start of the file; -1 where the format does not say.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def where(self) -> str:
        """The tensor and its file, for messages."""
        return f"{self.file}: tensor {self.name!r}"


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file, by name in file order, and its metadata. Reads nothing but the header.

    Raises:
        CheckpointError: the file is unreadable, truncated or breaks the format; names the file, the tensor and why.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            refuse_pointer(path, start)
            if len(start) < 8:
                raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: a header of {length} bytes is announced but the file has {size - 8} bytes after the "
                    f"length and a header may have {MAX_HEADER_BYTES}; truncated, or not a safetensors file"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) < length:
        raise CheckpointError(f"{path}: the header ends after {len(raw)} of {length} bytes")
    entries = _parse_json(path, raw)
    metadata = _check_metadata(path, entries.pop("__metadata__", {}))
    tensors = [_check_entry(path, name, entry) for name, entry in entries.items()]
    _check_ranges(path, tensors, size - 8 - length)
    return {
        name: TensorInfo(name, dtype, shape, path, 8 + length + begin) for name, dtype, shape, begin, _ in tensors
    }, metadata


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise CheckpointError(f"{path}: tensor {key!r} occurs twice in the header")
                seen.add(key)
        return table

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(entries).__name__}, not an object")
    return entries


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' must be an object with text values")
    return metadata


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_BYTES


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, np.dtype, tuple[int, ...], int, int]:
    """One tensor of the header as name, type, shape, first and last byte."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by a JSON {type(entry).__name__}, not an object")
    if missing := {"dtype", "shape", "data_offsets"} - entry.keys():
        raise CheckpointError(f"{where} lacks {', '.join(sorted(missing))}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{where} has dtype {kind!r}; readable are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_natural(n) for n in shape):
        raise CheckpointError(f"{where} has shape {shape!r}; wanted are up to {_MAX_DIMENSIONS} integers >= 0")
    if math.prod(n or 1 for n in shape) * DTYPES[kind].itemsize >= _MAX_BYTES:
        raise CheckpointError(f"{where} has shape {shape!r}, larger than any file")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_natural(n) for n in offsets):
        raise CheckpointError(f"{where} has data_offsets {offsets!r}; wanted are two integers >= 0")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != wanted:
        raise CheckpointError(
            f"{where} has bytes {begin} to {end}, {end - begin} in all, but {kind} of shape {shape} takes {wanted}"
        )
    return name, DTYPES[kind], tuple(shape), begin, end


def _check_ranges(path: Path, tensors: list[tuple[str, np.dtype, tuple[int, ...], int, int]], size: int) -> None:
    """The byte ranges must cover the data exactly: no overlap, no hole, nothing past the end."""
    position, previous = 0, "the header"
    for name, _, _, begin, end in sorted(tensors, key=lambda tensor: tensor[3:]):
        where = f"{path}: tensor {name!r}"
        if end > size:
            raise CheckpointError(f"{where} ends at byte {end} of the data, which has {size}; the file is truncated")
        if begin < position:
            raise CheckpointError(f"{where} starts at byte {begin} and overlaps {previous!r}, which ends at {position}")
        if begin > position:
            raise CheckpointError(f"{where} starts at byte {begin} and leaves a hole from {position}")
        position, previous = end, name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to none")


def read_into(
    info: TensorInfo, out: np.ndarray, *, rows: tuple[int, int] | None = None, on_block: OnBlock | None = None
) -> None:
    """Read a tensor, or a range of its rows, into `out`, casting on the way.

    Several threads share large ones. Memory beyond `out`: `BLOCK_BYTES` when a cast is needed, else none.

    Args:
        info: from `read_header`.
        out: C-contiguous array of the tensor's shape (with `rows`, of that many rows) and any type that the casting
            rule (`check_cast`) allows.
        rows: first row and the one after the last, along axis 0.
        on_block: called with every flat block of `out` when it is filled, by any thread and in any order.

    Raises:
        CheckpointError: the file ends early or cannot be read, or the cast is refused.
        ValueError: `out` or `rows` does not fit the tensor.
    """
    check_cast(info.dtype, out.dtype, info.where)
    shape, first = info.shape, 0
    if rows is not None:
        start, stop = rows
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"rows {rows} of {info.where} with shape {info.shape}")
        shape = (stop - start, *info.shape[1:])
        first = start * math.prod(info.shape[1:])
    if out.shape != shape or not out.flags.c_contiguous:
        raise ValueError(f"a C-contiguous array of shape {shape} is needed for {info.where}, not {out.shape}")
    if not out.size:
        return
    flat, itemsize = out.reshape(-1), info.dtype.itemsize
    widest = max(itemsize, out.dtype.itemsize)
    step = min(BLOCK_BYTES // THREADS // widest, max(_LEAST_BLOCK_BYTES // widest, -(-flat.size // THREADS)))
    begins = range(0, flat.size, step)
    # Allocated here: what threads allocate, the C library keeps for each.
    size = (0 if info.dtype == out.dtype else min(THREADS, len(begins)), min(step, flat.size))
    spare = list(np.empty(size, info.dtype))

    def read_blocks(begins: Sequence[int]) -> None:
        scratch = spare.pop() if spare else None
        for begin in begins:
            block = flat[begin : begin + step]
            target = block if scratch is None else scratch[: block.size]
            read_exactly(descriptor, target.view(np.uint8).data, info.offset + (first + begin) * itemsize, info)
            if scratch is not None:
                cast(block, target)
            if on_block is not None:
                on_block(block)

    with opened(info) as descriptor:
        share_out(read_blocks, begins)


@contextlib.contextmanager
def opened(info: TensorInfo) -> Iterator[int]:
    """A descriptor of the tensor's file.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        descriptor = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{info.where} cannot be read: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, target: memoryview, offset: int, info: TensorInfo) -> None:
    """Fill `target`, of bytes, from byte `offset` of the tensor's file.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{info.where} cannot be read at byte {offset + done}: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{info.where}: the file ends at byte {offset + done}, in the middle of the tensor")
        done += count


class SafetensorsWriter:
    """Writes a safetensors file whose tensors arrive one at a time, in any order, none of them kept.

    The header is written first, from the shapes; each tensor then goes to its place. Tensors are laid out by
    falling element size, so that each is aligned. Leaving the `with` block without an error flushes to disk.

    Args:
        path: the file to create; it must not exist.
        tensors: type and shape of every tensor.
        metadata: text to keep in the header.

    Raises:
        CheckpointError: a type the format lacks, or a tensor left unwritten at the end.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        self._infos: dict[str, TensorInfo] = {}
        position = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            if dtype not in _NAMES:
                raise CheckpointError(f"{path}: tensor {name!r} has type {dtype}, which safetensors cannot hold")
            info = TensorInfo(name, dtype, shape, path, position)
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + info.nbytes],
            }
            self._infos[name] = info
            position += info.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._data = 8 + len(raw)
        self._left = {name: info.nbytes for name, info in self._infos.items()}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            self._write_bytes(np.frombuffer(struct.pack("<Q", len(raw)) + raw, np.uint8), 0)
            os.ftruncate(self._descriptor, self._data + position)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a whole tensor of the announced type and shape, of any strides."""
        info = self._infos[name]
        if (array.dtype, array.shape) != (info.dtype, info.shape):
            raise ValueError(f"{info.where}: announced {info.dtype}{info.shape}, given {array.dtype}{array.shape}")
        if array.flags.c_contiguous:
            self.write_flat(name, 0, array.reshape(-1))
            return
        step = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
        for start in range(0, len(array), step):
            block = np.ascontiguousarray(array[start : start + step])
            self.write_flat(name, start * math.prod(array.shape[1:]), block.reshape(-1))

    def write_flat(self, name: str, start: int, values: np.ndarray) -> None:
        """Write consecutive elements of a tensor, from flat index `start`; each element must be written once."""
        info = self._infos[name]
        self._write_bytes(values.view(np.uint8), self._data + info.offset + start * info.dtype.itemsize)
        self._left[name] -= values.nbytes

    def _write_bytes(self, values: np.ndarray, offset: int) -> None:
        done = 0
        while done < values.size:
            done += os.pwrite(self._descriptor, values[done : done + BLOCK_BYTES].data, offset + done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if unwritten := [name for name, count in self._left.items() if count]:
                    raise CheckpointError(f"{self.path}: not fully written: {', '.join(unwritten[:20])}")
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

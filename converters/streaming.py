"""A checkpoint folder laid out for streaming: what a forward pass reads in turn lies in turn, on whole pages.

    DST/jdsi.json           manifest: format and version; per group its place, checksum and parameters; written last
    DST/weights.bin         the groups in the order of a pass, each from a multiple of 4096 bytes
    DST/config.json         the Hugging Face config, as it was
    DST/tokenizer.json ...  tokenizer and generation files, as they were

Inside a group every array starts at a multiple of 128 bytes, so that a group read into page-aligned memory is used
where it lies; arrays of one type lie together. A parameter is one array of its own type, or quantised to two: the
numbers, and the scales that they are multiplied by. Its entry then has the format and the arrays under "quantization",
while "dtype" and "shape" are what it had before. (Version 1 had no quantised parameters.)
"""

import dataclasses
import functools
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np

from jdsi.errors import CheckpointError
from jdsi.models import TransformerSpec, groups_of
from jdsi.models.weight_map import Shape
from jdsi.pallas_kernels.quantized_linear import WeightFormat

from .boxes import Piece, read_boxes, whole
from .buffers import BLOCK_BYTES, aligned_empty, cast, check_cast, is_float
from .config import read_config, read_json
from .direct_io import PAGE
from .manifest import MANIFEST, read_manifest, write_manifest
from .progress import Progress, Silent
from .quantization import StoredArray, StoredMatrix, read_quantized_boxes
from .safetensors_file import TensorInfo
from .sources import ParameterSource, ShareReader, Watch, check_shapes
from .streaming_layout import ALIGNMENT, entry_of, filled, layout

FORMAT = "jdsi-streaming"
VERSION = 2


@dataclasses.dataclass(frozen=True)
class Group:
    """One group in `weights.bin`.

    Attributes:
        offset, nbytes: its bytes in the file.
        crc32: of those bytes.
        offsets: of each parameter inside the group that is not quantised.
    """

    offset: int
    nbytes: int
    crc32: int
    offsets: Mapping[str, int]


def write_streaming(
    source: ParameterSource,
    spec: TransformerSpec,
    folder: Path,
    *,
    dtype: np.dtype | None,
    watch: Watch,
    formats: Mapping[str, WeightFormat] = MappingProxyType({}),
) -> None:
    """Writes every parameter below an existing `folder`, then the manifest.

    Memory: the largest parameter; of quantised ones also their arrays, and the scales of a group.

    Args:
        spec: says what is read together.
        dtype: cast every parameter that is not quantised; `None` keeps each as stored. Quantised ones are made of what
            is stored, not of what it would be cast to.
        watch: sees every block read.
        formats: of the parameters that are to be quantised.

    Raises:
        CheckpointError: a parameter cannot be read, or not be quantised because it holds NaN or infinity.
    """
    table = {}
    with open(folder / "weights.bin", "xb") as file:
        for group, names in groups_of(spec, tuple(source.shapes)).items():
            _pad(file, PAGE)
            start, crc = file.tell(), 0
            slots = layout(list(names), source, dtype, formats)
            for slot, array in filled(slots, source, formats, watch):
                crc = zlib.crc32(_pad(file, ALIGNMENT), crc)
                assert file.tell() - start == slot.array.offset, slot
                crc = _write(file, array, crc)
                del array  # before the next one is read
            table[group] = {
                "offset": start,
                "bytes": file.tell() - start,
                "crc32": crc,
                "parameters": {name: entry_of(name, slots, source, dtype, formats) for name in names},
            }
        _pad(file, PAGE)
        file.flush()
        os.fsync(file.fileno())
    write_manifest(folder, FORMAT, VERSION, groups=table)


def _write(file, array: np.ndarray, crc: int) -> int:
    """Appends an array; returns the checksum so far."""
    raw = array.reshape(-1).view(np.uint8)
    for begin in range(0, raw.size, BLOCK_BYTES):
        piece = raw[begin : begin + BLOCK_BYTES]
        crc = zlib.crc32(piece, crc)
        file.write(piece.data)
    return crc


def _pad(file, to: int) -> bytes:
    zeros = b"\0" * (-file.tell() % to)
    file.write(zeros)
    return zeros


class StreamingCheckpoint(ShareReader):
    """A folder that `write_streaming` made; also a `ParameterSource`.

    Attributes:
        path: the folder.
        file: the weights.
        groups: where each group lies, in the order of a pass.
        shapes, dtypes: of every parameter, by dotted path; of quantised ones, those they had before.
        quantized: how those are stored that are quantised.

    Raises:
        CheckpointError: the manifest or the file is absent, damaged, unfinished or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.label = path, path / "weights.bin", str(path)
        self.groups: dict[str, Group] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.quantized: dict[str, StoredMatrix] = {}
        self._plain: dict[str, StoredArray] = {}
        self._starts: dict[str, int] = {}
        version = read_json(path / MANIFEST).get("version")
        manifest = read_manifest(path, FORMAT, 1 if version == 1 else VERSION)
        try:
            for name, entry in manifest["groups"].items():
                self._add(name, entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST}: damaged: {error!r}") from error
        needed = max((group.offset + group.nbytes for group in self.groups.values()), default=0)
        size = self.file.stat().st_size if self.file.is_file() else None
        if size is None or size < needed:
            found = "is missing" if size is None else f"has {size:,} bytes, {needed:,} are needed"
            raise CheckpointError(f"{self.file} {found}")
        read_config(path)

    def _add(self, name: str, entry: dict) -> None:
        offsets: dict[str, int] = {}
        group = Group(int(entry["offset"]), int(entry["bytes"]), int(entry["crc32"]), offsets)
        if group.offset % PAGE or group.offset < 0 or group.nbytes < 0:
            raise ValueError(f"group {name} at {group.offset}")
        taken: list[tuple[int, int, str]] = []
        for parameter, what in entry["parameters"].items():
            for array in self._add_parameter(parameter, what, offsets):
                taken.append((array.offset, array.offset + array.nbytes, parameter))
            self._starts[parameter] = group.offset
        end = 0
        for start, stop, parameter in sorted(taken):
            if start < end or start % ALIGNMENT:
                raise ValueError(f"parameter {parameter} at {start}")
            end = stop
        if end > group.nbytes:
            raise ValueError(f"group {name} of {group.nbytes} bytes holds {end}")
        self.groups[name] = group

    def _add_parameter(self, name: str, what: dict, offsets: dict[str, int]) -> list[StoredArray]:
        shape, dtype = tuple(int(n) for n in what["shape"]), jnp.dtype(what["dtype"])
        if any(n < 0 for n in shape):
            raise ValueError(f"parameter {name} of shape {shape}")
        self.shapes[name], self.dtypes[name] = shape, dtype
        if "quantization" in what:
            if not is_float(dtype):
                raise ValueError(f"parameter {name} quantised from {dtype}")
            self.quantized[name] = StoredMatrix.from_json(what["quantization"], shape)
            return list(self.quantized[name].arrays.values())
        offsets[name] = int(what["offset"])
        self._plain[name] = StoredArray(dtype, shape, offsets[name])
        return [self._plain[name]]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as they are stored."""
        return sum(stored.nbytes for table in (self._plain, self.quantized) for stored in table.values())

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raises CheckpointError unless the parameters have exactly the names and shapes given."""
        check_shapes(self.path, self.shapes, shapes)

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        """A parameter on the host; see `ParameterSource.read`."""
        where = f"{self.path}: parameter {name!r}"
        check_cast(self.dtypes[name], dtype, where)
        out = aligned_empty(self.shapes[name], dtype)
        if name in self.quantized:
            self.read_boxes(name, [(whole(out.shape), out)], watch)
            return out
        flat = out.reshape(-1)
        step = BLOCK_BYTES // max(dtype.itemsize, self.dtypes[name].itemsize)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self._starts[name] + self._plain[name].offset)
            for begin in range(0, flat.size, step):
                part = flat[begin : begin + step]
                raw = part if self.dtypes[name] == dtype else np.empty(part.size, self.dtypes[name])
                _fill(file, raw.view(np.uint8), self.file)
                if raw is not part:
                    cast(part, raw)
                watch(name, part)
        return out

    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        """See `ShareReader.read_boxes`."""
        on_block = functools.partial(watch, name)
        if name not in self.quantized:
            read_boxes(self._info(name, self._plain[name]), pieces, on_block=on_block)
            return
        for _, target in pieces:
            check_cast(self.dtypes[name], target.dtype, f"{self.path}: parameter {name!r}")
        stored = self.quantized[name]
        infos = {part: self._info(name, array) for part, array in stored.arrays.items()}
        read_quantized_boxes(infos, stored.format, pieces, on_block)

    def _info(self, name: str, array: StoredArray) -> TensorInfo:
        return TensorInfo(name, array.dtype, array.shape, self.file, self._starts[name] + array.offset)

    def verify(self, progress: Progress | None = None) -> None:
        """Reads every byte and compares checksums.

        Raises:
            CheckpointError: naming the groups that are damaged.
        """
        progress = progress or Silent()
        progress.start(sum(group.nbytes for group in self.groups.values()))
        bad, block = [], np.empty(BLOCK_BYTES, np.uint8)
        try:
            with open(self.file, "rb", buffering=0) as file:
                for name, group in self.groups.items():
                    crc = 0
                    file.seek(group.offset)
                    for begin in range(0, group.nbytes, BLOCK_BYTES):
                        piece = block[: min(BLOCK_BYTES, group.nbytes - begin)]
                        _fill(file, piece, self.file)
                        crc = zlib.crc32(piece, crc)
                        progress.advance(piece.size)
                    if crc != group.crc32:
                        bad.append(name)
        finally:
            progress.finish()
        if bad:
            raise CheckpointError(f"{self.file}: the checksum is wrong of {', '.join(bad)}; convert it again")


def _fill(file, out: np.ndarray, path: Path) -> None:
    done = 0
    while done < out.size:
        count = file.readinto(out[done:].data)
        if not count:
            raise CheckpointError(f"{path}: the file ends at byte {file.tell()}; it was cut short")
        done += count

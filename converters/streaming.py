"""A checkpoint folder laid out for streaming: what a forward pass reads in turn lies in turn, on whole pages.

    DST/jdsi.json           manifest: format and version; per group its place, checksum and parameters; written last
    DST/weights.bin         the groups in the order of a pass, each from a multiple of 4096 bytes
    DST/config.json         the Hugging Face config, as it was
    DST/tokenizer.json ...  tokenizer and generation files, as they were

Inside a group every parameter starts at a multiple of 128 bytes, so that a group read into page-aligned memory is used
where it lies.
"""

import dataclasses
import functools
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jdsi.errors import CheckpointError
from jdsi.models.weight_map import Shape

from .boxes import Piece, read_boxes
from .buffers import BLOCK_BYTES, aligned_empty, cast, check_cast
from .config import read_config
from .direct_io import PAGE
from .manifest import MANIFEST, read_manifest, write_manifest
from .orbax import groups
from .progress import Progress, Silent
from .safetensors_file import TensorInfo
from .sources import ParameterSource, ShareReader, Watch, check_shapes

FORMAT = "jdsi-streaming"
VERSION = 1
_ALIGNMENT = 128


@dataclasses.dataclass(frozen=True)
class Group:
    """One group in `weights.bin`.

    Attributes:
        offset, nbytes: its bytes in the file.
        crc32: of those bytes.
        offsets: of each parameter inside the group.
    """

    offset: int
    nbytes: int
    crc32: int
    offsets: Mapping[str, int]


def write_streaming(source: ParameterSource, folder: Path, *, dtype: np.dtype | None, watch: Watch) -> None:
    """Writes every parameter below an existing `folder`, then the manifest. Memory: the largest parameter.

    Args:
        dtype: cast every parameter; `None` keeps each as stored.
        watch: sees every block read.
    """
    table = {}
    with open(folder / "weights.bin", "xb") as file:
        for group, names in groups(source.shapes).items():
            _pad(file, PAGE)
            start, crc, parameters = file.tell(), 0, {}
            for name in names:
                array = source.read(name, dtype or source.dtypes[name], watch)
                crc = zlib.crc32(_pad(file, _ALIGNMENT), crc)
                parameters[name] = {
                    "dtype": array.dtype.name,
                    "shape": list(array.shape),
                    "offset": file.tell() - start,
                }
                raw = array.reshape(-1).view(np.uint8)
                for begin in range(0, raw.size, BLOCK_BYTES):
                    piece = raw[begin : begin + BLOCK_BYTES]
                    crc = zlib.crc32(piece, crc)
                    file.write(piece.data)
                del array, raw
            table[group] = {
                "offset": start,
                "bytes": file.tell() - start,
                "crc32": crc,
                "parameters": parameters,
            }
        _pad(file, PAGE)
        file.flush()
        os.fsync(file.fileno())
    write_manifest(folder, FORMAT, VERSION, groups=table)


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
        shapes, dtypes: of every parameter, by dotted path.

    Raises:
        CheckpointError: the manifest or the file is absent, damaged, unfinished or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.label = path, path / "weights.bin", str(path)
        self.groups: dict[str, Group] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, int] = {}
        manifest = read_manifest(path, FORMAT, VERSION)
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
        group = Group(
            int(entry["offset"]),
            int(entry["bytes"]),
            int(entry["crc32"]),
            {parameter: int(what["offset"]) for parameter, what in entry["parameters"].items()},
        )
        if group.offset % PAGE or group.offset < 0 or group.nbytes < 0:
            raise ValueError(f"group {name} at {group.offset}")
        end = 0
        for parameter, what in entry["parameters"].items():
            shape, dtype = tuple(int(n) for n in what["shape"]), jnp.dtype(what["dtype"])
            start = group.offsets[parameter]
            if start < end or start % _ALIGNMENT or any(n < 0 for n in shape):
                raise ValueError(f"parameter {parameter} at {start}")
            end = start + math.prod(shape) * dtype.itemsize
            self.shapes[parameter], self.dtypes[parameter] = shape, dtype
            self._places[parameter] = group.offset + start
        if end > group.nbytes:
            raise ValueError(f"group {name} of {group.nbytes} bytes holds {end}")
        self.groups[name] = group

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raises CheckpointError unless the parameters have exactly the names and shapes given."""
        check_shapes(self.path, self.shapes, shapes)

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        """A parameter on the host; see `ParameterSource.read`."""
        where = f"{self.path}: parameter {name!r}"
        check_cast(self.dtypes[name], dtype, where)
        out = aligned_empty(self.shapes[name], dtype)
        flat = out.reshape(-1)
        step = BLOCK_BYTES // max(dtype.itemsize, self.dtypes[name].itemsize)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self._places[name])
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
        info = TensorInfo(name, self.dtypes[name], self.shapes[name], self.file, self._places[name])
        read_boxes(info, pieces, on_block=functools.partial(watch, name))

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

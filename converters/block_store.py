"""A checkpoint as blocks to stream: one per layer, each read into memory of its own and used where it lies."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from jdsi.errors import CheckpointError, ConfigError
from jdsi.models import abstract_parameters
from jdsi.models.spec import TransformerSpec
from jdsi.models.weight_map import Identity, Op

from .checkpoint import Checkpoint, open_checkpoint
from .config import load_family
from .direct_io import Segment, round_up
from .orbax import groups
from .sources import MappedParameters, place
from .streaming import StreamingCheckpoint

FIELD_ALIGNMENT = 128
"""Bytes; more than JAX needs to use host memory in place on the CPU, and a cache line of a GPU."""


@dataclasses.dataclass(frozen=True)
class Field:
    """An array inside a block's memory: `offset` is a multiple of `FIELD_ALIGNMENT`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: np.ndarray) -> np.ndarray:
        """The array."""
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A stored tensor that takes another layout in its parameter: read to `stored`, then put into rows of `into`."""

    op: Op
    stored: Field
    into: Field
    rows: tuple[int, int]

    def apply(self, memory: np.ndarray) -> None:
        """Fills the rows."""
        out = self.into.view(memory)
        place(self.op, self.stored.view(memory), out[slice(*self.rows)] if out.ndim else out)


@dataclasses.dataclass(frozen=True)
class Block:
    """What is read together: the parameters of one layer, of the embedding, of the head.

    Attributes:
        name: "embedding", "layers.0", ...
        fields: every parameter by its full name.
        segments: the reads that fill the block.
        rearrangements: what is left to do in memory then.
        nbytes: memory to read it into, whole pages.
    """

    name: str
    fields: Mapping[str, Field]
    segments: tuple[Segment, ...]
    rearrangements: tuple[Rearrangement, ...]
    nbytes: int

    def nbytes_as(self, dtype: np.dtype) -> int:
        """Bytes of the parameters once cast to `dtype`."""
        return sum(math.prod(field.shape) * np.dtype(dtype).itemsize for field in self.fields.values())

    @property
    def bytes_stored(self) -> int:
        """Bytes that one read takes from the files."""
        return sum(segment.nbytes for segment in self.segments)

    def arrays(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters, once the segments are read into `memory`; they are views of it."""
        for rearrangement in self.rearrangements:
            rearrangement.apply(memory)
        return {name: field.view(memory) for name, field in self.fields.items()}


@dataclasses.dataclass(frozen=True)
class BlockStore:
    """A model on disk, block by block.

    Attributes:
        path: its folder.
        spec: the model's.
        blocks: by name, in the order of a forward pass.
    """

    path: Path
    spec: TransformerSpec
    blocks: Mapping[str, Block]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The blocks of a folder that `convert(to="streaming")` made, or of a safetensors folder as it is.

        Raises:
            CheckpointError: the checkpoint is damaged, does not fit its config, or is of a layout whose bytes cannot
                be streamed.
        """
        checkpoint = open_checkpoint(path)
        family, spec = load_family(checkpoint.path)
        shapes = {name: tuple(leaf.shape) for name, leaf in abstract_parameters(spec).items()}
        if isinstance(checkpoint, StreamingCheckpoint):
            checkpoint.check(shapes)
            blocks = {name: _stored_block(checkpoint, name) for name in groups(shapes)}
        else:
            if not isinstance(checkpoint, Checkpoint) or any(info.offset < 0 for info in checkpoint.tensors.values()):
                raise CheckpointError(
                    f"{checkpoint.path}: only safetensors files and streaming folders can be streamed; "
                    "`jdsi convert SRC DST --to streaming` makes the latter from any other"
                )
            parameters = MappedParameters(checkpoint, family.weight_map(spec), shapes)
            blocks = {group: _mapped_block(parameters, group, names) for group, names in groups(shapes).items()}
        return cls(checkpoint.path, spec, blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(field.nbytes for block in self.blocks.values() for field in block.fields.values())

    def check_dtypes(self) -> None:
        """Raises ConfigError if parameters are no floating-point numbers, which nothing here could run."""
        for block in self.blocks.values():
            for name, field in block.fields.items():
                if field.dtype.kind in "iub":
                    raise ConfigError(f"{self.path}: {name} is stored as {field.dtype}; only floats can be streamed")


def _stored_block(checkpoint: StreamingCheckpoint, name: str) -> Block:
    entry = checkpoint.groups[name]
    fields = {
        parameter: Field(checkpoint.dtypes[parameter], checkpoint.shapes[parameter], offset)
        for parameter, offset in entry.offsets.items()
    }
    nbytes = round_up(entry.nbytes)  # the file is padded to whole pages, which go straight into memory
    return Block(name, fields, (Segment(checkpoint.file, entry.offset, nbytes, 0),), (), nbytes)


class _Layout:
    """Hands out fields one after another."""

    def __init__(self) -> None:
        self.nbytes = 0

    def field(self, dtype: np.dtype, shape: tuple[int, ...]) -> Field:
        field = Field(dtype, shape, round_up(self.nbytes, FIELD_ALIGNMENT))
        self.nbytes = field.offset + field.nbytes
        return field


def _mapped_block(parameters: MappedParameters, group: str, names: list[str]) -> Block:
    layout = _Layout()
    fields = {name: layout.field(parameters.dtypes[name], parameters.shapes[name]) for name in names}
    segments: list[Segment] = []
    rearrangements: list[Rearrangement] = []
    for name, field in fields.items():
        for op, info, rows in parameters.pieces(name):
            if info.dtype != field.dtype:
                raise CheckpointError(
                    f"{info.where} is stored as {info.dtype}, others of {name} as {field.dtype}; convert the "
                    "checkpoint with --to streaming first"
                )
            if isinstance(op, Identity):
                row = field.nbytes // field.shape[0] if field.shape and field.shape[0] else 0
                segments.append(Segment(info.file, info.offset, info.nbytes, field.offset + rows[0] * row))
            else:
                stored = layout.field(info.dtype, info.shape)
                segments.append(Segment(info.file, info.offset, info.nbytes, stored.offset))
                rearrangements.append(Rearrangement(op, stored, field, rows))
    return Block(group, fields, tuple(segments), tuple(rearrangements), round_up(layout.nbytes))

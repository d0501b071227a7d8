"""A checkpoint as blocks to stream: one per layer, each read into memory of its own and used where it lies."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from jdsi.errors import CheckpointError, ConfigError
from jdsi.models import abstract_parameters
from jdsi.models.spec import TransformerSpec
from jdsi.models.weight_map import Identity

from .block_form import FIELD_ALIGNMENT, BlockForm, Field, Joined, Parameter
from .checkpoint import Checkpoint, open_checkpoint
from .config import load_family
from .direct_io import Segment, round_up
from .orbax import groups
from .sources import MappedParameters
from .streaming import StreamingCheckpoint


@dataclasses.dataclass(frozen=True)
class Block:
    """What is read together: the parameters of one layer, of the embedding, of the head.

    Attributes:
        name: "embedding", "layers.0", ...
        form: what lies where in its memory.
        segments: the reads that fill the memory.
        nbytes: memory to read it into, whole pages.
    """

    name: str
    form: BlockForm
    segments: tuple[Segment, ...]
    nbytes: int

    @property
    def bytes_stored(self) -> int:
        """Bytes that one read takes from the files."""
        return sum(segment.nbytes for segment in self.segments)


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
        """Bytes of all blocks as they are stored."""
        return sum(field.nbytes for block in self.blocks.values() for _, field in block.form.fields)

    @property
    def dtype(self) -> np.dtype:
        """That the checkpoint had its layers in."""
        return self.blocks["layers.0"].form.parameters[0][1].dtype

    def check_dtypes(self) -> None:
        """Raises ConfigError if parameters are no floating-point numbers, which nothing here could run."""
        for block in self.blocks.values():
            for name, parameter in block.form.parameters:
                if parameter.dtype.kind in "iub":
                    where = f"{self.path}: {name} of {block.name}"
                    raise ConfigError(f"{where} is stored as {parameter.dtype}; only floats can be streamed")


def _local_name(group: str, name: str) -> str:
    """A parameter's name in its block: layers of a kind must have the same."""
    return name.removeprefix(f"{group}.") if group.startswith("layers.") else name


def _stored_block(checkpoint: StreamingCheckpoint, name: str) -> Block:
    entry = checkpoint.groups[name]
    fields, parameters = [], []
    for parameter, offset in entry.offsets.items():
        local, dtype, shape = _local_name(name, parameter), checkpoint.dtypes[parameter], checkpoint.shapes[parameter]
        fields.append((local, Field(dtype, shape, offset)))
        parameters.append((local, Parameter(shape, dtype, Joined(((local, Identity()),)))))
    nbytes = round_up(entry.nbytes)  # the file is padded to whole pages, which go straight into memory
    segments = (Segment(checkpoint.file, entry.offset, nbytes, 0),)
    return Block(name, BlockForm(_by_offset(fields), tuple(parameters)), segments, nbytes)


def _by_offset(fields: list[tuple[str, Field]]) -> tuple[tuple[str, Field], ...]:
    return tuple(sorted(fields, key=lambda item: item[1].offset))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array that is to lie in a block's memory, and what fills it: bytes of files, one behind another."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    sources: tuple[Segment, ...]


def _mapped_block(parameters: MappedParameters, group: str, names: list[str]) -> Block:
    stored: list[_Stored] = []
    made = []
    for full in names:
        name, shape, pieces = _local_name(group, full), parameters.shapes[full], parameters.pieces(full)
        files = [Segment(info.file, info.offset, info.nbytes, 0) for _, info, _ in pieces]
        if all(isinstance(op, Identity) and info.dtype == pieces[0][1].dtype for op, info, _ in pieces):
            stored.append(_Stored(name, pieces[0][1].dtype, shape, tuple(files)))
            recipe = Joined(((name, Identity()),))
        else:
            tags = [f"{name}:{i}" for i in range(len(pieces))]
            for tag, (_, info, _), file in zip(tags, pieces, files, strict=True):
                stored.append(_Stored(tag, info.dtype, info.shape, (file,)))
            recipe = Joined(tuple((tag, op) for tag, (op, _, _) in zip(tags, pieces, strict=True)))
        made.append((name, Parameter(shape, parameters.dtypes[full], recipe)))
    # Arrays of a type side by side, so that they go to several devices as one.
    stored.sort(key=lambda array: array.dtype.name)
    fields, segments, end = [], [], 0
    for array in stored:
        field = Field(array.dtype, array.shape, round_up(end, FIELD_ALIGNMENT))
        fields.append((array.name, field))
        end = field.offset
        for source in array.sources:
            segments.append(dataclasses.replace(source, target=end))
            end += source.nbytes
        assert end == field.offset + field.nbytes, array.name
    return Block(group, BlockForm(tuple(fields), tuple(made)), tuple(segments), round_up(end))

"""A checkpoint as blocks to stream: one per layer, each read into memory of its own and used where it lies."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from jdsi.errors import CheckpointError, ConfigError
from jdsi.models import ParameterInfo, TransformerSpec, groups_of, layer_group, splits_of
from jdsi.models.weight_map import Identity

from .block_form import FIELD_ALIGNMENT, BlockForm, Dequantized, Field, Joined, Parameter, Recipe
from .block_watch import BlockWatch
from .checkpoint import Checkpoint
from .direct_io import Segment, identity, round_up
from .sharded import ShardedCheckpoint
from .sources import MappedParameters
from .stored_model import StoredModel, open_model
from .streaming import StreamingCheckpoint


@dataclasses.dataclass(frozen=True)
class Block:
    """What is read together: the parameters of one layer, of the embedding, of the head.

    Attributes:
        name: "embedding", "layers.0", ...
        form: what lies where in its memory, or in each rank's part of that.
        segments: the reads that fill the memory.
        nbytes: memory to read it into, whole pages.
        ranks: how many shares it is stored as, one rank's behind another's in equal parts of the memory; 1 where it is
            stored whole.
    """

    name: str
    form: BlockForm
    segments: tuple[Segment, ...]
    nbytes: int
    ranks: int = 1

    def nbytes_as(self, dtype: np.dtype) -> int:
        """Bytes of the parameters, of all ranks, once they are of `dtype`."""
        return self.form.nbytes_as(dtype) * self.ranks

    def made_bytes(self, dtype: np.dtype) -> int:
        """Bytes of those parameters that are not used where they are stored."""
        return self.form.made_bytes(dtype) * self.ranks

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
        files: those that blocks are read from, each with its `identity` when the store was opened.
        watch: looks for NaN and infinity, see `look`.
    """

    path: Path
    spec: TransformerSpec
    blocks: Mapping[str, Block]
    files: Mapping[Path, tuple[int, ...]]
    watch: BlockWatch = dataclasses.field(default_factory=BlockWatch, compare=False)

    @classmethod
    def open(cls, path: str | Path | StoredModel, *, tensor_parallel: int = 1) -> Self:
        """The blocks of a folder that `convert(to="streaming")` made, or of a safetensors folder as it is.

        Args:
            path: the folder, or what `open_model` found in it.
            tensor_parallel: the degree that the model is to run with. A folder that `convert(to="sharded")` cut for it
                can be streamed too; every device then fetches no more than it uses.

        Raises:
            CheckpointError: the checkpoint is damaged, does not fit its config, or is of a layout whose bytes cannot
                be streamed.
        """
        stored = path if isinstance(path, StoredModel) else open_model(path)
        checkpoint, spec = stored.store, stored.spec
        groups = groups_of(spec, tuple(stored.parameters.shapes))
        if isinstance(checkpoint, StreamingCheckpoint):
            blocks = {group: _stored_block(checkpoint, group, infos) for group, infos in groups.items()}
        elif isinstance(checkpoint, ShardedCheckpoint):
            _check_degree(checkpoint, spec, tensor_parallel)
            blocks = {group: _cut_block(checkpoint, group, infos) for group, infos in groups.items()}
        else:
            if not isinstance(checkpoint, Checkpoint) or any(info.offset < 0 for info in checkpoint.tensors.values()):
                first = ""
                if isinstance(checkpoint, Checkpoint) and not (checkpoint.path / "config.json").is_file():
                    first = ", once the config.json of the model is copied into it"
                raise CheckpointError(
                    f"{checkpoint.label}: only safetensors files and streaming folders can be streamed; "
                    f"`jdsi convert {checkpoint.label} DST --to streaming` makes the latter of this one{first}"
                )
            assert isinstance(stored.parameters, MappedParameters)
            blocks = {group: _mapped_block(stored.parameters, group, infos) for group, infos in groups.items()}
        files = {segment.file for block in blocks.values() for segment in block.segments}
        return cls(checkpoint.path, spec, blocks, {file: identity(file) for file in files})

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks as they are stored."""
        return sum(field.nbytes * block.ranks for block in self.blocks.values() for _, field in block.form.fields)

    @property
    def layers(self) -> list[str]:
        """Names of the blocks that are layers, in order."""
        return [layer_group(index) for index in range(len(self.spec.layers))]

    @property
    def dtype(self) -> np.dtype:
        """That the checkpoint had its layers in."""
        return self.blocks[self.layers[0]].form.parameters[0][1].dtype

    def look(self, block: Block, memory: np.ndarray) -> None:
        """To be told of every block that was read, for `watch` to look at the first time."""
        self.watch.look(block.name, block.form, block.ranks, memory[: block.nbytes])

    def check_dtypes(self) -> None:
        """Raises ConfigError if parameters are no floating-point numbers, nor of a type of their own."""
        for block in self.blocks.values():
            for name, parameter in block.form.parameters:
                if parameter.dtype.kind in "iub" and parameter.own_dtype is None:
                    where = f"{self.path}: {name} of {block.name}"
                    raise ConfigError(f"{where} is stored as {parameter.dtype}; only floats can be streamed")


def _plain(name: str) -> Recipe:
    return Joined(((name, Identity()),))


Infos = Mapping[str, ParameterInfo]


def _stored_block(checkpoint: StreamingCheckpoint, name: str, infos: Infos) -> Block:
    entry = checkpoint.groups[name]
    fields: list[tuple[str, Field]] = []
    parameters: list[tuple[str, Parameter]] = []
    for full, info in infos.items():
        local, dtype, shape = info.inner, checkpoint.dtypes[full], checkpoint.shapes[full]
        if full in entry.offsets:
            fields.append((local, Field(dtype, shape, entry.offsets[full])))
            recipe = _plain(local)
        else:
            stored = checkpoint.quantized[full]
            tags = tuple((part, f"{local}:{part}") for part in stored.arrays)
            fields += [(tag, Field(*stored.arrays[part])) for part, tag in tags]
            recipe = Dequantized(stored.format, tags)
        parameters.append((local, Parameter(shape, dtype, recipe, info.dtype)))
    nbytes = round_up(entry.nbytes)  # the file is padded to whole pages, which go straight into memory
    segments = (Segment(checkpoint.file, entry.offset, nbytes, 0),)
    fields.sort(key=lambda item: item[1].offset)
    return Block(name, BlockForm(tuple(fields), tuple(parameters)), segments, nbytes)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array that is to lie in a block's memory, and what fills it: bytes of files, one behind another."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    sources: tuple[Segment, ...]


def _mapped_block(parameters: MappedParameters, group: str, infos: Infos) -> Block:
    stored: list[_Stored] = []
    made = []
    for full, info in infos.items():
        name, shape, pieces = info.inner, parameters.shapes[full], parameters.pieces(full)
        files = [Segment(tensor.file, tensor.offset, tensor.nbytes, 0) for _, tensor, _ in pieces]
        if all(isinstance(op, Identity) and tensor.dtype == pieces[0][1].dtype for op, tensor, _ in pieces):
            stored.append(_Stored(name, pieces[0][1].dtype, shape, tuple(files)))
            recipe = _plain(name)
        else:
            tags = [f"{name}:{i}" for i in range(len(pieces))]
            for tag, (_, tensor, _), file in zip(tags, pieces, files, strict=True):
                stored.append(_Stored(tag, tensor.dtype, tensor.shape, (file,)))
            recipe = Joined(tuple((tag, op) for tag, (op, _, _) in zip(tags, pieces, strict=True)))
        made.append((name, Parameter(shape, parameters.dtypes[full], recipe, info.dtype)))
    fields, segments, end = _laid_out(stored)
    return Block(group, BlockForm(fields, tuple(made)), segments, round_up(end))


def _laid_out(stored: list[_Stored]) -> tuple[tuple[tuple[str, Field], ...], tuple[Segment, ...], int]:
    """Fields, the reads that fill them, and the end of the last one."""
    fields, segments, end = [], [], 0
    # Arrays of a type side by side, so that they go to several devices as one.
    for array in sorted(stored, key=lambda array: array.dtype.name):
        field = Field(array.dtype, array.shape, round_up(end, FIELD_ALIGNMENT))
        fields.append((array.name, field))
        end = field.offset
        for source in array.sources:
            segments.append(dataclasses.replace(source, target=end))
            end += source.nbytes
        assert end == field.offset + field.nbytes, array.name
    return tuple(fields), tuple(segments), end


def _check_degree(checkpoint: ShardedCheckpoint, spec: TransformerSpec, ranks: int) -> None:
    if checkpoint.ranks != ranks:
        raise CheckpointError(
            f"{checkpoint.path} is cut for tensor_parallel={checkpoint.ranks} and can be streamed only with that, not "
            f"with {ranks}; `jdsi convert SRC DST --to streaming` makes a folder for any degree"
        )
    wanted = splits_of(spec, ranks)
    for name, split in checkpoint.splits.items():
        if split != wanted[name]:
            raise CheckpointError(f"{checkpoint.path}: {name} is not cut as this version does; convert it again")


def _cut_block(checkpoint: ShardedCheckpoint, group: str, infos: Infos) -> Block:
    made, segments, part = [], [], 0
    fields: tuple[tuple[str, Field], ...] = ()
    for rank in range(checkpoint.ranks):
        tensors = {info.inner: checkpoint.stored(full, rank) for full, info in infos.items()}
        own = {info.inner: info.dtype for info in infos.values()}
        stored = [
            _Stored(name, tensor.dtype, tensor.shape, (Segment(tensor.file, tensor.offset, tensor.nbytes, 0),))
            for name, tensor in tensors.items()
        ]
        fields, reads, end = _laid_out(stored)
        part = round_up(end)
        segments += [dataclasses.replace(read, target=read.target + rank * part) for read in reads]
        made = [
            (name, Parameter(tensor.shape, tensor.dtype, _plain(name), own[name])) for name, tensor in tensors.items()
        ]
    return Block(group, BlockForm(fields, tuple(made)), tuple(segments), checkpoint.ranks * part, checkpoint.ranks)

"""A checkpoint as blocks to stream: one per layer, each read into memory of its own and used where it lies."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from jdsi.errors import CheckpointError, ConfigError
from jdsi.models.spec import TransformerSpec
from jdsi.models.tensor_parallel import split_of
from jdsi.models.weight_map import Identity

from .block_form import FIELD_ALIGNMENT, BlockForm, Dequantized, Field, Joined, Parameter, Recipe
from .block_watch import BlockWatch
from .checkpoint import Checkpoint
from .direct_io import Segment, identity, round_up
from .orbax import groups
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
        checkpoint, spec, shapes = stored.store, stored.spec, stored.parameters.shapes
        if isinstance(checkpoint, StreamingCheckpoint):
            blocks = {name: _stored_block(checkpoint, name) for name in groups(shapes)}
        elif isinstance(checkpoint, ShardedCheckpoint):
            _check_degree(checkpoint, spec, tensor_parallel)
            blocks = {group: _cut_block(checkpoint, group, names) for group, names in groups(shapes).items()}
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
            blocks = {group: _mapped_block(stored.parameters, group, names) for group, names in groups(shapes).items()}
        files = {segment.file for block in blocks.values() for segment in block.segments}
        return cls(checkpoint.path, spec, blocks, {file: identity(file) for file in files})

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks as they are stored."""
        return sum(field.nbytes * block.ranks for block in self.blocks.values() for _, field in block.form.fields)

    @property
    def dtype(self) -> np.dtype:
        """That the checkpoint had its layers in."""
        return self.blocks["layers.0"].form.parameters[0][1].dtype

    def look(self, block: Block, memory: np.ndarray) -> None:
        """To be told of every block that was read, for `watch` to look at the first time."""
        self.watch.look(block.name, block.form, block.ranks, memory[: block.nbytes])

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


def _plain(name: str) -> Recipe:
    return Joined(((name, Identity()),))


def _stored_block(checkpoint: StreamingCheckpoint, name: str) -> Block:
    entry = checkpoint.groups[name]
    fields: list[tuple[str, Field]] = []
    parameters: list[tuple[str, Parameter]] = []
    for full in _parameters_of(checkpoint, name):
        local, dtype, shape = _local_name(name, full), checkpoint.dtypes[full], checkpoint.shapes[full]
        if full in entry.offsets:
            fields.append((local, Field(dtype, shape, entry.offsets[full])))
            recipe = _plain(local)
        else:
            stored = checkpoint.quantized[full]
            tags = tuple((part, f"{local}:{part}") for part in stored.arrays)
            fields += [(tag, Field(*stored.arrays[part])) for part, tag in tags]
            recipe = Dequantized(stored.format, tags)
        parameters.append((local, Parameter(shape, dtype, recipe)))
    nbytes = round_up(entry.nbytes)  # the file is padded to whole pages, which go straight into memory
    segments = (Segment(checkpoint.file, entry.offset, nbytes, 0),)
    fields.sort(key=lambda item: item[1].offset)
    return Block(name, BlockForm(tuple(fields), tuple(parameters)), segments, nbytes)


def _parameters_of(checkpoint: StreamingCheckpoint, group: str) -> list[str]:
    return groups(checkpoint.shapes)[group]


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
            recipe = _plain(name)
        else:
            tags = [f"{name}:{i}" for i in range(len(pieces))]
            for tag, (_, info, _), file in zip(tags, pieces, files, strict=True):
                stored.append(_Stored(tag, info.dtype, info.shape, (file,)))
            recipe = Joined(tuple((tag, op) for tag, (op, _, _) in zip(tags, pieces, strict=True)))
        made.append((name, Parameter(shape, parameters.dtypes[full], recipe)))
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
    for name, split in checkpoint.splits.items():
        if split != split_of(spec, name, ranks):
            raise CheckpointError(f"{checkpoint.path}: {name} is not cut as this version does; convert it again")


def _cut_block(checkpoint: ShardedCheckpoint, group: str, names: list[str]) -> Block:
    made, segments, part = [], [], 0
    fields: tuple[tuple[str, Field], ...] = ()
    for rank in range(checkpoint.ranks):
        infos = {_local_name(group, full): checkpoint.stored(full, rank) for full in names}
        stored = [
            _Stored(name, info.dtype, info.shape, (Segment(info.file, info.offset, info.nbytes, 0),))
            for name, info in infos.items()
        ]
        fields, reads, end = _laid_out(stored)
        part = round_up(end)
        segments += [dataclasses.replace(read, target=read.target + rank * part) for read in reads]
        made = [(name, Parameter(info.shape, info.dtype, _plain(name))) for name, info in infos.items()]
    return Block(group, BlockForm(fields, tuple(made)), tuple(segments), checkpoint.ranks * part, checkpoint.ranks)

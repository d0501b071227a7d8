"""A checkpoint folder cut beforehand for one degree of tensor parallelism.

    DST/jdsi.json                          manifest: format, version and degree; per parameter its type, plain shape and
                                           how it is split; written last
    DST/rank-00000-of-00004.safetensors    every split parameter's share of one rank, under our names, padding included
    DST/replicated.safetensors             every other parameter
    DST/config.json                        the Hugging Face config, as it was
    DST/tokenizer.json ...                 tokenizer and generation files, as they were

One file per rank, not per rank and layer: a process opens one file beside the replicated one, and a share is one read.
Parameters lie in the order of layers, so that a pipeline's stage still reads one stretch of it. Any other degree reads
the same folder, gathering runs from several ranks' files.
"""

import contextlib
import functools
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdsi.errors import CheckpointError
from jdsi.models import TransformerSpec, splits_of
from jdsi.models.weight_map import Shape
from jdsi.sharding import Run, Split

from .boxes import Piece, read_boxes, whole
from .buffers import aligned_empty
from .config import read_config
from .manifest import MANIFEST, read_manifest, write_manifest
from .safetensors_file import SafetensorsWriter, TensorInfo, read_header, read_into
from .shares import cut, pieces_in_shares, share_pieces
from .sources import ParameterSource, ShareReader, Watch, check_shapes

FORMAT = "jdsi-sharded"
VERSION = 1
REPLICATED = "replicated.safetensors"
_KEY = "jdsi"  # in each file's header: the folder and the file it was written for, so that none is taken for another


def rank_file(rank: int, ranks: int) -> str:
    """Name of the file with a rank's shares."""
    return f"rank-{rank:05}-of-{ranks:05}.safetensors"


def stored_bytes(source: ParameterSource, spec: TransformerSpec, ranks: int, dtype: np.dtype | None) -> int:
    """Bytes of all shares and replicated parameters."""
    total, splits = 0, splits_of(spec, ranks)
    for name, shape in source.shapes.items():
        split = splits[name]
        total += math.prod(split.global_shape(shape) if split else shape) * (dtype or source.dtypes[name]).itemsize
    return total


def write_sharded(
    source: ParameterSource, spec: TransformerSpec, folder: Path, *, ranks: int, dtype: np.dtype | None, watch: Watch
) -> None:
    """Write every parameter below an existing `folder`, then the manifest. Memory: a parameter and one share of it.

    Args:
        spec: says how each is split.
        ranks: of the tensor axis.
        dtype: cast every parameter; `None` keeps each as stored.
        watch: sees every block read.
    """
    shapes = source.shapes
    identity = secrets.token_hex(8)
    kept = {name: dtype or source.dtypes[name] for name in shapes}
    divided = splits_of(spec, ranks)
    splits = {name: divided[name] for name in shapes}
    local = {name: (kept[name], split.local_shape(shapes[name])) for name, split in splits.items() if split is not None}
    same = {name: (kept[name], shapes[name]) for name, split in splits.items() if split is None}
    with contextlib.ExitStack() as stack:
        replicated = stack.enter_context(
            SafetensorsWriter(folder / REPLICATED, same, {_KEY: f"{identity} {REPLICATED}"})
        )
        files = [rank_file(rank, ranks) for rank in range(ranks if local else 0)]
        writers = [
            stack.enter_context(SafetensorsWriter(folder / file, local, {_KEY: f"{identity} {file}"})) for file in files
        ]
        for name, split in splits.items():
            array = source.read(name, kept[name], watch)
            if split is None:
                replicated.write(name, array)
                continue
            for rank, writer in enumerate(writers):
                writer.write(name, cut(array, split, rank))
            del array
    table = {
        name: {"dtype": kept[name].name, "shape": list(shapes[name]), "split": _as_json(split)}
        for name, split in splits.items()
    }
    write_manifest(folder, FORMAT, VERSION, identity=identity, tensor_parallel=ranks, parameters=table)


def _as_json(split: Split | None) -> dict[str, Any] | None:
    if split is None:
        return None
    runs = [[[run.start, run.stop, run.target] for run in held] for held in split.runs]
    return {"dim": split.dim, "size": split.size, "runs": runs}


class ShardedCheckpoint(ShareReader):
    """A folder that `write_sharded` made; also a `ParameterSource`.

    Attributes:
        path: the folder.
        ranks: the degree it was cut for.
        shapes, dtypes: of every plain parameter, by dotted path.
        splits: how each is divided, `None` for those that are not.

    Raises:
        CheckpointError: the manifest or a file is absent, damaged, unfinished, of another version, or they disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.label = path, str(path)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.splits: dict[str, Split | None] = {}
        manifest = read_manifest(path, FORMAT, VERSION)
        try:
            self.ranks, self._identity = _natural(manifest["tensor_parallel"]), str(manifest["identity"])
            for name, entry in manifest["parameters"].items():
                self.shapes[name] = tuple(_natural(n) for n in entry["shape"])
                self.dtypes[name] = jnp.dtype(entry["dtype"])
                self.splits[name] = _read_split(entry["split"], self.shapes[name], self.ranks)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST}: damaged: {error!r}") from error
        same = {name: self.shapes[name] for name, split in self.splits.items() if split is None}
        local = {name: split.local_shape(self.shapes[name]) for name, split in self.splits.items() if split is not None}
        names = [rank_file(rank, self.ranks) for rank in range(self.ranks if local else 0)]
        if absent := [name for name in (REPLICATED, *names) if not (path / name).is_file()]:
            more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
            raise CheckpointError(f"{path}: files are missing: {', '.join(absent[:20])}{more}")
        self._replicated = self._read_header(path / REPLICATED, same)
        self._shares = [self._read_header(path / name, local) for name in names]
        read_config(path)

    def _read_header(self, file: Path, shapes: Mapping[str, Shape]) -> dict[str, TensorInfo]:
        found, metadata = read_header(file)
        if metadata.get(_KEY) != f"{self._identity} {file.name}":
            raise CheckpointError(f"{file}: written for another folder, or under another name; {MANIFEST} says which")
        wanted = {name: (self.dtypes[name], shape) for name, shape in shapes.items()}
        if wrong := sorted(
            name
            for name in wanted.keys() | found.keys()
            if name not in found or wanted.get(name) != (found[name].dtype, found[name].shape)
        ):
            more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            raise CheckpointError(
                f"{file}: {MANIFEST} disagrees about the shape, type or presence of {', '.join(wrong[:20])}{more}"
            )
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all plain parameters."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raise `CheckpointError` unless the parameters have exactly the names and shapes given."""
        check_shapes(self.path, self.shapes, shapes)

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        """A plain parameter on the host; see `ParameterSource.read`."""
        out = aligned_empty(self.shapes[name], dtype)
        if self.splits[name] is None:
            read_into(self._replicated[name], out, on_block=functools.partial(watch, name))
        else:
            self.read_boxes(name, [(whole(out.shape), out)], watch)
        return out

    def stored(self, name: str, rank: int) -> TensorInfo:
        """Where a rank's share of a parameter lies, or all of one that is not divided."""
        return self._replicated[name] if self.splits[name] is None else self._shares[rank][name]

    def read_share(self, name: str, dtype: np.dtype, split: Split, rank: int, watch: Watch) -> np.ndarray:
        """One contiguous read for a split that the folder was cut for, else gathered from several ranks' files."""
        if split != self.splits[name]:
            return super().read_share(name, dtype, split, rank, watch)
        out = aligned_empty(split.local_shape(self.shapes[name]), dtype)
        on_block = functools.partial(watch, name)
        if sum(map(len, split.runs[rank])) == split.size:
            read_into(self._shares[rank][name], out, on_block=on_block)
            return out
        read_into(self._shares[rank][name], out)
        for _, part in share_pieces(split, rank, self.shapes[name], out):  # what is padding is not to be counted
            on_block(np.ascontiguousarray(part).reshape(-1))
        return out

    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        """See `ShareReader.read_boxes`."""
        split, on_block = self.splits[name], functools.partial(watch, name)
        if split is None:
            read_boxes(self._replicated[name], pieces, on_block=on_block)
            return
        found, _ = pieces_in_shares(split, pieces, range(split.ranks))
        for rank, parts in found.items():
            read_boxes(self._shares[rank][name], parts, on_block=on_block)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where an integer >= 0 belongs")
    return value


def _read_split(entry: Any, shape: Shape, ranks: int) -> Split | None:
    """A split from the manifest, checked: its runs lie where they can, and together hold every entry."""
    if entry is None:
        return None
    runs = tuple(tuple(Run(*map(_natural, run)) for run in held) for held in entry["runs"])
    split = Split(_natural(entry["dim"]), _natural(entry["size"]), runs)
    length = shape[split.dim]
    if split.ranks != ranks or not all(_fits(held, length, split.size) for held in runs):
        raise ValueError(f"{entry!r} is no split of {length} entries among {ranks}")
    reach = 0
    for run in sorted((run for held in runs for run in held), key=lambda run: run.start):
        if run.start > reach:
            break
        reach = max(reach, run.stop)
    if reach < length:
        raise ValueError(f"no rank holds entry {reach} of {entry!r}")
    return split


def _fits(held: Iterable[Run], length: int, size: int) -> bool:
    end = 0
    for run in sorted(held, key=lambda run: run.target):
        if not run.start < run.stop <= length or run.target < end:
            return False
        end = run.target + len(run)
    return end <= size

"""Where parameters come from: a checkpoint read through a family's table, or arrays in memory."""

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.errors import CheckpointError
from jdsi.models.weight_map import Identity, Op, Rows, Shape, WeightMap
from jdsi.sharding import Split

from .boxes import Piece
from .buffers import OnBlock, aligned_empty, aligned_zeros, cast, check_cast, copy_blocks, on_host
from .matching import match
from .safetensors_file import TensorInfo
from .shares import share_pieces

Watch = Callable[[str, np.ndarray], None]
"""Called with a tensor's name and each block of it that has been read, by several threads; must not keep the block."""


class ParameterSource(Protocol):
    """Parameters in our layout and under our names, read one at a time.

    Attributes:
        shapes, dtypes: of every parameter as stored, by dotted path.
    """

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    @property
    def dtypes(self) -> Mapping[str, np.dtype]: ...

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        """A parameter as a C-contiguous host array of `dtype`, which the caller must not write to."""
        ...

    def read_share(self, name: str, dtype: np.dtype, split: Split, rank: int, watch: Watch) -> np.ndarray:
        """A rank's share of a split parameter, as an aligned C-contiguous host array of `dtype`.

        No more is read than lies in the share, as far as the storage allows.
        """
        ...


class ShareReader(abc.ABC):
    """A source that can read boxes of its parameters, and therefore shares."""

    shapes: Mapping[str, Shape]

    @abc.abstractmethod
    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        """Read boxes of a parameter, casting on the way.

        Raises:
            CheckpointError: they cannot be read, or the cast is refused.
        """

    def read_share(self, name: str, dtype: np.dtype, split: Split, rank: int, watch: Watch) -> np.ndarray:
        """See `ParameterSource.read_share`."""
        share = aligned_zeros(split.local_shape(self.shapes[name]), dtype)
        self.read_boxes(name, share_pieces(split, rank, self.shapes[name], share), watch)
        return share


class TensorStore(Protocol):
    """Named tensors on disk, as `Checkpoint` provides them."""

    @property
    def label(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(
        self, info: TensorInfo, out: np.ndarray, *, rows: tuple[int, int] | None = None, on_block: OnBlock | None = None
    ) -> None: ...

    def read_boxes(self, info: TensorInfo, pieces: Sequence[Piece], *, on_block: OnBlock | None = None) -> None: ...


class MappedParameters(ShareReader):
    """The parameters of a Hugging Face checkpoint.

    Each is read straight into its final buffer; a source whose `Op` changes the layout is buffered once beside it.

    Args:
        store: reads the tensors.
        tensors: those of the store, by the table's names.
        weight_map: the family's table.
        shapes: of every parameter of the model, by dotted path.
        strict: see `match`.

    Raises:
        CheckpointError: the checkpoint does not fit; see `match`.
    """

    def __init__(
        self,
        store: TensorStore,
        tensors: Mapping[str, TensorInfo],
        weight_map: WeightMap,
        shapes: Mapping[str, Shape],
        *,
        strict: bool = False,
    ) -> None:
        self._store = store
        self._entries = {entry.ours: entry for entry in weight_map.entries}
        self._found = match(tensors, weight_map, shapes, where=store.label, strict=strict)
        self.shapes = {entry.ours: tuple(shapes[entry.ours]) for entry in weight_map.entries}
        self.dtypes = {
            ours: np.dtype(jnp.result_type(*(self._found[source.name].dtype for source in entry.sources)))
            if len({self._found[source.name].dtype for source in entry.sources}) > 1
            else self._found[entry.sources[0].name].dtype
            for ours, entry in self._entries.items()
        }

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        entry, shape = self._entries[name], self.shapes[name]
        out = aligned_empty(shape, dtype)
        ranges = entry.row_ranges(shape) if shape else [(0, 0)]
        for source, (start, stop) in zip(entry.sources, ranges, strict=True):
            info = self._found[source.name]
            target = out[start:stop] if shape else out

            def on_block(block: np.ndarray, stored: str = info.name) -> None:
                watch(stored, block)

            if isinstance(source.op, Identity):
                self._store.read_into(info, target, on_block=on_block)
            else:
                buffer = aligned_empty(info.shape, dtype)
                self._store.read_into(info, buffer, on_block=on_block)
                place(source.op, buffer, target)
        return out

    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        for op, info, (start, stop) in self.pieces(name):
            stored: list[Piece] = []
            for box, target in pieces:
                first, last = max(start, box[0].start), min(stop, box[0].stop)
                if first < last:
                    inside = (slice(first - start, last - start), *box[1:])
                    stored += op.stored_boxes(inside, target[first - box[0].start : last - box[0].start])
            if stored:
                self._store.read_boxes(info, stored, on_block=functools.partial(watch, info.name))

    def pieces(self, name: str) -> list[tuple[Op, TensorInfo, tuple[int, int]]]:
        """The stored tensors that make up a parameter: how each changes its layout, where it lies, which rows it is."""
        entry, shape = self._entries[name], self.shapes[name]
        ranges = entry.row_ranges(shape) if shape else [(0, 0)]
        return [(source.op, self._found[source.name], rows) for source, rows in zip(entry.sources, ranges, strict=True)]


def place(op: Op, stored: np.ndarray, out: np.ndarray) -> None:
    """`out[...] = op.forward(stored)`, without the temporary copy that a gather of rows would make."""
    if isinstance(op, Rows):
        np.take(stored, np.asarray(op.order), axis=0, out=out, mode="clip")
    else:
        out[...] = op.forward(stored)


class MemoryParameters(ShareReader):
    """Parameters that are arrays already, such as those of a trained model."""

    def __init__(self, parameters: Mapping[str, jax.Array]) -> None:
        self._parameters = parameters
        self.shapes = {name: tuple(array.shape) for name, array in parameters.items()}
        self.dtypes = {name: np.dtype(array.dtype) for name, array in parameters.items()}

    def read(self, name: str, dtype: np.dtype, watch: Watch) -> np.ndarray:
        array = np.ascontiguousarray(on_host(self._parameters[name])).reshape(self.shapes[name])
        array = recast(array, dtype, name)
        watch(name, array)
        return array

    def read_boxes(self, name: str, pieces: Sequence[Piece], watch: Watch) -> None:
        array = on_host(self._parameters[name])
        for box, target in pieces:
            check_cast(array.dtype, target.dtype, name)
            copy_blocks(target, array[box], functools.partial(watch, name))


def recast(array: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """`array` itself if it has `dtype`, else a cast copy."""
    if array.dtype == dtype:
        return array
    check_cast(array.dtype, dtype, where)
    out = aligned_empty(array.shape, dtype)
    cast(out, array)
    return out


def total_bytes(source: ParameterSource, dtype: np.dtype | None) -> int:
    """Bytes of all parameters, in `dtype` or as stored."""
    return sum(math.prod(shape) * (dtype or source.dtypes[name]).itemsize for name, shape in source.shapes.items())


def check_shapes(where: str | Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raises `CheckpointError` unless the parameters found in a folder, or elsewhere, are exactly those wanted."""
    lines = [f"missing: {name}" for name in wanted if name not in found]
    lines += [f"not in the model: {name}" for name in found if name not in wanted]
    lines += [
        f"of another shape: {name}: {found[name]}, wanted {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != tuple(shape)
    ]
    if lines:
        more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise CheckpointError(
            f"{where} does not fit the model its config describes:\n  " + "\n  ".join(lines[:20]) + more
        )

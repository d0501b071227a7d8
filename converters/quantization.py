"""Weight matrices that a streaming folder keeps quantised: which, as which arrays, and how they become plain again."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdsi.errors import CheckpointError, ConfigError, nearest
from jdsi.models import ParameterInfo
from jdsi.models.weight_map import Shape
from jdsi.pallas_kernels.quantized_linear import QuantizedWeight, WeightFormat, dequantize, quantize

from .boxes import Piece, read_boxes
from .buffers import OnBlock, aligned_empty, all_finite, cast, check_cast
from .safetensors_file import TensorInfo

KINDS = ("int8", "int4")
GROUP_SIZES = (128, 64, 32)
_PIECE_BYTES = 4 << 20  # of float32 at a time, so that what is made of it is still in the caches


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the weight matrices of a model's linear layers are to be stored.

    Attributes:
        kind: "int8" or "int4".
        group_size: inputs of a row that share a scale, 128, 64 or 32, where a row is a multiple of it. Other rows have
            the largest smaller group that they are a multiple of. Where there is none, int8 has one scale a row, and
            int4 leaves the matrix as it is.

    Raises:
        ConfigError: there is no such kind or group.
    """

    kind: Any
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"quantize={self.kind!r}{nearest(str(self.kind), KINDS)}: wanted is 'int8' or 'int4'")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size={self.group_size!r}: wanted is 32, 64 or 128")

    def format_of(self, info: ParameterInfo) -> WeightFormat | None:
        """The format of a parameter; `None` for one that is stored as it is: anything but a linear layer's matrix."""
        if not info.quantizable:
            return None
        inputs = info.shape[1]
        fitting = [size for size in GROUP_SIZES if size <= self.group_size and inputs % size == 0]
        if fitting:
            return WeightFormat(self.kind, fitting[0])
        return WeightFormat("int8") if self.kind == "int8" else None

    def formats(self, infos: Mapping[str, ParameterInfo]) -> dict[str, WeightFormat]:
        """The formats of those parameters of a model that are quantised.

        Raises:
            ConfigError: none would be.
        """
        found = {name: form for name, info in infos.items() if (form := self.format_of(info)) is not None}
        if not found:
            raise ConfigError(
                f"quantize={self.kind!r} changes nothing: no weight matrix of this model has inputs in multiples of "
                f"{GROUP_SIZES[-1]}; 'int8' takes any"
            )
        return found


class StoredArray(NamedTuple):
    """An array inside a group of a streaming folder; `offset` is in bytes from the group's start."""

    dtype: np.dtype
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """How a quantised parameter is stored.

    Attributes:
        format: how the arrays are to be read.
        arrays: those of its `QuantizedWeight` by name: "values" and "scales".
    """

    format: WeightFormat
    arrays: Mapping[str, StoredArray]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def as_json(self) -> dict[str, Any]:
        """The entry "quantization" of a manifest."""
        arrays = {
            name: {"dtype": array.dtype.name, "shape": list(array.shape), "offset": array.offset}
            for name, array in self.arrays.items()
        }
        return {**dataclasses.asdict(self.format), "arrays": arrays}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], shape: Shape) -> Self:
        """The reverse of `as_json`, of a matrix of `shape`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the entry is damaged, or does not fit the shape.
        """
        fields = {name: value for name, value in entry.items() if name != "arrays"}
        form = WeightFormat(**fields)
        if form.kind not in KINDS or form.zero_points or type(form.group) not in (int, type(None)):
            raise ValueError(f"{form} is no format of streaming folders")
        arrays = {
            name: StoredArray(jnp.dtype(what["dtype"]), tuple(int(n) for n in what["shape"]), int(what["offset"]))
            for name, what in entry["arrays"].items()
        }
        found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        wanted = stored_arrays(form, shape)
        if found != wanted:
            raise ValueError(f"arrays {found} of a matrix {shape} in {form.kind}, not {wanted}")
        return cls(form, arrays)


@functools.lru_cache(maxsize=1024)
def stored_arrays(form: WeightFormat, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
    """Type and shape of each array that a matrix of `shape` is stored as, by name.

    Raises:
        ValueError: such a matrix does not have that format.
    """
    made = jax.eval_shape(functools.partial(quantize, format=form), jax.ShapeDtypeStruct(shape, jnp.float32))
    return {name: (np.dtype(array.dtype), tuple(array.shape)) for name, array in _arrays_of(made).items()}


def _arrays_of(weight: QuantizedWeight) -> dict[str, Any]:
    arrays = {"values": weight.values, "scales": weight.scales, "zeros": weight.zeros}
    return {name: array for name, array in arrays.items() if array is not None}


def quantized(matrix: np.ndarray, form: WeightFormat, where: str) -> dict[str, np.ndarray]:
    """The arrays of `quantize(matrix, form)` by name, made piece by piece on the host.

    Args:
        matrix: `[out, in]`, of any floating-point type.
        where: names it in messages.

    Raises:
        CheckpointError: it holds integers, NaN or infinity, or numbers beyond float32.
    """
    check_cast(matrix.dtype, np.dtype(np.float32), where)
    out: dict[str, Any] = {
        name: aligned_empty(shape, dtype) for name, (dtype, shape) in stored_arrays(form, matrix.shape).items()
    }
    whole = QuantizedWeight(out["values"], out["scales"], None, form)
    rows, inputs = matrix.shape
    step = min(_rows_of_a_piece(inputs), rows)
    memory = aligned_empty((step, inputs), np.dtype(np.float32))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        wide = memory[: stop - start]
        cast(wide, matrix[start:stop])
        if not all_finite(wide):
            raise CheckpointError(
                f"{where} holds NaN or infinity, which {form.kind} has no numbers for; convert it without quantize"
            )
        with _on_host():
            made = _quantize(wide, format=form)
        targets = _arrays_of(whole.rows(start, stop))
        for name, array in _arrays_of(made).items():
            np.copyto(targets[name], np.asarray(array))  # which waits, so that `memory` can be written again
    return out


def dequantized(stored: Mapping[str, Array], form: WeightFormat, dtype: DTypeLike) -> Float[Array, "out in"]:
    """The plain matrix, computed in float32 and rounded once to `dtype`; also inside `jax.jit`.

    The numbers are those that `StreamingCheckpoint.read` gives, bit by bit, whatever program this becomes part of.

    Args:
        stored: the arrays of the matrix by name, as `StoredMatrix.arrays` describes them.
    """
    matrix = dequantize(QuantizedWeight(stored["values"], stored["scales"], None, form), dtype)
    # What uses it is compiled as for a matrix that was loaded, and adds in the same order.
    return jax.lax.optimization_barrier(matrix)


def read_quantized_boxes(
    infos: Mapping[str, TensorInfo], form: WeightFormat, pieces: Sequence[Piece], on_block: OnBlock
) -> None:
    """Read boxes of a quantised matrix as plain numbers, rounded once to the types of their targets.

    Whole groups of inputs are read; memory beyond the targets is a few MiB and the scales of a box.

    Args:
        infos: where the matrix's arrays lie, by name.
        pieces: what is read, and into what.
        on_block: called with every block of a target, flat, when it is filled.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    for box, target in pieces:
        if target.size:
            _read_box(infos, form, (box[0], box[1]), target, on_block)


def _read_box(
    infos: Mapping[str, TensorInfo], form: WeightFormat, box: tuple[slice, slice], target: np.ndarray, done: OnBlock
) -> None:
    rows, columns = box
    unit = form.columns or 1
    first, last = columns.start // unit * unit, -(-columns.stop // unit) * unit
    groups = slice(0, 1) if form.columns is None else slice(first // unit, last // unit)
    words = slice(first // form.words, last // form.words)
    scales = np.empty((groups.stop - groups.start, len(target)), infos["scales"].dtype)
    read_boxes(infos["scales"], [((groups, rows), scales)])
    step = min(_rows_of_a_piece(last - first), len(target))
    memory = np.empty((step, words.stop - words.start), infos["values"].dtype)
    # JAX's types end at 32 bits; wider ones hold the same numbers.
    dtype = np.dtype(np.float32) if target.dtype.itemsize > 4 else target.dtype
    for start in range(0, len(target), step):
        block = target[start : start + step]
        stop = start + len(block)
        values = memory[: len(block)]
        read_boxes(infos["values"], [((slice(rows.start + start, rows.start + stop), words), values)])
        with _on_host():
            plain = _dequantized({"values": values, "scales": scales[:, start:stop]}, form=form, dtype=dtype)
        # NumPy waits for the numbers, so that `memory` can be written again.
        cast(block, np.asarray(plain)[:, columns.start - first : columns.stop - first])
        done(np.ascontiguousarray(block).reshape(-1))


def _rows_of_a_piece(inputs: int) -> int:
    return max(1, _PIECE_BYTES // (4 * inputs))


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """Computes on the CPU, away from whatever runs on an accelerator; there if JAX is kept from using the CPU."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


_quantize: Callable[..., QuantizedWeight] = jax.jit(quantize, static_argnames="format")
_dequantized: Callable[..., Array] = jax.jit(dequantized, static_argnames=("form", "dtype"))

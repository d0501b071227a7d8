"""Quantised weights: what is stored, how it is made from a matrix and turned back into one."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

Kind = Literal["int8", "int4", "fp8"]
ScaleDtype = Literal["float32", "bfloat16", "float16"]

BLOCK = 128  # rows and inputs that share a scale in block formats
RUN = 32  # inputs packed together in 4 bits: eight words of 16 bits
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_STORED = {"int8": jnp.int8, "int4": jnp.int16, "fp8": jnp.float8_e4m3fn}
_GROUPS = {"int8": (32, 64, 128), "int4": (32, 64, 128), "fp8": ()}


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a weight matrix `[out, in]` is quantised. Hashable.

    Attributes:
        kind: "int8", "int4", or "fp8" (`float8_e4m3fn`).
        group: inputs of one row that share a scale: 32, 64 or 128; `None` for one scale a row. 4-bit formats need it.
        blocks: one scale for 128 rows by 128 inputs (DeepSeek-V3), "fp8" only and without `group`.
        zero_points: every group has a zero point beside its scale, "int4" only.
        scale_dtype: of the scales; by default bfloat16 for groups, of which there are many, else float32.

    Raises:
        ValueError: a combination that does not exist.
    """

    kind: Kind
    group: int | None = None
    blocks: bool = False
    zero_points: bool = False
    scale_dtype: ScaleDtype | None = None

    def __post_init__(self) -> None:
        if self.kind not in _STORED:
            raise ValueError(f"kind: {self.kind!r} is none of {', '.join(_STORED)}")
        if self.group is not None and self.group not in _GROUPS[self.kind]:
            known = ", ".join(map(str, _GROUPS[self.kind])) or "none"
            raise ValueError(f"group: {self.kind} has groups of {known}, not {self.group}")
        if self.kind == "int4" and self.group is None:
            raise ValueError("group: int4 needs one; a scale for a whole row is too coarse for 4 bits")
        if self.blocks and self.kind != "fp8":
            raise ValueError(f"blocks: only fp8 has blocks, not {self.kind}")
        if self.zero_points and self.kind != "int4":
            raise ValueError(f"zero_points: only int4 has zero points, not {self.kind}")
        if self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", "float32" if self.group is None else "bfloat16")
        elif self.scale_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"scale_dtype: {self.scale_dtype!r} is none of float32, bfloat16, float16")

    @property
    def columns(self) -> int | None:
        """Inputs that share a scale, `None` for all of a row."""
        return BLOCK if self.blocks else self.group

    @property
    def largest(self) -> float:
        """The largest magnitude before it is scaled, in formats without zero points."""
        return _LARGEST[self.kind]

    @property
    def words(self) -> int:
        """Inputs in one stored value."""
        return 4 if self.kind == "int4" else 1

    def check_inputs(self, inputs: int) -> None:
        """Raises ValueError unless rows of `inputs` numbers have this format."""
        if self.columns is not None and inputs % self.columns:
            raise ValueError(f"{inputs} inputs are not a multiple of the {self.columns} that share a scale")


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A quantised matrix `[out, in]`, a pytree; its arrays may be of numpy or JAX.

    Attributes:
        values: int8 or float8_e4m3fn `[out, in]` as they are. In 4 bits, int16 `[out, in / 4]` of unsigned numbers
            0..15: every run of 32 inputs is eight words, and bits `4 j .. 4 j + 3` of word `c` are input `8 j + c` of
            the run. (A kernel then finds eight neighbouring inputs in the same bits of eight neighbouring words, which
            is what one row of a tensor core's 8x8 tile wants.)
        scales: `[in / group, out]`, `[1, out]` for one scale a row, `[in / 128, ceil(out / 128)]` for blocks.
        zeros: int8 `[in / group, out]`, 0..15, with zero points; otherwise `None`.
        format: how the arrays are to be read.

    The matrix is `(values - zero) * scale`; in 4 bits without zero points, zero is 8.

    Raises:
        ValueError: arrays that do not fit the format or each other.
    """

    values: Array
    scales: Array
    zeros: Array | None
    format: WeightFormat

    def __post_init__(self) -> None:
        if not hasattr(self.values, "dtype"):  # placeholders, when JAX handles the pytree's structure
            return
        if getattr(self.values, "ndim", 0) != 2 or self.values.dtype == jax.dtypes.float0:
            return  # batched by a transformation, or a tangent
        form = self.format
        if self.values.dtype != _STORED[form.kind]:
            raise ValueError(
                f"values: {form.kind} is stored as {jnp.dtype(_STORED[form.kind])}, not {self.values.dtype}"
            )
        form.check_inputs(self.shape[1])
        rows, inputs = self.shape
        expected = (1 if form.columns is None else inputs // form.columns, -(-rows // BLOCK) if form.blocks else rows)
        for name, array, wanted in (("scales", self.scales, expected), ("zeros", self.zeros, expected)):
            if array is not None and hasattr(array, "shape") and tuple(array.shape) != wanted:
                raise ValueError(f"{name}: {tuple(array.shape)} for a matrix {self.shape}, not {wanted}")
        if (self.zeros is None) == form.zero_points:
            raise ValueError(f"zeros: the format has zero points {form.zero_points}, but they are {type(self.zeros)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix: `(out, in)`."""
        return self.values.shape[-2], self.values.shape[-1] * self.format.words

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, scales and zero points."""
        arrays = (self.values, self.scales, self.zeros)
        return sum(array.size * array.dtype.itemsize for array in arrays if array is not None)

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Rows `start` to `stop` (outputs).

        Raises:
            ValueError: they are not in the matrix, or cut a block of 128 rows that share scales.
        """
        out, _ = self.shape
        if not 0 <= start < stop <= out:
            raise ValueError(f"rows {start} to {stop} of {out}")
        if not self.format.blocks:
            return self._with(self.values[start:stop], slice(None), slice(start, stop))
        if start % BLOCK or (stop % BLOCK and stop != out):
            raise ValueError(f"rows {start} to {stop} cut a block of {BLOCK} rows that share scales")
        return self._with(self.values[start:stop], slice(None), slice(start // BLOCK, -(-stop // BLOCK)))

    def columns(self, start: int, stop: int) -> "QuantizedWeight":
        """Columns `start` to `stop` (inputs).

        Raises:
            ValueError: they are not in the matrix, or cut a group of inputs that share a scale.
        """
        inputs = self.shape[1]
        if not 0 <= start < stop <= inputs:
            raise ValueError(f"columns {start} to {stop} of {inputs}")
        group = self.format.columns
        if group is not None and (start % group or stop % group):
            raise ValueError(f"columns {start} to {stop} cut a group of {group} inputs that share a scale")
        words = self.format.words
        groups = slice(None) if group is None else slice(start // group, stop // group)
        return self._with(self.values[:, start // words : stop // words], groups, slice(None))

    def _with(self, values: Array, groups: slice, rows: slice) -> "QuantizedWeight":
        zeros = None if self.zeros is None else self.zeros[groups, rows]
        return QuantizedWeight(values, self.scales[groups, rows], zeros, self.format)


jax.tree_util.register_dataclass(QuantizedWeight, ("values", "scales", "zeros"), ("format",))


def quantize(weight: Float[ArrayLike, "out in"], format: WeightFormat) -> QuantizedWeight:
    """The nearest matrix of that format, each group scaled to its largest magnitude, or with zero points to its range.

    Every number of the result is at most half a step (half the distance of its neighbours in the format) from that of
    `weight`; groups of zeros stay exactly zero.

    Raises:
        ValueError: not a matrix, or `in` is not a multiple of the inputs that share a scale.
    """
    wide = jnp.asarray(weight, jnp.float32)
    if wide.ndim != 2:
        raise ValueError(f"a weight is a matrix, not {wide.shape}")
    rows, inputs = wide.shape
    format.check_inputs(inputs)
    grouped = wide.reshape(rows, -1, format.columns or inputs)
    if format.zero_points:
        low, high = jnp.minimum(grouped.min(-1), 0.0), jnp.maximum(grouped.max(-1), 0.0)
        scale = _stored_scale(high - low, 15, format)
    else:
        low = None
        largest = jnp.abs(grouped).max(-1)
        if format.blocks:
            largest = jnp.pad(largest, ((0, -rows % BLOCK), (0, 0))).reshape(-1, BLOCK, largest.shape[1]).max(1)
        scale = _stored_scale(largest, format.largest, format)
    divisor = _of_rows(scale, rows, format)
    divisor = jnp.where(divisor > 0, divisor, 1.0)
    steps = grouped / divisor[..., None]
    if format.kind == "fp8":
        values = jnp.clip(steps, -448, 448).reshape(rows, inputs).astype(jnp.float8_e4m3fn)
        return QuantizedWeight(values, _transposed(scale, format), None, format)
    if format.kind == "int8":
        values = jnp.clip(jnp.round(steps), -127, 127).reshape(rows, inputs).astype(jnp.int8)
        return QuantizedWeight(values, _transposed(scale, format), None, format)
    zero = jnp.round(-low / divisor) if low is not None else jnp.full_like(divisor, 8.0)
    numbers = jnp.clip(jnp.round(steps) + zero[..., None], 0, 15).reshape(rows, inputs).astype(jnp.int32)
    zeros = zero.T.astype(jnp.int8) if format.zero_points else None
    return QuantizedWeight(pack(numbers), _transposed(scale, format), zeros, format)


def dequantize(weight: QuantizedWeight, dtype: DTypeLike = jnp.float32) -> Float[Array, "out in"]:
    """The matrix, computed in float32 and rounded once to `dtype`, whatever program this becomes part of."""
    form, (rows, inputs) = weight.format, weight.shape
    values, scales = jnp.asarray(weight.values), jnp.asarray(weight.scales)
    numbers = _runs(values) if form.kind == "int4" else values[..., None]
    numbers = numbers.astype(jnp.float32).reshape(rows, scales.shape[0], -1, *numbers.shape[2:])
    of_group = (..., *[None] * (numbers.ndim - 2))
    if form.kind == "int4":
        numbers -= 8.0 if weight.zeros is None else jnp.asarray(weight.zeros).T.astype(jnp.float32)[of_group]
    scale = _of_rows(scales.T.astype(jnp.float32), rows, form)[of_group]
    # Without the barrier XLA would skip the rounding of a number that is widened again at once, and on a CPU compute
    # every number's place in `numbers` from its place in the matrix, for which 4 bits took four times as long.
    return jax.lax.optimization_barrier((numbers * scale).astype(dtype)).reshape(rows, inputs)


def pack(numbers: Array) -> Array:
    """Numbers 0..15 `[..., in]` as the words of `QuantizedWeight.values`."""
    runs = numbers.reshape(*numbers.shape[:-1], -1, 4, RUN // 4).astype(jnp.uint16)
    words = runs[..., 0, :] | runs[..., 1, :] << 4 | runs[..., 2, :] << 8 | runs[..., 3, :] << 12
    return jax.lax.bitcast_convert_type(words.reshape(*numbers.shape[:-1], -1), jnp.int16)


def unpack(words: Array) -> Array:
    """The reverse of `pack`, as int32."""
    return _runs(words).reshape(*words.shape[:-1], -1)


def _runs(words: Array) -> Array:
    """The numbers in words `[..., in/4]`, `[..., in/32, 4, 8]`."""
    runs = words.reshape(*words.shape[:-1], -1, 1, RUN // 4).astype(jnp.int32)
    return runs >> jnp.arange(0, 16, 4)[:, None] & 15


def _stored_scale(extent: Array, steps: float, format: WeightFormat) -> Array:
    """The scale with which `steps` reach over `extent`, as it is stored, widened again: rounded up, so that they do."""
    assert format.scale_dtype is not None  # settled by WeightFormat
    dtype = jnp.dtype(format.scale_dtype)
    info = jnp.finfo(dtype)
    # A group of tiny numbers keeps a scale that is not zero; float32 below its smallest normal is flushed.
    scale = jnp.where(extent > 0, jnp.maximum(extent / steps, max(float(info.smallest_subnormal), 2.0**-126)), 0.0)
    nearest = scale.astype(dtype).astype(jnp.float32)
    # Numbers below the smallest normal one, which float16 has many of, lie equally far apart.
    larger = jnp.maximum(scale * (1 + float(info.eps)), scale + float(info.smallest_subnormal))
    above = larger.astype(dtype).astype(jnp.float32)
    return jnp.where(nearest < scale, above, nearest)


def _of_rows(scale: Array, rows: int, format: WeightFormat) -> Array:
    """Scales `[out, groups]` from those of blocks of rows; others as they are."""
    return jnp.repeat(scale, BLOCK, axis=0)[:rows] if format.blocks else scale


def _transposed(scale: Array, format: WeightFormat) -> Array:
    assert format.scale_dtype is not None
    return scale.T.astype(format.scale_dtype)

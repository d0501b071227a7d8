"""From stored weights to tensor core operands, in registers.

Bits are put where a float whose unit in the last place is one holds an integer's bits, and the float's own value is
taken off again, so that no conversion instruction is needed: bfloat16 has 7 bits for it, float16 has 10.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxtyping import Array, Float, Int

from .weight import RUN, WeightFormat

LANES = RUN // 4  # neighbouring inputs that share bit positions in 4-bit words


def bit_pattern(form: WeightFormat, dtype: jnp.dtype) -> int | None:
    """The bits that `operand` wants as a scalar, if any, better from memory than as a constant.

    `bits & mask | pattern` is one instruction with the mask in it and the pattern in a register, but two where the
    compiler sees that both are constants.
    """
    if form.kind == "fp8":
        return None
    return 0x4300 if dtype == jnp.bfloat16 else 0x6400 if form.kind == "int4" else 0x6480


def operand(
    stored: Array,
    form: WeightFormat,
    dtype: jnp.dtype,
    pattern: Int[Array, ""] | None,
    zeros: Int[Array, " rows"] | None,
) -> Float[Array, "rows inputs"]:
    """Numbers in `dtype`, exact, from a tile of `QuantizedWeight.values`; in 4 bits less `zeros`, or less 8."""
    if form.kind == "fp8":
        half = stored.astype(jnp.float16)  # one instruction for two numbers; to bfloat16 the way leads over float32
        return half if dtype == jnp.float16 else half.astype(jnp.float32).astype(dtype)
    assert pattern is not None
    if form.kind == "int4":
        return _from_words(stored, dtype, pattern, zeros)
    number = spread(stored)
    if dtype == jnp.float16:  # 1024, and the sign's bit turned over: numbers from 0 to 255
        return _float(number ^ pattern, dtype) - dtype.type(1024 + 128)
    # Bits 0..6 stand for themselves in the mantissa of 128. The sign's is the lowest of the exponent: it makes 256 of
    # the 128 that is taken off again.
    return _float(number & jnp.int16(0x7F) | pattern, dtype) - _float(number & jnp.int16(0x80) | pattern, dtype)


def _from_words(words: jax.Array, dtype: jnp.dtype, pattern: jax.Array, zeros: jax.Array | None) -> jax.Array:
    one = 128 if dtype == jnp.bfloat16 else 1024  # the number whose last bit is worth one
    offset: Any = dtype.type(one + 8)
    if zeros is not None:
        offset = across(_float(zeros.astype(jnp.int16) | pattern, dtype), words.shape[1])
    fields = []
    for bits in (0, 4, 8, 12):
        nibble = (shifted(words, bits) if bits else words) & jnp.int16(0xF)
        fields.append(_float(nibble | pattern, dtype) - offset)
    runs = range(words.shape[1] // LANES)
    # Slices and joins of whole 8x8 tiles only name registers anew.
    return lax.concatenate([field[:, LANES * run : LANES * (run + 1)] for run in runs for field in fields], 1)


def across(row: jax.Array, columns: int) -> jax.Array:
    """A number per row, in every column."""
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (len(row), columns), (0,)), plgpu.Layout.WGMMA)


def shifted(words: Int[Array, "rows words"], bits: int) -> Int[Array, "rows words"]:
    """Shifts words to the right, two neighbours at a time as one number of 32 bits: one instruction instead of six.

    What comes into the high bits of a word may be its neighbour's.
    """

    def shift(words: Any) -> Any:
        return arith.shrui(words, utils.c(bits, words.type))

    return _by_twos(words, shift)


def spread(numbers: Int[Array, "rows inputs"]) -> Int[Array, "rows inputs"]:
    """The bits of numbers of 8 bits, with 8 zeros before them: one instruction for two neighbours, instead of three."""

    def permute(numbers: Any) -> Any:
        return utils.inline_ptx("prmt.b32 $0, $1, 0, 0x4140;", numbers, result_types=numbers.type)

    return _by_twos(numbers, permute)


def _by_twos(numbers: Int[Array, "rows inputs"], change: Callable[[Any], Any]) -> Int[Array, "rows inputs"]:
    """What `change` makes of every two neighbours as a number of 32 bits, again as two, of 16 bits each."""
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(numbers.shape, jnp.dtype("int16"), layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=result)

    @inline
    def changed(_: Any, numbers: Any) -> Any:
        wide = ir.IntegerType.get_signless(32)

        def of_two(two: Any) -> Any:
            bits = utils.bitwidth(two.type)
            number = utils.bitcast(two, ir.IntegerType.get_signless(bits))
            number = number if bits == 32 else arith.extui(wide, number)
            return utils.bitcast(change(number), ir.VectorType.get((2,), ir.IntegerType.get_signless(16)))

        return numbers._pointwise(of_two, output_is_signed=True, restrict_bitwidth=False)

    return changed(numbers)


def _float(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)

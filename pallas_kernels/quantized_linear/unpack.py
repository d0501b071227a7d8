"""From stored weights to tensor core operands, in registers.

Bits are put where a float whose unit in the last place is one holds an integer's bits, and the float's own value is
taken off again, so that no conversion instruction is needed: bfloat16 has 7 bits for it, float16 has 10.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .weight import RUN, WeightFormat

LANES = RUN // 4  # neighbouring inputs that share bit positions in 4-bit words


def bit_patterns(form: WeightFormat, dtype: jnp.dtype) -> tuple[int, ...]:
    """Bit patterns that `operand` wants as scalars, better from memory than as constants.

    `bits & mask | pattern` is one instruction with the mask in it and the pattern in a register, but two where the
    compiler sees that both are constants.
    """
    if form.kind == "int4":
        return (0x4300, 0x4100, 0x4180) if dtype == jnp.bfloat16 else (0x6400,)
    return (0x6480,) if form.kind == "int8" and dtype == jnp.float16 else ()


def operand(
    stored: Array, form: WeightFormat, dtype: jnp.dtype, patterns: Sequence[Int[Array, ""]]
) -> Float[Array, "rows inputs"]:
    """Numbers in `dtype`, exact, from a tile of `QuantizedWeight.values`; in 4 bits less 8."""
    if form.kind == "int4":
        return _from_words(stored, dtype, patterns)
    if form.kind == "fp8":
        half = stored.astype(jnp.float16)  # one instruction for two numbers; to bfloat16 the way leads over float32
        return half if dtype == jnp.float16 else half.astype(jnp.float32).astype(dtype)
    if dtype == jnp.bfloat16:
        return stored.astype(dtype)  # Mosaic has the trick for this one
    [pattern] = patterns  # 1024, and the sign's bit turned over: numbers from 0 to 255
    return _float((stored.astype(jnp.int16) & jnp.int16(0xFF)) ^ pattern, dtype) - dtype.type(1024 + 128)


def _from_words(words: jax.Array, dtype: jnp.dtype, patterns: Sequence[jax.Array]) -> jax.Array:
    # Bits 0..7 serve as they are; one shift serves two numbers more.
    fields = [
        nibble(bits, dtype, patterns)
        for bits in (words, lax.shift_right_logical(words, jnp.int16(8)))
        for nibble in (_low_nibble, _high_nibble)
    ]
    runs = range(words.shape[1] // LANES)
    # Slices and joins of whole 8x8 tiles only name registers anew.
    return lax.concatenate([field[:, LANES * run : LANES * (run + 1)] for run in runs for field in fields], 1)


def _low_nibble(bits: jax.Array, dtype: jnp.dtype, patterns: Sequence[jax.Array]) -> jax.Array:
    """Bits 0..3, less 8."""
    one = 128 if dtype == jnp.bfloat16 else 1024
    return _float((bits & jnp.int16(0xF)) | patterns[0], dtype) - dtype.type(one + 8)


def _high_nibble(bits: jax.Array, dtype: jnp.dtype, patterns: Sequence[jax.Array]) -> jax.Array:
    """Bits 4..7, less 8."""
    if dtype == jnp.float16:
        return _float((bits & jnp.int16(0xF0)) | patterns[0], dtype) * dtype.type(1 / 16) - dtype.type(64 + 8)
    # Bits 4..6 stand for 1, 2, 4 in the mantissa of 8. Bit 7 is the lowest of the exponent: turned over, it makes 8 of
    # the nibbles from 8 and 16 of the others, which taken off leave those as they are less 8.
    low = _float((bits & jnp.int16(0x70)) | patterns[1], dtype)
    return low - _float((bits & jnp.int16(0x80)) ^ patterns[2], dtype)


def _float(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)

"""From stored weights to tensor core operands, in registers.

Bits are put where a float whose unit in the last place is one holds an integer's bits, and the float's own value is
taken off again, so that no conversion instruction is needed: bfloat16 has 7 bits for it, float16 has 10.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .weight import RUN, WeightFormat

LANES = 8  # neighbouring inputs that share bit positions in 4-bit words


def operand(stored: jax.Array, form: WeightFormat, dtype: jnp.dtype) -> jax.Array:
    """Numbers `[rows, inputs]` in `dtype`, exact, from a tile of `QuantizedWeight.values`; in 4 bits less 8."""
    if form.kind == "int4":
        return _from_words(stored, dtype)
    if form.kind == "fp8":
        half = stored.astype(jnp.float16)  # one instruction for two numbers; to bfloat16 the way leads over float32
        return half if dtype == jnp.float16 else half.astype(jnp.float32).astype(dtype)
    if dtype == jnp.bfloat16:
        return stored.astype(dtype)
    bits = stored.astype(jnp.int16)
    return _float(((bits & _bits(0xFF)) ^ _bits(0x80)) | _bits(0x6400), dtype) - dtype.type(1024 + 128)


def _from_words(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    low, high = words, lax.shift_right_logical(words, jnp.int16(8))
    fields = [convert(word, dtype) for word in (low, high) for convert in (_low_nibble, _high_nibble)]
    runs = range(words.shape[1] // LANES)
    # Slices and joins of whole 8x8 tiles only name registers anew.
    return lax.concatenate([field[:, LANES * run : LANES * (run + 1)] for run in runs for field in fields], 1)


def _low_nibble(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Bits 0..3, less 8."""
    one, base = (0x4300, 128) if dtype == jnp.bfloat16 else (0x6400, 1024)
    return _float((bits & _bits(0xF)) | _bits(one), dtype) - dtype.type(base + 8)


def _high_nibble(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Bits 4..7, less 8."""
    if dtype == jnp.float16:
        return _float((bits & _bits(0xF0)) | _bits(0x6400), dtype) * dtype.type(1 / 16) - dtype.type(64 + 8)
    # Bits 4..6 stand for 1, 2, 4 in the mantissa of 8. Bit 7 is the lowest of the exponent: 16 becomes 8 where it is
    # set, and less 16 or less 8 is less 8 or nothing but the 8 of the first term.
    return _float((bits & _bits(0x70)) | _bits(0x4100), dtype) - _float((bits & _bits(0x80)) ^ _bits(0x4180), dtype)


def _float(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(bits, dtype)


def _bits(pattern: int) -> jax.Array:
    return jnp.int16(pattern - (pattern >> 15 << 16))


assert RUN == 4 * LANES

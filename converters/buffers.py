"""Host buffers: aligned allocation, the casting rule, and a cheap look for NaN and infinity."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.errors import CheckpointError

ALIGNMENT = 64
"""Bytes; JAX takes a host array aligned like this without copying it on the CPU."""

BLOCK_BYTES = 16 << 20
"""Bytes read, cast or written at a time."""

OnBlock = Callable[[np.ndarray], None]
"""Called with every flat block of a destination once it is filled; must not keep it. Threads may call at a time."""


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A C-contiguous uninitialised array of `shape` and `dtype` that starts at a multiple of `ALIGNMENT`."""
    return _aligned(np.empty, shape, dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As `aligned_empty`, filled with zeros; memory that stays unwritten takes none on most systems."""
    return _aligned(np.zeros, shape, dtype)


def _aligned(allocate: Callable[..., np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = allocate(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A copy of an array in memory of its own, as `aligned_empty` makes it."""
    out = aligned_empty(array.shape, array.dtype)
    np.copyto(out, array)
    return out


def is_float(dtype: np.dtype) -> bool:
    """Whether `dtype` is a floating-point type, narrow ones (bfloat16, fp8) included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def check_cast(stored: np.dtype, wanted: np.dtype, where: str) -> None:
    """The casting rule: any float becomes any float, rounding to nearest; everything else keeps its type.

    Args:
        where: names the tensor and its file in the message.

    Raises:
        CheckpointError: the cast is refused. Integer weights are codes of a quantisation, not values.
    """
    if stored == wanted or (is_float(stored) and is_float(wanted)):
        return
    raise CheckpointError(
        f"{where} is stored as {stored} and cannot be read as {wanted}: only floating-point weights are cast, "
        "and only to floating-point types"
    )


def cast(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values` with an unchecked cast; overflow becomes infinity without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, values, casting="unsafe")


def copy_blocks(out: np.ndarray, values: np.ndarray, on_block: OnBlock | None = None) -> None:
    """`out[...] = values`, cast, block by block; of any strides, and of at least one dimension."""
    step = max(1, BLOCK_BYTES // max(1, out[:1].nbytes))
    for start in range(0, len(out) if out.size else 0, step):
        block = out[start : start + step]
        cast(block, values[start : start + step])
        if on_block is not None:
            on_block(np.ascontiguousarray(block).reshape(-1))


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array's values, which the caller must not write to; copied only where they do not lie in host memory.

    NumPy's own way leaves the copy with the array for as long as that lives: a whole model's, for a model that is
    written parameter by parameter.
    """
    if isinstance(array, np.ndarray):
        return array
    data = [shard.data for shard in array.addressable_shards]
    handle = jax.make_array_from_single_device_arrays(array.shape, array.sharding, data, dtype=array.dtype)
    return np.asarray(handle)


# Type name: unsigned type of the same width, and its bits without the sign. They rise with the number, up to NaN.
_MAGNITUDE: dict[str, tuple[type, int]] = {
    "float64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF),
    "float32": (np.uint32, 0x7FFF_FFFF),
    "float16": (np.uint16, 0x7FFF),
    "bfloat16": (np.uint16, 0x7FFF),
    "float8_e4m3fn": (np.uint8, 0x7F),
    "float8_e5m2": (np.uint8, 0x7F),
}
_LOOK = 1 << 18


def largest(block: np.ndarray) -> float:
    """The largest magnitude in a C-contiguous array; NaN if any is in it, and 0 of types that are no floats."""
    if block.dtype.name not in _MAGNITUDE:
        return 0.0
    unsigned, mask = _MAGNITUDE[block.dtype.name]
    bits = block.reshape(-1).view(unsigned)
    # Pieces that stay in the cache, and a maximum over integers, keep this at memory speed.
    pieces = ((bits[i : i + _LOOK] & unsigned(mask)).max() for i in range(0, bits.size, _LOOK))
    return float(np.array(max(pieces, default=0), unsigned).view(block.dtype))


def all_finite(block: np.ndarray) -> bool:
    """Whether a C-contiguous array holds neither NaN nor infinity; True for types that have neither."""
    return math.isfinite(largest(block))


def overflow(dtype: np.dtype) -> float:
    """The smallest magnitude that becomes infinite when it is rounded to a floating-point type."""
    info = jnp.finfo(dtype)
    return 2.0**info.maxexp * (1 - 2.0 ** -(info.nmant + 2))  # half-way from the largest number to the next

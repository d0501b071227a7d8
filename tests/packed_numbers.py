"""Teaches Pallas' GPU interpreter what products with quantised weights need: packed numbers in registers."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from jdsi.pallas_kernels.quantized_linear import unpack
from kernels import ON_GPU
from register_operands import register_operands


@contextlib.contextmanager
def packed_numbers() -> Iterator[None]:
    """Within it the interpreter takes a `wgmma` whose left operand is an array, and instructions on packed numbers.

    On a GPU it changes nothing.
    """
    if ON_GPU:
        yield
        return
    with register_operands(), mock.patch.multiple(unpack, shifted=shifted, spread=spread):
        yield


def shifted(words: jax.Array, bits: int) -> jax.Array:
    """What `unpack.shifted` does, without its instruction."""
    twos = lax.bitcast_convert_type(words.reshape(*words.shape[:-1], -1, 2), jnp.uint32)
    return lax.bitcast_convert_type(lax.shift_right_logical(twos, jnp.uint32(bits)), jnp.int16).reshape(words.shape)


def spread(numbers: jax.Array) -> jax.Array:
    """What `unpack.spread` does, without its instruction."""
    return lax.bitcast_convert_type(numbers, jnp.uint8).astype(jnp.int16)

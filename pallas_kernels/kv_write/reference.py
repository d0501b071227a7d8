"""Rotary embedding and the write into the KV memory, reference form."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..rotary import Rotary, apply_rotary

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


def quantize(x: Float[Array, "*heads D"], dtype: Any) -> tuple[Array, Float[Array, "*heads"]]:
    """Every head over its scale, rounded to `dtype`, and the scales, which make its largest magnitude the type's.

    A head of zeros has scale 0.
    """
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / LARGEST[jnp.dtype(dtype)]
    return rounded(wide / divisor(scales)[..., None], dtype), scales


def divisor(scales: Array) -> Array:
    """The scales, but 1 where they are 0."""
    return jnp.where(scales > 0, scales, jnp.ones_like(scales))


def rounded(numbers: Array, dtype: Any) -> Array:
    """To `dtype`, ties to even."""
    return (jnp.round(numbers) if jnp.dtype(dtype) == jnp.int8 else numbers).astype(dtype)


def separate(q: Array, k: Array | None, v: Array | None, num_heads: int) -> tuple[Array, Array, Array]:
    """q, k and v; where k and v are `None`, of the fused projection that comes as q: its first `num_heads` are q's."""
    if k is None or v is None:
        q, k, v = jnp.split(q, (num_heads, (num_heads + q.shape[1]) // 2), axis=1)
    return q, k, v


def rotary_kv_write_reference(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"] | None,
    v: Float[Array, "T K Dv"] | None,
    keys: Float[Array, "R K L D"],
    values: Float[Array, "R K L Dv"],
    rows: Int[Array, " T"],
    slots: Int[Array, " T"],
    positions: Int[Array, " T"],
    lengths: Int[Array, " T"],
    key_scales: Float[Array, "R K L"] | None,
    value_scales: Float[Array, "R K L"] | None,
    *,
    rotary: Rotary | None,
    ascending: bool,
    num_heads: int = 0,
) -> tuple[Array, ...]:
    """See `rotary_kv_write`, and `rotary_kv_write_fused`, whose qkv comes as q, without k and v."""
    q, k, v = separate(q, k, v, num_heads)
    if rotary is not None:
        q, k = (apply_rotary(x, positions, lengths, rotary) for x in (q, k))

    def write(memory: Array, new: Array) -> Array:
        return memory.at[rows, :, slots].set(
            new.astype(memory.dtype),
            mode="drop",
            unique_indices=ascending,
            indices_are_sorted=ascending,
            wrap_negative_indices=False,
        )

    if key_scales is None or value_scales is None:
        return q, write(keys, k), write(values, v)
    (k, of_keys), (v, of_values) = quantize(k, keys.dtype), quantize(v, values.dtype)
    return q, write(keys, k), write(values, v), write(key_scales, of_keys), write(value_scales, of_values)

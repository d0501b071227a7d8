"""The step between the attention's input projections and the attention itself."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..operator import Implementation, Operator
from ..rotary import Rotary
from .reference import LARGEST, rotary_kv_write_reference, separate


def _bucket(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"] | None,
    v: Float[Array, "T K Dv"] | None,
    keys: Array,
    values: Array,
    rows: Array,
    slots: Array,
    positions: Array,
    lengths: Array,
    key_scales: Array | None,
    value_scales: Array | None,
    *,
    rotary: Rotary | None,
    ascending: bool,
    num_heads: int = 0,
) -> str:
    tokens, heads, dim = q.shape
    heads, fused = (num_heads, " fused") if k is None else (heads, "")
    turned = "" if rotary is None else f" rotary={rotary.dim}{'i' * rotary.interleaved}"
    kv_heads, value_dim = values.shape[1], values.shape[3]
    tokens = 1 << max(tokens - 1, 0).bit_length()
    return f"T={tokens} H={heads} K={kv_heads} D={dim}/{value_dim}{turned} {keys.dtype}{fused}"


ROTARY_KV_WRITE = Operator("rotary_kv_write", "jdsi.pallas_kernels.kv_write", rotary_kv_write_reference, _bucket)


def rotary_kv_write(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K Dv"],
    keys: Float[Array, "R K L D"],
    values: Float[Array, "R K L Dv"],
    rows: Int[Array, " T"],
    slots: Int[Array, " T"],
    positions: Int[Array, " T"],
    rotary: Rotary | None,
    *,
    lengths: Int[Array, " T"] | None = None,
    key_scales: Float[Array, "R K L"] | None = None,
    value_scales: Float[Array, "R K L"] | None = None,
    ascending: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """Rotates q and k and writes k and v of token t to `[rows[t], :, slots[t]]` of the memory.

    R and L are batch rows and their capacity, or pages and their size: the layout serves contiguous and paged memory
    alike. Where the memory is donated to the compiled function around this, it is written in place.

    Args:
        q, k, v: of the new tokens, as projected.
        keys, values: the memory; its dtype may differ, then k and v are cast. Memory of int8 or float8_e4m3fn has
            scales, float32, and the largest magnitude of each new head becomes the largest of the type.
        rows, slots: where each token goes, no two to the same place. A token whose row or slot is negative or past the
            end is written nowhere: so padding is expressed. (Its q is rotated all the same.)
        positions: of the tokens in their sequences.
        rotary: the embedding, `None` for a model without.
        lengths: length of each token's sequence, see `apply_rotary`; `positions + 1` if left out.
        ascending: a promise that the pairs (row, slot) ascend strictly, dropped ones included, which lets XLA scatter
            without minding the order. The kernel does not need it.
        implementation: one by name, or the fastest that takes the arguments.

    Returns:
        Rotated q in its dtype, and the memory with the tokens written: keys, values and, where there are any, the
        scales of both: what each key and value is to be multiplied with.

    Raises:
        ValueError: arrays that do not fit together.
        UnsupportedError: the named implementation cannot take the arguments.
    """
    return _write(
        (q, k, v),
        0,
        keys,
        values,
        rows,
        slots,
        positions,
        rotary,
        lengths=lengths,
        key_scales=key_scales,
        value_scales=value_scales,
        ascending=ascending,
        implementation=implementation,
    )


def rotary_kv_write_fused(
    qkv: Float[Array, "T H+2*K D"],
    num_heads: int,
    keys: Float[Array, "R K L D"],
    values: Float[Array, "R K L D"],
    rows: Int[Array, " T"],
    slots: Int[Array, " T"],
    positions: Int[Array, " T"],
    rotary: Rotary | None,
    *,
    lengths: Int[Array, " T"] | None = None,
    key_scales: Float[Array, "R K L"] | None = None,
    value_scales: Float[Array, "R K L"] | None = None,
    ascending: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """`rotary_kv_write` of one projection's whole result, which saves the kernel's callers the cutting.

    Args:
        qkv: the heads of q, then those of k, then those of v.
        num_heads: how many of them are q's.

    The other arguments, what is returned and what is raised are those of `rotary_kv_write`.
    """
    if not (0 < num_heads < qkv.shape[1] and (qkv.shape[1] - num_heads) % 2 == 0):
        raise ValueError(f"{qkv.shape[1]} heads, {num_heads} of them for q, leave none or an odd number for k and v")
    return _write(
        (qkv, None, None),
        num_heads,
        keys,
        values,
        rows,
        slots,
        positions,
        rotary,
        lengths=lengths,
        key_scales=key_scales,
        value_scales=value_scales,
        ascending=ascending,
        implementation=implementation,
    )


def _write(
    new: tuple[Array, Array | None, Array | None],
    num_heads: int,
    keys: Array,
    values: Array,
    rows: Array,
    slots: Array,
    positions: Array,
    rotary: Rotary | None,
    *,
    lengths: Array | None,
    key_scales: Array | None,
    value_scales: Array | None,
    ascending: bool,
    implementation: Implementation | None,
) -> tuple[Array, ...]:
    """Checks the arguments of either form and calls the operator."""
    q, k, v = jax.eval_shape(functools.partial(separate, num_heads=num_heads), *new)
    tokens, kv_heads = k.shape[:2]
    for name, array, shape in (
        ("q", q, (tokens, q.shape[1], k.shape[2])),
        ("v", v, (tokens, kv_heads, v.shape[2])),
        ("keys", keys, (keys.shape[0], kv_heads, keys.shape[2], k.shape[2])),
        ("values", values, (*keys.shape[:3], v.shape[2])),
        ("rows", rows, (tokens,)),
        ("slots", slots, (tokens,)),
        ("positions", positions, (tokens,)),
        ("lengths", lengths, (tokens,)),
        ("key_scales", key_scales, keys.shape[:3]),
        ("value_scales", value_scales, keys.shape[:3]),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape} as k of shape {k.shape} demands")
    for name, scales, memory in (("key_scales", key_scales, keys), ("value_scales", value_scales, values)):
        if (scales is not None) != (memory.dtype in LARGEST):
            raise ValueError(f"{name} {'are missing for' if scales is None else 'do not go with'} {memory.dtype}")
    if (key_scales is None) != (value_scales is None):
        raise ValueError(f"keys are {keys.dtype} and values {values.dtype}: both need scales, or neither")
    if rotary is not None and not (rotary.dim % 2 == 0 and 0 < rotary.dim <= k.shape[2]):
        raise ValueError(f"{rotary.dim} rotated dimensions: an even number up to the head's {k.shape[2]} is needed")
    if lengths is None:
        lengths = positions + 1
    return ROTARY_KV_WRITE(
        *new,
        keys,
        values,
        *(x.astype(jnp.int32) for x in (rows, slots, positions, lengths)),
        key_scales,
        value_scales,
        implementation=implementation,
        rotary=rotary,
        ascending=ascending,
        num_heads=num_heads,
    )

"""Attention of the newest tokens of many sequences to long memories of keys and values."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ..attention.form import AttentionForm
from ..operator import Implementation, Operator
from .reference import decode_attention as _reference


def _bucket(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Array | None,
    *_: Any,
    form: AttentionForm,
    sinks: int = 0,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> str:
    batch, length, heads, dim = q.shape
    capacity = k.shape[2] if block_tables is None else k.shape[2] * block_tables.shape[1]
    # Only what decides how much is read and how it is divided, and sizes that grow in powers of two.
    batch, capacity = (1 << (x - 1).bit_length() for x in (max(batch, 1), max(capacity, 1)))
    values = value_dim if v is None else v.shape[-1]
    return (
        f"B={batch} S={length} H={heads} K={k.shape[1]} D={dim},{values} L={capacity} {q.dtype}"
        + (f" kv={k.dtype}" if k.dtype != q.dtype else "")
        + (f" window={form.window}" if form.window is not None else "")
        + (f" page={k.shape[2]}" if block_tables is not None else "")
    )


_PACKAGE = "jdsi.pallas_kernels.decode_attention"
_KERNELS = ("pallas", "triton")

DECODE_ATTENTION = Operator("decode_attention", _PACKAGE, _reference, _bucket, _KERNELS)
PAGED_DECODE_ATTENTION = Operator("paged_decode_attention", _PACKAGE, _reference, _bucket, _KERNELS)


def decode_attention(
    q: Float[Array, "B S H D"],
    k: Shaped[Array, "B K L D"],
    v: Shaped[Array, "B K L Dv"] | None,
    form: AttentionForm,
    *,
    q_start: Int[Array, " B"],
    k_lengths: Int[Array, " B"] | None = None,
    sinks: int = 0,
    value_dim: int | None = None,
    k_scales: Float[Array, "B K L"] | None = None,
    v_scales: Float[Array, "B K L"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B S H Dv"] | tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"]]:
    """Attention of each row's last S tokens (one, or a few in speculative decoding) to the row's keys.

    The keys of a row are divided among many blocks of the GPU, whose results are then combined by their logarithms
    (flash decoding, Dao et al. 2023).

    Args:
        q: queries, already rotated; query head `h` reads key/value head `h // (H // K)`.
        k, v: keys and values, in the dtype of `q`, or int8 or float8_e4m3fn with scales. Without `v` the values are the
            first `value_dim` dims of the keys (the latents of DeepSeek's MLA, K = 1).
        form: scale, causal mask, window, soft cap and ALiBi; `form.rotary` is ignored.
        q_start: index of each row's first query on the axis of keys; query `i` stands at `q_start + i`, and masks and
            biases compare indices.
        k_lengths: keys of each row; what lies behind in memory has no influence. By default `q_start + S`.
        sinks: the first `sinks` keys stay visible outside the form's window (StreamingLLM, Xiao et al. 2023).
        value_dim: see `v`.
        k_scales, v_scales: float32, what each key and each value is to be multiplied with.
        return_lse: also return the natural logarithm of each softmax's denominator, float32.
        implementation: one by name, or the fastest that takes the arguments.

    Returns:
        The weighted values in the dtype of `q`. A query that sees no key gets zeros, and -inf for its logarithm.

    Raises:
        ValueError: arrays that do not fit together.
        UnsupportedError: the named implementation cannot take the arguments.
    """
    _check(q, k, v, k_scales, v_scales, q_start, k_lengths, sinks, value_dim)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"queries have {q.shape[0]} rows, keys {k.shape[0]}")
    return DECODE_ATTENTION(
        q,
        k,
        v,
        k_scales,
        v_scales,
        None,
        q_start,
        k_lengths,
        form=form,
        sinks=sinks if form.window is not None else 0,
        value_dim=value_dim,
        return_lse=return_lse,
        implementation=implementation,
    )


def paged_decode_attention(
    q: Float[Array, "B S H D"],
    k_pages: Shaped[Array, "P K page D"],
    v_pages: Shaped[Array, "P K page Dv"] | None,
    block_tables: Int[Array, "B N"],
    form: AttentionForm,
    *,
    q_start: Int[Array, " B"],
    k_lengths: Int[Array, " B"] | None = None,
    sinks: int = 0,
    value_dim: int | None = None,
    k_scales: Float[Array, "P K page"] | None = None,
    v_scales: Float[Array, "P K page"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B S H Dv"] | tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"]]:
    """`decode_attention` to keys and values in pages (vLLM's paged attention, Kwon et al. 2023).

    Args:
        k_pages, v_pages, k_scales, v_scales: as there, but in pages of one pool.
        block_tables: key `j` of row `b` is at offset `j % page` of page `block_tables[b, j // page]`. An entry outside
            `[0, P)` is a hole: its keys are invisible, and nothing is read for it.
        q, form, q_start, k_lengths, sinks, value_dim, return_lse, implementation: as there.

    Returns:
        As there.

    Raises:
        ValueError: arrays that do not fit together.
        UnsupportedError: the named implementation cannot take the arguments.
    """
    _check(q, k_pages, v_pages, k_scales, v_scales, q_start, k_lengths, sinks, value_dim)
    if block_tables.ndim != 2 or block_tables.shape[0] != q.shape[0]:
        raise ValueError(f"block tables have shape {block_tables.shape}, queries {q.shape[0]} rows")
    return PAGED_DECODE_ATTENTION(
        q,
        k_pages,
        v_pages,
        k_scales,
        v_scales,
        block_tables,
        q_start,
        k_lengths,
        form=form,
        sinks=sinks if form.window is not None else 0,
        value_dim=value_dim,
        return_lse=return_lse,
        implementation=implementation,
    )


def _check(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    q_start: Array,
    k_lengths: Array | None,
    sinks: int,
    value_dim: int | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} dimensions, not 4")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"queries have {q.shape[3]} dimensions, keys {k.shape[3]}")
    if q.shape[2] % k.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[1]} key/value heads")
    if (v is None) == (value_dim is None):
        raise ValueError("give either v or value_dim")
    if value_dim is not None and not 0 < value_dim <= k.shape[3]:
        raise ValueError(f"value_dim is {value_dim}, the keys have {k.shape[3]} dimensions")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"keys are {k.shape[:3]} and values {v.shape[:3]} without their last axis")
    narrow = k.dtype in (jnp.int8, jnp.float8_e4m3fn)
    for name, scales, of in (("k_scales", k_scales, k), ("v_scales", v_scales, v)):
        if (scales is not None) != (narrow and of is not None):
            raise ValueError(f"{name} {'are missing' if scales is None else 'do not go'} with {k.dtype}")
        if scales is not None and of is not None and scales.shape != of.shape[:3]:
            raise ValueError(f"{name} have shape {scales.shape}, not {of.shape[:3]}")
    if v is not None and v.dtype != k.dtype:
        raise ValueError(f"keys are {k.dtype}, values {v.dtype}")
    for name, x in (("q_start", q_start), ("k_lengths", k_lengths)):
        if x is not None and x.shape != (q.shape[0],):
            raise ValueError(f"{name} has shape {x.shape}, not ({q.shape[0]},)")
    if sinks < 0:
        raise ValueError(f"sinks must not be negative: {sinks}")

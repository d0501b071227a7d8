"""Attention of few queries to a long KV memory, reference form."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..attention.reference import _masked_scores, _weighted_sum, attention


def decode_attention(
    q: Float[Array, "B S H D"],
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Int[Array, "B N"] | None,
    q_start: Int[Array, " B"],
    k_lengths: Int[Array, " B"] | None,
    *,
    form: AttentionForm,
    sinks: int = 0,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> Float[Array, "B S H Dv"] | tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"]]:
    """See `api.decode_attention`; with `block_tables` what `api.paged_decode_attention` computes."""
    batch, length, heads, _ = q.shape
    there, quantised = None, k_scales is not None
    if block_tables is not None:
        pages, _, page, _ = k.shape
        there = jnp.repeat((block_tables >= 0) & (block_tables < pages), page, axis=1)
        k, v, k_scales, v_scales = (_gathered(x, block_tables) for x in (k, v, k_scales, v_scales))
    if k_scales is not None:
        k = k.astype(jnp.float32) * k_scales[..., None]
    if v is None:
        v = k[..., :value_dim]
    elif v_scales is not None:
        v = v.astype(jnp.float32) * v_scales[..., None]
    q_positions = q_start[:, None] + jnp.arange(length, dtype=jnp.int32)
    key = jnp.arange(k.shape[2], dtype=jnp.int32)
    k_positions = jnp.broadcast_to(key, (batch, len(key)))
    if k_lengths is None and there is None and form.causal and not (sinks or return_lse or quantised):
        return attention(q, k, v, form, q_positions=q_positions, k_positions=k_positions)

    real = key < (q_start + length if k_lengths is None else k_lengths)[:, None]
    if there is not None:
        real &= there
    # What stands in memory behind the keys may be NaN, which would outlive a weight of zero.
    v = jnp.where(real[:, None, :, None], v, jnp.zeros((), v.dtype))
    distance = key - q_positions[:, :, None]
    visible = real[:, None] & (distance <= 0) if form.causal else jnp.broadcast_to(real[:, None], distance.shape)
    if form.window is not None:
        visible &= (jnp.abs(distance) < form.window) | (key < sinks)
    unmasked = dataclasses.replace(form, causal=False, window=None)
    dtype = jnp.promote_types(q.dtype, k.dtype)
    scores = _masked_scores(q.astype(dtype), k, unmasked, q_positions, k_positions, visible)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = visible.any(axis=-1)[:, :, None]
    out = (_weighted_sum(weights.astype(v.dtype), v) / total).transpose(0, 3, 1, 2, 4)
    out = jnp.where(seen[..., None], out.reshape(batch, length, heads, -1), 0.0).astype(q.dtype)
    lse = (jnp.log(total) + top)[..., 0].transpose(0, 3, 1, 2).reshape(batch, length, heads)
    return (out, jnp.where(seen, lse, -jnp.inf)) if return_lse else out


def _gathered(pages: Any, block_tables: Int[Array, "B N"]) -> Any:
    """`[P, K, page, ...]` as `[B, K, N * page, ...]`; holes get some page."""
    if pages is None:
        return None
    rows = pages[jnp.clip(block_tables, 0, pages.shape[0] - 1)].swapaxes(1, 2)
    return rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])

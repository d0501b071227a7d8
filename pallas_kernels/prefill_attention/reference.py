"""Attention of many queries to contiguous keys and values, reference form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..attention.form import AttentionForm
from ..attention.reference import _masked_scores, attention


def prefill_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    q_start: Int[Array, " B"] | None,
    k_lengths: Int[Array, " B"] | None,
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B L"] | None,
    *,
    form: AttentionForm,
    return_lse: bool = False,
) -> Float[Array, "B S H Dv"] | tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"]]:
    """See `api.prefill_attention`. For the logarithms all scores are in memory at once."""
    batch, queries, heads, _ = q.shape
    k, v, k_segments = in_sight(q, k, v, q_start, k_segments, form)
    keys = k.shape[2]
    query, key = jnp.arange(queries, dtype=jnp.int32), jnp.arange(keys, dtype=jnp.int32)
    start = jnp.zeros(batch, jnp.int32) if q_start is None else q_start
    positions = {
        "q_positions": start[:, None] + query,
        "k_positions": jnp.broadcast_to(key, (batch, keys)),
        "visible": _visible(queries, keys, k_lengths, q_segments, k_segments),
    }
    aligned = q_start is None and queries == keys
    out = attention(q, k, v, form, **positions, aligned=aligned)
    if aligned and positions["visible"] is None and not return_lse:
        return out  # every query sees at least itself
    seen = _sees_a_key(form, positions["q_positions"], keys, positions["visible"])[:, :, None]
    out = jnp.where(seen[..., None], out, jnp.zeros((), out.dtype))
    if not return_lse:
        return out
    lse = jax.nn.logsumexp(_masked_scores(q, k, form, **positions), axis=-1).reshape(batch, heads, queries)
    return out, jnp.where(seen, lse.swapaxes(1, 2), -jnp.inf)


def keys_in_sight(
    q: Float[Array, "B S H D"], k: Float[Array, "B K L D"], q_start: Array | None, form: AttentionForm
) -> int:
    """How many keys, from the first on, queries can see by their indices alone; memory may have room for more."""
    return min(q.shape[1], k.shape[2]) if form.causal and q_start is None else k.shape[2]


def in_sight(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    q_start: Array | None,
    k_segments: Int[Array, "B L"] | None,
    form: AttentionForm,
) -> tuple[Array, Array, Array | None]:
    """`k`, `v` and `k_segments` without keys that are out of sight."""
    keys = keys_in_sight(q, k, q_start, form)
    return k[:, :, :keys], v[:, :, :keys], None if k_segments is None else k_segments[:, :keys]


def _visible(
    queries: int, keys: int, k_lengths: Array | None, q_segments: Array | None, k_segments: Array | None
) -> Bool[Array, "B S L"] | None:
    """What lengths and segments leave visible; `None` for everything."""
    visible = None
    if q_segments is not None and k_segments is not None:
        visible = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] >= 0)
    if k_lengths is not None:
        real = jnp.arange(keys, dtype=jnp.int32) < k_lengths[:, None, None]
        visible = jnp.broadcast_to(real, (len(k_lengths), queries, keys)) if visible is None else visible & real
    return visible


def _sees_a_key(
    form: AttentionForm, q_positions: Int[Array, "B S"], keys: int, visible: Bool[Array, "B S L"] | None
) -> Bool[Array, "B S"]:
    if visible is None:
        begin = jnp.zeros((), jnp.int32) if form.window is None else jnp.maximum(q_positions - (form.window - 1), 0)
        reach = 1 if form.causal else form.window
        return begin < (keys if reach is None else jnp.minimum(q_positions + reach, keys)) + jnp.zeros_like(q_positions)
    distance = jnp.arange(keys, dtype=jnp.int32) - q_positions[:, :, None]
    if form.causal:
        visible &= distance <= 0
    if form.window is not None:
        visible &= jnp.abs(distance) < form.window
    return jnp.any(visible, axis=-1)

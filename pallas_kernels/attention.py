"""Scaled dot-product attention, reference form: every variant the families use, in plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .rotary import Rotary

_MASKED = np.float32(-1e30)  # finite, so that a row with no visible key gives numbers and never NaN
_QUERY_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """The static part of one layer's attention: what is computed from q, k and v. Hashable.

    Attributes:
        scale: multiplies the scores.
        causal: a query sees only keys at its own position or earlier.
        window: a query at position i sees only keys at positions > i - window.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask.
        alibi_slopes: one slope per query head; adds `slope * (key position - query position)`.
        rotary: rotary embedding of q and k. Whoever owns the KV memory applies it, for only it knows the positions.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    rotary: Rotary | None = None


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B L K D"],
    v: Float[Array, "B L K Dv"],
    form: AttentionForm,
    *,
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B L"],
    visible: Bool[Array, "B S L"] | None = None,
) -> Float[Array, "B S H Dv"]:
    """Attention of `q` to `k` and `v` with grouped query heads; scores and softmax in float32.

    Args:
        q, k, v: query head h reads key/value head `h // (H // K)`. q and k are already rotated.
        form: scale, mask kind, bias.
        q_positions, k_positions: positions that `causal`, `window` and ALiBi compare.
        visible: a further mask; `False` hides the key.

    Returns:
        The weighted values in the dtype of `q`. A query that sees no key gets the mean of all values.
    """
    if q.shape[1] <= 2 * _QUERY_BLOCK:
        return _attention_block(q, k, v, form, q_positions, k_positions, visible)
    # Long prompts go block by block, so that scores take S/block times less memory.
    blocks = -(-q.shape[1] // _QUERY_BLOCK)
    pad = blocks * _QUERY_BLOCK - q.shape[1]

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(x.shape[0], blocks, _QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(block: tuple) -> Array:
        return _attention_block(block[0], k, v, form, block[1], k_positions, block[2] if visible is not None else None)

    parts = (split(q), split(q_positions)) + ((split(visible),) if visible is not None else ())
    out = jax.lax.map(one, parts).swapaxes(0, 1)
    return out.reshape(q.shape[0], blocks * _QUERY_BLOCK, *out.shape[3:])[:, : q.shape[1]]


def attention_weights(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B L K D"],
    form: AttentionForm,
    *,
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B L"],
    visible: Bool[Array, "B S L"] | None = None,
) -> Float[Array, "B K G S L"]:
    """The softmax of the masked scores, float32, query heads grouped by the KV head they share (`G = H // K`)."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide over {kv_heads} key/value heads")
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bskgd,blkd->bkgsl", grouped, k, preferred_element_type=jnp.float32) * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    distance = k_positions[:, None, :] - q_positions[:, :, None]  # B S L
    if form.alibi_slopes is not None:
        slopes = jnp.asarray(form.alibi_slopes, jnp.float32).reshape(kv_heads, -1)
        scores += slopes[None, :, :, None, None] * distance[:, None, None].astype(jnp.float32)
    mask = visible
    if form.causal:
        mask = _both(mask, distance <= 0)
    if form.window is not None:
        mask = _both(mask, jnp.abs(distance) < form.window)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    return jax.nn.softmax(scores, axis=-1)


def _attention_block(q, k, v, form, q_positions, k_positions, visible) -> Array:  # noqa: ANN001 - see `attention`
    weights = attention_weights(q, k, form, q_positions=q_positions, k_positions=k_positions, visible=visible)
    out = jnp.einsum("bkgsl,blkd->bskgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype)


def _both(mask: Array | None, other: Array) -> Array:
    return other if mask is None else mask & other

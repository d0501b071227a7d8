"""Scaled dot-product attention, reference form: every variant the families use, in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .form import AttentionForm

_MASKED = np.float32(-1e30)  # finite, so that a row with no visible key gives numbers and never NaN
_QUERY_BLOCK = 256
_DIAGONAL_BLOCK, _DIAGONAL_PARTS = 128, 8


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    form: AttentionForm,
    *,
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B L"],
    visible: Bool[Array, "B S L"] | None = None,
    aligned: bool = False,
) -> Float[Array, "B S H Dv"]:
    """Attention of `q` to `k` and `v` with grouped query heads; scores and softmax in float32.

    Args:
        q, k, v: query head h reads key/value head `h // (H // K)`. q and k are already rotated.
        form: scale, mask kind, bias.
        q_positions, k_positions: positions that `causal`, `window` and ALiBi compare.
        visible: a further mask; `False` hides the key.
        aligned: query i and key i are of the same token and later tokens stand behind earlier ones, so that causal
            attention need not compute what lies behind the diagonal.

    Returns:
        The weighted values in the dtype of `q`. A query that sees no key gets the mean of all values.
    """
    length = q.shape[1]
    if aligned and form.causal and length > _DIAGONAL_BLOCK:
        # Each part of the queries meets only the keys up to its own end; few parts, for each is compiled.
        size = max(_DIAGONAL_BLOCK, -(-length // _DIAGONAL_PARTS))
        parts = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            seen = None if visible is None else visible[:, start:stop, :stop]
            parts.append(
                attention(
                    q[:, start:stop],
                    k[:, :, :stop],
                    v[:, :, :stop],
                    form,
                    q_positions=q_positions[:, start:stop],
                    k_positions=k_positions[:, :stop],
                    visible=seen,
                )
            )
        return jnp.concatenate(parts, axis=1)
    if length <= 2 * _QUERY_BLOCK:
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
    k: Float[Array, "B K L D"],
    form: AttentionForm,
    *,
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B L"],
    visible: Bool[Array, "B S L"] | None = None,
) -> Float[Array, "B K G S L"]:
    """The softmax of the masked scores, float32, query heads grouped by the KV head they share (`G = H // K`)."""
    return jax.nn.softmax(_masked_scores(q, k, form, q_positions, k_positions, visible), axis=-1)


def _masked_scores(
    q: Array, k: Array, form: AttentionForm, q_positions: Array, k_positions: Array, visible: Array | None
) -> Float[Array, "B K G S L"]:
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide over {kv_heads} key/value heads")
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    scores = _scores(grouped, k) * form.scale
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    distance = k_positions[:, None, :] - q_positions[:, :, None]  # B S L
    if form.alibi is not None:
        scores += form.alibi.bias(q_positions, k_positions).reshape(scores.shape)
    mask = visible
    if form.causal:
        mask = _both(mask, distance <= 0)
    if form.window is not None:
        mask = _both(mask, jnp.abs(distance) < form.window)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, _MASKED)
    return scores


def _attention_block(
    q: Array, k: Array, v: Array, form: AttentionForm, q_positions: Array, k_positions: Array, visible: Array | None
) -> Array:
    scores = _masked_scores(q, k, form, q_positions, k_positions, visible)
    # The softmax's division comes after the sum over keys, where there is less to divide.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_weighted_sum(weights.astype(v.dtype), v) / total).transpose(0, 3, 1, 2, 4)
    return out.reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype)


# With one query and few rows XLA's CPU backend copies the whole cache to call a matrix product; a multiply and a
# reduction read it in place. With more rows the product wins, and more so with the cache as its left operand.
_MULTIPLY_REDUCE_BATCH = 3


def _scores(q: Float[Array, "B K G S D"], k: Float[Array, "B K L D"]) -> Float[Array, "B K G S L"]:
    if q.shape[3] == 1 and q.shape[0] <= _MULTIPLY_REDUCE_BATCH:
        return jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[:, :, None], axis=-1)[:, :, :, None]
    if q.shape[3] == 1:
        scores = jnp.einsum(
            "bkld,bkgd->bklg", k, q[:, :, :, 0], precision=_precision(q), preferred_element_type=jnp.float32
        )
        return jax.lax.optimization_barrier(scores).swapaxes(2, 3)[:, :, :, None]
    return jnp.einsum("bkgsd,bkld->bkgsl", q, k, precision=_precision(q), preferred_element_type=jnp.float32)


def _weighted_sum(weights: Float[Array, "B K G S L"], v: Float[Array, "B K L D"]) -> Float[Array, "B K G S D"]:
    if weights.shape[3] == 1 and weights.shape[0] <= _MULTIPLY_REDUCE_BATCH:
        column = jnp.swapaxes(weights, 3, 4).astype(jnp.float32)
        return jnp.sum(column * v.astype(jnp.float32)[:, :, None], axis=-2)[:, :, :, None]
    return jnp.einsum("bkgsl,bkld->bkgsd", weights, v, precision=_precision(v), preferred_element_type=jnp.float32)


def _precision(x: Array) -> jax.lax.Precision | None:
    """Full float32 products for float32 inputs; TF32 would make the answer depend on the device."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _both(mask: Array | None, other: Array) -> Array:
    return other if mask is None else mask & other

"""Attention of a packed batch over paged keys and values, reference form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..varying import vary_like
from .blocks import query_blocks

_BLOCK = 16  # tokens that share one copy of their sequence's pages


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    return_lse: bool = False,
) -> Float[Array, "T H Dv"] | tuple[Float[Array, "T H Dv"], Float[Array, "T H"]]:
    """See `api.ragged_paged_attention`; scores and softmax in float32.

    Goes over blocks of 16 tokens, one after another: memory beyond the arguments is that of one sequence's pages and
    of 16 rows of scores a head. Blocks without tokens cost nothing.
    """
    tokens, heads, dim = q.shape
    pages, kv_heads, page, _ = k_pages.shape
    sequences, columns = block_tables.shape
    group = heads // kv_heads
    blocks = query_blocks(q_offsets, k_lengths, tokens, _BLOCK)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    key = jnp.arange(columns * page, dtype=jnp.int32)

    def one(sequence: Array, token: Array, position: Array) -> tuple[Array, Array]:
        table = block_tables[sequence]
        there = (table >= 0) & (table < pages)
        kept = jnp.repeat(there, page) & (key < k_lengths[sequence])
        table = jnp.where(there, table, 0)
        positions = position + jnp.arange(_BLOCK, dtype=jnp.int32)
        rows = q[jnp.minimum(token + jnp.arange(_BLOCK), tokens - 1)].reshape(_BLOCK, kv_heads, group, dim)
        # What stands in memory behind the keys may be NaN, which would outlive a weight of zero, also in derivatives.
        read = kept.reshape(columns, 1, page, 1)
        keys, values = jnp.where(read, k_pages[table], 0), jnp.where(read, v_pages[table], 0)
        scores = jnp.einsum(
            "tkgd,nkpd->kgtnp", rows, keys, precision=precision, preferred_element_type=jnp.float32
        ).reshape(heads, _BLOCK, len(key))
        scores *= form.scale
        if form.softcap is not None:
            scores = form.softcap * jnp.tanh(scores / form.softcap)
        if form.alibi is not None:
            scores += form.alibi.bias(positions[None], key[None])[0]
        distance = key - positions[:, None]
        visible = kept[None]
        if form.causal:
            visible &= distance <= 0
        if form.window is not None:
            visible &= jnp.abs(distance) < form.window
        seen = visible.any(axis=-1)
        scores = jnp.where(visible, scores, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.where(seen, scores.max(axis=-1), 0.0))
        weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - top[..., None], 0.0)), 0.0)
        total = jnp.where(seen, weights.sum(axis=-1), 1.0)
        out = jnp.einsum(
            "kgtnp,nkpd->tkgd",
            weights.reshape(kv_heads, group, _BLOCK, columns, page).astype(values.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        ).reshape(_BLOCK, heads, -1)
        lse = jnp.where(seen, jnp.log(total) + top, -jnp.inf)
        return (out / total.T[..., None]).astype(q.dtype), lse.T

    def none(*_: Array) -> tuple[Array, Array]:
        empty = jnp.zeros((_BLOCK, heads, v_pages.shape[3]), q.dtype), jnp.full((_BLOCK, heads), -jnp.inf, jnp.float32)
        return vary_like(empty, (q, k_pages, v_pages, block_tables, q_offsets, k_lengths))

    @jax.checkpoint
    def step(block: tuple[Array, ...]) -> tuple[Array, Array]:
        sequence, token, count, position = block
        return jax.lax.cond((count > 0) & (sequence < sequences), one, none, sequence, token, position)

    if tokens == 0:
        out, lse = jnp.zeros((0, heads, v_pages.shape[3]), q.dtype), jnp.zeros((0, heads), jnp.float32)
    else:
        parts = jax.lax.map(step, (blocks.sequence, blocks.token, blocks.tokens, blocks.position))
        place = blocks.of_token, jnp.arange(tokens) - blocks.token[blocks.of_token]
        out, lse = (part[place] for part in parts)
    return (out, lse) if return_lse else out

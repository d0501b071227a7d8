"""Attention over paged keys and values, of a batch that mixes prompt chunks and decodes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..operator import Implementation, Operator
from .reference import ragged_paged_attention as reference


def _bucket(
    q: Array, k_pages: Array, v_pages: Array, block_tables: Array, q_offsets: Array, k_lengths: Array, **static: object
) -> str:
    _pages, kv_heads, page, dim = k_pages.shape
    sequences, columns = block_tables.shape
    return (
        f"T={q.shape[0]} B={sequences} H={q.shape[1]} K={kv_heads} D={dim},{v_pages.shape[3]} "
        f"page={page}x{columns} {q.dtype}"
    )


RAGGED_PAGED_ATTENTION = Operator(
    "ragged_paged_attention",
    "jdsi.pallas_kernels.ragged_paged_attention",
    reference,
    _bucket,
    ("pallas", "triton"),
)


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    form: AttentionForm,
    *,
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "T H Dv"] | tuple[Float[Array, "T H Dv"], Float[Array, "T H"]]:
    """Attention of the new tokens of many sequences to all their keys, which lie in pages: one call for a whole step.

    A sequence with one new token is a decode, one with several a prompt or a chunk of one; a batch may mix them (the
    blocked attention of DeepSpeed-FastGen, Holmes et al. 2024). A sequence's result does not depend on the others.

    Args:
        q: queries, packed: those of sequence `b` are `q[q_offsets[b]:q_offsets[b + 1]]`, already rotated.
        k_pages, v_pages: the pool of pages; query head `h` reads key/value head `h // (H // K)`.
        block_tables: key `j` of sequence `b` is at offset `j % page` of page `block_tables[b, j // page]`. An entry
            outside `[0, P)` is a hole: its keys are invisible and never read.
        form: scale, causal mask, window, soft cap and ALiBi; `form.rotary` is ignored.
        q_offsets: ascending from 0. Equal neighbours are a sequence without new tokens; tokens past the last entry
            are padding, whose results are zeros and, in the logarithms, -inf.
        k_lengths: keys of each sequence, the new tokens' among them: its last query stands at index
            `k_lengths[b] - 1`, and masks compare indices. What lies in the pages behind is not looked at.
        return_lse: also return the natural logarithm of each softmax's denominator, float32.
        implementation: which one to run; by default the fastest that takes the arguments.

    Returns:
        The weighted values in the dtype of `q`; a query that sees no key gets zeros (and -inf).

    Raises:
        ValueError: shapes that do not go together.
        UnsupportedError: `implementation` cannot take the arguments.
    """
    _check(q, k_pages, v_pages, block_tables, q_offsets, k_lengths)
    return RAGGED_PAGED_ATTENTION(
        q,
        k_pages,
        v_pages,
        jnp.asarray(block_tables),
        jnp.asarray(q_offsets),
        jnp.asarray(k_lengths),
        form=form,
        return_lse=return_lse,
        implementation=implementation,
    )


def _check(q: Array, k_pages: Array, v_pages: Array, block_tables: Array, q_offsets: Array, k_lengths: Array) -> None:
    for name, x, rank in (("q", q, 3), ("k_pages", k_pages, 4), ("v_pages", v_pages, 4), ("tables", block_tables, 2)):
        if x.ndim != rank:
            raise ValueError(f"{name} has {x.ndim} dimensions, not {rank}")
    if k_pages.shape[:3] != v_pages.shape[:3]:
        raise ValueError(f"k_pages are {k_pages.shape[:3]}, v_pages {v_pages.shape[:3]} (pages, heads, page size)")
    if q.shape[2] != k_pages.shape[3]:
        raise ValueError(f"queries have {q.shape[2]} dimensions, keys {k_pages.shape[3]}")
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide over {k_pages.shape[1]} key/value heads")
    sequences = block_tables.shape[0]
    if k_lengths.shape != (sequences,):
        raise ValueError(f"k_lengths have shape {k_lengths.shape}, the block tables {sequences} rows")
    if q_offsets.shape != (sequences + 1,):
        raise ValueError(f"q_offsets have shape {q_offsets.shape}, not ({sequences + 1},) for {sequences} sequences")

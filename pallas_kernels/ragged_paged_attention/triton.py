"""Attention of a packed batch over paged keys and values, in Triton: for NVIDIA GPUs that the Pallas kernel leaves out.

Each block takes some queries of one sequence through all the keys they see, so that no sum depends on the batch. A
long sequence with one new token keeps one block per KV head busy: batches of decodes alone are better served by
`paged_decode_attention`, which splits the keys.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..attention.form import AttentionForm
from ..attention.triton_form import Blocks, blocks, constants, slopes, why_not_form
from ..device import Device
from ..operator import Config
from ..triton_support import launch, why_not_device, why_not_dtype


def why_not(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    q_offsets: Array,
    k_lengths: Array,
    *,
    device: Device,
    form: AttentionForm,
    return_lse: bool = False,
) -> str | None:
    """See `KernelModule`."""
    if reason := why_not_device(device) or why_not_dtype(q=q, k_pages=k_pages, v_pages=v_pages):
        return reason
    if reason := why_not_form(form, q.shape[1]):
        return reason
    if 0 in (*q.shape, *k_pages.shape, *v_pages.shape, *block_tables.shape):
        return "nothing to compute"
    group = q.shape[1] // k_pages.shape[1]
    fitting = _default(q, k_pages, v_pages, device)
    if fitting is None or fitting.block_m < group:
        return (
            f"{group} query heads of {q.shape[2]} and {v_pages.shape[3]} dimensions "
            f"do not fit {device.shared_memory} bytes of shared memory"
        )
    return None


def candidates(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    q_offsets: Array,
    k_lengths: Array,
    *,
    device: Device,
    form: AttentionForm,
    return_lse: bool = False,
) -> Sequence[Config]:
    """See `KernelModule`."""
    group = q.shape[1] // k_pages.shape[1]
    found = []
    for block_m in (16, 32, 64, 128):
        for block_n in (32, 64, 128):
            for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
                option = Blocks(block_m, block_n, warps, stages)
                used = option.shared_memory(q.shape[2], v_pages.shape[3], q.dtype.itemsize, shared_values=False)
                if block_m >= group and used <= device.shared_memory:
                    found.append(dataclasses.asdict(option))
    return found


def run(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    q_offsets: Array,
    k_lengths: Array,
    *,
    device: Device,
    config: Config | None,
    form: AttentionForm,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `KernelModule`."""
    from .triton_kernels import ragged

    tokens, heads, dim = q.shape
    pages, kv_heads, page, value_dim = v_pages.shape
    sequences, columns = block_tables.shape
    chosen = _default(q, k_pages, v_pages, device)
    assert chosen is not None  # checked by `why_not`
    chosen = dataclasses.replace(chosen, **config or {})
    queries = chosen.block_m // (heads // kv_heads)
    out, lse = launch(
        ragged,
        q,
        k_pages,
        v_pages,
        block_tables.astype(jnp.int32),
        q_offsets.astype(jnp.int32),
        k_lengths.astype(jnp.int32),
        slopes(form),
        tokens,
        sequences,
        columns,
        pages,
        out=[
            jax.ShapeDtypeStruct((tokens, heads, value_dim), q.dtype),
            jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        ],
        # Each sequence, and the padding behind them, may leave one block partly empty.
        grid=(tokens // queries + sequences + 1, kv_heads),
        device=device,
        warps=chosen.warps,
        stages=chosen.paged_stages(),
        HEADS=heads,
        KV_HEADS=kv_heads,
        PAGE=page,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        **constants(form, dim, value_dim),
    )
    return (out, lse) if return_lse else out


def _default(q: Array, k_pages: Array, v_pages: Array, device: Device) -> Blocks | None:
    """The same blocks for every batch: a sequence's sums are then the same in whatever company.

    64 rows are enough to keep the tensor cores busy and, where one decoded token fills few of them, still take less
    time than their keys take to arrive.
    """
    rows = max(64, q.shape[1] // k_pages.shape[1])
    return blocks(rows, q.shape[2], v_pages.shape[3], q.dtype.itemsize, device, shared_values=False)

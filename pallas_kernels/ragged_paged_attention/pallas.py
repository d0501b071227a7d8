"""The kernel for Hopper: persistent, warp-specialised, keys and values by TMA one page at a time.

The query heads that share a key/value head are packed with the tokens of a query block into the 64 rows of one
warpgroup's matrix product (row `token * heads + head`), so that a decode, too, reads each key once. Each
multiprocessor goes through its share of the schedule: one warpgroup keeps loads of pages in flight, across the borders
of work items, the others compute. Keys of long sequences are split; a second small kernel adds up the parts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..attention.tile import why_not_form
from ..device import Device
from ..mosaic import not_hopper, tiled
from ..operator import Config
from .body import Inputs, Results, Scratch, run_block
from .combine import combine_parts
from .schedule import TOKEN, Schedule, make_schedule, most_slots, most_splits
from .tiling import (
    PART_COLUMNS,
    ROWS,
    Tiling,
    default_tiling,
    head_blocks,
    operand_width,
    padded,
    shared_memory,
    tilings,
)


def run(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    return_lse: bool = False,
    device: Device,
    config: Config | None,
) -> Any:
    """See `reference.ragged_paged_attention`.

    Where tables have room for sequences that will be split, their parts take `most_slots() * H * Dv` float32 numbers of
    memory, of which only those that are needed are written and read.
    """
    (tokens, heads, _), (_, kv_heads, page, _), v_dim = q.shape, k_pages.shape, v_pages.shape[3]
    tiling = dataclasses.replace(default_tiling(q, k_pages, v_pages, form, device), **(config or {}))
    room = block_tables.shape[1] * page
    splits = most_splits(room, tiling.chunk, tiling.splits)
    schedule = make_schedule(
        q_offsets,
        k_lengths,
        form=form,
        tokens=tokens,
        keys=room,
        block=tiling.block,
        tile=tiling.keys,
        chunk=tiling.chunk,
        splits=tiling.splits,
        units=kv_heads * head_blocks(heads // kv_heads, tiling),
        cores=device.cores,
    )
    tables, slopes = block_tables.astype(jnp.int32), _row_slopes(form, heads, kv_heads, tiling)
    arrays = Inputs(schedule.items, schedule.shares, tables, slopes, q, k_pages, v_pages)
    out, lse, parts = _call(arrays, form, tiling, device, splits=splits, lse=return_lse or splits > 1)
    if parts is not None and lse is not None:
        out = combine_parts(out, lse, parts, schedule, kv_heads, tiling)
    out = out[:, :, :v_dim]
    if lse is None or not return_lse:
        return out
    lse = _by_token(lse, schedule, heads // kv_heads, tiling, splits)
    return out, jax.nn.logsumexp(lse, axis=0)


def _call(
    arrays: Inputs, form: AttentionForm, tiling: Tiling, device: Device, *, splits: int, lse: bool
) -> tuple[Array, Array | None, Array | None]:
    """Results, logarithms `[item, unit, warpgroup, row]` and parts `[slot, H, Dv]`."""
    (tokens, heads, dim), (_, kv_heads, page, _), v_dim = arrays.q.shape, arrays.k.shape, arrays.v.shape[3]
    dtype, width = arrays.q.dtype, padded(v_dim)
    pieces = max(1, tiling.keys // page)
    if padded(dim) > dim:
        arrays = arrays._replace(q=jnp.pad(arrays.q, ((0, 0), (0, 0), (0, padded(dim) - dim))))
    present = [i for i, x in enumerate(arrays) if x is not None]
    units = kv_heads * head_blocks(heads // kv_heads, tiling)
    slots = most_slots(tokens, arrays.tables.shape[0], splits)
    out_type = Results(
        jax.ShapeDtypeStruct((tokens, heads, width), dtype),
        jax.ShapeDtypeStruct((len(arrays.items), units, tiling.warpgroups, ROWS), jnp.float32) if lse else None,
        jax.ShapeDtypeStruct((slots, heads, width), jnp.float32) if splits > 1 else None,
    )
    written = [i for i, x in enumerate(out_type) if x is not None]

    def entry(*refs: Any) -> None:
        inputs = Inputs(*(refs[present.index(i)] if i in present else None for i in range(len(Inputs._fields))))
        rest = refs[len(present) :]
        results = Results(*(rest[written.index(i)] if i in written else None for i in range(len(Results._fields))))

        def rows(columns: int, dtype: Any) -> Any:
            return plgpu.SMEM((tiling.warpgroups, ROWS, columns), dtype)

        def operand(count: int, rows: int, columns: int, most: int = 64) -> Any:
            return plgpu.SMEM((count, rows, columns), dtype, transforms=_transforms(operand_width(columns, most)))

        def barriers(arrivals: int, count: int) -> Any:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

        def block(*scratch: Any) -> None:
            run_block(inputs, results, Scratch(*scratch), form, tiling, dim)

        pl.run_scoped(
            block,
            operand(tiling.warpgroups, ROWS, dim),
            rows(padded(dim), dtype),
            rows(width, dtype) if width != padded(dim) else None,
            rows(PART_COLUMNS, jnp.float32) if splits > 1 else None,
            operand(tiling.stages, tiling.keys, dim),
            # A product over so many keys takes no wider swizzle of its second operand.
            operand(tiling.stages, tiling.keys, v_dim, tiling.step),
            plgpu.SMEM((tiling.stages,), jnp.int32),
            barriers(1 if tiling.heads == 1 else tiling.tokens, tiling.warpgroups),
            barriers(2 * pieces, tiling.stages),
            barriers(tiling.warpgroups, tiling.stages),
            barriers(1, tiling.stages),
            collective_axes="warpgroup",
        )

    written_arrays = plgpu.kernel(
        entry,
        out_type=[x for x in out_type if x is not None],
        grid=(device.cores,),
        grid_names=("core",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*(arrays[i] for i in present))
    results: list[Any] = [
        written_arrays[written.index(i)] if i in written else None for i in range(len(Results._fields))
    ]
    return results[0], results[1], results[2]


def _transforms(width: int) -> tuple[Any, ...]:
    """The layout that matrix products read."""
    return tiled(width)


def _row_slopes(form: AttentionForm, heads: int, kv_heads: int, tiling: Tiling) -> Array | None:
    """ALiBi's slope of each row, for each unit."""
    if form.alibi is None:
        return None
    group = heads // kv_heads
    head = jnp.arange(head_blocks(group, tiling))[:, None] * tiling.heads + jnp.arange(ROWS) % tiling.heads
    head = jnp.minimum(head, group - 1)
    head = jnp.arange(kv_heads)[:, None, None] * group + head
    return form.alibi.values()[head.reshape(-1, ROWS)]


def _by_token(
    lse: Float[Array, "items units warpgroups rows"], schedule: Schedule, group: int, tiling: Tiling, splits: int
) -> Float[Array, "splits T H"]:
    """The logarithms of each token's parts; -inf for parts it does not have."""
    units = lse.shape[1]
    kv_heads = units // head_blocks(group, tiling)
    head = jnp.arange(kv_heads * group)
    unit = head // group * head_blocks(group, tiling) + head % group // tiling.heads
    inside = head % group % tiling.heads
    token = jnp.arange(len(schedule.splits)) - schedule.items[schedule.first_item, TOKEN]
    split = jnp.arange(splits)[:, None]
    item = schedule.first_item + jnp.minimum(split, schedule.splits - 1)
    row = (token % tiling.tokens)[:, None] * tiling.heads + inside
    parts = lse[item[..., None], unit, (token // tiling.tokens)[:, None], row]
    return jnp.where((split < schedule.splits)[..., None], parts, -jnp.inf)


def why_not(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    return_lse: bool = False,
    device: Device,
) -> str | None:
    """See `KernelModule.why_not`."""
    (_, heads, dim), page, v_dim = q.shape, k_pages.shape[2], v_pages.shape[3]
    dtypes = {str(x.dtype) for x in (q, k_pages, v_pages)}
    if reason := not_hopper(device):
        return reason
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"q and pages must all be bfloat16 or all float16, not {', '.join(sorted(dtypes))}"
    if 0 in (*q.shape, *k_pages.shape, *block_tables.shape):
        return f"there is nothing to compute for q of shape {q.shape} and pages of shape {k_pages.shape}"
    if dim % 16 or v_dim % 16 or max(dim, v_dim) > 256:
        return f"head dims must be multiples of 16 up to 256, not {dim} for keys and {v_dim} for values"
    tiling = default_tiling(q, k_pages, v_pages, form, device)
    if page % 8 or (page % tiling.keys and tiling.keys % page):
        return f"pages must have 8, 16, 32 or a multiple of {tiling.keys} keys, not {page}"
    if (needed := shared_memory(tiling, dim, v_dim)) > device.shared_memory:
        return f"it needs {needed} bytes of shared memory, there are {device.shared_memory}"
    return why_not_form(form, heads)


def candidates(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "P K page D"],
    v_pages: Float[Array, "P K page Dv"],
    block_tables: Int[Array, "B N"],
    q_offsets: Int[Array, " B+1"],
    k_lengths: Int[Array, " B"],
    *,
    form: AttentionForm,
    return_lse: bool = False,
    device: Device,
) -> Sequence[Config]:
    """See `KernelModule.candidates`."""
    found = [dataclasses.asdict(tiling) for tiling in tilings(q, k_pages, v_pages, form, device)]
    # Where a batch fills the device by itself, splitting its sequences is only work.
    return found + [tiling | {"chunk": chunk} for tiling in found[:1] for chunk in (1024, 2048)]

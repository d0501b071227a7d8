"""The decode attention kernel for Hopper: split keys, tiles by TMA, products on the tensor cores."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..attention.form import AttentionForm
from ..attention.tile import combine, why_not_form
from ..device import Device
from ..operator import Config
from .body import ROWS, Inputs, Plan, body, scratch

_MOST_COLUMNS = 64


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut up.

    Attributes:
        keys: of one tile, a multiple of 64.
        columns: queries of one block, a multiple of 8.
        stages: tiles in shared memory.
        splits: parts of each row's keys.
    """

    keys: int
    columns: int
    stages: int
    splits: int


def why_not(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Array | None,
    q_start: Array,
    k_lengths: Array | None,
    *,
    device: Device,
    form: AttentionForm,
    sinks: int = 0,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> str | None:
    """See `KernelModule.why_not`."""
    if device.capability[0] != 9:
        return f"it is written for Hopper GPUs, not {device.kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries must be bfloat16 or float16, not {q.dtype}"
    narrow = k.dtype in (jnp.int8, jnp.float8_e4m3fn)
    if k.dtype != q.dtype and not narrow:
        return f"keys are {k.dtype}, queries {q.dtype}"
    if narrow and v is None:
        return "latents that are keys and values at once must not be quantised"
    if reason := why_not_form(form, q.shape[2]):
        return reason
    if 0 in q.shape or 0 in k.shape:
        return "there are no queries or no keys"
    line = 16 if k.dtype == q.dtype else 32
    values = value_dim if v is None else v.shape[3]
    for name, dim in (("keys", q.shape[3]), ("values", values)):
        if dim % line:
            return f"{name} have {dim} dimensions, not a multiple of {line}"
    if v is None and value_dim % ROWS:
        return f"values that are part of the keys need a multiple of {ROWS} dimensions, not {value_dim}"
    if values > 512:
        return f"values have {values} dimensions, more than 512"
    unit = k.shape[2]
    if unit % 8:
        return f"{'a page has' if block_tables is not None else 'there is memory for'} {unit} keys, not a multiple of 8"
    if block_tables is not None and (unit < 16 or (unit % ROWS and ROWS % unit)):
        return f"pages of {unit} keys neither divide nor are divided by tiles of {ROWS}"
    if _default(q, k, v, block_tables, device, form, value_dim) is None:
        return "a tile of keys does not fit into shared memory"
    return None


def _default(
    q: Array,
    k: Array,
    v: Array | None,
    block_tables: Array | None,
    device: Device,
    form: AttentionForm,
    value_dim: int | None,
) -> Tiling | None:
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    queries = length * (heads // kv_heads)
    column_tiles = -(-queries // _MOST_COLUMNS)
    columns = -(-queries // (8 * column_tiles)) * 8
    values = value_dim if v is None else -(-v.shape[3] // ROWS) * ROWS
    if _warpgroups(values, columns) > 1:
        columns = -(-columns // 16) * 16  # each stores half of them
    key_bytes = (dim + (0 if v is None else values)) * k.dtype.itemsize
    keys = ROWS
    if key_bytes <= 256 and k.dtype == q.dtype and (block_tables is None or k.shape[2] % (2 * ROWS) in (0, 64, 32, 16)):
        keys = 2 * ROWS
    if block_tables is not None and keys % k.shape[2] and k.shape[2] % keys:
        keys = ROWS
    # Besides the tiles: queries, weights, and converted values.
    fixed = columns * (dim + keys) * 2 + _scratch_bytes(columns, v) + 1024
    tile = keys * key_bytes
    if k.dtype != q.dtype:
        fixed += keys * values * 2
        tile += 2 * keys * 4
    # Two blocks share a multiprocessor where each can have three tiles: while one computes, the other's copies go on.
    half, whole = (
        min((share - fixed) // tile, 8) for share in ((device.shared_memory - 1024) // 2, device.shared_memory)
    )
    if whole < 2:
        return None
    capacity = k.shape[2] * (1 if block_tables is None else block_tables.shape[1])
    if form.window is not None:
        capacity = min(capacity, form.window + length + keys)
    # A block takes the time of about two tiles before its copies arrive. Its result is written and read once more.
    overhead = 2 + 2 * 4 * values * columns / tile
    blocks = batch * kv_heads * column_tiles
    # Numbers of one byte arrive faster than one block can convert them.
    busy = 2 if k.dtype != q.dtype and half >= 3 else 1
    splits = _splits(blocks, -(-capacity // keys), device.cores, busy, overhead)
    alone = half < 3 or blocks * splits <= device.cores
    return Tiling(keys, columns, whole if alone else half, splits)


def _scratch_bytes(columns: int, v: Array | None) -> int:
    """Memory for reductions among the warps: enough to do all columns at once, or where it is scarce eight."""
    return 1024 if v is None and columns > 32 else 128 * columns


def _warpgroups(values: int, columns: int) -> int:
    """How many share the value dims, so that the sums fit into their registers: 128 numbers a thread at most."""
    return 2 if values * columns > 64 * 128 else 1


def _splits(blocks: int, tiles: int, cores: int, busy: int, overhead: float) -> int:
    """Into how many parts to divide the keys, so that the multiprocessor with most to read is done soonest.

    Args:
        blocks: there are without a division.
        tiles: of keys.
        cores: multiprocessors.
        busy: blocks that keep a multiprocessor's memory busy.
        overhead: time that each block takes in any case, in that of a tile.
    """

    def cost(splits: int) -> float:
        return max(-(-blocks * splits // cores), busy) * (-(-tiles // splits) + overhead)

    return min(range(1, max(1, min(tiles // 2, 64)) + 1), key=cost)


def candidates(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Array | None,
    *_: Any,
    device: Device,
    form: AttentionForm,
    value_dim: int | None = None,
    **static: Any,
) -> Sequence[Config]:
    """See `KernelModule.candidates`."""
    default = _default(q, k, v, block_tables, device, form, value_dim)
    assert default is not None
    splits = sorted({max(1, default.splits // 2), default.splits, default.splits * 2, default.splits * 3})
    stages = sorted({max(2, default.stages - 1), default.stages})
    return [{"splits": s, "stages": n} for n in stages for s in splits]


def run(
    q: Array,
    k: Array,
    v: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
    block_tables: Array | None,
    q_start: Array,
    k_lengths: Array | None,
    *,
    device: Device,
    config: Config | None,
    form: AttentionForm,
    sinks: int = 0,
    value_dim: int | None = None,
    return_lse: bool = False,
) -> Any:
    """See `KernelModule.run`."""
    batch, length, heads, dim = q.shape
    kv_heads, unit = k.shape[1:3]
    group = heads // kv_heads
    tiling = _default(q, k, v, block_tables, device, form, value_dim)
    assert tiling is not None
    tiling = dataclasses.replace(tiling, **(config or {}))
    columns = tiling.columns
    column_tiles = -(-length * group // columns)
    values = value_dim if v is None else v.shape[3]
    assert values is not None
    plan = Plan(
        form=form,
        sinks=sinks,
        dtype=q.dtype,
        length=length,
        group=group,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=values,
        capacity=unit * (1 if block_tables is None else block_tables.shape[1]),
        page=0 if block_tables is None else unit,
        pages=k.shape[0],
        keys=tiling.keys,
        columns=columns,
        stages=tiling.stages,
        splits=tiling.splits,
        warpgroups=_warpgroups(values, columns),
    )
    if k_lengths is None:
        k_lengths = q_start + length
    inputs = Inputs(
        q=_by_kv_head(q, kv_heads, columns * column_tiles),
        k=k.reshape(-1, unit, dim),
        v=None if v is None else v.reshape(-1, unit, values),
        k_scales=None if k_scales is None else k_scales.reshape(-1, unit),
        v_scales=None if v_scales is None else v_scales.reshape(-1, unit),
        block_tables=None if block_tables is None else block_tables.astype(jnp.int32),
        slopes=_slopes(plan, columns * column_tiles),
        q_start=q_start.astype(jnp.int32),
        k_lengths=k_lengths.astype(jnp.int32),
    )
    rows, width = batch * kv_heads, columns * column_tiles
    threads: dict[str, Any] = {}
    if plan.warpgroups > 1:
        threads = {"num_threads": plan.warpgroups, "thread_name": "warpgroup"}

    given = [x is not None for x in inputs]

    def decode_kernel(*refs: Any, **memory: Any) -> None:
        arrays = iter(refs[:-2])
        body(plan, Inputs(*(next(arrays) if there else None for there in given)), *refs[-2:], memory)

    outs, lses = plgpu.kernel(
        decode_kernel,
        out_type=[
            jax.ShapeDtypeStruct((tiling.splits, rows, plan.value_rows, width), jnp.float32),
            jax.ShapeDtypeStruct((tiling.splits, rows, width), jnp.float32),
        ],
        # Blocks that read the same keys stand side by side, to find them in the cache.
        grid=(rows, tiling.splits, column_tiles),
        grid_names=("row", "split", "column_tile"),
        scratch_types=scratch(plan, inputs),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=_scratch_bytes(columns, v)),
        **threads,
    )(*(x for x in inputs if x is not None))
    # [splits, B, K, Dv, S, G] and the same without Dv.
    outs = outs[:, :, :values, : length * group].reshape(-1, batch, kv_heads, values, length, group)
    lses = lses[:, :, : length * group].reshape(-1, batch, kv_heads, length, group)
    out, lse = combine(outs.transpose(0, 1, 4, 2, 5, 3), lses.transpose(0, 1, 3, 2, 4))
    out = out.reshape(batch, length, heads, values).astype(q.dtype)
    return (out, lse.reshape(batch, length, heads)) if return_lse else out


def _by_kv_head(q: Array, kv_heads: int, width: int) -> Array:
    """`[B * K, queries, D]`: what reads one key/value head, query by query; padded where the kernel could not."""
    batch, length, heads, dim = q.shape
    group = heads // kv_heads
    grouped = q.reshape(batch, length, kv_heads, group, dim).swapaxes(1, 2).reshape(-1, length * group, dim)
    if length * group in (1, 2, 4, width):
        return grouped  # copies may reach beyond an array's end
    return jnp.pad(grouped, [(0, 0), (0, width - length * group), (0, 0)])


def _slopes(plan: Plan, width: int) -> Array | None:
    if plan.form.alibi is None:
        return None
    slopes = jnp.asarray(plan.form.alibi.slopes, jnp.float32).reshape(plan.kv_heads, 1, plan.group)
    slopes = jnp.broadcast_to(slopes, (plan.kv_heads, plan.length, plan.group)).reshape(plan.kv_heads, -1)
    return jnp.pad(slopes, [(0, 0), (0, width - slopes.shape[1])])

"""The decode attention kernel for Hopper: split keys, tiles by TMA, products on the tensor cores."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..attention.form import AttentionForm
from ..attention.tile import why_not_form
from ..device import Device
from ..mosaic import not_hopper
from ..operator import Config
from .body import body
from .combine import combine, padded
from .plan import ROWS, Inputs, Plan, default_tiling, warpgroups, width_of_values


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
    if reason := not_hopper(device):
        return reason
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
    values = width_of_values(v, value_dim)
    for name, dim in (("keys", q.shape[3]), ("values", values)):
        if dim % line:
            return f"{name} have {dim} dimensions, not a multiple of {line}"
    if v is None and values % ROWS:
        return f"values that are part of the keys need a multiple of {ROWS} dimensions, not {values}"
    if values > 512:
        return f"values have {values} dimensions, more than 512"
    unit = k.shape[2]
    if unit % 8:
        return f"{'a page has' if block_tables is not None else 'there is memory for'} {unit} keys, not a multiple of 8"
    if block_tables is not None and (unit < 16 or (unit % ROWS and ROWS % unit)):
        return f"pages of {unit} keys neither divide nor are divided by tiles of {ROWS}"
    tiling = default_tiling(q, k, v, block_tables, form, value_dim, device)
    if tiling is None:
        return "a tile of keys does not fit into shared memory"
    rows = -(-values // ROWS) * ROWS
    if rows % (2 * ROWS) and warpgroups(rows, tiling.columns) == 2:
        return f"values of {values} dimensions are not to be divided between two warpgroups by {ROWS}"
    return None


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
    default = default_tiling(q, k, v, block_tables, form, value_dim, device)
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
    tiling = default_tiling(q, k, v, block_tables, form, value_dim, device)
    values = width_of_values(v, value_dim)
    assert tiling is not None  # checked by `why_not`
    assert values is not None
    plan = Plan(
        tiling=dataclasses.replace(tiling, **(config or {})),
        form=form,
        sinks=sinks,
        dtype=q.dtype,
        kv_dtype=k.dtype,
        length=length,
        group=group,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=values,
        shared=v is None,
        capacity=unit * (1 if block_tables is None else block_tables.shape[1]),
        page=0 if block_tables is None else unit,
        pages=k.shape[0],
        return_lse=return_lse,
    )
    width = plan.tiling.columns * plan.column_tiles
    inputs = Inputs(
        q=_by_kv_head(q, kv_heads, width),
        k=k.reshape(-1, unit, dim),
        v=None if v is None else v.reshape(-1, unit, values),
        k_scales=None if k_scales is None else k_scales.reshape(-1, unit),
        v_scales=None if v_scales is None else v_scales.reshape(-1, unit),
        block_tables=None if block_tables is None else block_tables.astype(jnp.int32),
        slopes=_slopes(plan, width),
        q_start=q_start.astype(jnp.int32),
        k_lengths=(q_start + length if k_lengths is None else k_lengths).astype(jnp.int32),
    )
    given = [x is not None for x in inputs]

    def decode_kernel(*refs: Any, **memory: Any) -> None:
        left = iter(refs)
        body(plan, Inputs(*(next(left) if there else None for there in given)), list(left), memory)

    shape = batch, length, heads, values
    parts = (padded(plan.tiling.splits), batch * kv_heads)
    out_type = [
        jax.ShapeDtypeStruct((*parts, width, plan.value_rows), jnp.float32),
        jax.ShapeDtypeStruct((*parts, width), jnp.float32),
    ]
    threads: dict[str, Any] = {}
    if plan.warpgroups > 1:
        threads = {"num_threads": plan.warpgroups, "thread_name": "warpgroup"}
    outs, *lses = plgpu.kernel(
        decode_kernel,
        out_type=[jax.ShapeDtypeStruct(shape, q.dtype)] if plan.direct else out_type,
        # Blocks that read the same keys stand side by side, to find them in the cache.
        grid=(batch * kv_heads * plan.tiling.splits * plan.column_tiles,),
        grid_names=("block",),
        scratch_types=plan.memory(),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=plan.reduction_bytes),
        **threads,
    )(*(x for x in inputs if x is not None))
    if plan.direct:
        return outs
    out, lse = combine(outs, lses[0], plan.tiling.splits, shape, q.dtype, return_lse)
    return (out, lse) if return_lse else out


def _by_kv_head(q: Array, kv_heads: int, width: int) -> Array:
    """`[B * K, queries, D]`: what reads one key/value head, query by query; padded where the kernel could not."""
    batch, length, heads, dim = q.shape
    group = heads // kv_heads
    grouped = q.reshape(batch, length, kv_heads, group, dim).swapaxes(1, 2).reshape(-1, length * group, dim)
    if length * group < 8 or length * group == width:
        return grouped  # copies may reach beyond an array's end
    return jnp.pad(grouped, [(0, 0), (0, width - length * group), (0, 0)])


def _slopes(plan: Plan, width: int) -> Array | None:
    if plan.form.alibi is None:
        return None
    slopes = plan.form.alibi.values().reshape(plan.kv_heads, 1, plan.group)
    slopes = jnp.broadcast_to(slopes, (plan.kv_heads, plan.length, plan.group)).reshape(plan.kv_heads, -1)
    return jnp.pad(slopes, [(0, 0), (0, width - slopes.shape[1])])

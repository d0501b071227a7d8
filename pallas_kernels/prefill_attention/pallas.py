"""Flash attention for Hopper GPUs (Dao et al. 2022; Shah et al. 2024), written with Mosaic GPU.

One block computes 128 queries of one head with two warpgroups of 64 queries each. They take turns: while one has the
tensor cores for its matrix products, the other does its exponentials. Keys and values arrive in shared memory a few
steps ahead, fetched by the first warpgroup; the turns also tell it when a place is free. There is no warpgroup that
only fetches: a block of two can have 255 registers a thread, whereas three rely on `setmaxnreg`, which is ignored
where XLA assembles kernels with nvJitLink. Key blocks that no query of the block sees are never read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..attention.form import AttentionForm
from ..attention.tile import Softmax, finish, start, tile_scores, update, why_not_form
from ..device import Device
from ..operator import Config
from .spans import Span, geometric_span, segment_spans

_WARPGROUPS = 2
_ROWS = 64  # queries of a warpgroup, the height of its matrix products
_QUERY_BLOCK = _WARPGROUPS * _ROWS
_REGISTERS = 176  # a thread's, of 255, for numbers of tiles
_ALIGNMENT = 1024  # of arrays in shared memory, bytes


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How keys go through shared memory.

    Attributes:
        key_block: keys of one step, a multiple of 64.
        stages: steps whose keys and values are in shared memory at a time.
    """

    key_block: int
    stages: int

    def shared_memory(self, dim: int, value_dim: int, *, segments: bool) -> int:
        """Bytes a block takes, the logarithms included."""
        keys = self.stages * self.key_block
        arrays = [_QUERY_BLOCK * max(dim, value_dim) * 2, keys * dim * 2, keys * value_dim * 2, _QUERY_BLOCK * 4]
        if segments:
            arrays += [_QUERY_BLOCK * 4, keys * 4]
        barriers = 8 * (_WARPGROUPS + 2 * self.stages + 1)
        return sum(pl.cdiv(size, _ALIGNMENT) * _ALIGNMENT for size in arrays) + barriers


class _Arrays(NamedTuple):
    """What the kernel reads: `None` where the call has no such argument."""

    q: Any
    k: Any
    v: Any
    q_start: Any
    k_lengths: Any
    q_segments: Any
    k_segments: Any
    spans: Any
    slopes: Any


class _Scratch(NamedTuple):
    """Shared memory and barriers of one block. Barriers of keys and values: one of each per stage."""

    q: Any
    k: Any
    v: Any
    lse: Any
    q_segments: Any
    k_segments: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    turn: Any


def _transforms(columns: int) -> tuple[Any, ...]:
    """The layout that matrix products read: the widest swizzle whose rows divide `columns` two-byte numbers.

    Head dims of 80 and 96 thus get narrower swizzles instead of copies padded to 128.
    """
    width = next(w for w in (64, 32, 16) if columns % w == 0)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)


def run(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    q_start: Int[Array, " B"] | None,
    k_lengths: Int[Array, " B"] | None,
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B L"] | None,
    *,
    form: AttentionForm,
    return_lse: bool,
    device: Device,
    config: Config | None,
) -> Any:
    """See `prefill_attention`."""
    queries, keys = q.shape[1], k.shape[2]
    tiling = _tiling(q, v, q_segments, device, config)
    # Rows in shared memory come in eights, and Mosaic wants whole ones in device memory too. Lengths from buckets are
    # multiples of eight; for others XLA copies.
    q = _padded(q, 1, 8, 0)
    if keys % 8:
        k_lengths = jnp.full(q.shape[0], keys, jnp.int32) if k_lengths is None else jnp.minimum(k_lengths, keys)
        k, v = _padded(k, 2, 8, 0), _padded(v, 2, 8, 0)
    spans = None
    if q_segments is not None and k_segments is not None:
        # Padding of queries and padding of keys must not be one segment.
        q_segments = _padded(jnp.maximum(q_segments, -1).astype(jnp.int32), 1, _QUERY_BLOCK, -1)
        k_segments = _padded(jnp.where(k_segments < 0, -2, k_segments).astype(jnp.int32), 1, tiling.key_block, -2)
        spans = segment_spans(q_segments, k_segments, _QUERY_BLOCK, tiling.key_block)
    slopes = None if form.alibi is None else jnp.asarray(form.alibi.slopes, jnp.float32)
    arrays = _Arrays(q, k, v, q_start, k_lengths, q_segments, k_segments, spans, slopes)
    out, lse = _call(arrays, form, queries, tiling, return_lse=return_lse)
    out = out[:, :queries]
    return (out, lse[:, :, :queries].swapaxes(1, 2)) if return_lse else out


def _padded(x: Array, axis: int, multiple: int, value: int) -> Array:
    extra = -x.shape[axis] % multiple
    widths = [(0, extra if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if extra else x


def _call(arrays: _Arrays, form: AttentionForm, queries: int, tiling: Tiling, *, return_lse: bool) -> tuple[Any, Any]:
    batch, rows, heads, dim = arrays.q.shape
    dtype, value_dim = arrays.q.dtype, arrays.v.shape[-1]
    blocks = pl.cdiv(queries, _QUERY_BLOCK)
    present = [i for i, array in enumerate(arrays) if array is not None]
    out_type = [jax.ShapeDtypeStruct((batch, rows, heads, value_dim), dtype)]
    if return_lse:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, blocks * _QUERY_BLOCK), jnp.float32))

    def entry(*refs: Any) -> None:
        inputs = _Arrays(*(refs[present.index(i)] if i in present else None for i in range(len(arrays))))
        out, lse = refs[len(present)], refs[len(present) + 1] if return_lse else None
        segmented, stages = inputs.q_segments is not None, tiling.stages
        ready = plgpu.Barrier(num_arrivals=1 + segmented, num_barriers=_WARPGROUPS)

        def copies(count: int, size: int, columns: int) -> Any:
            return plgpu.SMEM((count, size, columns), dtype, transforms=_transforms(columns))

        scratch = _Scratch(
            # The result takes the place of the queries.
            plgpu.RefUnion(copies(_WARPGROUPS, _ROWS, dim), copies(_WARPGROUPS, _ROWS, value_dim)),
            copies(stages, tiling.key_block, dim),
            copies(stages, tiling.key_block, value_dim),
            plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32) if return_lse else None,
            plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.int32) if segmented else None,
            plgpu.SMEM((stages, tiling.key_block), jnp.int32) if segmented else None,
            ready,
            plgpu.Barrier(num_arrivals=1 + segmented, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
        )
        pl.run_scoped(
            lambda *scratch: _block(inputs, out, lse, _Scratch(*scratch), form, queries, tiling),
            *scratch,
            collective_axes="warpgroup",
        )

    results = plgpu.kernel(
        entry,
        out_type=out_type,
        # Blocks with the most keys start first, so that short ones fill the end; heads that share keys run together.
        grid=(heads, batch, blocks),
        grid_names=("head", "row", "block"),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*(arrays[i] for i in present))
    return (results[0], results[1]) if return_lse else (results[0], None)


def _block(
    inputs: _Arrays, out: Any, lse: Any, scratch: _Scratch, form: AttentionForm, queries: int, tiling: Tiling
) -> None:
    """What each warpgroup of one block does."""
    heads, kv_heads, keys = inputs.q.shape[2], inputs.k.shape[1], inputs.k.shape[2]
    head, row, warpgroup = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("warpgroup")
    block = pl.cdiv(queries, _QUERY_BLOCK) - 1 - lax.axis_index("block")
    kv_head = lax.div(head, jnp.int32(heads // kv_heads))
    stages, size = tiling.stages, tiling.key_block

    offset = jnp.int32(0) if inputs.q_start is None else inputs.q_start[row]
    limit = jnp.int32(keys)
    if inputs.k_lengths is not None:
        limit = lax.clamp(jnp.int32(0), inputs.k_lengths[row], limit)
    low = offset + block * _QUERY_BLOCK
    high = offset + lax.min(block * _QUERY_BLOCK + _QUERY_BLOCK, jnp.int32(queries))
    span = geometric_span(form, low, high, limit, size)
    if inputs.spans is not None:
        span = span.within(Span(*(inputs.spans[row, block, i] for i in range(4))))
    steps = span.last - span.first

    q_s, out_s = (ref.at[warpgroup] for ref in scratch.q)
    first_query = low + warpgroup * _ROWS
    slope = None if inputs.slopes is None else inputs.slopes[head]

    def fetch_queries() -> None:
        at = pl.ds(block * _QUERY_BLOCK + warpgroup * _ROWS, _ROWS)
        ready = scratch.q_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(inputs.q.at[row, at, head], q_s, ready)
        if inputs.q_segments is not None:
            plgpu.copy_gmem_to_smem(inputs.q_segments.at[row, at], scratch.q_segments.at[warpgroup], ready)
        plgpu.barrier_wait(ready)

    def fetch_keys(step: Any) -> None:
        slot, at = lax.rem(step, jnp.int32(stages)), pl.ds((span.first + step) * size, size)
        ready = scratch.k_ready.at[slot]
        plgpu.copy_gmem_to_smem(inputs.k.at[row, kv_head, at], scratch.k.at[slot], ready)
        if inputs.k_segments is not None:
            plgpu.copy_gmem_to_smem(inputs.k_segments.at[row, at], scratch.k_segments.at[slot], ready)

    def fetch_values(step: Any) -> None:
        slot, at = lax.rem(step, jnp.int32(stages)), pl.ds((span.first + step) * size, size)
        plgpu.copy_gmem_to_smem(inputs.v.at[row, kv_head, at], scratch.v.at[slot], scratch.v_ready.at[slot])

    def in_place_of(step: Any, fetch: Callable[[Any], None]) -> None:
        pl.when((warpgroup == 0) & (step >= 0) & (step + stages < steps))(lambda: fetch(step + stages))

    def number(axis: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, (_ROWS, size), axis, layout=plgpu.Layout.WGMMA)

    def distance(step: Any) -> Array:
        # In float32, exact below 2^24: so there is a conversion for each row and column, not for each pair.
        query = number(0) + (first_query - (span.first + step) * size)
        return number(1).astype(jnp.float32) - query.astype(jnp.float32)

    def hide(scores: Array, step: Any) -> Array:
        key = (span.first + step) * size
        query = number(0) + (first_query - key)  # as the columns count
        # All bounds of a row but segments come down to two numbers, which the compiler computes once a row.
        end = [query + (1 if form.causal else form.window)] if form.causal or form.window is not None else []
        if inputs.k_lengths is not None or keys % size:
            end.append(jnp.full_like(query, limit - key))
        visible = number(1) < functools.reduce(jnp.minimum, end) if end else None
        if form.window is not None:
            visible = _both(visible, number(1) > query - form.window)
        if q_segments is not None:
            slot = lax.rem(step, jnp.int32(stages))
            k_segments = plgpu.load(scratch.k_segments.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
            plgpu.commit_smem()  # the copy that comes next to this place must not overtake the load
            same = _down(q_segments, scores.shape) == lax.broadcast_in_dim(k_segments, scores.shape, [1])
            visible = _both(visible, same)
        return scores if visible is None else jnp.where(visible, scores, -jnp.inf)

    def give_turn() -> None:
        plgpu.barrier_arrive(scratch.turn)

    def await_turn() -> None:
        plgpu.barrier_wait(scratch.turn)

    def step(index: Any, carry: tuple[Array, Softmax]) -> tuple[Array, Softmax]:
        values, softmax = carry
        slot = lax.rem(index, jnp.int32(stages))
        plgpu.barrier_wait(scratch.k_ready.at[slot])

        def products(scores: Any) -> Array:
            plgpu.wgmma(scores, q_s, scratch.k.at[slot].T)
            give_turn()
            await_turn()
            # The other warpgroup has weighed the keys of the step before, and this one long ago.
            in_place_of(index - 1, fetch_keys)
            return scores[...]

        raw = pl.run_scoped(products, plgpu.ACC((_ROWS, size), jnp.float32))
        apart = None if form.alibi is None else distance(index)
        scores, factor = tile_scores(raw, form, apart, slope=slope, masked=False)
        clean = (span.first + index >= span.clean_from) & (span.first + index < span.clean_to)
        scores = lax.cond(clean, lambda scores: scores, lambda scores: hide(scores, index), scores)
        weights, rescale, softmax = update(softmax, scores, factor)
        values = values * _down(rescale, values.shape)
        values, weights, softmax = lax.optimization_barrier((values, weights.astype(inputs.v.dtype), softmax))
        give_turn()
        plgpu.barrier_wait(scratch.v_ready.at[slot])
        await_turn()
        # The other warpgroup has started this step, so it is done with the values of the step before.
        in_place_of(index - 1, fetch_values)
        values = pl.run_state(lambda values: plgpu.wgmma(values, weights, scratch.v.at[slot]))(plgpu.ACC.init(values))
        return values, softmax

    for ahead in range(stages):

        @pl.when((warpgroup == 0) & (ahead < steps))
        def _(step: int = ahead) -> None:
            fetch_keys(jnp.int32(step))
            fetch_values(jnp.int32(step))

    fetch_queries()
    q_segments = None
    if inputs.q_segments is not None:
        q_segments = plgpu.load(scratch.q_segments.at[warpgroup], layout=plgpu.Layout.WGMMA.reduce(1))
    softmax = Softmax(*(plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1)) for x in start(_ROWS)))
    values = plgpu.layout_cast(jnp.zeros((_ROWS, inputs.v.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)

    @pl.when(warpgroup == 1)
    def _() -> None:
        give_turn()
        await_turn()

    values, softmax = lax.fori_loop(0, steps, step, (values, softmax))

    @pl.when(warpgroup == 0)
    def _() -> None:
        give_turn()
        await_turn()

    reciprocal, logarithm = finish(softmax)
    out_s[...] = (values * _down(reciprocal, values.shape)).astype(out_s.dtype)
    if lse is not None:
        scratch.lse[warpgroup] = logarithm
    plgpu.commit_smem()
    at = pl.ds(block * _QUERY_BLOCK + warpgroup * _ROWS, _ROWS)
    plgpu.copy_smem_to_gmem(out_s, out.at[row, at, head])
    if lse is not None:
        plgpu.copy_smem_to_gmem(scratch.lse.at[warpgroup], lse.at[row, head, at])
    plgpu.wait_smem_to_gmem(0)


def _down(rows: Array, shape: tuple[int, ...]) -> Array:
    """One number per row, repeated along the row."""
    return lax.broadcast_in_dim(rows, shape, [0])


def _both(mask: Array | None, other: Array) -> Array:
    return other if mask is None else mask & other


def why_not(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    q_start: Int[Array, " B"] | None,
    k_lengths: Int[Array, " B"] | None,
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B L"] | None,
    *,
    form: AttentionForm,
    return_lse: bool,
    device: Device,
) -> str | None:
    """See `KernelModule.why_not`."""
    dtypes = {str(x.dtype) for x in (q, k, v)}
    dim, value_dim = q.shape[-1], v.shape[-1]
    if device.capability[0] != 9:
        return f"it needs a Hopper GPU (compute capability 9.x), not {device.kind}"
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"q, k and v must all be bfloat16 or all float16, not {', '.join(sorted(dtypes))}"
    if dim % 16 or value_dim % 16 or not (16 <= dim <= 256 and 16 <= value_dim <= 256):
        return f"head dims must be multiples of 16 up to 256, not {dim} for keys and {value_dim} for values"
    if 0 in (*q.shape, k.shape[2]):
        return f"there is nothing to compute for q of shape {q.shape} and k of shape {k.shape}"
    return why_not_form(form, q.shape[2])


def candidates(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B K L D"],
    v: Float[Array, "B K L Dv"],
    q_start: Int[Array, " B"] | None,
    k_lengths: Int[Array, " B"] | None,
    q_segments: Int[Array, "B S"] | None,
    k_segments: Int[Array, "B L"] | None,
    *,
    form: AttentionForm,
    return_lse: bool,
    device: Device,
) -> Sequence[Config]:
    """See `KernelModule.candidates`."""
    return [dataclasses.asdict(tiling) for tiling in _tilings(q, v, q_segments, device)]


def _tilings(
    q: Float[Array, "B S H D"], v: Float[Array, "B K L Dv"], q_segments: Array | None, device: Device
) -> list[Tiling]:
    """Every tiling that fits, the default first: few steps, and as much as possible on its way."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    # Of a warpgroup's numbers each thread has half of a row's: values, scores, and two weights to a register.
    blocks = [n for n in (128, 64) if value_dim / 2 + n / 2 + n / 4 <= _REGISTERS]
    tilings = [Tiling(block, stages) for block in blocks for stages in (4, 3, 2)]
    segments = q_segments is not None
    return [t for t in tilings if t.shared_memory(dim, value_dim, segments=segments) <= device.shared_memory]


def _tiling(
    q: Float[Array, "B S H D"],
    v: Float[Array, "B K L Dv"],
    q_segments: Array | None,
    device: Device,
    config: Config | None,
) -> Tiling:
    return dataclasses.replace(_tilings(q, v, q_segments, device)[0], **(config or {}))

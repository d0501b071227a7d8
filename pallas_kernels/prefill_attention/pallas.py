"""Flash attention for Hopper GPUs (Dao et al. 2022; Shah et al. 2024), written with Mosaic GPU.

What a block of the kernel does is in `body`, which keys it has to look at in `spans`.
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
from .body import QUERY_BLOCK, ROWS, WARPGROUPS, Inputs, Memory, attend
from .reference import in_sight
from .spans import segment_spans

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
        arrays = [QUERY_BLOCK * max(dim, value_dim) * 2, keys * dim * 2, keys * value_dim * 2, QUERY_BLOCK * 4]
        if segments:
            arrays += [QUERY_BLOCK * 4, keys * 4]
        barriers = 8 * (WARPGROUPS + 2 * self.stages + 1)
        return sum(pl.cdiv(size, _ALIGNMENT) * _ALIGNMENT for size in arrays) + barriers


def _transforms(columns: int) -> tuple[Any, ...]:
    """The layout that matrix products read: the widest swizzle whose rows divide `columns` two-byte numbers.

    Head dims of 80 and 96 thus get narrower swizzles instead of copies padded to 128.
    """
    width = next(w for w in (64, 32, 16) if columns % w == 0)
    return tiled(width)


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
    device: Device,
    config: Config | None,
    return_lse: bool = False,
) -> Any:
    """See `prefill_attention`."""
    queries, keys = q.shape[1], k.shape[2]
    tiling = _tiling(q, v, q_segments, form, device, config)
    # Rows in shared memory come in eights, and Mosaic wants whole ones in device memory too. Lengths from buckets are
    # multiples of eight; for others XLA copies.
    q = _padded(q, 1, 8, 0)
    if keys % 8:
        k, v, k_segments = in_sight(q, k, v, q_start, k_segments, form)
        keys = k.shape[2]
    if keys % 8:
        k_lengths = jnp.full(q.shape[0], keys, jnp.int32) if k_lengths is None else jnp.minimum(k_lengths, keys)
        k, v = _padded(k, 2, 8, 0), _padded(v, 2, 8, 0)
    spans = None
    if q_segments is not None and k_segments is not None:
        # Padding of queries and padding of keys must not be one segment.
        q_segments = _padded(jnp.maximum(q_segments, -1).astype(jnp.int32), 1, QUERY_BLOCK, -1)
        k_segments = _padded(jnp.where(k_segments < 0, -2, k_segments).astype(jnp.int32), 1, tiling.key_block, -2)
        spans = segment_spans(q_segments, k_segments, QUERY_BLOCK, tiling.key_block)
    q_start, k_lengths = (None if x is None else x.astype(jnp.int32) for x in (q_start, k_lengths))
    slopes = None if form.alibi is None else form.alibi.values()
    arrays = Inputs(q, k, v, q_start, k_lengths, q_segments, k_segments, spans, slopes)
    out, lse = _call(arrays, form, queries, tiling, return_lse=return_lse)
    out = out[:, :queries]
    return (out, lse[:, :, :queries].swapaxes(1, 2)) if return_lse else out


def _padded(x: Array, axis: int, multiple: int, value: int) -> Array:
    extra = -x.shape[axis] % multiple
    widths = [(0, extra if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if extra else x


def _call(arrays: Inputs, form: AttentionForm, queries: int, tiling: Tiling, *, return_lse: bool) -> tuple[Any, Any]:
    batch, rows, heads, _ = arrays.q.shape
    dtype, value_dim = arrays.q.dtype, arrays.v.shape[-1]
    blocks = pl.cdiv(queries, QUERY_BLOCK)
    present = [i for i, array in enumerate(arrays) if array is not None]
    out_type = [jax.ShapeDtypeStruct((batch, rows, heads, value_dim), dtype)]
    if return_lse:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, blocks * QUERY_BLOCK), jnp.float32))

    def entry(*refs: Any) -> None:
        inputs = Inputs(*(refs[present.index(i)] if i in present else None for i in range(len(arrays))))
        out, lse = refs[len(present)], refs[len(present) + 1] if return_lse else None
        pl.run_scoped(
            lambda *memory: attend(inputs, out, lse, Memory(*memory), form, queries),
            *_memory(arrays, tiling, return_lse=return_lse),
            collective_axes="warpgroup",
        )

    results = plgpu.kernel(
        entry,
        out_type=out_type,
        # Heads run fastest, for those that share keys to run together; blocks that see the most keys run first, for the
        # end to be filled with short ones.
        grid=(blocks * batch * heads,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*(arrays[i] for i in present))
    return (results[0], results[1]) if return_lse else (results[0], None)


def _memory(arrays: Inputs, tiling: Tiling, *, return_lse: bool) -> Memory:
    dim, value_dim, segmented = arrays.q.shape[-1], arrays.v.shape[-1], arrays.q_segments is not None

    def copies(count: int, size: int, columns: int) -> Any:
        return plgpu.SMEM((count, size, columns), arrays.q.dtype, transforms=_transforms(columns))

    return Memory(
        # The result takes the place of the queries.
        q_out=plgpu.RefUnion(copies(WARPGROUPS, ROWS, dim), copies(WARPGROUPS, ROWS, value_dim)),
        k=copies(tiling.stages, tiling.key_block, dim),
        v=copies(tiling.stages, tiling.key_block, value_dim),
        lse=plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32) if return_lse else None,
        q_segments=plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32) if segmented else None,
        k_segments=plgpu.SMEM((tiling.stages, tiling.key_block), jnp.int32) if segmented else None,
        q_ready=plgpu.Barrier(num_arrivals=1 + segmented, num_barriers=WARPGROUPS),
        k_ready=plgpu.Barrier(num_arrivals=1 + segmented, num_barriers=tiling.stages),
        v_ready=plgpu.Barrier(num_barriers=tiling.stages),
        turn=plgpu.Barrier(num_arrivals=WARPGROUPS),
    )


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
    device: Device,
    return_lse: bool = False,
) -> str | None:
    """See `KernelModule.why_not`."""
    dtypes = {str(x.dtype) for x in (q, k, v)}
    dim, value_dim = q.shape[-1], v.shape[-1]
    if reason := not_hopper(device):
        return reason
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
    device: Device,
    return_lse: bool = False,
) -> Sequence[Config]:
    """See `KernelModule.candidates`."""
    return [dataclasses.asdict(tiling) for tiling in _tilings(q, v, q_segments, form, device)]


def _tilings(
    q: Float[Array, "B S H D"],
    v: Float[Array, "B K L Dv"],
    q_segments: Array | None,
    form: AttentionForm,
    device: Device,
) -> list[Tiling]:
    """Every tiling that fits, the default first: few steps, and as much as possible on its way."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    segments = q_segments is not None
    # Of a warpgroup's numbers each thread has half of a row's: values, scores, and two weights to a register.
    others = 32 if segments and form.alibi is not None else 0  # slopes and numbers of segments, and what both lead to
    blocks = (128, 64) if value_dim / 2 + 64 + 32 + others <= _REGISTERS else (64,)
    tilings = [Tiling(block, stages) for block in blocks for stages in (4, 3, 2)]
    return [t for t in tilings if t.shared_memory(dim, value_dim, segments=segments) <= device.shared_memory]


def _tiling(
    q: Float[Array, "B S H D"],
    v: Float[Array, "B K L Dv"],
    q_segments: Array | None,
    form: AttentionForm,
    device: Device,
    config: Config | None,
) -> Tiling:
    return dataclasses.replace(_tilings(q, v, q_segments, form, device)[0], **(config or {}))

"""Rotary embedding and KV write as one Mosaic GPU kernel: one pass over q, k and v, none over the memory.

A block has some heads of one token's q, k or v, which are arrays of their own or parts of the fused projection. They
go from global memory to registers and back, up to 16 bytes a thread at once. The sines and cosines of the angles are
computed once a block, one a thread, and shared.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..device import Device
from ..mosaic import block_indices, not_hopper, store
from ..operator import Config
from ..rotary import Rotary, rotary_frequencies
from ..varying import varying_axes
from .quantized import quantize_parts
from .reference import LARGEST, separate
from .spread import THREADS, Part, Spread, one_each

_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is dealt out.

    Attributes:
        numbers: a block has as many heads as have at most so many numbers, 64 for each thread by default: enough loads
            in flight to a block, and still several blocks to a token where there are few tokens.
    """

    numbers: int = 64 * THREADS

    def heads(self, heads: int, dim: int) -> int:
        """Heads in a block: a divisor of `heads`, but all of them where the divisors in reach are small."""
        most = max(1, min(heads, self.numbers // dim))
        fitting = max(n for n in range(1, most + 1) if heads % n == 0)
        return fitting if 4 * fitting >= most else heads


def why_not(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"] | None,
    v: Float[Array, "T K Dv"] | None,
    keys: Float[Array, "R K L D"],
    values: Float[Array, "R K L Dv"],
    rows: Int[Array, " T"],
    slots: Int[Array, " T"],
    positions: Int[Array, " T"],
    lengths: Int[Array, " T"],
    key_scales: Float[Array, "R K L"] | None,
    value_scales: Float[Array, "R K L"] | None,
    *,
    device: Device,
    rotary: Rotary | None,
    ascending: bool,
    num_heads: int = 0,
) -> str | None:
    """See `KernelModule.why_not`."""
    if reason := not_hopper(device):
        return reason
    if varying_axes((q, k, v, keys, values, rows, slots)):
        return (
            "memory whose type differs over a mesh axis cannot be written in place; use shard_map(..., check_vma=False)"
        )
    new = (("qkv", q),) if k is None or v is None else (("q", q), ("k", k), ("v", v))
    for name, array in (*new, ("keys", keys), ("values", values)):
        if array.dtype not in _FLOATS and not (name in ("keys", "values") and array.dtype in LARGEST):
            return f"{name} is {array.dtype}, not bfloat16, float16 or float32"
        if array.size == 0:
            return f"{name} of shape {array.shape} is empty"
        if array.shape[-1] > 1024:
            return f"the heads of {name} have {array.shape[-1]} numbers, more than 1024"
    for name, memory in (("keys", keys), ("values", values)):
        if math.prod(memory.shape[1:]) >= 2**31:  # threads count in 32 bits from a row's beginning
            return f"a row of {name} has {math.prod(memory.shape[1:])} numbers, more than 2^31 - 1"
    if rotary is not None and rotary.interleaved and q.shape[2] % 2:
        return f"pairs are interleaved in a head of {q.shape[2]} numbers, which is odd"
    return None


def candidates(q: Float[Array, "T H D"], *_: Any, device: Device, **static: Any) -> Sequence[Config]:
    """See `KernelModule.candidates`."""
    return [{"numbers": n * THREADS} for n in (16, 32, 64, 128)]


def run(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"] | None,
    v: Float[Array, "T K Dv"] | None,
    keys: Float[Array, "R K L D"],
    values: Float[Array, "R K L Dv"],
    rows: Int[Array, " T"],
    slots: Int[Array, " T"],
    positions: Int[Array, " T"],
    lengths: Int[Array, " T"],
    key_scales: Float[Array, "R K L"] | None,
    value_scales: Float[Array, "R K L"] | None,
    *,
    device: Device,
    config: Config | None,
    rotary: Rotary | None,
    ascending: bool,
    num_heads: int = 0,
) -> tuple[Array, ...]:
    """See `KernelModule.run`."""
    tiling = Tiling(**(config or {}))
    fused, qkv = k is None, q
    q, k, v = separate(q, k, v, num_heads)
    # What is fused is read in three places. Of its parts only the shapes are used: as operands they would be copies.
    sources, first_heads = [k, v, q], [0, 0, 0]
    if fused:
        sources, first_heads = [qkv, qkv, qkv], [num_heads, num_heads + k.shape[1], 0]
    new, indices = [k, v], [rows, slots]
    memory = [x for x in (keys, values, key_scales, value_scales) if x is not None]
    if rotary is not None or fused:
        new.append(q)
    if rotary is not None:
        indices += [positions, _padded(rotary_frequencies(rotary, lengths))]
    jobs = [
        _Job(tiling.heads(*x.shape[1:]), x.shape[2], turns, max(x.dtype.itemsize, to.itemsize))
        for x, to, turns in zip(new, (keys.dtype, values.dtype, q.dtype), (rotary, None, rotary), strict=False)
    ]
    blocks = [x.shape[1] // job.heads for x, job in zip(new, jobs, strict=True)]  # of each token

    grid = (q.shape[0], sum(blocks))

    def kv_write_kernel(*refs: Any) -> None:
        source_refs, refs = refs[: len(new)], refs[len(new) :]
        (rows_ref, slots_ref, *angles), refs = refs[: len(indices)], refs[len(indices) :]
        memory_refs, (*turned_ref, table, maxima, barrier) = refs[: len(memory)], refs[len(memory) :]
        token, block = block_indices(*grid)
        row, slot = rows_ref[token], slots_ref[token]
        inside = (row >= 0) & (row < keys.shape[0]) & (slot >= 0) & (slot < keys.shape[2])

        def work(i: int, first: int) -> None:
            start = (block - first) * jobs[i].heads
            heads, theirs = (pl.ds(start + head, jobs[i].heads) for head in (0, first_heads[i]))
            here, wanted = ((row, heads, slot), inside) if i < 2 else ((token, heads), True)
            sink, *scales_refs = memory_refs[i::2] if i < 2 else turned_ref
            parts, scales = jobs[i].compute(source_refs[i].at[token, theirs], token, angles, table, barrier), []
            if scales_refs:
                parts, scales = quantize_parts(parts, maxima, barrier, sink.dtype)

            @pl.when(wanted)
            def _() -> None:
                for part in parts:
                    part.store(sink.at[here])
                for start, scale in zip(parts[0].spread.starts, scales, strict=False):
                    store(scales_refs[0].at[here].at[pl.ds(start, parts[0].spread.rows)], scale)

        for i, count in enumerate(blocks):
            first = sum(blocks[:i])
            pl.when((block >= first) & (block < first + count))(functools.partial(work, i, first))

    if rotary is not None and rotary.interleaved:
        # The two numbers of a pair get an axis of their own, so that either of all pairs can be had.
        sources[0], sources[2], new[2] = (x.reshape(*x.shape[:-1], -1, 2) for x in (sources[0], sources[2], new[2]))
        memory[0] = keys.reshape(*keys.shape[:-1], -1, 2)
    kernel = plgpu.kernel(
        kv_write_kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in new[2:]],
        grid=(math.prod(grid),),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((2, max(job.table for job in jobs)), jnp.float32),
            plgpu.SMEM((3, max(job.heads for job in jobs)), jnp.float32),
            plgpu.Barrier(),
        ],
        # No thread reads what another wrote but the table and the maxima, and those wait for the barrier.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )

    @jax.custom_batching.sequential_vmap
    def in_place(sources: list[Array], indices: list[Array], memory: list[Array], turned: list[Array]) -> list[Array]:
        # As a reference the memory is the same operand of the kernel, read and written: XLA need not copy it.
        @pl.run_state
        def write(refs: Any) -> None:
            results = kernel(*sources, *indices, *refs[: len(memory)])
            for ref, result in zip(refs[len(memory) :], results, strict=True):
                ref[...] = result

        return write([*memory, *turned])

    keys, values, *others = in_place(sources[: len(new)], indices, memory, new[2:])
    scales, turned = others[: len(memory) - 2], others[len(memory) - 2 :]
    q = turned[0].reshape(q.shape) if turned else q
    return q, keys.reshape(*keys.shape[:3], -1), values, *scales


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a block does with `heads` heads of `dim` numbers, of which `rotary` turns the first."""

    heads: int
    dim: int
    rotary: Rotary | None
    itemsize: int

    @property
    def table(self) -> int:
        """Sines that the block needs, a multiple of its threads."""
        return THREADS if self.rotary is None else -(-self.rotary.dim // 2 // THREADS) * THREADS

    def compute(self, source: Any, token: Any, angles: Sequence[Any], table: Any, barrier: Any) -> list[Part]:
        """The heads, turned, in up to three parts."""
        widest = 16 // self.itemsize
        if self.rotary is None:
            rest = pl.ds(0, self.dim)
            spread = Spread.best(self.heads, self.dim, widest)
            return [Part((rest,), spread, spread.load(source, (rest,)))]
        rotated, pairs = self.rotary.dim, self.rotary.dim // 2
        if self.rotary.interleaved:
            halves = [(pl.ds(0, pairs), half) for half in (0, 1)]
            rest = (pl.ds(pairs, self.dim // 2 - pairs), pl.ds(0, 2))
            spread = Spread.best(self.heads, pairs, 1, whole=self.dim // 2)  # every other number is of the other half
            rest_spread = spread.same_lanes(self.dim // 2 - pairs, 1, paired=True)
        else:
            halves = [(pl.ds(half * pairs, pairs),) for half in (0, 1)]
            rest = (pl.ds(rotated, self.dim - rotated),)
            spread = Spread.best(self.heads, pairs, _aligned(widest, pairs, self.dim), whole=self.dim)
            rest_spread = spread.same_lanes(self.dim - rotated, _aligned(widest, rotated, self.dim))
        # All is asked for before anything waits.
        loaded = [spread.load(source, half) for half in halves]
        copied = rest_spread.load(source, rest) if rotated < self.dim else []
        positions, frequencies = angles
        frequencies = frequencies.at[token] if len(frequencies.shape) == 2 else frequencies
        phase = positions[token].astype(jnp.float32) * plgpu.load(frequencies, layout=one_each(), optimized=False)
        factor = 1.0 if self.rotary.scaling is None else self.rotary.scaling.attention_factor
        table[0] = jnp.cos(phase) * factor
        table[1] = jnp.sin(phase) * factor
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        cos, sin = (spread.shared(table.at[i, pl.ds(0, pairs)]) for i in (0, 1))
        both = [[chunk.astype(jnp.float32) for chunk in half] for half in loaded]
        first = [x * cos - y * sin for x, y in zip(*both, strict=True)]
        second = [y * cos + x * sin for x, y in zip(*both, strict=True)]
        # Rounded as the reference does, which casts to the memory's dtype afterwards.
        parts = [
            Part(half, spread, [y.astype(x.dtype) for x, y in zip(was, turned, strict=True)])
            for half, was, turned in zip(halves, loaded, (first, second), strict=True)
        ]
        return [*parts, Part(rest, rest_spread, copied)] if copied else parts


def _padded(frequencies: Any) -> Array:
    """To a whole number for each thread."""
    short = -frequencies.shape[-1] % THREADS
    return jnp.pad(jnp.asarray(frequencies), [(0, 0)] * (frequencies.ndim - 1) + [(0, short)])


def _aligned(widest: int, *offsets: int) -> int:
    """The largest power of two up to `widest` that divides all `offsets`."""
    while any(offset % widest for offset in offsets):
        widest //= 2
    return widest

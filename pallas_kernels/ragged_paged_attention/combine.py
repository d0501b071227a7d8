"""The sum of a token's parts, where its sequence's keys were split."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..attention.tile import LOWEST
from ..mosaic import block_indices, store
from .schedule import SLOT, TOKEN, Schedule
from .tiling import Tiling, head_blocks

_WARPS, _LANES = 4, 32
_HEADS = 16  # summed at a time, for each takes as many numbers as it has value dims


def combine_parts(
    out: Float[Array, "T H Dv"],
    lse: Float[Array, "items units warpgroups rows"],
    parts: Float[Array, "slots H Dv"],
    schedule: Schedule,
    kv_heads: int,
    tiling: Tiling,
) -> Float[Array, "T H Dv"]:
    """`out` with the results of tokens whose keys were split: the mean of their parts weighted by `exp(lse)`.

    The others' results stay where they are. A block sums one token's parts for the heads of one unit, in order.

    Args:
        lse: natural logarithms of each item's sums of exponentials, -inf for a row without visible keys.
        parts: results over each part of the keys, where the schedule has put them.
    """
    tokens, heads, width = out.shape
    group, blocks = heads // kv_heads, head_blocks(heads // kv_heads, tiling)
    grid = tokens, kv_heads, blocks
    columns = math.gcd(width, _WARPS * _LANES)

    def kernel_body(splits: Any, first_item: Any, items: Any, lse: Any, parts: Any, out: Any) -> None:
        token, kv_head, block = block_indices(*grid)
        count = splits[token]

        @pl.when(count > 1)
        def _() -> None:
            item = first_item[token]
            within = token - items[item, TOKEN]
            slot = items[item, SLOT] + within * count
            logarithms = lse.at[:, kv_head * blocks + block, lax.div(within, tiling.tokens)]
            row = lax.rem(within, tiling.tokens) * tiling.heads

            def combine(number: int) -> None:
                for start in range(0, number, _HEADS):
                    some = min(_HEADS, number - start)
                    first = kv_head * group + block * tiling.heads + start
                    for column in range(0, width, columns):
                        at = pl.ds(first, some), pl.ds(column, columns)
                        found = _sum(logarithms.at[:, pl.ds(row + start, some)], item, parts.at[:, *at], slot, count)
                        store(out.at[token, *at], found.astype(out.dtype))

            rest = group - (blocks - 1) * tiling.heads
            if rest == tiling.heads:
                combine(rest)
            else:
                pl.when(block < blocks - 1)(functools.partial(combine, tiling.heads))
                pl.when(block == blocks - 1)(functools.partial(combine, rest))

    kernel = plgpu.kernel(
        kernel_body,
        out_type=[],
        grid=(math.prod(grid),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )

    @jax.custom_batching.sequential_vmap
    def in_place(out: Array, *arrays: Array) -> Array:
        return pl.run_state(lambda out: kernel(*arrays, out) and None)(out)

    return in_place(out, schedule.splits, schedule.first_item, schedule.items, lse, parts)


def _sum(logarithms: Any, item: Array, parts: Any, slot: Array, count: Array) -> Array:
    """The mean of `parts[slot : slot + count]`, `[heads, columns]` each, weighted by the exponentials of logarithms."""
    shape = parts.shape[1:]
    layout = _layout(shape[1])
    by_head = layout.reduce(1)

    def spread(numbers: Array) -> Array:
        return lax.broadcast_in_dim(numbers, shape, [0])

    def add(part: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, top, total = carry
        logarithm = plgpu.load(logarithms.at[item + part], layout=by_head, optimized=False)
        higher = jnp.maximum(top, logarithm)
        rescale, weight = jnp.exp(top - higher), jnp.exp(logarithm - higher)
        more = plgpu.load(parts.at[slot + part], layout=layout, optimized=False)
        return values * spread(rescale) + more * spread(weight), higher, total * rescale + weight

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    of_heads = [plgpu.layout_cast(jnp.full(shape[:1], x, jnp.float32), by_head) for x in (LOWEST, 0.0)]
    values, _, total = lax.fori_loop(0, count, add, (zeros, *of_heads))
    return values / spread(jnp.where(total > 0, total, 1.0))


def _layout(columns: int) -> Any:
    """Columns over the threads, each of which has those of all heads; 64 are too few for more than one warp."""
    if columns == _WARPS * _LANES:
        return plgpu.Layout.TILED(plgpu.Tiling(((1, columns), (_LANES,), (1,))), (-3,), (-2,), -1)
    return plgpu.Layout.TILED(plgpu.Tiling(((1, columns), (2,))), (plgpu.Replicated(_WARPS),), (-2,), -1)

"""The sum of a token's parts, where its sequence's keys were split."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from ..attention.tile import LOWEST
from ..mosaic import store

_ROWS = 64


def whole_blocks(tokens: int, heads: int) -> int:
    """`tokens`, or a few more, so that their heads fill blocks of 64 rows."""
    multiple = _ROWS // math.gcd(_ROWS, heads)
    return -(-tokens // multiple) * multiple


def part_weights(
    lses: Float[Array, "splits T H"],
) -> tuple[Float[Array, "splits T H"], Float[Array, "T H"]]:
    """What to multiply each part with, and the logarithm of the whole denominator; absent parts have -inf."""
    top = jnp.maximum(jnp.max(lses, axis=0), LOWEST)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    return weights / safe, jnp.where(seen, top + jnp.log(safe), -jnp.inf)


def combine_parts(
    whole: Float[Array, "T H Dv"],
    parts: Float[Array, "splits T H Dv"],
    weights: Float[Array, "splits T H"],
    splits: Int[Array, " T"],
) -> Float[Array, "T H Dv"]:
    """The weighted sum of the parts of tokens with several, `whole` for those with one; `T * H` is a multiple of 64.

    A kernel, because it reads only the parts that are there: most of `parts` is memory that nobody wrote.
    """
    tokens, heads, width = whole.shape
    rows = tokens * heads
    blocks = rows // _ROWS
    of_row = jnp.broadcast_to(splits[:, None], (tokens, heads)).reshape(rows)
    # A token without parts has its whole result in place of the first part, all of it.
    alone = (of_row == 1).astype(jnp.float32)
    weights = jnp.where(alone > 0, 0.0, weights.reshape(-1, rows))
    most = jnp.where(of_row > 1, of_row, 0).reshape(blocks, _ROWS).max(axis=1)

    def body(most: Any, alone: Any, weights: Any, whole: Any, parts: Any, out: Any) -> None:
        block = lax.axis_index("block")
        at = pl.ds(block * _ROWS, _ROWS)

        def weigh(weights: Any, values: Any) -> Array:
            weight = plgpu.load(weights, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            weight = lax.broadcast_in_dim(weight, values.shape, [0])
            values = plgpu.load(values, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
            return jnp.where(weight > 0, values * weight, 0.0)  # what nobody wrote may be NaN

        def add(split: Array, total: Array) -> Array:
            return total + weigh(weights.at[split, at], parts.at[split, at])

        total = lax.fori_loop(0, most[block], add, weigh(alone.at[at], whole.at[at]))
        store(out.at[at], total.astype(out.dtype))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, width), whole.dtype),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(most, alone, weights, whole.reshape(rows, width), parts.reshape(-1, rows, width)).reshape(whole.shape)

"""The second pass: one attention from attentions to parts of the keys, in one launch.

As plain `jnp` it becomes up to five kernels: XLA computes maxima, weights and sums on their own, because many results
share them. All of that is far less work than a launch.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from ..attention.tile import LOWEST
from ..mosaic import block_indices, store

_WARPS = 4
_LANES = 32


def padded(splits: int) -> int:
    """Parts that there has to be memory for: each warp reads as many, and a single one is not read here."""
    return 1 if splits == 1 else -(-splits // _WARPS) * _WARPS


def combine(
    outs: Float[Array, "padded B*K columns value_rows"],
    lses: Float[Array, "padded B*K columns"],
    splits: int,
    shape: tuple[int, int, int, int],
    dtype: jax.typing.DTypeLike,
    return_lse: bool,
) -> tuple[Float[Array, "B S H Dv"], Float[Array, "B S H"] | None]:
    """The parts' mean weighted by `exp(lse)`, and its logarithm where asked for.

    A block sums up to 64 value dims of one query: each warp a quarter of the parts, then the four in order.

    Args:
        outs: float32 results over each part of the keys, the queries of each key/value head one after another;
            anything may stand behind the last part and the last query.
        lses: their natural logarithms of the sum of exponentials, -inf for a part without visible keys.
        shape: of the result.
        dtype: of the result.

    Returns:
        Zeros and -inf where no part has a visible key.
    """
    batch, length, heads, values = shape
    kv_heads = outs.shape[1] // batch
    group = heads // kv_heads
    if splits == 1:
        out = _by_token(outs[0, ..., :values], shape).astype(dtype)
        return out, _by_token(lses[0], shape[:3]) if return_lse else None
    chunk = next(n for n in (64, 32, 16) if values % n == 0)
    tile = (outs.shape[0], chunk)
    grid = batch, length, kv_heads, group, values // chunk
    layout = _layout(chunk)
    by_part = layout.reduce(1)

    def body(outs: Any, lses: Any, out: Any, *lse: Any) -> None:
        sequence, token, kv_head, head, piece = block_indices(*grid)
        row, column = sequence * kv_heads + kv_head, token * group + head
        query, dims = lax.div(lax.axis_index("block"), grid[-1]), pl.ds(piece * chunk, chunk)
        parts = plgpu.load(outs.at[:, row, column, dims], layout=layout, optimized=False)
        logarithms = plgpu.load(lses.at[:, row, column], layout=by_part, optimized=False)
        if splits < tile[0]:
            there = plgpu.broadcasted_iota(jnp.int32, tile[:1], 0, layout=by_part) < splits
            parts = jnp.where(lax.broadcast_in_dim(there, tile, [0]), parts, 0.0)
            logarithms = jnp.where(there, logarithms, -jnp.inf)
        top = jnp.maximum(jnp.max(logarithms, axis=0), LOWEST)
        weights = jnp.exp(logarithms - top)
        total = jnp.sum(weights, axis=0)
        safe = jnp.where(total == 0, 1.0, total)
        sums = jnp.sum(parts * lax.broadcast_in_dim(weights, tile, [0]), axis=0)
        store(out.at[query, dims], (sums / safe).astype(dtype))
        if lse:

            @pl.when(piece == 0)
            def _() -> None:
                lse[0][query] = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))

    queries = batch * length * heads
    types = [jax.ShapeDtypeStruct((queries, values), dtype), jax.ShapeDtypeStruct((queries,), jnp.float32)]
    out, *lse = plgpu.kernel(
        body,
        out_type=types if return_lse else types[:1],
        grid=(math.prod(grid),),
        grid_names=("block",),
    )(outs, lses)
    return out.reshape(shape), lse[0].reshape(shape[:3]) if lse else None


def _by_token(x: Shaped[Array, "B*K columns ..."], shape: tuple[int, ...]) -> Shaped[Array, "B S H ..."]:
    batch, length, heads, *rest = shape
    kv_heads = x.shape[0] // batch
    group = heads // kv_heads
    x = x[:, : length * group].reshape(batch, kv_heads, length, group, *rest)
    return x.swapaxes(1, 2).reshape(shape)


def _layout(chunk: int) -> Any:
    """Parts by value dims: parts go round the warps, a part's dims are spread over the lanes."""
    lanes = chunk // 2
    copies = (plgpu.Replicated(_LANES // lanes),) if lanes < _LANES else ()
    tiling = plgpu.Tiling(((_WARPS, chunk), (2,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(*copies, -2), vector_dim=-1)

"""The norm in front of a product, inside the kernel: `x` in shared memory is normalised where it lies."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..normalization import NormForm

# wgmma's fragment of [inputs, tokens], with pairs of neighbouring inputs in one register as shared memory has them.
_LAYOUT = plgpu.Layout.WGMMA_TRANSPOSED


def fetch(x: Any, x_s: Any, per_input: Sequence[tuple[Any, Any]], barrier: Any) -> None:
    """Starts the copies of `x` and of the norm's weight and bias, one each, which `barrier` waits for.

    Args:
        x: `[T, in]` in global memory; rows past its end arrive as zeros.
        x_s: `[columns, in]` in shared memory, tiled and swizzled as wgmma wants it.
        per_input: pairs of `[chunks, step]` in global and in shared memory.
        barrier: takes an arrival of each.
    """
    first = lax.axis_index("block") * 0  # traced, for only then may an index reach past an array
    plgpu.copy_gmem_to_smem(x.at[pl.ds(first, x_s.shape[0])], x_s, barrier)
    for source, destination in per_input:
        plgpu.copy_gmem_to_smem(source, destination, barrier)


def normalise(x_s: Any, weight_s: Any, bias_s: Any, form: NormForm, step: int) -> None:
    """Replaces the rows in `x_s` by their norms: statistics in float32, rounded to the dtype of `x_s`.

    It goes over `step` inputs at a time. The sums of a row stay spread over the threads until the last of them: one
    exchange between warps per statistic.
    """
    columns, inputs = x_s.shape
    chunks, shape = inputs // step, (step, columns)

    def place(index: jax.Array) -> Any:
        return x_s.at[:, pl.ds(index * step, step)].T

    def chunk(index: jax.Array) -> jax.Array:
        return plgpu.load(place(index), layout=_LAYOUT).astype(jnp.float32)

    def over_rows(values: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(values, shape, (1,))

    def mean(square: bool, centre: jax.Array | None) -> jax.Array:
        def add(index: jax.Array, sums: jax.Array) -> jax.Array:
            values = chunk(index) if centre is None else chunk(index) - over_rows(centre)
            return sums + (values * values if square else values)

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _LAYOUT)
        return jnp.sum(lax.fori_loop(0, chunks, add, zeros), axis=0) * (1 / inputs)

    centre = mean(False, None) if form.centred else None
    scale = lax.rsqrt(mean(True, centre) + form.eps)

    def per_input(ref: Any, index: jax.Array) -> jax.Array:
        values = plgpu.load(ref.at[index], layout=_LAYOUT.reduce(1), optimized=False).astype(jnp.float32)
        return lax.broadcast_in_dim(values + form.weight_offset if ref is weight_s else values, shape, (0,))

    @pl.loop(0, chunks)
    def _(index: jax.Array) -> None:
        values = chunk(index) if centre is None else chunk(index) - over_rows(centre)
        values = values * over_rows(scale)
        if weight_s is not None:
            values = values * per_input(weight_s, index)
        if bias_s is not None:
            values = values + per_input(bias_s, index)
        place(index)[...] = values.astype(x_s.dtype)

    plgpu.commit_smem()  # before wgmma reads what was written

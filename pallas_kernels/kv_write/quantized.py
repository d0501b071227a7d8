"""Keys and values of 8 bits inside the kernel: the reference's `quantize` of heads that come in parts."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..mosaic import store
from .reference import LARGEST, divisor, rounded
from .spread import Part


def quantize_parts(parts: list[Part], maxima: Any, barrier: Any, dtype: Any) -> tuple[list[Part], list[Array]]:
    """`quantize` inside the kernel, of heads that come in several parts.

    Args:
        parts: all numbers of the heads.
        maxima: `[parts, heads]` of shared memory, by which the parts learn of one another.

    Returns:
        The same in `dtype`, and the scales of the heads in each chunk of the first part.
    """
    for i, part in enumerate(parts):
        for start, chunk in zip(part.spread.starts, part.chunks, strict=True):
            largest = jnp.abs(chunk.astype(jnp.float32))
            while largest.ndim > 1:
                largest = jnp.max(largest, axis=-1)
            store(maxima.at[i, pl.ds(start, part.spread.rows)], largest)
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
    narrow, scales = [], []
    for part in parts:
        chunks = []
        for start, chunk in zip(part.spread.starts, part.chunks, strict=True):
            of_parts = (part.spread.load_each(maxima.at[i], start) for i in range(len(parts)))
            scale = functools.reduce(jnp.maximum, of_parts) / LARGEST[jnp.dtype(dtype)]
            chunks.append(rounded(chunk.astype(jnp.float32) / part.spread.over_heads(divisor(scale)), dtype))
            if part is parts[0]:
                scales.append(scale)
        narrow.append(dataclasses.replace(part, chunks=chunks))
    return narrow, scales

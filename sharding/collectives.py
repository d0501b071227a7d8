"""Collectives over named axes of a mesh, each the identity where the axis is absent or has one device.

Layers call these inside `jax.shard_map`, so that every exchange of data between devices can be read where it happens.
Under plain `jax.jit` no axis is bound: the same layers then compute on whole arrays, and XLA splits them as it likes.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from .split import Split

DATA, PIPE, EXPERT, TENSOR = "data", "pipe", "expert", "tensor"
AXES = (PIPE, DATA, EXPERT, TENSOR)
"""The axes of our meshes, outermost first: neighbours on the tensor axis talk most, those on the pipe axis least."""


def axis_size(axis: str) -> int:
    """Devices on `axis` around this code; 1 where it is not bound."""
    try:
        return lax.axis_size(axis)
    except NameError:
        return 1


def axis_index(axis: str) -> Any:
    """Which of the axis's devices runs this code; 0 where it is not bound."""
    return lax.axis_index(axis) if axis_size(axis) > 1 else 0


def all_reduce(x: Array, axis: str) -> Array:
    """The sum of the devices' `x`, on each."""
    return lax.psum(x, axis) if axis_size(axis) > 1 else x


def all_max(x: Array, axis: str) -> Array:
    """The elementwise maximum of the devices' `x`, on each."""
    return lax.pmax(x, axis) if axis_size(axis) > 1 else x


def all_min(x: Array, axis: str) -> Array:
    """The elementwise minimum of the devices' `x`, on each; of booleans, whether all are true."""
    if axis_size(axis) == 1:
        return x
    return lax.pmin(x.astype(jnp.int32), axis).astype(x.dtype) if x.dtype == jnp.bool_ else lax.pmin(x, axis)


def all_gather(x: Array, axis: str, dim: int = 0) -> Array:
    """The devices' `x`, in order, joined along `dim`, on each."""
    return lax.all_gather(x, axis, axis=dim, tiled=True) if axis_size(axis) > 1 else x


def reduce_scatter(x: Array, axis: str, dim: int = 0) -> Array:
    """Each device's own part along `dim` of the sum of the devices' `x`; the axis must divide that dimension."""
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True) if axis_size(axis) > 1 else x


def own_part(x: Array, axis: str, dim: int = 0) -> Array:
    """Each device's own part along `dim` of an `x` that all have; the axis must divide that dimension."""
    devices = axis_size(axis)
    if devices == 1:
        return x
    size = x.shape[dim] // devices
    return lax.dynamic_slice_in_dim(x, axis_index(axis) * size, size, dim)


def own_share(x: Array, axis: str, split: Split | None) -> Array:
    """Each device's own share of an `x` that all have, its padding zeros; all of it where there is no split."""
    if split is None:
        return x
    if all(
        [(run.start, run.stop) for run in runs] == [(rank * split.size, (rank + 1) * split.size)]
        for rank, runs in enumerate(split.runs)
    ):
        return own_part(x, axis, split.dim)
    past = x.shape[split.dim]
    places = np.full((split.ranks, split.size), past, np.int32)
    for rank, runs in enumerate(split.runs):
        for run in runs:
            places[rank, run.target : run.target + len(run)] = np.arange(run.start, run.stop)
    return jnp.take(x, jnp.asarray(places)[axis_index(axis)], axis=split.dim, mode="fill", fill_value=0)


def is_split(axis: str) -> bool:
    """Whether code here runs on more than one device of `axis`."""
    return axis_size(axis) > 1

"""Moving arrays between the stages of a pipeline, each on a mesh of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jdsi.sharding import PIPE


def is_here(mesh: Mesh) -> bool:
    """Whether this process has a device of `mesh`."""
    return any(device.process_index == jax.process_index() for device in mesh.devices.flat)


def all_here(mesh: Mesh) -> bool:
    """Whether this process has all devices of `mesh`."""
    return all(device.process_index == jax.process_index() for device in mesh.devices.flat)


class Link:
    """Sends arrays from the devices of one mesh to those at the same places of another of the same shape.

    In one process that is a copy from device to device, which waits for nothing but its data. Across processes it is a
    collective permute over both meshes: every process with a device of either takes part, in the same order, and gives
    `None` where it has no device of the source.
    """

    def __init__(self, source: Mesh, target: Mesh) -> None:
        self._source, self._target = source, target
        self._copies = all_here(source) and all_here(target)
        both = np.stack([source.devices, target.devices])
        self._both = Mesh(both, (PIPE, *source.axis_names), axis_types=(source.axis_types[0], *source.axis_types))

    def send(self, x: Array | None, spec: PartitionSpec, abstract: jax.ShapeDtypeStruct) -> Array | None:
        """`x`, divided over the source as `spec` says, on the target; `None` where this process has no device of it.

        Args:
            x: the array.
            spec: how it is divided, on both.
            abstract: its shape and dtype, for the processes that do not have it.
        """
        sharding = NamedSharding(self._target, spec)
        if self._copies:
            return jax.device_put(x, sharding)
        if not is_here(self._both):
            return None
        pair = _stacked(spec)
        joined = _side_by_side(x, abstract, sharding.shard_shape(abstract.shape), NamedSharding(self._both, pair), 2)
        moved = _permute(self._both, pair)(joined)
        arrived = {shard.device: shard.data for shard in moved.addressable_shards}
        wanted = [arrived[device] for device in self._target.local_devices]
        return _at(abstract, sharding, wanted) if wanted else None


def _stacked(spec: PartitionSpec) -> PartitionSpec:
    """The spec of arrays joined along their first dimension, one from each stage: none of them has to be reshaped."""
    first = spec[0] if spec else None
    return PartitionSpec((PIPE, *(first if isinstance(first, tuple) else [first] if first else [])), *spec[1:])


def _side_by_side(
    x: Array | None, abstract: Any, share: tuple[int, ...], sharding: NamedSharding, stages: int
) -> Array:
    """An array joined of `stages` stages' arrays, of which this process has one at most; anything for the others."""
    have = {} if x is None else {shard.device: shard.data for shard in x.addressable_shards}
    shards = [
        have[device] if device in have else jnp.zeros(share, abstract.dtype, device=device)
        for device in sharding.mesh.local_devices or ()
    ]
    shape = (stages * abstract.shape[0], *abstract.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


@functools.cache
def _permute(mesh: Mesh, spec: PartitionSpec) -> Any:
    def body(x: Array) -> Array:
        return lax.ppermute(x, PIPE, [(0, 1)])

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _at(like: Any, sharding: NamedSharding, shards: list[Array]) -> Array:
    return jax.make_array_from_single_device_arrays(tuple(like.shape), sharding, shards)


def spread(tree: Any, abstract: Any, stage: int, whole: Mesh) -> Any:
    """Arrays that are equal on all devices of one stage, on all devices of all stages.

    Every process takes part. Those without a device of the stage may give anything for `tree`.

    Args:
        tree: a pytree of arrays with at least one dimension.
        abstract: its shapes and dtypes.
        stage: which one has them.
        whole: the mesh of all stages, with the axis "pipe".
    """
    leaves, structure = jax.tree.flatten(abstract)
    has = np.moveaxis(whole.devices, whole.axis_names.index(PIPE), 0)[stage].flat
    here = any(device.process_index == jax.process_index() for device in has)
    values = jax.tree.leaves(tree) if here else [None] * len(leaves)
    sharding, stages = NamedSharding(whole, PartitionSpec(PIPE)), whole.shape[PIPE]
    joined = [
        _side_by_side(value, leaf, leaf.shape, sharding, stages) for leaf, value in zip(leaves, values, strict=True)
    ]
    return jax.tree.unflatten(structure, _everywhere(whole, stage)(joined))


@functools.cache
def _everywhere(whole: Mesh, stage: int) -> Any:
    def body(arrays: list[Array]) -> list[Array]:
        # One sum for all arrays, in which the other stages count for zero; of bits as integers, for then it is exact.
        words = jnp.concatenate([_words(x).reshape(-1) for x in arrays])
        words = lax.psum(jnp.where(lax.axis_index(PIPE) == stage, words, 0), PIPE)
        parts = jnp.split(words, np.cumsum([x.size for x in arrays])[:-1])
        return [_from_words(part.reshape(x.shape), x.dtype) for part, x in zip(parts, arrays, strict=True)]

    in_specs, out_specs = PartitionSpec(PIPE), PartitionSpec()
    return jax.jit(jax.shard_map(body, mesh=whole, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def _words(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.int32)
    return lax.bitcast_convert_type(x, _bits(x.dtype)).astype(jnp.int32)


def _from_words(words: Array, dtype: Any) -> Array:
    if dtype == jnp.bool_:
        return words.astype(dtype)
    return lax.bitcast_convert_type(words.astype(_bits(dtype)), dtype)


def _bits(dtype: Any) -> Any:
    """Integers as wide as numbers of four bytes or fewer."""
    return {4: jnp.int32, 2: jnp.int16, 1: jnp.int8}[jnp.dtype(dtype).itemsize]


def part_on(x: Array, mesh: Mesh) -> Array:
    """An array that is equal on all devices of a larger mesh, as one on `mesh`; nothing is copied."""
    shards = {shard.device: shard.data for shard in x.addressable_shards}
    wanted = [shards[device] for device in mesh.local_devices]
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, PartitionSpec()), wanted)


@functools.cache
def replicate(mesh: Mesh) -> Any:
    """A program that makes every array of a pytree equal on all devices of `mesh`, over which they may be divided."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))

"""The compiled programs between slabs, whose slots come first, and what a layer computes with, whose rows do.

Each serves the devices that offload a layer, all at once, and leaves the others alone.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

_DEVICE, _SLABS = PartitionSpec("device"), PartitionSpec(None, "device")


def put(memories: Mapping[Any, np.ndarray]) -> Array:
    """Slots `[L, B, K, D]` of each device, put there, as one array whose rows are divided over the devices."""
    shards = [
        jax.device_put(memory, jax.sharding.SingleDeviceSharding(device, memory_kind="device"))
        for device, memory in memories.items()
    ]
    return _joined(shards, 1, _SLABS)


def expand(
    devices: Sequence[Any], arrays: tuple[Array, Array], lengths: Int[np.ndarray, " N"], capacity: int
) -> tuple[dict[Any, tuple[Array, Array]], Array]:
    """Keys and values `[B, K, L, D]` of each device, zero behind every row's last token.

    Args:
        devices: that `arrays` are on, in order.
        arrays: what `put` made of keys and of values.
        lengths: tokens of the rows of all devices, one device's behind another's.
        capacity: L.

    Returns:
        Those, and what is ready when the arrays are not read any more.
    """
    (keys, values), done = _expand(_mesh(tuple(devices)), capacity)(arrays, lengths)
    return _by_device(keys, values), done


def cut(
    shards: Mapping[Any, tuple[Array, Array]], starts: Int[np.ndarray, " N"], size: int
) -> dict[Any, tuple[Array, Array]]:
    """Slots `starts[b]` to `starts[b] + size` of keys and values, `[size, B, K, D]` on each device.

    Args:
        shards: `[B, K, L, D]` of each device.
        starts: of the rows of all devices, one device's behind another's.
    """
    keys, values = (_joined([pair[which] for pair in shards.values()], 0, _DEVICE) for which in range(2))
    return _by_device(*_cut(_mesh(tuple(shards)), size)((keys, values), starts))


@functools.cache
def _mesh(devices: tuple[Any, ...]) -> Mesh:
    return Mesh(np.array(devices), ("device",), axis_types=(AxisType.Auto,))


def _joined(shards: Sequence[Array], axis: int, spec: PartitionSpec) -> Array:
    """Arrays on several devices as one along `axis`."""
    mesh = _mesh(tuple(shard.device for shard in shards))
    shape = list(shards[0].shape)
    shape[axis] *= len(shards)
    return jax.make_array_from_single_device_arrays(tuple(shape), NamedSharding(mesh, spec), list(shards))


def _by_device(keys: Array, values: Array) -> dict[Any, tuple[Array, Array]]:
    others = {shard.device: shard.data for shard in values.addressable_shards}
    return {shard.device: (shard.data, others[shard.device]) for shard in keys.addressable_shards}


@functools.cache
def _expand(mesh: Mesh, capacity: int) -> Any:
    def one(x: Array, lengths: Array) -> Array:
        slots = jnp.arange(x.shape[0])
        x = jnp.where((slots[:, None] < lengths)[:, :, None, None], x, 0)  # the rest of a slab may be anything
        return jnp.pad(x.transpose(1, 2, 0, 3), ((0, 0), (0, 0), (0, capacity - x.shape[0]), (0, 0)))

    def body(memory: tuple[Array, Array], lengths: Array) -> tuple[tuple[Array, Array], Array]:
        keys, values = (one(x, lengths) for x in memory)
        return (keys, values), lengths + 0  # which nobody takes over, to tell when it is done

    specs = {"in_specs": (_SLABS, _DEVICE), "out_specs": _DEVICE}
    return jax.jit(jax.shard_map(body, mesh=mesh, check_vma=False, **specs))


@functools.cache
def _cut(mesh: Mesh, size: int) -> Any:
    def one(row: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(row, start, size, axis=1)

    def body(memory: tuple[Array, Array], starts: Array) -> tuple[Array, ...]:
        return tuple(jax.vmap(one)(x, starts).transpose(2, 0, 1, 3) for x in memory)

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(_DEVICE, _DEVICE), out_specs=_SLABS, check_vma=False))

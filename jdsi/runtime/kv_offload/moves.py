"""The programs and the tasks that move one layer's keys and values between slabs and devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jdsi.converters.direct_io import round_up
from jdsi.errors import JdsiError

from .slabs import Slab, SlabHome
from .store import Worker

SLOTS = 128
"""Capacities are multiples of this."""

_DEVICE, _SLABS = PartitionSpec("device"), PartitionSpec(None, "device")


@dataclasses.dataclass
class LayerState:
    """One layer of a batch, in one process.

    Attributes:
        lengths: tokens that each row holds.
        rows: of each device, those it has.
        slabs: keys and values of each device that offloads the layer.
        kept: keys and values of each other device, while the layer is not taken.
        loading: the task that loads them, once it was asked for.
        taken: the memory that was loaded and what still reads it, while the layer is taken.
        saving: the last task that saved something.
        out: what the last load brought, whether or not whoever asked for it got to know.
    """

    lengths: Int[np.ndarray, " B"]
    rows: Mapping[Any, slice]
    slabs: dict[Any, tuple[Slab, Slab]]
    kept: dict[Any, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    loading: Future | None = None
    taken: "Loaded | None" = None
    saving: Future | None = None
    out: "Loaded | None" = None

    @property
    def used(self) -> int:
        """Slots in use of the longest row."""
        return int(self.lengths.max(initial=0))

    def per_device(self, values: Int[np.ndarray, " B"]) -> Int[np.ndarray, " N"]:
        """Values of rows, those of each device that offloads the layer behind another's."""
        return np.concatenate([values[self.rows[device]] for device in self.slabs]).astype(np.int32)


@dataclasses.dataclass
class Loaded:
    """Slabs' memory, of each device keys and values, and what was put on the devices from it.

    Attributes:
        memories: on the host.
        arrays: keys and values on the devices, slots first, of the slots in use at least.
        reader: what is ready when nothing reads the memories any more: on the CPU JAX computes with them as they are.
    """

    memories: dict[Any, list[np.ndarray]]
    arrays: tuple[Array, Array] | None
    reader: Any

    def release(self, home: SlabHome) -> None:
        """Gives the memories back when nothing reads them; the second time does nothing."""
        with contextlib.suppress(RuntimeError):  # a computation that failed has finished too; its caller hears of it
            jax.block_until_ready(self.reader)
        while self.memories:
            home.release(self.memories.popitem()[1])
        self.arrays = self.reader = None


def load(home: SlabHome, layer: LayerState, capacity: int) -> Loaded:
    """Loads a layer's slabs and puts the slots in use on the devices; a task."""
    if layer.saving is not None:
        layer.saving.result()
    if layer.out is not None:
        layer.out.release(home)  # where the caller was interrupted before it knew of it
    memories: dict[Any, list[np.ndarray]] = {}
    slots = _padded(layer.used, capacity)
    loaded = layer.out = Loaded(memories, None, None)
    try:
        for device, slabs in layer.slabs.items():
            memories[device] = home.load(slabs, layer.used)
        arrays = []
        for which in range(2):
            shards = [
                jax.device_put(one[which][:slots], jax.sharding.SingleDeviceSharding(device, memory_kind="device"))
                for device, one in memories.items()
            ]
            arrays.append(_joined(shards, 1, _SLABS))
        loaded.arrays = (arrays[0], arrays[1])
        loaded.reader = jax.block_until_ready(loaded.arrays)
    except BaseException:
        loaded.release(home)
        raise
    return loaded


def expand(layer: LayerState, loaded: Loaded, capacity: int) -> dict[Any, tuple[Array, Array]]:
    """Keys and values `[B, K, L, D]` of each device that offloads the layer, zero behind every row's last token."""
    assert loaded.arrays is not None
    program = _expand(_mesh(tuple(layer.slabs)), capacity)
    (keys, values), loaded.reader = program(loaded.arrays, layer.per_device(layer.lengths))
    loaded.arrays = None
    return _by_device(keys, values)


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


def save(
    home: SlabHome,
    layer: LayerState,
    loaded: Loaded,
    cuts: Mapping[Any, tuple[Array, Array]],
    starts: Int[np.ndarray, " B"],
    lengths: Int[np.ndarray, " B"],
    new_lengths: Int[np.ndarray, " B"],
) -> None:
    """Puts new slots that were cut out into the slabs and gives their memories back; a task."""
    try:
        for device, pieces in cuts.items():
            rows, memories = layer.rows[device], loaded.memories[device]
            # By way of pinned memory, for a GPU copies several times as fast to that as to any other.
            pinned = jax.device_put(pieces, jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"))
            for piece, memory in zip(pinned, memories, strict=True):
                _insert(memory, np.asarray(piece), starts[rows], lengths[rows], new_lengths[rows])
            home.save(layer.slabs[device], memories, lengths[rows], new_lengths[rows])
    finally:
        loaded.release(home)


def copy_rows(
    home: SlabHome,
    layer: LayerState,
    targets: Mapping[Any, tuple[Slab, Slab]],
    rows: Mapping[Any, Int[np.ndarray, " n"]],
) -> None:
    """Row i of each device's target slabs becomes a copy of row `rows[device][i]`; targets may be the layer's slabs."""
    for device, slabs in layer.slabs.items():
        chosen, own = rows[device], layer.lengths[layer.rows[device]]
        with contextlib.ExitStack() as stack:
            memories = others = home.load(slabs, layer.used)
            stack.callback(home.release, memories)
            if targets[device] is not slabs:
                others = home.load(targets[device], 0)
                stack.callback(home.release, others)
            for memory, other in zip(memories, others, strict=True):
                other[: layer.used] = memory[: layer.used][:, chosen]
            home.save(targets[device], others, np.zeros_like(chosen), own[chosen])


def free(home: SlabHome, layers: list[LayerState], ahead: set[Future], saves: Worker) -> None:
    """Gives back what a batch holds; a task, behind all loads of it.

    It relies on what the two threads have done only, for the caller may have been interrupted before it noted anything.
    """
    with contextlib.suppress(JdsiError):  # closed, and so done
        saves.submit(lambda: None).result()
    for layer in layers:
        if layer.loading is not None:
            ahead.discard(layer.loading)
        if layer.out is not None:
            layer.out.release(home)
        free_slabs(home, layer.slabs)
    layers.clear()


def free_slabs(home: SlabHome, slabs: Mapping[Any, tuple[Slab, Slab]]) -> None:
    """Lets the room of some devices' slabs be used again."""
    for pair in slabs.values():
        home.free(pair)


def _insert(memory: np.ndarray, piece: np.ndarray, starts: Any, lengths: Any, new_lengths: Any) -> None:
    """Slots of `piece`, which begins at slot `starts[b]` of row b, go where they belong in `memory`."""
    if len({*zip(starts, lengths, new_lengths, strict=True)}) == 1:
        start, first, last = starts[0], lengths[0], lengths[0] + new_lengths[0]
        memory[first:last] = piece[first - start : last - start]
        return
    for row, (start, first, new) in enumerate(zip(starts, lengths, new_lengths, strict=True)):
        memory[first : first + new, row] = piece[first - start : first - start + new, row]


def _padded(used: int, capacity: int) -> int:
    """Slots to move so that few programs are compiled: steps of a quarter at most."""
    step = max(SLOTS, 1 << max(0, used.bit_length() - 3))
    return min(capacity, round_up(used, step))


@functools.cache
def _mesh(devices: tuple[Any, ...]) -> Mesh:
    """Of the devices that offload a layer, so that one program serves them all without the others."""
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

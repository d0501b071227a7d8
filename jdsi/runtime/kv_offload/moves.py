"""The tasks that move one layer's keys and values between slabs and devices, and what is known of the layer."""

import contextlib
import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jdsi.converters.direct_io import round_up

from . import programs
from .layout import SLOTS
from .slabs import Slab, SlabHome


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

    def expand(self, lengths: Int[np.ndarray, " N"], capacity: int) -> dict[Any, tuple[Array, Array]]:
        """See `programs.expand`; once, for the arrays are not kept."""
        assert self.arrays is not None
        expanded, self.reader = programs.expand(tuple(self.memories), self.arrays, lengths, capacity)
        self.arrays = None
        return expanded

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
        keys, values = (
            programs.put({device: pair[which][:slots] for device, pair in memories.items()}) for which in range(2)
        )
        loaded.arrays = keys, values
        loaded.reader = jax.block_until_ready(loaded.arrays)
    except BaseException:
        loaded.release(home)
        raise
    return loaded


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

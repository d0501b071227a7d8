"""Which parts of a model stay in memory and which are streamed, under a limit."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from jdsi.converters.block_store import Block, BlockStore
from jdsi.errors import CapacityError
from jdsi.models import groups_of

EDGES = ("embedding", "head")


@dataclasses.dataclass(frozen=True)
class Residency:
    """Where each block of a model lives while it runs.

    Attributes:
        resident: names of the blocks that stay in memory.
        streamed: names of those that do not, in the order of a pass; a table that is the embedding and the head comes
            twice.
        slots: buffers of the ring.
        nbytes: memory for weights: ring, resident blocks, and what a streamed block takes while it is used.
    """

    resident: frozenset[str]
    streamed: tuple[str, ...]
    slots: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What weights take of the memory that a limit is for: a GPU's own, or that of the process where devices are CPUs.

    Attributes:
        store: the model.
        dtype: that it runs in.
        tensor, data: over how many devices.
        shared: whether the devices have the host's memory, and count together.
    """

    store: BlockStore
    dtype: np.dtype
    tensor: int = 1
    data: int = 1
    shared: bool = True

    def kept(self, names: Iterable[str]) -> int:
        """Bytes of blocks that stay; every data-parallel group has them, and every rank what is not divided."""
        own = sum(self._own_bytes(self.store.blocks[name]) for name in names)
        return own * self.tensor * self.data if self.shared else own

    def _own_bytes(self, block: Block) -> int:
        if block.ranks > 1 or self.tensor == 1:
            return block.form.nbytes_as(self.dtype)
        total = 0
        for info in groups_of(self.store.spec)[block.name].values():
            split = info.split(self.tensor)
            shape = info.shape if split is None else split.local_shape(info.shape)
            total += math.prod(shape) * info.dtype_in(self.dtype).itemsize
        return total

    def buffer(self, names: Iterable[str]) -> int:
        """Bytes that a buffer of the ring takes, one which any of the blocks fits."""
        largest = max((self.store.blocks[name].nbytes for name in names), default=0)
        return largest if self.shared else -(-largest // (self.tensor * self.data))

    def in_use(self, names: Iterable[str]) -> int:
        """Bytes that streamed blocks take while they are used: gathered from several devices, of another type.

        What layers are made into before they run is memory that layers of the same shapes share, and that stays.
        """
        devices = self.tensor * self.data
        prepared, passing, layers = {}, 0, set(self.store.layers)
        for name in names:
            block = self.store.blocks[name]
            made = block.form.made_bytes(self.dtype)
            is_layer = name in layers
            if is_layer and (made or devices > 1):
                prepared[block.form.shapes] = name
            passing = max(passing, block.nbytes * (devices > 1) + made * (devices > 1 or not is_layer))
        return self.kept(prepared.values()) + passing * (devices if self.shared else 1)


def plan_residency(footprint: Footprint, limit: int | None, *, slots: int = 3, stream: bool = True) -> Residency:
    """Keeps what the limit allows: first what every token needs at both ends, then layers, evenly spread.

    Layers that stay are spread over the stack so that those on their way always have something to hide behind.

    Args:
        footprint: of the model.
        limit: bytes of memory for weights; `None` keeps the embedding and the head, and no layer.
        slots: buffers of the ring, at least 2; one fewer is tried before giving up.
        stream: `False` keeps everything, whatever it takes.

    Raises:
        CapacityError: not even two blocks fit; the message says what would.
    """
    names, layers = list(footprint.store.blocks), footprint.store.layers
    if limit is None:
        kept, moved = _edge_choices(footprint)[0]
        limit = footprint.kept(kept) + slots * footprint.buffer(moved) + footprint.in_use(moved)
    everything = footprint.kept(names)
    if not stream or everything <= limit:
        return Residency(frozenset(names), (), 0, everything)
    for ring in (slots, 2):
        for kept, moved in _edge_choices(footprint):
            buffers = ring * footprint.buffer(moved) + footprint.in_use(moved)
            room = limit - buffers - footprint.kept(kept)
            if room >= 0:
                kept = [*kept, *_spread(layers, max(footprint.kept([name]) for name in layers), room)]
                resident = frozenset(kept)
                return Residency(resident, _order(footprint.store, resident), ring, buffers + footprint.kept(kept))
    raise CapacityError(
        f"{footprint.store.path}: {limit:,} bytes for weights are too few, {least_bytes(footprint):,} are needed"
    )


def least_bytes(footprint: Footprint) -> int:
    """Bytes for weights without which `plan_residency` gives up."""
    return min(
        2 * footprint.buffer(moved) + footprint.in_use(moved) + footprint.kept(kept)
        for kept, moved in _edge_choices(footprint)
    )


def _edge_choices(footprint: Footprint) -> list[tuple[list[str], list[str]]]:
    """What stays besides layers, and what may be streamed: as few of the embedding and the head as possible first."""
    names, layers = list(footprint.store.blocks), footprint.store.layers
    edges = [name for name in names if name in EDGES]
    small = [name for name in names if name not in layers and name not in edges]  # the last norm, a classifier
    return [
        ([*small, *(name for name in edges if name not in streamed)], [*layers, *streamed])
        for streamed in ([], edges[:1], edges[1:], edges)
    ]


def _spread(layers: list[str], largest: int, room: int) -> list[str]:
    count = min(room // largest, len(layers) - 1)
    return [layers[math.floor((i + 0.5) * len(layers) / count)] for i in range(count)]


def _order(store: BlockStore, kept: frozenset[str]) -> tuple[str, ...]:
    order = [name for name in store.blocks if name not in kept and name not in ("head", "norm", "classifier")]
    if "embedding" in order:  # it may stand anywhere in the files
        order.remove("embedding")
        order.insert(0, "embedding")
    head = store.spec.head
    if head is not None and head.tied and "embedding" not in kept:
        order.append("embedding")
    return (*order, *(["head"] if "head" in store.blocks and "head" not in kept else []))

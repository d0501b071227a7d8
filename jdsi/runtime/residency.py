"""Which parts of a model stay in memory and which are streamed, under a limit."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from jdsi.converters.block_store import BlockStore
from jdsi.errors import CapacityError

EDGES = ("embedding", "head")


@dataclasses.dataclass(frozen=True)
class Residency:
    """Where each block of a model lives while it runs.

    Attributes:
        resident: names of the blocks that stay in memory.
        streamed: names of those that do not, in the order of a pass; a table that is the embedding and the head comes
            twice.
        slots: buffers of the ring.
        nbytes: memory for weights: ring, resident blocks, and a streamed block's copy where it changes its type.
    """

    resident: frozenset[str]
    streamed: tuple[str, ...]
    slots: int
    nbytes: int


def plan_residency(
    store: BlockStore, limit: int | None, dtype: np.dtype, *, slots: int = 3, stream: bool = True
) -> Residency:
    """Keeps what the limit allows: first what every token needs at both ends, then layers, evenly spread.

    Layers that stay are spread over the stack so that those on their way always have something to hide behind.

    Args:
        store: the model.
        limit: bytes of host memory for weights; `None` keeps the embedding and the head, and no layer.
        dtype: of the weights that stay; those on their way keep the type they are stored in.
        slots: buffers of the ring, at least 2; one fewer is tried before giving up.
        stream: `False` keeps everything, whatever it takes.

    Raises:
        CapacityError: not even two blocks fit; the message says what would.
    """
    stored = {name: block.nbytes for name, block in store.blocks.items()}
    kept_size = {name: block.nbytes_as(dtype) for name, block in store.blocks.items()}
    layers = [name for name in stored if name.startswith("layers.")]
    edges = [name for name in stored if name in EDGES]
    small = [name for name in stored if name not in layers and name not in edges]  # the last norm

    def held(names: Iterable[str]) -> int:
        return sum(kept_size[name] for name in names)

    if limit is None:
        limit = held([*small, *edges]) + slots * max(stored[name] for name in layers)
        limit += _widened(store, layers, dtype)
    if not stream or held(stored) <= limit:
        return Residency(frozenset(stored), (), 0, held(stored))
    for ring in (slots, 2):
        for streamed_edges in ([], edges[:1], edges[1:], edges):
            kept = [*small, *(name for name in edges if name not in streamed_edges)]
            buffers = ring * max(stored[name] for name in [*layers, *streamed_edges])
            buffers += _widened(store, [*layers, *streamed_edges], dtype)
            room = limit - buffers - held(kept)
            if room >= 0:
                kept += _spread(layers, max(kept_size[name] for name in layers), room)
                return Residency(frozenset(kept), _order(store, frozenset(kept)), ring, buffers + held(kept))
    raise CapacityError(
        f"{store.path}: {limit:,} bytes for weights are too few, {least_bytes(store, dtype):,} are needed"
    )


def least_bytes(store: BlockStore, dtype: np.dtype) -> int:
    """Bytes for weights without which `plan_residency` gives up."""
    blocks = store.blocks.values()
    small = sum(b.nbytes_as(dtype) for b in blocks if b.name not in EDGES and not b.name.startswith("layers."))
    return 2 * max(b.nbytes for b in blocks) + _widened(store, store.blocks, dtype) + small


def _widened(store: BlockStore, names: Iterable[str], dtype: np.dtype) -> int:
    """What a streamed block takes while it is used as another type than it is stored in."""
    changed = [
        store.blocks[name].nbytes_as(dtype)
        for name in names
        if any(field.dtype != dtype for field in store.blocks[name].fields.values())
    ]
    return max(changed, default=0)


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

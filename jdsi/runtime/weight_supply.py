"""Where an executor that streams gets the weights of its programs: what stays on the devices, and what arrives."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import PageBuffer
from jdsi.models import layer_group
from jdsi.models.spec import LayerSpec

from .layer_programs import LayerPrograms
from .placement import Streamed, Weights, kept_weights, streamed_weights
from .residency import Residency
from .weight_sources import BlockSource, DiskSource
from .weight_stream import Delivery, StreamReport, WeightStream


@dataclasses.dataclass(frozen=True)
class Resident:
    """Stands for a `Delivery` where the weights do not have to make room for others once they were used.

    Attributes:
        arrays: what the programs take.
    """

    arrays: Any

    def used_by(self, result: Array) -> None:
        """Nothing waits for it."""


class WeightSupply:
    """The weights of a model in the order of a pass, and the programs to go with them.

    Args:
        store: the model.
        residency: what stays on the devices.
        mesh: the devices.
        programs: of the model on them.
        source: where streamed blocks come from; by default the store's files. Closed with this.

    Attributes:
        embed, top: programs, see `LayerPrograms`.
    """

    def __init__(
        self, store: BlockStore, residency: Residency, mesh: Mesh, programs: LayerPrograms, source: BlockSource | None
    ) -> None:
        weights = {name: streamed_weights(store.spec, block, mesh) for name, block in store.blocks.items()}
        with contextlib.closing(DiskSource(store)) as disk:
            self._resident = {
                name: _load(disk, store.blocks[name], weights[name], programs) for name in residency.resident
            }
        blocks = [(store.blocks[name], weights[name]) for name in residency.streamed]
        self._stream = WeightStream(source or DiskSource(store), blocks, residency.slots) if blocks else None
        used = {name: kept_weights(own) if name in residency.resident else own for name, own in weights.items()}
        # In the order in which they arrive.
        self._top_blocks = ["norm"] * ("norm" in used)
        head = store.spec.head
        self._top_blocks += ["embedding"] * (head is not None and head.tied)
        self._top_blocks += [name for name in ("head", "classifier") if name in used]
        top = [used[name] for name in self._top_blocks]
        self.embed, self.top = programs.embed(used["embedding"]), programs.top(top)
        self._layers = [_Layer.of(programs, used[layer_group(i)], layer) for i, layer in enumerate(store.spec.layers)]
        self._prepared: dict[Any, dict[str, Array]] = {}
        self._store, self._dtype = store, programs.dtype
        if self._stream is None:
            self._warn()

    @contextlib.contextmanager
    def block(self, name: str) -> Iterator[Delivery | Resident]:
        """A block that is no layer, until the end of the context; blocks must be taken in the order of a pass."""
        if name in self._resident or self._stream is None:
            yield Resident(self._resident[name])
            return
        delivery = self._stream.take(name)
        try:
            yield delivery
        finally:
            delivery.release()

    @contextlib.contextmanager
    def layer(self, index: int, batches: int) -> Iterator[tuple[Delivery | Resident, Callable[..., Any]]]:
        """A layer's weights for so many batches, until the end of the context, and the program that takes them."""
        layer = self._layers[index]
        with self.block(layer_group(index)) as block:
            if layer.prepare is None or layer.run_prepared is None:
                yield block, layer.run
                return
            if not worth_preparing(batches):
                self._prepared.clear()  # of a pass of more batches
                yield block, layer.run
                return
            # Into the memory of the last layer of the same shape, once that has been computed: fresh memory for every
            # layer would be more than one layer's, and on a CPU its pages cost as much as reading the weights does.
            parameters, done = layer.prepare(block.arrays, self._prepared.pop(layer.shapes, None))
            self._prepared[layer.shapes] = parameters
            block.used_by(done)
        yield Resident(parameters), layer.run_prepared

    @contextlib.contextmanager
    def top_weights(self) -> Iterator[list[Delivery | Resident]]:
        """What the program `top` takes, a block for each of its arrays, until the end of the context."""
        with contextlib.ExitStack() as stack:
            blocks = [stack.enter_context(self.block(name)) for name in self._top_blocks]
            self._warn()  # once: by the end of a pass all blocks have been read
            yield blocks

    def _warn(self) -> None:
        self._store.watch.warn(str(self._store.path), np.dtype(self._dtype))

    def report(self) -> StreamReport | None:
        """What was streamed so far, if anything is."""
        return None if self._stream is None else dataclasses.replace(self._stream.report)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._stream is not None:
            self._stream.close()


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer's programs: the one that takes what a block has, and where that costs, those that prepare it once.

    Attributes:
        run: of `LayerPrograms.layer`, for the block.
        prepare: of `LayerPrograms.keep`, if the block is gathered, rearranged, widened or dequantised.
        run_prepared: as `run`, for what `prepare` gives.
        shapes: of what that is; layers with the same can share its memory.
    """

    run: Callable[..., Any]
    prepare: Callable[..., Any] | None = None
    run_prepared: Callable[..., Any] | None = None
    shapes: Any = None

    @classmethod
    def of(cls, programs: LayerPrograms, weights: Weights, layer: LayerSpec) -> "_Layer":
        run = programs.layer(weights, layer)
        if not isinstance(weights, Streamed) or not weights.prepares(programs.dtype):
            return cls(run)
        kept = kept_weights(weights)
        return cls(run, programs.keep(weights, kept), programs.layer(kept, layer), weights.form.shapes)


def worth_preparing(batches: int) -> bool:
    """Whether what so many batches use is made once before: one batch's program may do it on its way.

    Not on a CPU, where it would make all of it first anyway, in memory of its own.
    """
    return batches > 1 or jax.default_backend() == "cpu"


def _load(disk: DiskSource, block: Block, weights: Streamed, programs: LayerPrograms) -> Mapping[str, Array]:
    """A block's parameters, to stay; on a CPU, if stored as they are used, in the memory they are read into."""
    arrays = disk.begin(block, PageBuffer(weights.memory_bytes(block.nbytes)).bytes, weights)()
    if not weights.prepares(programs.dtype):
        return arrays
    parameters, _ = programs.keep(weights, kept_weights(weights))(arrays, None)
    return jax.block_until_ready(parameters)

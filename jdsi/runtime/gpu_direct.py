"""Weights that go from their files straight into the memory of GPUs, see `DeviceReader`; not run on a GPU yet."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import Segment
from jdsi.errors import ConfigError

from .device_reader import DeviceReader
from .placement import Streamed


def gpu_direct_source(store: BlockStore) -> "GPUDirectSource":
    """The source behind the setting `gpu_direct`.

    Raises:
        ConfigError: JAX does not run on GPUs, or kvikio cannot be imported.
    """
    backend = jax.default_backend()
    if backend != "gpu":
        raise ConfigError(f"gpu_direct reads files into the memory of GPUs, and JAX runs on {backend}; leave it out")
    return GPUDirectSource(store)


class GPUDirectSource:
    """See `BlockSource`: blocks from their files, every time they are asked for, with no host memory in between.

    A buffer is arrays as `Streamed.put` makes them. They are made anew when a block of another form comes.

    Args:
        store: that the blocks are of.

    Raises:
        ConfigError: kvikio cannot be imported.
    """

    def __init__(self, store: BlockStore) -> None:
        self._reader = DeviceReader(known=store.files)
        self._make: dict[Streamed, Callable[[], Any]] = {}
        self._parts: dict[str, list[list[Segment]]] = {}

    def prepare(self, blocks: Sequence[tuple[Block, Streamed]]) -> None:
        """See `BlockSource.prepare`; works out what to read where.

        Raises:
            ConfigError: JAX has no arrays of the type that a block is stored in.
        """
        for block, weights in blocks:
            for array in jax.tree.leaves(weights.shapes):
                if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
                    raise ConfigError(
                        f"{block.segments[0].file}: {block.name} is stored as {array.dtype}, which JAX narrows on the "
                        "way to a device, and gpu_direct reads bytes as they are; `jdsi convert SRC DST --to streaming "
                        "--dtype float32`, or leave gpu_direct out"
                    )
            zeros = partial(jax.tree.map, _zeros, weights.shapes)
            self._make.setdefault(weights, jax.jit(zeros, out_shardings=weights.shardings("device")))
            self._parts[block.name] = _parts(block, weights)

    def buffer(self, blocks: Sequence[tuple[Block, Streamed]]) -> "_Buffer":
        """See `BlockSource.buffer`; it takes no memory before a block comes."""
        return _Buffer()

    def begin(self, block: Block, buffer: "_Buffer", weights: Streamed) -> Callable[[], Any]:
        """See `BlockSource.begin`."""
        # JAX takes the values of arrays for constant, and these are written over. Its programs cannot tell: a buffer
        # comes here once all that was computed with it is done, and what is computed with it next is started after the
        # last byte has come. NumPy could, for which JAX keeps a copy of what it has read once; weights are not read so.
        filled = buffer.filled
        if filled is None or filled.weights != weights:
            filled = buffer.filled = None  # first of all, so that the new ones can have the memory
            filled = buffer.filled = _Filled.of(weights, self._make[weights])
        reads = [
            dataclasses.replace(segment, target=address + segment.target)
            for address, segments in zip(filled.addresses, self._parts[block.name], strict=True)
            for segment in segments
        ]
        arrived, arrays = self._reader.start(reads, filled.arrays), filled.arrays

        def finish() -> Any:
            arrived()
            return arrays

        return finish

    def close(self) -> None:
        """See `BlockSource.close`."""
        self._reader.close()


@dataclasses.dataclass(frozen=True)
class _Filled:
    """Arrays for blocks of one form.

    Attributes:
        weights: that they are for.
        arrays: see `Streamed.put`.
        addresses: where each device's part of each of them begins: leaf after leaf, for one device after another.
    """

    weights: Streamed
    arrays: Any
    addresses: list[int]

    @classmethod
    def of(cls, weights: Streamed, make: Callable[[], Any]) -> "_Filled":
        """New ones."""
        arrays = jax.block_until_ready(make())  # or zeros might be written over what is read
        addresses = []
        for array in jax.tree.leaves(arrays):
            shards = {shard.device: shard.data for shard in array.addressable_shards}
            addresses += [shards[device].unsafe_buffer_pointer() for device in weights.mesh.devices.flat]
        return cls(weights, arrays, addresses)


@dataclasses.dataclass
class _Buffer:
    """One of the ring: arrays for blocks of the form that it was last used for."""

    filled: _Filled | None = None


def _zeros(array: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(array.shape, array.dtype)


def _parts(block: Block, weights: Streamed) -> list[list[Segment]]:
    """What fills each device's part of each array, in the order of `_Filled.addresses`; targets count from there."""

    def of_array(array: jax.ShapeDtypeStruct, starts: list[int]) -> list[list[Segment]]:
        nbytes = array.size * array.dtype.itemsize // len(starts)
        return [within(block.segments, start, nbytes) for start in starts]

    shapes = weights.shapes
    arrays = jax.tree.map(of_array, shapes, weights.starts(block.nbytes))
    return [part for parts in jax.tree.structure(shapes).flatten_up_to(arrays) for part in parts]


def within(segments: Iterable[Segment], start: int, nbytes: int) -> list[Segment]:
    """What of some segments lands in a stretch of the memory that they fill; its targets count from the stretch."""
    found = []
    for segment in segments:
        first = max(start, segment.target)
        stop = min(start + nbytes, segment.target + segment.nbytes)
        if first < stop:
            offset = segment.offset + first - segment.target
            found.append(Segment(segment.file, offset, stop - first, first - start))
    return found

"""Keys and values of a batch that come to the devices layer by layer (DeepSpeed Inference, arXiv:2207.00032)."""

import contextlib
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jdsi.errors import CapacityError, ConfigError, JdsiError
from jdsi.sharding import DATA, TENSOR

from .moves import SLOTS, LayerState, Loaded, copy_rows, cut, expand, free, free_slabs, load, save
from .slabs import Slab
from .store import Failure, SlabStore, Worker


class OffloadedKV:
    """The KV memory of one batch on a mesh, all rows empty at first.

    A step takes every layer, runs a program that adds tokens to it, and gives it back; what the program did not have
    to do with stays where it is. A layer's slots in use travel to the devices, and its new slots back. One thread at a
    time may use it; other batches of the same store do so in turn.

    Of n devices that share one host link, device i offloads the layers l with l % n == i % n and keeps the others, so
    that no two need the link for the same layer (the paper's odd and even layers).

    Args:
        heads: per layer `(num_kv_heads, key dim, value dim)`.
        rows: of the batch.
        capacity: slots per row, a multiple of 128.
        dtype: of keys and values, a floating-point type.
        mesh: with the axes "data", over which rows are divided, and "tensor", over which heads are.
        store: where slabs lie; not closed with this.
        devices_per_link: as above; counted among this process's devices in the order of the mesh.

    Attributes:
        rows, capacity: as above.

    Raises:
        ConfigError: rows or heads cannot be divided over the mesh, or an argument is out of range.
        CapacityError: the store has no room for it.
    """

    def __init__(
        self,
        heads: Sequence[tuple[int, int, int]],
        rows: int,
        capacity: int,
        dtype: Any,
        mesh: Mesh,
        store: SlabStore,
        *,
        devices_per_link: int = 1,
    ) -> None:
        _check_divides(mesh, rows, heads)
        if capacity < SLOTS or capacity % SLOTS:
            raise ConfigError(f"capacity={capacity} must be a multiple of {SLOTS}")
        if devices_per_link < 1:
            raise ConfigError(f"devices_per_link={devices_per_link} must be at least 1")
        self.rows, self.capacity = rows, capacity
        self._heads, self._dtype, self._store = list(heads), np.dtype(dtype), store
        self._mesh, self._sharding = mesh, NamedSharding(mesh, PartitionSpec(DATA, TENSOR))
        self._failure = Failure()
        devices, link = list(mesh.local_devices), devices_per_link
        offloading = [
            [device for i, device in enumerate(devices) if layer % link == i % link] for layer in range(len(heads))
        ]
        ranges = self._row_ranges(rows)
        self._layers = [
            LayerState(np.zeros(rows, np.int64), ranges, slabs)
            for slabs in self._reserve(range(len(heads)), offloading, rows)
        ]
        self._free = partial(free, store.home, self._layers, store.ahead, store.saves)
        self._finalizer = weakref.finalize(self, _free_soon, store.loads, self._free, self._failure)
        for index, layer in enumerate(self._layers):
            shares = [self._sharding.shard_shape(shape) for shape in self._shapes(index, rows)]
            for device in set(devices) - set(layer.slabs):
                keys, values = (jnp.zeros(share, self._dtype, device=device) for share in shares)
                layer.kept[device] = keys, values

    def offloaded(self, layer: int) -> list[Any]:
        """The devices of this process whose shares of a layer lie in the store."""
        return list(self._layers[layer].slabs)

    def prefetch(self, layer: int) -> None:
        """Begins to load a layer that will be taken soon; does nothing while many others are ahead of it.

        Raises:
            JdsiError: something went wrong earlier, or this is closed.
        """
        self._failure.check()
        state = self._layers[layer]
        if state.slabs and state.loading is None and state.taken is None and self._store.has_room_ahead:
            state.loading = self._load(state)
            self._store.ahead.add(state.loading)  # behind what names it, so that it cannot be counted for good

    def take(self, layer: int) -> tuple[Float[Array, "B K L D"], Float[Array, "B K L Dv"]]:
        """A layer's keys and values, zero where no token is, which the caller may donate and must give back.

        Rows are divided over "data", heads over "tensor". Waits until they are loaded.

        Raises:
            JdsiError: loading failed, or something went wrong earlier, or this is closed.
            ValueError: the layer is taken already.
        """
        self._failure.check()
        state = self._layers[layer]
        if state.taken is not None:
            raise ValueError(f"layer {layer} was taken and not given back")
        shards, state.kept = state.kept, {}
        if state.slabs:
            if state.loading is None:
                state.loading = self._load(state)
            state.taken = self._arrived(state)
            state.loading = None
            shards |= expand(state, state.taken, self.capacity)
        else:
            state.taken = Loaded({}, None, None)
        keys, values = (
            jax.make_array_from_single_device_arrays(
                shape, self._sharding, [shards[device][which] for device in self._mesh.local_devices]
            )
            for which, shape in enumerate(self._shapes(layer, self.rows))
        )
        return keys, values

    def give(
        self,
        layer: int,
        memory: tuple[Float[Array, "B K L D"], Float[Array, "B K L Dv"]],
        lengths: Int[Array | np.ndarray, " B"],
        new_lengths: Int[Array | np.ndarray, " B"],
        new_tokens: int,
    ) -> None:
        """A layer's changed keys and values, which the caller must not use any more; only new slots are looked at.

        Returns when the devices have been told to cut those out. Waits while many layers are on their way back.

        Args:
            memory: divided as `take` gave it.
            lengths: tokens that each row held; fewer than it does takes the last ones back.
            new_lengths: tokens that came to each row.
            new_tokens: at least as many as came to any row; programs are compiled for it.

        Raises:
            CapacityError: a row has more tokens than slots.
            JdsiError: something went wrong earlier, or this is closed.
            ValueError: the layer was not taken, or what is given does not fit it.
        """
        self._failure.check()
        state, loaded = self._layers[layer], self._layers[layer].taken
        if loaded is None:
            raise ValueError(f"layer {layer} was not taken")
        lengths, new_lengths = (np.array(x, np.int64) for x in (lengths, new_lengths))
        self._check(layer, memory, lengths, new_lengths, new_tokens)
        by_device = [{shard.device: shard.data for shard in array.addressable_shards} for array in memory]
        shards = {device: (keys, by_device[1][device]) for device, keys in by_device[0].items()}
        if state.slabs:
            size = min(new_tokens, self.capacity)
            starts = np.minimum(lengths, self.capacity - size)
            self._store.wait_for_room_behind()
            cuts = cut({device: shards[device] for device in state.slabs}, state.per_device(starts), size)
            task = partial(save, self._store.home, state, loaded, cuts, starts, lengths, new_lengths)
            state.saving = self._store.save(partial(self._failure.watch, task))
        state.taken, state.lengths = None, lengths + new_lengths
        state.kept = {device: pair for device, pair in shards.items() if device not in state.slabs}

    def select(self, rows: Int[Array | np.ndarray, " N"]) -> None:
        """Row i becomes a copy of row `rows[i]` (beam search); there may be another number of rows afterwards.

        On a mesh a row must lie in the same group of the axis "data" as the one it is copied from.

        Raises:
            CapacityError: there is no room for more rows.
            ConfigError: the rows cannot be divided over the axis "data".
            JdsiError: reading or writing failed, or something went wrong earlier, or this is closed.
            ValueError: a layer is taken, or a row comes from another group.
        """
        self._failure.check()
        rows = np.asarray(rows)
        if any(state.taken is not None for state in self._layers):
            raise ValueError("rows cannot be selected while a layer is taken")
        _check_divides(self._mesh, len(rows), self._heads)
        before, after = self._row_ranges(self.rows), self._row_ranges(len(rows))
        local = {device: rows[after[device]] - before[device].start for device in after}
        if any(
            ((own < 0) | (own >= before[device].stop - before[device].start)).any() for device, own in local.items()
        ):
            raise ValueError(f"rows {rows.tolist()} are not all copies of rows in their own group of the axis {DATA!r}")
        self._failure.watch(partial(self._select, rows, local))

    def close(self) -> None:
        """Frees the slabs, when what is under way is done; the second time does nothing."""
        if self._finalizer.detach() is not None:
            self._failure.error = _closed()
            with contextlib.suppress(JdsiError):  # a store that is closed has freed them
                self._store.loads.submit(self._free).result()

    def _shapes(self, layer: int, rows: int) -> list[tuple[int, int, int, int]]:
        kv_heads, *dims = self._heads[layer]
        return [(rows, kv_heads, self.capacity, dim) for dim in dims]

    def _row_ranges(self, rows: int) -> dict[Any, slice]:
        indices = NamedSharding(self._mesh, PartitionSpec(DATA)).addressable_devices_indices_map((rows,))
        return {device: slice(*index[0].indices(rows)) for device, index in indices.items() if index is not None}

    def _reserve(
        self, layers: Sequence[int], devices: Sequence[Sequence[Any]], rows: int
    ) -> list[dict[Any, tuple[Slab, Slab]]]:
        """Slabs for keys and values of layers, each for its devices, or none at all."""
        shapes = []
        for layer, offloading in zip(layers, devices, strict=True):
            for shape in self._shapes(layer, rows) * len(offloading):
                own_rows, kv_heads, slots, dim = self._sharding.shard_shape(shape)
                shapes.append((slots, own_rows, kv_heads, dim))
        slabs = iter(self._store.allocate(shapes, self._dtype))
        return [{device: (next(slabs), next(slabs)) for device in offloading} for offloading in devices]

    def _load(self, state: LayerState) -> Future:
        task = partial(load, self._store.home, state, self.capacity)
        return self._store.loads.submit(partial(self._failure.watch, task))

    def _arrived(self, state: LayerState) -> Loaded:
        """What is being loaded, once it is there; `state.loading` still names it."""
        assert state.loading is not None
        began = time.perf_counter()
        wait([state.loading])
        self._store.wait_seconds += time.perf_counter() - began
        self._store.ahead.discard(state.loading)
        if state.loading.exception() is not None:
            self._failure.check()
        return state.loading.result()

    def _check(self, layer: int, memory: Any, lengths: np.ndarray, new_lengths: np.ndarray, new_tokens: int) -> None:
        held = self._layers[layer].lengths
        for array, shape in zip(memory, self._shapes(layer, self.rows), strict=True):
            if array.shape != shape or array.dtype != self._dtype:
                raise ValueError(f"layer {layer} is {self._dtype}{list(shape)}, given {array.dtype}{list(array.shape)}")
            if not array.sharding.is_equivalent_to(self._sharding, array.ndim):
                raise ValueError(f"layer {layer} must be divided as {self._sharding}, given {array.sharding}")
        if lengths.shape != held.shape or new_lengths.shape != held.shape:
            raise ValueError(f"lengths must be of {self.rows} rows")
        if ((lengths < 0) | (lengths > held)).any():
            raise ValueError(f"rows hold {held.tolist()} tokens, and cannot continue behind {lengths.tolist()}")
        if ((new_lengths < 0) | (new_lengths > new_tokens)).any():
            raise ValueError(f"of {new_tokens} new tokens a row cannot have {new_lengths.tolist()}")
        if (longest := int((lengths + new_lengths).max())) > self.capacity:
            raise CapacityError(f"a row would have {longest} tokens, and its KV memory has {self.capacity} slots")

    def _select(self, rows: Int[np.ndarray, " N"], local: Mapping[Any, Int[np.ndarray, " n"]]) -> None:
        home, same = self._store.home, len(rows) == self.rows
        for state in self._layers:
            if state.loading is not None:
                self._arrived(state).release(home)
                state.loading = None
            if state.saving is not None:
                state.saving.result()
        ranges = self._row_ranges(len(rows))
        for layer, state in enumerate(self._layers):
            slabs = state.slabs
            if not same:  # one layer at a time, so that no more than one is there twice
                (slabs,) = self._reserve([layer], [list(state.slabs)], len(rows))
            try:
                copy_rows(home, state, slabs, local)
            except BaseException:
                if not same:
                    free_slabs(home, slabs)
                raise
            old, state.slabs, state.rows, state.lengths = state.slabs, slabs, ranges, state.lengths[rows]
            if not same:
                free_slabs(home, old)
            for device, (keys, values) in state.kept.items():
                state.kept[device] = jnp.take(keys, local[device], axis=0), jnp.take(values, local[device], axis=0)
        self.rows = len(rows)


def _check_divides(mesh: Mesh, rows: int, heads: Sequence[tuple[int, int, int]]) -> None:
    if rows < 1 or rows % mesh.shape[DATA]:
        raise ConfigError(f"{rows} rows cannot be divided over {mesh.shape[DATA]} devices on the axis {DATA!r}")
    for kv_heads, _, _ in heads:
        if kv_heads % mesh.shape[TENSOR]:
            raise ConfigError(
                f"{kv_heads} kv heads cannot be divided over {mesh.shape[TENSOR]} devices on the axis {TENSOR!r}"
            )


def _free_soon(loads: Worker, task: Callable[[], None], failure: Failure) -> None:
    """Of memory that is dropped: behind what is under way, for it may be dropped anywhere, in the threads even."""
    failure.error = _closed()
    loads.submit_if_open(task)


def _closed() -> JdsiError:
    return JdsiError("these keys and values are closed")

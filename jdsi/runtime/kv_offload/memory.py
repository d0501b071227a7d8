"""Keys and values of a batch that come to the devices layer by layer (DeepSpeed Inference, arXiv:2207.00032)."""

import contextlib
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jdsi.errors import JdsiError
from jdsi.kv_cache import KVShape

from .layout import Layout
from .lifetime import begin, end, select
from .moves import LayerState, Loaded, load, save
from .programs import cut
from .store import Failure, SlabStore


class OffloadedKV:
    """The KV memory of one batch on a mesh, all rows empty at first.

    A step takes every layer, runs a program that adds tokens to it, and gives it back; what the program did not have
    to do with stays where it is. A layer's slots in use travel to the devices, and its new slots back. One thread at a
    time may use it; other batches of the same store do so in turn.

    Of n devices that share one host link, device i offloads the layers l with l % n == i % n and keeps the others, so
    that no two need the link for the same layer (the paper's odd and even layers).

    Args:
        heads: what each layer remembers of a token.
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
        heads: Sequence[KVShape],
        rows: int,
        capacity: int,
        dtype: Any,
        mesh: Mesh,
        store: SlabStore,
        *,
        devices_per_link: int = 1,
    ) -> None:
        self._layout = Layout(tuple(heads), capacity, np.dtype(dtype), mesh, devices_per_link)
        self.rows, self.capacity, self._store = rows, capacity, store
        self._failure, self._layers = Failure(), list[LayerState]()
        self._end = partial(end, store.home, self._layers, store.ahead, store.saves)
        # First, so that whatever `begin` gets will be given back, wherever this is interrupted.
        self._finalizer = weakref.finalize(self, store.loads.submitter(self._end))
        store.loads.submit(partial(begin, store.home, self._layout, rows, self._layers)).result()
        for index, layer in enumerate(self._layers):
            shares = self._layout.share_shapes(index, rows)
            for device in self._layout.keeping(index):
                keys, values = (jnp.zeros(share, self._layout.dtype, device=device) for share in shares)
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
        if state.slabs and state.loading is None:
            state.loading = self._load(state)
        # Before the rest is touched, so that the layer counts as taken wherever this is interrupted then.
        state.taken = loaded = Loaded({}, None, None) if state.loading is None else self._result(state.loading)
        shards, state.kept, state.loading = state.kept, {}, None
        if state.slabs:
            shards |= loaded.expand(state.per_device(state.lengths), self.capacity)
        keys, values = (
            jax.make_array_from_single_device_arrays(
                shape, self._layout.sharding, [shards[device][which] for device in self._layout.mesh.local_devices]
            )
            for which, shape in enumerate(self._layout.shapes(layer, self.rows))
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
        self._layout.check_given(layer, memory, state.lengths, lengths, new_lengths, new_tokens)
        by_device = [{shard.device: shard.data for shard in array.addressable_shards} for array in memory]
        shards = {device: (keys, by_device[1][device]) for device, keys in by_device[0].items()}
        if state.slabs:
            size = min(new_tokens, self.capacity)
            starts = np.minimum(lengths, self.capacity - size)
            self._store.wait_for_room_behind()
            cuts = cut({device: shards[device] for device in state.slabs}, state.per_device(starts), size)
            task = partial(save, self._store.home, state, loaded, cuts, starts, lengths, new_lengths)
            state.saving = self._store.save(partial(self._failure.watch, task))
        state.kept = {device: pair for device, pair in shards.items() if device not in state.slabs}
        # Last, and in one step, so that the layer counts as taken wherever this was interrupted.
        state.taken, state.lengths = None, lengths + new_lengths

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
        sources = self._layout.sources(rows, self.rows)
        task = partial(select, self._store.home, self._layout, self._layers, self._store.ahead, rows, sources)
        # Where this is interrupted, the thread finishes it or never began, and nobody here could tell.
        self._failure.unfinished = "selecting rows"
        self._result(self._store.loads.submit(partial(self._failure.watch, task)))
        self.rows = len(rows)
        self._failure.unfinished = None

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several with as many slots, one behind another; those are closed.

        Raises:
            CapacityError, ConfigError, JdsiError: as the constructor, `take` and `give`.
        """
        layout = parts[0]._layout
        rows, link = sum(part.rows for part in parts), layout.devices_per_link
        store = parts[0]._store
        whole = cls(layout.heads, rows, layout.capacity, layout.dtype, layout.mesh, store, devices_per_link=link)
        none = np.zeros(rows, np.int64)
        for layer in range(len(layout.heads)):
            taken = [part.take(layer) for part in parts]
            memory = [jax.device_put(jnp.concatenate(arrays), layout.sharding) for arrays in zip(*taken, strict=True)]
            lengths = [part._layers[layer].lengths for part in parts]
            for part, own, held in zip(parts, taken, lengths, strict=True):
                part.give(layer, own, held, np.zeros_like(held), 1)
            whole.take(layer)
            held = np.concatenate(lengths)
            whole.give(layer, (memory[0], memory[1]), none, held, max(1, int(held.max())))
        for part in parts:
            part.close()
        return whole

    def close(self) -> None:
        """Frees the slabs, when what is under way is done; the second time does nothing."""
        if self._finalizer.alive:
            self._failure.error = JdsiError("these keys and values are closed")
            with contextlib.suppress(JdsiError):  # a store that is closed has freed them
                self._store.loads.submit(self._end).result()
            self._finalizer.detach()  # last, so that it still frees what Ctrl-C kept this from

    def _load(self, state: LayerState) -> Future:
        task = partial(load, self._store.home, state, self.capacity)
        return self._store.loads.submit(partial(self._failure.watch, task))

    def _result(self, future: Future) -> Any:
        """Of a task of the loading thread, once it is done, and thus not ahead any more."""
        self._store.wait(future)
        self._store.ahead.discard(future)
        if future.exception() is not None:
            self._failure.check()
        return future.result()

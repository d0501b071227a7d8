"""The cache of a batch whose keys and values are elsewhere."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jdsi.errors import ConfigError
from jdsi.kv_cache import Contiguous, ContiguousContext, KVShape, OneForAll

from .memory import OffloadedKV
from .store import SlabReport, SlabStore

_ROWS = Contiguous()  # as which a layer's keys and values come to the devices


@dataclasses.dataclass(frozen=True)
class Offloaded:
    """The `CacheSpec` of keys and values that come to the devices layer by layer, for executors that run so.

    Attributes:
        store: where they lie meanwhile; closed with this.
        devices_per_link: see `OffloadedKV`.
    """

    store: SlabStore
    devices_per_link: int = 1

    def bytes(self, layers: Sequence[KVShape], rows: int, tokens: int, dtype: DTypeLike) -> int:
        """See `CacheSpec.bytes`."""
        return _ROWS.bytes(layers, rows, tokens, dtype)

    def create(
        self, layers: Sequence[KVShape], rows: int, tokens: int, dtype: DTypeLike, mesh: Mesh | None = None
    ) -> "OffloadedCache":
        """See `CacheSpec.create`.

        Raises:
            CapacityError: the store has no room for it.
            ConfigError: there is no mesh, or rows or heads cannot be divided over it.
        """
        if mesh is None:
            raise ConfigError("keys and values can be elsewhere only for an executor that runs layer by layer")
        room, link = _ROWS.slots(tokens), self.devices_per_link
        return OffloadedCache.empty(OffloadedKV(layers, rows, room, dtype, mesh, self.store, devices_per_link=link))

    def report(self) -> SlabReport:
        """See `CacheSpec.report`."""
        return self.store.report()

    def close(self) -> None:
        """See `CacheSpec.close`."""
        self.store.close()


@dataclasses.dataclass(frozen=True)
class OffloadedCache(OneForAll):
    """See `Cache`; what executors that run layer by layer do with a context. Not a pytree, for no program takes it.

    Attributes:
        frame: which token belongs where; without memory.
        lengths: tokens that each row holds, known to the host.
        kv: the memory. It changes in place, so of several contexts of a batch only the newest may be used.
    """

    frame: ContiguousContext
    lengths: Int[np.ndarray, " B"]
    kv: OffloadedKV

    @classmethod
    def empty(cls, kv: OffloadedKV) -> Self:
        """No row holds a token."""
        none = jnp.zeros(kv.rows, jnp.int32)
        return cls(ContiguousContext((), (), none, none, empty=True), np.zeros(kv.rows, np.int64), kv)

    @property
    def rows(self) -> int:
        """See `Cache.rows`."""
        return len(self.lengths)

    def begin(self, new_lengths: Int[Array | np.ndarray, " B"], new_tokens: int) -> Self:
        """See `Cache.begin`."""
        return dataclasses.replace(self, frame=self.frame.begin(new_lengths, new_tokens))

    def rollback(self, tokens: Int[np.ndarray, " B"]) -> Self:
        """See `Cache.rollback`; a layer takes its last tokens back when it is next written to."""
        lengths = np.maximum(self.lengths - tokens, 0)
        return dataclasses.replace(self, frame=self.frame.rollback(tokens), lengths=lengths)

    def release(self, rows: Sequence[int]) -> Self:
        """See `Cache.release`."""
        tokens = np.zeros_like(self.lengths)
        tokens[np.asarray(rows)] = self.lengths[np.asarray(rows)]
        return self.rollback(tokens)

    def commit(self) -> Self:
        """See `AttentionContext.commit`."""
        new = np.asarray(self.frame.new_lengths)
        return dataclasses.replace(self, frame=self.frame.commit(), lengths=self.lengths + new)

    def only(self, memory: Any) -> ContiguousContext:
        """See `AttentionContext.only`."""
        return self.frame.only(memory) if memory else self.frame

    def prefetch(self, layer: int) -> None:
        """See `Cache.prefetch`."""
        self.kv.prefetch(layer)

    def memory(self, layer: int) -> tuple[Array, Array]:
        """See `AttentionContext.memory`; what is taken must come back through `with_memory`."""
        return self.kv.take(layer)

    def with_memory(self, layer: int, memory: tuple[Array, Array]) -> Self:
        """See `AttentionContext.with_memory`; of the memory only the new tokens' places are looked at."""
        self.kv.give(layer, memory, self.lengths, np.asarray(self.frame.new_lengths), self.frame.new_tokens)
        return self

    def select(self, rows: Int[Array | np.ndarray, " N"]) -> Self:
        """See `Cache.select`."""
        chosen = np.asarray(rows)
        self.kv.select(chosen)
        return dataclasses.replace(self, frame=self.frame.select(jnp.asarray(chosen)), lengths=self.lengths[chosen])

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """See `Cache.join`."""
        lengths = np.concatenate([cache.lengths for cache in caches])
        kv = OffloadedKV.joined([cache.kv for cache in caches])
        return cls(ContiguousContext.join([cache.frame for cache in caches]), lengths, kv)

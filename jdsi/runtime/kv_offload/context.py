"""The context of a batch whose keys and values are elsewhere."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jdsi.kv_cache import ContiguousContext

from .memory import OffloadedKV


@dataclasses.dataclass(frozen=True)
class OffloadedContext:
    """What executors that run layer by layer do with a context; not a pytree, for no program takes it.

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
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths)

    def extend(self, new_lengths: Int[Array | np.ndarray, " B"], new_tokens: int) -> Self:
        """See `ContiguousContext.extend`."""
        return dataclasses.replace(self, frame=self.frame.extend(new_lengths, new_tokens))

    def commit(self) -> Self:
        """See `AttentionContext.commit`."""
        new = np.asarray(self.frame.new_lengths)
        return dataclasses.replace(self, frame=self.frame.commit(), lengths=self.lengths + new)

    def only(self, memory: Any) -> ContiguousContext:
        """See `AttentionContext.only`."""
        return self.frame.only(memory) if memory else self.frame

    def prefetch(self, layer: int) -> None:
        """Begins to bring the memory of a layer that is wanted soon."""
        self.kv.prefetch(layer)

    def memory(self, layer: int) -> tuple[Array, Array]:
        """See `AttentionContext.memory`; what is taken must come back through `with_memory`."""
        return self.kv.take(layer)

    def with_memory(self, layer: int, memory: tuple[Array, Array]) -> Self:
        """See `AttentionContext.with_memory`; of the memory only the new tokens' places are looked at."""
        self.kv.give(layer, memory, self.lengths, np.asarray(self.frame.new_lengths), self.frame.new_tokens)
        return self

    def select(self, rows: Int[Array | np.ndarray, " N"]) -> Self:
        """A context whose row i is a copy of row `rows[i]`; this one must not be used any more."""
        chosen = np.asarray(rows)
        self.kv.select(chosen)
        return dataclasses.replace(self, frame=self.frame.select(jnp.asarray(chosen)), lengths=self.lengths[chosen])

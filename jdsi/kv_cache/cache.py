"""KV memory between the calls of a model: what is asked for, and what loops and executors do with it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int
from numpy import ndarray


class KVShape(NamedTuple):
    """What a layer remembers of every token.

    Attributes:
        heads: key/value heads.
        key, value: dims of each.
    """

    heads: int
    key: int
    value: int


class Cache(Protocol):
    """Keys and values of the rows of a batch.

    It is the `AttentionContext` of the next call, once `begin` has said what that brings; a call gives it back with the
    new tokens in it. Every method returns the cache to go on with, and the one it was called on is used up.
    """

    @property
    def rows(self) -> int:
        """How many."""
        ...

    def begin(self, new_lengths: Int[Array | ndarray, " B"], new_tokens: int) -> Self:
        """The context of a call with `new_tokens` tokens for each row, of which the first `new_lengths` are real."""
        ...

    def rollback(self, tokens: Int[ndarray, " B"]) -> Self:
        """Without the last so many tokens of each row: what was read in vain, or not accepted."""
        ...

    def release(self, rows: Sequence[int]) -> Self:
        """With these rows empty, for others to come."""
        ...

    def select(self, rows: Int[Array | ndarray, " N"]) -> Self:
        """With copies of rows: row i is what row `rows[i]` was.

        On a mesh a row must lie in the same group of the axis "data" as the one it is copied from.
        """
        ...

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """The rows of several with as much room for each, one behind another."""
        ...

    def on_stages(self, count: int) -> Sequence[Any]:
        """The contexts of a pipeline's stages, each of its own layers; `None` where a stage is in other processes."""
        ...

    def from_stages(self, contexts: Sequence[Any]) -> Self:
        """This with what the stages gave back."""
        ...

    def prefetch(self, layer: int) -> None:
        """Begins to bring what is wanted soon of a layer, if it has to be brought."""
        ...


class CacheSpec(Protocol):
    """A kind of KV memory, as it is asked for; frozen, and compared by value."""

    def bytes(self, layers: Sequence[KVShape], rows: int, tokens: int, dtype: DTypeLike) -> int:
        """What so many rows take that have room for `tokens` tokens each, wherever it lies."""
        ...

    def create(
        self, layers: Sequence[KVShape], rows: int, tokens: int, dtype: DTypeLike, mesh: Mesh | None = None
    ) -> Cache:
        """Empty memory.

        Args:
            layers: in order; of all devices together.
            rows: of the batch.
            tokens: that each row has room for, at least.
            dtype: of keys and values.
            mesh: with our axes, over which the cache divides itself; by default JAX's default device has it.
        """
        ...

    def report(self) -> Any:
        """What moving caches of this kind has taken so far; `None` where nothing moves."""
        ...

    def close(self) -> None:
        """Gives back what all caches of this kind shared; none may be used afterwards."""
        ...


class OneForAll:
    """A base for contexts that are the same on all stages, and lie where they are used."""

    def on_stages(self, count: int) -> Sequence[Self]:
        """See `Cache.on_stages`."""
        return [self] * count

    def from_stages(self, contexts: Sequence[Self]) -> Self:
        """See `Cache.from_stages`."""
        return contexts[0]

    def prefetch(self, layer: int) -> None:
        """See `Cache.prefetch`."""


def token_bytes(layers: Sequence[KVShape], itemsize: int) -> int:
    """Bytes that the layers remember of one token."""
    return sum(shape.heads * (shape.key + shape.value) for shape in layers) * itemsize

"""Hidden states of batches that wait for their turn at a layer."""

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float


class Waiting:
    """Holds the hidden states of every batch between two layers, on the devices or in host memory.

    In host memory those of all batches but the one whose turn it is and its neighbours: the next one's come while this
    one computes, and the last one's go.

    Args:
        batches: how many.
        sharding: how hidden states lie on the devices.
        park: whether they go to host memory, pinned where the devices are GPUs.
    """

    def __init__(self, batches: int, sharding: NamedSharding, *, park: bool) -> None:
        self._held: list[Float[Array, "T E"] | None] = [None] * batches
        self._here, self._parked = sharding, sharding.with_memory_kind("pinned_host") if park else None
        self._coming: dict[int, Array] = {}

    def put(self, batch: int, hidden: Float[Array, "T E"]) -> None:
        """A batch's hidden states, until it is their turn again."""
        self._held[batch] = hidden if self._parked is None else jax.device_put(hidden, self._parked)

    def take(self, batch: int) -> Float[Array, "T E"]:
        """What was put in for a batch, on the devices; the caller may donate it."""
        hidden = self._coming.pop(batch) if batch in self._coming else self._on_devices(batch)
        after = (batch + 1) % len(self._held)
        if self._parked is not None and self._held[after] is not None and after not in self._coming:
            self._coming[after] = self._on_devices(after)
        return hidden

    def _on_devices(self, batch: int) -> Array:
        hidden, self._held[batch] = self._held[batch], None
        assert hidden is not None, f"batch {batch} has no hidden states here"
        return hidden if self._parked is None else jax.device_put(hidden, self._here)

"""The cache of a pipeline: one for each stage, on the stage's own mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class StagedCache:
    """See `Cache`; all is done to every stage's. Not a pytree, for no program takes it.

    Attributes:
        stages: per stage its cache; `None` for a stage with no device in this process.
    """

    stages: tuple[Any, ...]

    @property
    def rows(self) -> int:
        """See `Cache.rows`."""
        return next(stage.rows for stage in self.stages if stage is not None)

    def begin(self, new_lengths: Int[Array | np.ndarray, " B"], new_tokens: int) -> Self:
        """See `Cache.begin`."""
        return self._each(lambda stage: stage.begin(new_lengths, new_tokens))

    def rollback(self, tokens: Int[np.ndarray, " B"]) -> Self:
        """See `Cache.rollback`."""
        return self._each(lambda stage: stage.rollback(tokens))

    def release(self, rows: Sequence[int]) -> Self:
        """See `Cache.release`."""
        return self._each(lambda stage: stage.release(rows))

    def select(self, rows: Int[Array | np.ndarray, " N"]) -> Self:
        """See `Cache.select`."""
        on_host = np.asarray(rows)  # every stage has devices of its own, and the indices come from the last one's
        return self._each(lambda stage: stage.select(on_host))

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """See `Cache.join`."""
        stages = zip(*(cache.stages for cache in caches), strict=True)
        return cls(tuple(None if parts[0] is None else type(parts[0]).join(parts) for parts in stages))

    def on_stages(self, count: int) -> Sequence[Any]:
        """See `Cache.on_stages`."""
        return self.stages

    def from_stages(self, contexts: Sequence[Any]) -> Self:
        """See `Cache.from_stages`."""
        return dataclasses.replace(self, stages=tuple(contexts))

    def prefetch(self, layer: int) -> None:
        """See `Cache.prefetch`; what stages hold lies where it is used."""

    def _each(self, change: Callable[[Any], Any]) -> Self:
        return self.from_stages([None if stage is None else change(stage) for stage in self.stages])

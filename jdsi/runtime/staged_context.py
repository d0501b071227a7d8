"""The context of a pipeline: one context for each stage, on the stage's own mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class StagedContext:
    """What callers of an executor do with a context, done to every stage's; not a pytree, for no program takes it.

    Attributes:
        stages: per stage its context; `None` for a stage with no device in this process.
    """

    stages: tuple[Any, ...]

    @property
    def batch(self) -> int:
        """Rows."""
        return next(stage.batch for stage in self.stages if stage is not None)

    def extend(self, new_lengths: Int[Array | np.ndarray, " B"], new_tokens: int) -> Self:
        """Every stage's context for a call with `new_tokens` tokens per row."""
        return self.each(lambda stage: stage.extend(new_lengths, new_tokens))

    @classmethod
    def join(cls, contexts: Sequence[Self]) -> Self:
        """The rows of several contexts, one behind another."""
        stages = zip(*(context.stages for context in contexts), strict=True)
        return cls(tuple(None if parts[0] is None else type(parts[0]).join(parts) for parts in stages))

    def each(self, change: Callable[[Any], Any]) -> Self:
        """What `change` makes of every stage's context."""
        return dataclasses.replace(
            self, stages=tuple(None if stage is None else change(stage) for stage in self.stages)
        )

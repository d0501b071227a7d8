"""Which of a model's modules stand together: all of it, a stage of a pipeline, or a piece that is run by itself."""

import dataclasses

from .spec import TransformerSpec


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive modules of a model.

    Attributes:
        layers: indices in the model; they attend as layers 0, 1, ... of the context they are given.
        first: the embedding is among them, so that what comes in are token ids, else hidden states.
        last: the norm behind the layers, head and classifier are among them, and the table of a tied head.
    """

    layers: range
    first: bool
    last: bool

    @classmethod
    def whole(cls, spec: TransformerSpec) -> "Part":
        """All of a model."""
        return cls.stage(spec, range(len(spec.layers)))

    @classmethod
    def stage(cls, spec: TransformerSpec, layers: range) -> "Part":
        """Layers with the embedding in front of the model's first, and what comes behind its last."""
        return cls(layers, layers.start == 0, layers.stop == len(spec.layers))

    @classmethod
    def embedding(cls) -> "Part":
        """The embedding alone."""
        return cls(range(0), first=True, last=False)

    @classmethod
    def layer(cls, index: int) -> "Part":
        """A layer alone."""
        return cls(range(index, index + 1), first=False, last=False)

    @classmethod
    def top(cls) -> "Part":
        """What comes behind the layers, alone."""
        return cls(range(0), first=False, last=True)

"""A model in the pieces an executor can run one after another: embedding, layers, head."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .block import BLOCKS, make_norm
from .spec import LayerSpec, TransformerSpec
from .transformer import Classifier, Head, InputEmbedding


@dataclasses.dataclass(frozen=True)
class Part:
    """A module taken apart: its structure, and what its arrays are called.

    Attributes:
        names: of the arrays, inside the part, in the order in which `build` takes them.
        build: the module with the given arrays.
    """

    names: tuple[str, ...]
    build: Callable[[list[Array]], Any]

    @classmethod
    def of(cls, make: Callable[[], nnx.Module]) -> "Part":
        """The part that `make` describes; nothing is allocated."""
        graph, state = nnx.split(nnx.eval_shape(make))
        flat = dict(nnx.to_flat_state(state))

        def build(arrays: list[Array]) -> Any:
            filled = [(path, leaf.replace(array)) for (path, leaf), array in zip(flat.items(), arrays, strict=True)]
            return nnx.merge(graph, nnx.from_flat_state(filled))

        names = tuple(".".join(map(str, path)) for path in flat)
        return cls(names, build)

    def pick(self, arrays: Mapping[str, Array], prefix: str) -> list[Array]:
        """The part's arrays out of those of a model, where their names start with `prefix`."""
        return [arrays[f"{prefix}{name}"] for name in self.names]


def embedding_part(spec: TransformerSpec, dtype: DTypeLike) -> Part:
    """The part under "embedding."."""
    return Part.of(lambda: InputEmbedding(spec.embedding, spec.vocab_size, spec.width, dtype=dtype, rngs=nnx.Rngs(0)))


def layer_part(spec: TransformerSpec, layer: LayerSpec, dtype: DTypeLike) -> Part:
    """The part under "layers.N." of a layer like this one; it attends as layer 0 of the context it is given."""
    return Part.of(lambda: BLOCKS[type(layer.residual)](layer, spec.width, 0, dtype=dtype, rngs=nnx.Rngs(0)))


class Top(nnx.Module):
    """What comes behind the layers: the last norm, the head, which may share the embedding's table, the classifier."""

    def __init__(self, spec: TransformerSpec, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        table = spec.embedding.width or spec.width
        self.norm = make_norm(spec.norm, spec.width, dtype) if spec.norm else None
        self.head = Head(spec.head, spec.vocab_size, spec.width, table, dtype=dtype, rngs=rngs) if spec.head else None
        self.classifier = Classifier(spec.classifier, spec.width, dtype=dtype, rngs=rngs) if spec.classifier else None

    def __call__(
        self,
        hidden: Float[Array, "T E"],
        wanted: Int[Array, " B"] | None,
        table: Float[Array, "V W"] | None,
        *,
        classify: bool = False,
    ) -> Float[Array, "B outputs"]:
        """Logits of the tokens `wanted`, or of all; hidden states where there is no head.

        To `classify` is to apply the classifier to these tokens in place of the head.
        """
        if wanted is not None:
            hidden = hidden[wanted]
        if self.norm is not None:
            hidden = self.norm(hidden)
        if classify:
            assert self.classifier is not None
            return self.classifier(hidden)
        if self.head is None:
            return hidden
        return self.head(hidden, jnp.zeros((0, 0), hidden.dtype) if table is None else table)


def top_part(spec: TransformerSpec, dtype: DTypeLike) -> Part:
    """The part whose arrays have no prefix; `tied_table` names one that it needs besides."""
    return Part.of(lambda: Top(spec, dtype=dtype, rngs=nnx.Rngs(0)))


def tied_table(spec: TransformerSpec) -> str | None:
    """The embedding's array that the head multiplies with, if it has no matrix of its own."""
    return "embedding.tokens.weight" if spec.head is not None and spec.head.tied else None

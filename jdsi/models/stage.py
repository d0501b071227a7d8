"""Consecutive layers of a model as a module of their own: all of it, or what one stage of a pipeline holds."""

import dataclasses
import re

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.kv_cache import AttentionContext
from jdsi.layers import VocabularyEmbedding

from .block import BLOCKS
from .parts import Part, Top, tied_table
from .spec import TransformerSpec
from .transformer import InputEmbedding


class Stage(nnx.Module):
    """Layers `layers` of a model, the embedding in front of the first, norm and heads behind the last.

    They attend as layers 0, 1, ... of the context they are given.
    """

    def __init__(self, spec: TransformerSpec, layers: range, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, first, last = spec.width, layers.start == 0, layers.stop == len(spec.layers)
        shared = last and not first and tied_table(spec) is not None
        table = spec.embedding.width or width
        self.embedding = (
            InputEmbedding(spec.embedding, spec.vocab_size, width, dtype=dtype, rngs=rngs) if first else None
        )
        self.layers = nnx.List(
            [
                BLOCKS[type(spec.layers[i].residual)](spec.layers[i], width, i - layers.start, dtype=dtype, rngs=rngs)
                for i in layers
            ]
        )
        self.top = Top(spec, dtype=dtype, rngs=rngs) if last else None
        self.table = VocabularyEmbedding(spec.vocab_size, table, dtype=dtype, rngs=rngs) if shared else None

    def embed(
        self, tokens: Int[Array, " T"], context: AttentionContext, token_types: Int[Array, " T"] | None
    ) -> Float[Array, "T E"]:
        """What the first stage's layers start from."""
        assert self.embedding is not None
        return self.embedding(tokens, context.positions, token_types)

    def run(
        self, hidden: Float[Array, "T E"], context: AttentionContext
    ) -> tuple[Float[Array, "T E"], AttentionContext]:
        """The layers, and the context that has seen the tokens."""
        for layer in self.layers:
            hidden, context = layer(hidden, context)
        return hidden, context.commit()

    def finish(
        self, hidden: Float[Array, "T E"], wanted: Int[Array, " B"] | None, *, classify: bool = False
    ) -> Float[Array, "B outputs"]:
        """What the last stage gives of the tokens `wanted`, or of all, see `Top`."""
        assert self.top is not None
        table = self.table or (self.embedding.tokens if self.embedding is not None else None)
        return self.top(hidden, wanted, None if table is None else table.weight[...], classify=classify)


def stage_part(spec: TransformerSpec, layers: range, dtype: DTypeLike) -> Part:
    """The stage as a `Part` whose names are those of the whole model's parameters."""
    part = Part.of(lambda: Stage(spec, layers, dtype=dtype, rngs=nnx.Rngs(0)))
    return dataclasses.replace(part, names=tuple(_whole_name(name, layers.start) for name in part.names))


def _whole_name(name: str, first: int) -> str:
    if name == "table.weight":
        return "embedding.tokens.weight"
    name = name.removeprefix("top.")
    return re.sub(r"^layers\.(\d+)", lambda match: f"layers.{int(match[1]) + first}", name)

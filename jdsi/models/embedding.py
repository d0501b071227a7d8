"""The embedding of a model, whole or of a part that holds its table alone."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.layers import Embedding, Linear, VocabularyEmbedding

from .norms import make_norm
from .spec import EmbeddingSpec


class TokenTable(nnx.Module):
    """The table of token embeddings: all of the embedding that a tied head needs."""

    def __init__(self, spec: EmbeddingSpec, vocab_size: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.tokens = VocabularyEmbedding(vocab_size, spec.width or width, dtype=dtype, rngs=rngs)


class InputEmbedding(TokenTable):
    """Tokens, plus learned positions and token types where the family has them."""

    def __init__(self, spec: EmbeddingSpec, vocab_size: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(spec, vocab_size, width, dtype=dtype, rngs=rngs)
        self.spec = spec
        table = spec.width or width
        self.positions = Embedding(spec.positions.entries, width, dtype=dtype, rngs=rngs) if spec.positions else None
        self.token_types = Embedding(spec.token_types, table, dtype=dtype, rngs=rngs) if spec.token_types else None
        self.norm = make_norm(spec.norm, width, dtype) if spec.norm else None
        self.project = Linear(table, width, bias=False, dtype=dtype, rngs=rngs) if table != width else None

    def __call__(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"], token_types: Int[Array, " T"] | None
    ) -> Float[Array, "T E"]:
        x = self.tokens(tokens)
        if self.spec.scale != 1.0:
            x = x * jnp.asarray(self.spec.scale, x.dtype)
        if self.token_types is not None:
            x = x + self.token_types(jnp.zeros_like(tokens) if token_types is None else token_types)
        if self.project is not None:
            x = self.project(x)
        if self.positions is not None and self.spec.positions is not None:
            x = x + self.positions(positions + self.spec.positions.offset)
        return x if self.norm is None else self.norm(x)

"""The one Transformer: every family is a `TransformerSpec` run by this module."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.errors import CapacityError
from jdsi.kv_cache import AttentionContext, PackedContext
from jdsi.layers import rows_of
from jdsi.sharding import TENSOR, own_part

from .embedding import InputEmbedding, TokenTable
from .heads import Classifier, Head, classified_tokens
from .layer import Layer
from .norms import make_norm
from .parameters import Skeleton, layer_group
from .part import Part
from .spec import TransformerSpec

Output = Literal["hidden", "logits", "classes"]


class Transformer(nnx.Module):
    """A model of any family, or a part of one, built from its spec with random weights.

    Args:
        spec: what the model is.
        part: which of its modules there are; by default all.
        rngs: of the weights; see `from_parameters` for given ones.
        dtype: of the weights.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        *,
        part: Part | None = None,
        rngs: nnx.Rngs | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        part = Part.whole(spec) if part is None else part
        self.spec, self.part = spec, part
        width, table = spec.width, spec.embedding.width or spec.width
        kind = InputEmbedding if part.first else TokenTable
        there = part.first or (part.last and spec.head is not None and spec.head.tied)
        self.embedding = kind(spec.embedding, spec.vocab_size, width, dtype=dtype, rngs=rngs) if there else None
        self.layers = nnx.List(
            [Layer(spec.layers[i], width, i - part.layers.start, dtype=dtype, rngs=rngs) for i in part.layers]
        )
        norm, head, classifier = (spec.norm, spec.head, spec.classifier) if part.last else (None, None, None)
        self.norm = make_norm(norm, width, dtype) if norm else None
        self.head = Head(head, spec.vocab_size, width, table, dtype=dtype, rngs=rngs) if head else None
        self.classifier = Classifier(classifier, width, dtype=dtype, rngs=rngs) if classifier else None

    @classmethod
    def skeleton(
        cls, spec: TransformerSpec, part: Part | None = None, dtype: DTypeLike = jnp.float32
    ) -> "Skeleton[Transformer]":
        """The model, or a part of it, without arrays; nothing is allocated."""
        return Skeleton.around(nnx.eval_shape(lambda: cls(spec, part=part, dtype=dtype)))

    @classmethod
    def from_parameters(cls, spec: TransformerSpec, parameters: Mapping[str, jax.Array]) -> "Transformer":
        """The model with the given arrays, keyed as `abstract_parameters` keys them; no array is copied.

        Raises:
            ValueError: a parameter is missing, unknown, or of the wrong shape.
        """
        skeleton = cls.skeleton(spec)
        if missing := sorted(skeleton.abstract.keys() ^ parameters.keys()):
            raise ValueError(f"parameters missing or unknown for {spec.family}: {', '.join(missing)}")
        for name, leaf in skeleton.abstract.items():
            if leaf.shape != parameters[name].shape:
                raise ValueError(f"{name}: shape {parameters[name].shape}, the spec says {leaf.shape}")
        return skeleton.build([parameters[name] for name in skeleton.abstract])

    def run(
        self,
        x: Int[Array, " T"] | Float[Array, "rows E"],
        context: AttentionContext,
        token_types: Int[Array, " T"] | None = None,
        *,
        wanted: Int[Array, " N"] | None = None,
        output: Output = "logits",
        divide: bool = False,
    ) -> tuple[Array, AttentionContext]:
        """The forward pass: every executor runs this, of the whole model or of its parts one after another.

        Args:
            x: ids of all sequences on one axis, or the hidden states that the part before this one gave.
            context: which token belongs where, and the KV memory of the part's layers.
            token_types: segment ids of families that have them (default 0), for the embedding.
            wanted: index in `x` of the tokens of which something is wanted of the last part; by default all.
            output: what that is: hidden states behind the last norm, logits over the vocabulary (hidden states where
                there is no head) or what the classifier makes of each; float32 but for the first.
            divide: inside `jax.shard_map`, each rank of "tensor" holds its own part of the tokens between products
                (Korthikanti et al. 2022).

        Returns:
            What is wanted, `[N, width, vocabulary or labels]`, or of a part that is not the last the hidden states
            `[T, E]`, of divided tokens each rank's own; the context that has seen the tokens.
        """
        hidden = x
        if self.part.first:
            assert isinstance(self.embedding, InputEmbedding)
            with jax.named_scope("embedding"):
                hidden = self.embedding(x, context.positions, token_types)
            hidden = own_part(hidden, TENSOR) if divide else hidden
        for index, layer in zip(self.part.layers, self.layers, strict=True):
            with jax.named_scope(layer_group(index)):
                hidden, context = layer(hidden, context)
        context = context.commit()
        if not self.part.last:
            return hidden, context
        hidden = rows_of(hidden, wanted, context.positions.shape[0])
        if self.norm is not None:
            with jax.named_scope("norm"):
                hidden = self.norm(hidden)
        if output == "classes":
            assert self.classifier is not None
            with jax.named_scope("classifier"):
                return self.classifier(hidden), context
        if output == "hidden" or self.head is None:
            return hidden, context
        with jax.named_scope("head"):
            return self.logits(hidden), context

    def forward(
        self, tokens: Int[Array, " T"], context: AttentionContext, token_types: Int[Array, " T"] | None = None
    ) -> tuple[Float[Array, "T E"], AttentionContext]:
        """`run` of the whole model, for hidden states after the final norm, of all tokens."""
        return self.run(tokens, context, token_types, output="hidden")

    def logits(self, hidden: Float[Array, "T E"]) -> Float[Array, "T V"]:
        """Vocabulary logits, float32, of hidden states returned by `forward`."""
        if self.head is None:
            raise ValueError(f"this {self.spec.family} checkpoint has no language-model head; use forward()")
        return self.head(hidden, None if self.embedding is None else self.embedding.tokens.weight)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits of a dense batch, without a cache; differentiable, for `jax.jit` and `jax.grad`.

        Args:
            tokens: ids, right-padded where `lengths` is given; ids outside the vocabulary read its nearest entry.
            lengths: real tokens of each row; what comes after them influences nothing.
            token_types: segment ids (BERT).

        Returns:
            Float32 logits, or hidden states `[B, S, E]` for a model without a head.
        """
        return self._dense(tokens, lengths, token_types).reshape(*tokens.shape, -1)

    def classify(
        self,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B labels"]:
        """Scores of each sequence of a dense batch by a sequence classifier, float32, before any softmax or sigmoid.

        For packed sequences call `classifier` with the hidden states that `forward` returns for one token of each.

        Args:
            tokens, lengths, token_types: as in a call of the model.

        Raises:
            ValueError: the model is no sequence classifier.
        """
        if self.spec.classifier is None or self.spec.classifier.labels is None:
            raise ValueError(f"this {self.spec.family} checkpoint is not a sequence classifier; {_instead(self.spec)}")
        return self._classified(tokens, lengths, token_types)

    def pool(
        self,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B E"]:
        """The vector that a bare encoder's pooler makes of each sequence of a dense batch, float32 (`pooler_output`).

        Args:
            tokens, lengths, token_types: as in a call of the model.

        Raises:
            ValueError: the model has no pooler, or one in front of labels.
        """
        if self.spec.classifier is None or self.spec.classifier.labels is not None:
            raise ValueError(f"this {self.spec.family} checkpoint is no encoder with a pooler; {_instead(self.spec)}")
        return self._classified(tokens, lengths, token_types)

    def _classified(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"] | None, token_types: Int[Array, "B S"] | None
    ) -> Float[Array, "B outputs"]:
        assert self.classifier is not None
        rows, length = tokens.shape
        real = jnp.full(rows, length) if lengths is None else lengths
        places = jnp.arange(rows) * length + classified_tokens(self.classifier.spec, tokens, real)
        return self._dense(tokens, lengths, token_types, places, "classes")

    def _dense(
        self,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, " B"] | None,
        token_types: Int[Array, "B S"] | None,
        wanted: Int[Array, " N"] | None = None,
        output: Output = "logits",
    ) -> Float[Array, "N outputs"]:
        if len(jnp.shape(tokens)) != 2:
            raise ValueError(f"tokens must be an array [B, S] of token ids, not one of shape {jnp.shape(tokens)}")
        batch, length = tokens.shape
        if self.spec.position_table is not None and length > self.spec.position_table:
            raise CapacityError(f"{length} tokens exceed the {self.spec.position_table} positions of the learned table")
        context = PackedContext.from_dense(batch, length, lengths)
        flat_types = None if token_types is None else token_types.reshape(-1)
        return self.run(tokens.reshape(-1), context, flat_types, wanted=wanted, output=output)[0]


def _instead(spec: TransformerSpec) -> str:
    """What to do with a model that has not the head which was asked for."""
    call = spec.main_call
    return f"use {call}" if call in ("classify()", "pool()") else "call it for logits or hidden states"

"""The one Transformer: every family is a `TransformerSpec` run by this module."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.errors import CapacityError
from jdsi.kv_cache import AttentionContext, PackedContext
from jdsi.layers import Embedding, Linear, VocabularyEmbedding
from jdsi.pallas_kernels import ACTIVATIONS, linear

from .block import BLOCKS, make_norm
from .spec import ClassifierSpec, EmbeddingSpec, HeadSpec, HeadTransform, TransformerSpec


class InputEmbedding(nnx.Module):
    """Tokens, plus learned positions and token types where the family has them."""

    def __init__(self, spec: EmbeddingSpec, vocab_size: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.spec = spec
        table = spec.width or width
        self.tokens = VocabularyEmbedding(vocab_size, table, dtype=dtype, rngs=rngs)
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


class TransformedHidden(nnx.Module):
    """`norm(act(dense(hidden)))`, see `HeadTransform`."""

    def __init__(self, spec: HeadTransform, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = spec.activation
        self.dense = Linear(width, width, bias=True, dtype=dtype, rngs=rngs)
        self.norm = make_norm(spec.norm, width, dtype)

    def __call__(self, hidden: Float[Array, "T E"]) -> Float[Array, "T E"]:
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))


class Head(nnx.Module):
    """From hidden states to logits over the vocabulary."""

    def __init__(
        self, spec: HeadSpec, vocab_size: int, width: int, table: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.spec = spec
        self.transform = TransformedHidden(spec.transform, width, dtype=dtype, rngs=rngs) if spec.transform else None
        self.project = Linear(width, table, bias=False, dtype=dtype, rngs=rngs) if table != width else None
        weight = jax.random.normal(rngs.params(), (vocab_size, table), dtype) * 0.02
        self.weight = None if spec.tied else nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros(vocab_size, dtype)) if spec.bias else None

    def __call__(self, hidden: Float[Array, "T E"], table: Float[Array, "V W"]) -> Float[Array, "T V"]:
        """Logits in float32; `table` is the token embedding, the projection of tied heads."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        weight = table if self.weight is None else self.weight[...]
        bias = None if self.bias is None else self.bias[...]
        logits = linear(hidden, weight, bias, out_dtype=jnp.float32)
        cap = self.spec.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class Classifier(nnx.Module):
    """Scores, or vectors, of sequences from the hidden states of one token of each, see `ClassifierSpec`."""

    def __init__(self, spec: ClassifierSpec, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.dense = Linear(width, width, bias=True, dtype=dtype, rngs=rngs) if spec.activation else None
        labels = 0 if spec.labels is None else len(spec.labels)
        self.out = Linear(width, labels, bias=spec.bias, dtype=dtype, rngs=rngs) if labels else None

    def __call__(self, hidden: Float[Array, "B E"]) -> Float[Array, "B outputs"]:
        """Scores before any softmax or sigmoid, or where there are no labels the dense layer's outputs; float32."""
        if self.dense is not None and self.spec.activation is not None:
            hidden = ACTIVATIONS[self.spec.activation](self.dense(hidden))
        return hidden.astype(jnp.float32) if self.out is None else self.out(hidden, out_dtype=jnp.float32)


def classified_tokens(
    spec: ClassifierSpec, tokens: Int[Array | np.ndarray, "B S"], lengths: Int[Array | np.ndarray, " B"]
) -> Int[Array, " B"]:
    """Index in its row of the token whose hidden state a classifier reads, for right-padded rows.

    A last token is the last one that is not padding by its id either, as in `transformers`; where all are, the first.
    """
    if spec.token == "first":
        return jnp.zeros(len(tokens), jnp.int32)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    counts = index < jnp.asarray(lengths)[:, None]
    if spec.padding_id is not None:
        counts &= jnp.asarray(tokens) != spec.padding_id
    return jnp.where(counts, index, 0).max(axis=1)


class Transformer(nnx.Module):
    """A model of any family, built from its spec with random weights; see `from_parameters` for given ones."""

    def __init__(self, spec: TransformerSpec, *, rngs: nnx.Rngs | None = None, dtype: DTypeLike = jnp.float32) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.spec = spec
        width, table = spec.width, spec.embedding.width or spec.width
        self.embedding = InputEmbedding(spec.embedding, spec.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                BLOCKS[type(layer.residual)](layer, width, i, dtype=dtype, rngs=rngs)
                for i, layer in enumerate(spec.layers)
            ]
        )
        self.norm = make_norm(spec.norm, width, dtype) if spec.norm else None
        self.head = Head(spec.head, spec.vocab_size, width, table, dtype=dtype, rngs=rngs) if spec.head else None
        self.classifier = Classifier(spec.classifier, width, dtype=dtype, rngs=rngs) if spec.classifier else None

    @classmethod
    def from_parameters(cls, spec: TransformerSpec, parameters: Mapping[str, jax.Array]) -> "Transformer":
        """The model with the given arrays, keyed as `abstract_parameters` keys them; no array is copied.

        Raises:
            ValueError: a parameter is missing, unknown, or of the wrong shape.
        """
        model = nnx.eval_shape(lambda: cls(spec))
        graph, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        names = {".".join(map(str, path)): path for path in flat}
        if missing := sorted(names.keys() ^ parameters.keys()):
            raise ValueError(f"parameters missing or unknown for {spec.family}: {', '.join(missing)}")
        for name, path in names.items():
            if flat[path].shape != parameters[name].shape:
                raise ValueError(f"{name}: shape {parameters[name].shape}, the spec says {flat[path].shape}")
            flat[path] = flat[path].replace(parameters[name])
        return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))

    def forward(
        self, tokens: Int[Array, " T"], context: AttentionContext, token_types: Int[Array, " T"] | None = None
    ) -> tuple[Float[Array, "T E"], AttentionContext]:
        """The packed forward pass: hidden states after the final norm, and the context that has seen the tokens.

        Args:
            tokens: ids of all sequences on one axis.
            context: which token belongs where, and the KV memory.
            token_types: segment ids of families that have them (default 0).
        """
        hidden = self.embedding(tokens, context.positions, token_types)
        for layer in self.layers:
            hidden, context = layer(hidden, context)
        return (hidden if self.norm is None else self.norm(hidden)), context.commit()

    def logits(self, hidden: Float[Array, "T E"]) -> Float[Array, "T V"]:
        """Vocabulary logits, float32, of hidden states returned by `forward`."""
        if self.head is None:
            raise ValueError(f"this {self.spec.family} checkpoint has no language-model head; use forward()")
        return self.head(hidden, self.embedding.tokens.weight[...])

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
        hidden = self._dense(tokens, lengths, token_types)
        out = hidden if self.head is None else self.logits(hidden)
        return out.reshape(*tokens.shape, -1)

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
        hidden = self._dense(tokens, lengths, token_types)
        rows, length = tokens.shape
        real = jnp.full(rows, length) if lengths is None else lengths
        places = classified_tokens(self.classifier.spec, tokens, real)
        return self.classifier(hidden[jnp.arange(rows) * length + places])

    def _dense(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"] | None, token_types: Int[Array, "B S"] | None
    ) -> Float[Array, "T E"]:
        if len(jnp.shape(tokens)) != 2:
            raise ValueError(f"tokens must be an array [B, S] of token ids, not one of shape {jnp.shape(tokens)}")
        batch, length = tokens.shape
        if self.spec.position_table is not None and length > self.spec.position_table:
            raise CapacityError(f"{length} tokens exceed the {self.spec.position_table} positions of the learned table")
        context = PackedContext.from_dense(batch, length, lengths)
        flat_types = None if token_types is None else token_types.reshape(-1)
        return self.forward(tokens.reshape(-1), context, flat_types)[0]


def _instead(spec: TransformerSpec) -> str:
    """What to do with a model that has not the head which was asked for."""
    call = spec.main_call
    return f"use {call}" if call in ("classify()", "pool()") else "call it for logits or hidden states"


def parameters(model: Transformer) -> dict[str, jax.Array]:
    """The model's arrays keyed by dotted path, in a fixed order."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def abstract_parameters(spec: TransformerSpec, dtype: DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter of `spec`, without allocating any."""
    state = nnx.state(nnx.eval_shape(lambda: Transformer(spec, dtype=dtype)), nnx.Param)
    return {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(state)
    }

"""What a model makes of its last hidden states: logits over the vocabulary, or scores of whole sequences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.layers import WIDTH, Linear, Weight, array_weight, parameter, vocabulary_axis
from jdsi.pallas_kernels import ACTIVATIONS

from .norms import make_norm
from .spec import ClassifierSpec, HeadSpec, HeadTransform


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
        matrix = jax.random.normal(rngs.params(), (vocab_size, table), dtype) * 0.02
        axes = vocabulary_axis(vocab_size), WIDTH
        plain = array_weight(matrix, axes, quantizable=True)
        own: Any = plain if spec.form is None else spec.form.of(plain)
        self.weight: Weight | None = None if spec.tied else own
        self.bias = parameter(jnp.zeros(vocab_size, dtype), axes[:1]) if spec.bias else None

    def __call__(self, hidden: Float[Array, "T E"], table: Weight | None) -> Float[Array, "T V"]:
        """Logits in float32; `table` is the token embedding, the projection of tied heads."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        matrix = table if self.weight is None else self.weight
        assert matrix is not None
        bias = None if self.bias is None else self.bias[...]
        logits = matrix.product(hidden, bias, out_dtype=jnp.float32)
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

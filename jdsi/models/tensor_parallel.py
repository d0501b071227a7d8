"""A model's share of one rank of the tensor axis, as a spec of its own."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdsi.kv_cache import KVShape
from jdsi.sharding import TENSOR, Evenly, axis_index, axis_size

from .spec import TransformerSpec

SEQUENCE_PARALLEL_TOKENS = 1024
"""Tokens of a data-parallel group from which on the residual stream is divided over "tensor", unless one is told."""


def local_spec(spec: TransformerSpec, ranks: int) -> TransformerSpec:
    """The spec of one rank's share; the same for every rank, for smaller shares are padded.

    Layers built from it reduce over the axis "tensor" where that is bound; its vocabulary is one rank's.
    """
    if ranks == 1:
        return spec
    return dataclasses.replace(
        spec,
        vocab_size=Evenly(spec.vocab_size).among(ranks, 0).size,
        layers=tuple(layer.share(ranks) for layer in spec.layers),
    )


def kv_shapes(spec: TransformerSpec, ranks: int) -> list[KVShape]:
    """What each layer remembers of a token on all ranks together; heads may be padded, or held by several ranks."""
    return [shape._replace(heads=shape.heads * ranks) for shape in local_spec(spec, ranks).kv_shapes]


def without_padding(logits: Float[Array, "B V"], vocabulary: int) -> Float[Array, "B V"]:
    """One rank's share of the logits with minus infinity past the end of the vocabulary; inside `jax.shard_map`."""
    if logits.shape[1] * axis_size(TENSOR) == vocabulary:
        return logits
    ids = axis_index(TENSOR) * logits.shape[1] + jnp.arange(logits.shape[1])
    return jnp.where(ids < vocabulary, logits, -jnp.inf)

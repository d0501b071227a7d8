"""A model's share of one rank of the tensor axis: its spec, and where its parameters come from."""

import dataclasses
import re

import jax.numpy as jnp
from jaxtyping import Array, Float

from jdsi.kv_cache import KVShape
from jdsi.sharding import TENSOR, HeadSplit, Split, axis_index, axis_size, joined, split_evenly, split_heads

from .spec import AttentionSpec, LayerSpec, MlpSpec, TransformerSpec

SEQUENCE_PARALLEL_TOKENS = 1024
"""Tokens of a data-parallel group from which on the residual stream is divided over "tensor", unless one is told."""

_MULTIPLE = 16  # what uneven widths are rounded up to: kernels load 16 values at a time


def local_spec(spec: TransformerSpec, ranks: int) -> TransformerSpec:
    """The spec of one rank's share; the same for every rank, for smaller shares are padded.

    Layers built from it reduce over the axis "tensor" where that is bound; its vocabulary is one rank's.
    """
    if ranks == 1:
        return spec
    return dataclasses.replace(
        spec,
        vocab_size=split_vocabulary(spec, ranks).size,
        layers=tuple(_local_layer(layer, ranks) for layer in spec.layers),
    )


def kv_shapes(spec: TransformerSpec, ranks: int) -> list[KVShape]:
    """What each layer remembers of a token on all ranks together; heads may be padded, or held by several ranks."""
    return [shape._replace(heads=shape.heads * ranks) for shape in local_spec(spec, ranks).kv_shapes]


def split_vocabulary(spec: TransformerSpec, ranks: int) -> Split:
    """The vocabulary divided among ranks."""
    return split_evenly(spec.vocab_size, ranks, multiple=_MULTIPLE)


def without_padding(logits: Float[Array, "B V"], vocabulary: int) -> Float[Array, "B V"]:
    """One rank's share of the logits with minus infinity past the end of the vocabulary; inside `jax.shard_map`."""
    if logits.shape[1] * axis_size(TENSOR) == vocabulary:
        return logits
    ids = axis_index(TENSOR) * logits.shape[1] + jnp.arange(logits.shape[1])
    return jnp.where(ids < vocabulary, logits, -jnp.inf)


def _local_layer(layer: LayerSpec, ranks: int) -> LayerSpec:
    heads = _heads(layer.attention, ranks)
    alibi = layer.attention.alibi
    if alibi is not None:
        shares = [alibi.slopes[start:stop] for start, stop in heads.heads]
        padded = tuple(slope for share in shares for slope in (*share, *(0.0,) * (heads.num_heads - len(share))))
        alibi = dataclasses.replace(alibi, slopes=padded, split=(TENSOR, ranks))
    return dataclasses.replace(
        layer,
        attention=dataclasses.replace(
            layer.attention, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, alibi=alibi
        ),
        feed_forward=dataclasses.replace(layer.feed_forward, width=_width(layer.feed_forward, ranks).size),
    )


def _heads(attention: AttentionSpec, ranks: int) -> HeadSplit:
    return split_heads(attention.num_heads, attention.num_kv_heads, ranks)


def _width(mlp: MlpSpec, ranks: int, dim: int = 0) -> Split:
    return split_evenly(mlp.width, ranks, dim=dim, multiple=_MULTIPLE)


def split_of(spec: TransformerSpec, name: str, ranks: int) -> Split | None:
    """How parameter `name` of `spec` is divided among the ranks of the tensor axis; `None` where each holds all of it.

    Projections to heads, hidden units and the vocabulary are divided by rows, those back by columns (Megatron,
    arXiv:1909.08053). The rows of q, k and v, and of gate and up, are divided each for themselves.
    """
    if ranks == 1:
        return None
    if name in ("embedding.tokens.weight", "head.weight", "head.bias"):
        return split_vocabulary(spec, ranks)
    match = re.fullmatch(r"layers\.(\d+)\.(attention|feed_forward)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, (part, kind) = spec.layers[int(match[1])], match.group(3, 4)
    if part == "qkv":
        return _split_qkv(layer.attention, ranks)
    if part == "up":
        return _split_up(layer.feed_forward, ranks)
    if kind == "weight" and part == "out":
        heads, dim = _heads(layer.attention, ranks), layer.attention.head_dim
        return joined(1, [(0, heads.num_heads * dim, _entries(heads.heads, dim))])
    if kind == "weight" and part == "down":
        return _width(layer.feed_forward, ranks, dim=1)
    return None


def _entries(heads: tuple[tuple[int, int], ...], dim: int) -> list[tuple[int, int]]:
    return [(start * dim, stop * dim) for start, stop in heads]


def _split_qkv(attention: AttentionSpec, ranks: int) -> Split:
    heads, dim = _heads(attention, ranks), attention.head_dim
    q, k, _ = attention.qkv_rows
    queries, keys = _entries(heads.heads, dim), _entries(heads.kv_heads, dim)
    pieces = [(0, heads.num_heads, queries), (q, heads.num_kv_heads, keys), (q + k, heads.num_kv_heads, keys)]
    return joined(0, [(first, count * dim, bounds) for first, count, bounds in pieces])


def _split_up(mlp: MlpSpec, ranks: int) -> Split:
    width = _width(mlp, ranks)
    if not mlp.gated:
        return width
    bounds = [(runs[0].start, runs[0].stop) if runs else (0, 0) for runs in width.runs]
    return joined(0, [(0, width.size, bounds), (mlp.width, width.size, bounds)])

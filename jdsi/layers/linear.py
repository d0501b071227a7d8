"""Linear layer and embedding tables, and what they exchange where the axis "tensor" is bound.

A projection whose rows are divided over that axis needs nothing: each rank computes its own outputs. One whose columns
are divided gives every rank a share of a sum, which `row_parallel` adds up.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.pallas_kernels import gated_linear, linear
from jdsi.sharding import TENSOR, all_gather, all_reduce, axis_index, is_split, reduce_scatter

from .norm import Norm
from .parameter import WIDTH, Axis, parameter, vocabulary_axis

UNDIVIDED = (None, None)


class Linear(nnx.Module):
    """`y = x W^T + b` with `W` laid out `[out, in]`, as checkpoints store it, and what can be fused with it.

    Args:
        in_features, out_features: of the matrix.
        axes, quantizable: of the matrix, see `Declaration`; the bias is divided as its rows are.
        bias: whether there is one.
        dtype, rngs, scale: of random values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[Axis | None, Axis | None] = UNDIVIDED,
        quantizable: bool = False,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        scale: float = 0.02,
    ) -> None:
        matrix = jax.random.normal(rngs.params(), (out_features, in_features), dtype) * scale
        self.weight = parameter(matrix, axes, quantizable=quantizable)
        self.bias = parameter(jnp.zeros(out_features, dtype), axes[:1]) if bias else None

    def __call__(
        self,
        x: Float[Array, "T in"],
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        residual: Float[Array, "T out"] | None = None,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "T out"]:
        """`residual + activation(norm(x) W^T + b)`."""
        bias = None if self.bias is None else self.bias[...]
        return linear(
            x,
            self.weight[...],
            bias,
            activation=activation,
            residual=residual,
            out_dtype=out_dtype,
            **_norm_arguments(norm),
        )

    def gated(self, x: Float[Array, "T in"], *, activation: str, norm: Norm | None = None) -> Float[Array, "T half"]:
        """`activation(gate) * up` where the rows of the weight are those of gate, then those of up."""
        bias = None if self.bias is None else self.bias[...]
        return gated_linear(x, self.weight[...], bias, activation=activation, **_norm_arguments(norm))


def _norm_arguments(norm: Norm | None) -> dict:
    if norm is None:
        return {}
    weight, bias = norm.arrays
    return {"norm": norm.form, "norm_weight": weight, "norm_bias": bias}


class Embedding(nnx.Module):
    """A table `[entries, E]` looked up by integer."""

    def __init__(
        self,
        entries: int,
        width: int,
        *,
        axes: tuple[Axis | None, Axis | None] = UNDIVIDED,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        scale: float = 0.02,
    ) -> None:
        self.weight = parameter(jax.random.normal(rngs.params(), (entries, width), dtype) * scale, axes)

    def __call__(self, ids: Int[Array, " T"]) -> Float[Array, "T E"]:
        return jnp.take(self.weight[...], ids, axis=0, mode="clip")


class VocabularyEmbedding(Embedding):
    """A table of token embeddings; inside `jax.shard_map`, of one rank's share of the vocabulary."""

    def __init__(self, entries: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(entries, width, axes=(vocabulary_axis(entries), WIDTH), dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, " T"]) -> Float[Array, "T E"]:
        """Rows of the table, on every rank; an id outside the vocabulary reads its nearest entry, on a mesh zeros."""
        if not is_split(TENSOR):
            return super().__call__(ids)
        table = self.weight[...]
        return _rows_of_parts(table, ids)


def _rows_of_parts(part: Float[Array, "own E"], rows: Int[Array, " N"]) -> Float[Array, "N E"]:
    """Rows of a matrix of which each rank of the axis "tensor" holds an equal part; zeros past its end."""
    rows = rows - axis_index(TENSOR) * part.shape[0]
    own = (rows >= 0) & (rows < part.shape[0])
    found = jnp.take(part, rows, axis=0, mode="clip")
    # One rank has the row and the others add zeros, so the sum is exact in any dtype.
    return all_reduce(jnp.where(own[:, None], found, jnp.zeros((), found.dtype)), TENSOR)


def rows_of(hidden: Float[Array, "rows E"], wanted: Int[Array, " N"] | None, tokens: int) -> Float[Array, "N E"]:
    """The `wanted` of so many tokens, by default all, of the residual stream; a rank may hold its own part of it."""
    if hidden.shape[0] == tokens:
        return hidden if wanted is None else hidden[wanted]
    return all_gather(hidden, TENSOR) if wanted is None else _rows_of_parts(hidden, wanted)


def row_parallel(
    pairs: Sequence[tuple[Linear, Float[Array, "T in"]]],
    rows: int,
    residual: Float[Array, "rows out"] | None = None,
) -> Float[Array, "rows out"]:
    """`residual + sum of (x W^T + b)` over pairs of a layer and its input, whose features lie divided over "tensor".

    One all-reduce for all pairs, or one reduce-scatter where `rows`, those of the residual stream, are a rank's own
    part of the tokens. Where the axis is not bound, residual and biases are added inside the products.
    """
    if not is_split(TENSOR):
        total = residual
        for layer, x in pairs:
            total = layer(x, residual=total)
        assert total is not None
        return total
    share = None
    for layer, x in pairs:
        share = linear(x, layer.weight[...], residual=share)
    assert share is not None
    out = all_reduce(share, TENSOR) if share.shape[0] == rows else reduce_scatter(share, TENSOR)
    for layer, _ in pairs:
        if layer.bias is not None:
            out = out + layer.bias[...]
    return out if residual is None else residual + out


def whole(x: Float[Array, "rows E"], norm: Norm | None, tokens: int) -> tuple[Float[Array, "T E"], Norm | None]:
    """All tokens of the residual stream, and the norm that is still to be applied to them.

    Where each rank holds its own part of the tokens, the norm is applied to that part and the parts are gathered.
    """
    if x.shape[0] == tokens:
        return x, norm
    return all_gather(x if norm is None else norm(x), TENSOR), None

"""Linear layer and embedding tables, and what they exchange where the axis "tensor" is bound.

A projection whose rows are divided over that axis needs nothing: each rank computes its own outputs. One whose columns
are divided gives every rank a share of a sum, see `jdsi.layers.sums`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.sharding import TENSOR, all_gather, all_reduce, axis_index, is_split

from .norm import Norm
from .parameter import WIDTH, Axis, parameter, vocabulary_axis
from .weight import ArrayWeight, Weight

UNDIVIDED = (None, None)


def array_weight(
    matrix: Float[Array, "out in"], axes: Sequence[Axis | None], *, quantizable: bool = False
) -> ArrayWeight:
    """A declared matrix in the form of an array, see `parameter`."""
    return parameter(matrix, axes, quantizable=quantizable, kind=ArrayWeight)


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
        self.weight: Weight = array_weight(matrix, axes, quantizable=quantizable)
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
        return self.weight.product(x, bias, norm=norm, activation=activation, residual=residual, out_dtype=out_dtype)

    def gated(self, x: Float[Array, "T in"], *, activation: str, norm: Norm | None = None) -> Float[Array, "T half"]:
        """`activation(gate) * up` where the rows of the weight are those of gate, then those of up."""
        bias = None if self.bias is None else self.bias[...]
        return self.weight.product(x, bias, norm=norm, activation=activation, gated=True)


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
        self.weight = array_weight(jax.random.normal(rngs.params(), (entries, width), dtype) * scale, axes)

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

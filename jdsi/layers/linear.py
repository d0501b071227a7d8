"""Linear layer and embedding table."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jdsi.pallas_kernels import gated_linear, linear

from .norm import Norm


class Linear(nnx.Module):
    """`y = x W^T + b` with `W` laid out `[out, in]`, as checkpoints store it, and what can be fused with it."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs, scale: float = 0.02
    ) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (out_features, in_features), dtype) * scale)
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

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

    def __init__(self, entries: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs, scale: float = 0.02) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (entries, width), dtype) * scale)

    def __call__(self, ids: Int[Array, " T"]) -> Float[Array, "T E"]:
        return jnp.take(self.weight[...], ids, axis=0, mode="clip")

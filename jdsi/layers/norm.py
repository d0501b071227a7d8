"""Normalisation layers."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdsi.pallas_kernels import layer_norm, rms_norm


class RMSNorm(nnx.Module):
    """Root-mean-square norm; the weight used is `weight + weight_offset` (Gemma stores it minus 1)."""

    def __init__(self, width: int, *, eps: float, weight_offset: float = 0.0, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.full(width, 1.0 - weight_offset, dtype))
        self.eps = eps
        self.weight_offset = weight_offset

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        return rms_norm(x, self.weight[...], self.eps, weight_offset=self.weight_offset)


class LayerNorm(nnx.Module):
    """Layer norm with or without weight and bias."""

    def __init__(self, width: int, *, eps: float, weight: bool = True, bias: bool = True, dtype: DTypeLike) -> None:
        self.weight = nnx.Param(jnp.ones(width, dtype)) if weight else None
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        weight = None if self.weight is None else self.weight[...]
        return layer_norm(x, weight, None if self.bias is None else self.bias[...], self.eps)

"""RMSNorm and LayerNorm, reference forms. Statistics in float32, result in the dtype of the input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "... E"], weight: Float[Array, " E"], eps: float, *, weight_offset: float = 0.0
) -> Float[Array, "... E"]:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` (Zhang and Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scaled * (weight.astype(jnp.float32) + weight_offset)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... E"], weight: Float[Array, " E"] | None, bias: Float[Array, " E"] | None, eps: float
) -> Float[Array, "... E"]:
    """`(x - mean) / sqrt(var + eps) * weight + bias` (Ba et al. 2016); `None` leaves that term out."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y *= weight.astype(jnp.float32)
    if bias is not None:
        y += bias.astype(jnp.float32)
    return y.astype(x.dtype)

"""Matrix product with weights laid out `[out, in]`, reference form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "T in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None = None,
    *,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "T out"]:
    """`x weight^T + bias`, accumulated in float32 (full float32 products, never TF32).

    Returns:
        The product in `out_dtype`, by default the dtype of `x`.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    if bias is not None:
        y += bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)

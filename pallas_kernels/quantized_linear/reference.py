"""Product with a quantised weight, reference form."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..activations import ACTIVATIONS
from ..linear.epilogue import combine
from ..linear.form import LinearForm
from ..linear.reference import linear
from .weight import QuantizedWeight, dequantize


def quantized_linear(
    x: Float[Array, "T in"],
    weight: QuantizedWeight,
    bias: Float[Array, " rows"] | None,
    residual: Float[Array, "T out"] | None,
    *,
    form: LinearForm,
) -> Float[Array, "T out"]:
    """The weight turned back into a float32 matrix, the product with it in float32, and what follows it."""
    products = jnp.split(linear(x.astype(jnp.float32), dequantize(weight)), form.operands, axis=1)
    biases = [None] * form.operands if bias is None else jnp.split(bias, form.operands)
    act = (lambda y: y) if form.activation is None else ACTIVATIONS[form.activation]
    y = combine(products, biases, form, act).astype(form.result_dtype(x.dtype))
    return y if residual is None else residual + y

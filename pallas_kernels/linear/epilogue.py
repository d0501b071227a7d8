"""What follows the products: bias, activation, gate, cast, residual. The same code in a kernel and after it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..activations import ACTIVATIONS
from .form import LinearForm

# P in erfc(z) = t exp(P(t) - z^2) with t = 1 / (1 + z / 2), z >= 0: relative error below 1.2e-7 everywhere
# (Press et al., Numerical Recipes, section 6.2).
_ERFC = (
    -1.26551223,
    1.00002368,
    0.37409196,
    0.09678418,
    -0.18628806,
    0.27886807,
    -1.13520398,
    1.48851587,
    -0.82215223,
    0.17087277,
)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, `x Phi(x)`, without erf, which kernels lack; relative error of a few float32 roundings."""
    z = jnp.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * z)
    exponent = jnp.full_like(t, _ERFC[-1])
    for coefficient in _ERFC[-2::-1]:
        exponent = exponent * t + coefficient
    half_erfc = 0.5 * t * jnp.exp(exponent - z * z)
    return x * jnp.where(x < 0, half_erfc, 1.0 - half_erfc)


# jax.nn's forms carry rules for derivatives, which kernels cannot hold in every version of JAX.
_IN_KERNELS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": gelu,
        "relu": lambda x: jnp.maximum(x, 0.0),
        "relu2": lambda x: jnp.square(jnp.maximum(x, 0.0)),
        "silu": lambda x: x * jax.lax.logistic(x),
        "swish": lambda x: x * jax.lax.logistic(x),
    }
)


def activation(name: str | None) -> Callable[[Array], Array]:
    """The activation of that name in primitives that kernels have."""
    if name is None:
        return lambda x: x
    return _IN_KERNELS.get(name) or ACTIVATIONS[name]


def combine(
    products: Sequence[Float[Array, "..."]],
    biases: Sequence[Float[Array, "..."] | None],
    form: LinearForm,
    act: Callable[[Array], Array],
) -> Float[Array, "..."]:
    """Bias, activation and gate on one float32 product, or on those of gate and up; float32.

    Args:
        biases: broadcast against the products, `None` for none.
        act: the form's activation, as the caller has it.
    """
    wide = [p if b is None else p + b.astype(jnp.float32) for p, b in zip(products, biases, strict=True)]
    return act(wide[0]) * wide[1] if form.gated else act(wide[0])


def reduce_splits(
    partials: Float[Array, "splits operands T padded"],
    bias: Float[Array, " rows"] | None,
    residual: Float[Array, "T out"] | None,
    form: LinearForm,
    outputs: int,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "T out"]:
    """The second pass: sums the splits in order, then the epilogue. One elementwise fusion for XLA.

    Args:
        partials: float32 products; columns past `outputs` are ignored.
        dtype: of the result.
    """
    total = partials[0]
    for split in range(1, partials.shape[0]):
        total += partials[split]
    total = total[..., :outputs]
    biases: Sequence[Array | None] = [None] * form.operands
    if bias is not None:
        biases = list(bias.reshape(form.operands, 1, outputs))
    y = combine(list(total), biases, form, activation(form.activation)).astype(dtype)
    return y if residual is None else residual + y

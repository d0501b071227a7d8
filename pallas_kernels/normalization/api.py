"""Norms as operators: alone, and together with the residual sum that comes before them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..operator import Implementation, Operator
from .form import NormForm, normalise


def _reference(
    x: Float[Array, "T E"],
    residual: Float[Array, "T E"] | None,
    bias: Float[Array, " E"] | None,
    weight: Float[Array, " E"] | None,
    norm_bias: Float[Array, " E"] | None,
    *,
    form: NormForm,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    summed = x.astype(jnp.float32)
    if bias is not None:
        summed += bias.astype(jnp.float32)
    if residual is not None:
        summed += residual.astype(jnp.float32)
    summed = summed.astype(x.dtype)
    return normalise(summed, weight, norm_bias, form), summed


def _bucket(
    x: Float[Array, "T E"],
    residual: Float[Array, "T E"] | None,
    bias: Array | None,
    weight: Array | None,
    norm_bias: Array | None,
    *,
    form: NormForm,
) -> str:
    rows, width = x.shape
    kind = ("layer" if form.centred else "rms") + ("" if residual is None and bias is None else "+sum")
    return f"{kind} T={1 << max(rows - 1, 0).bit_length()} E={width} {x.dtype}"


ADD_NORM = Operator("add_norm", "jdsi.pallas_kernels.normalization", _reference, _bucket)


def add_norm(
    x: Float[Array, "T E"],
    residual: Float[Array, "T E"] | None,
    bias: Float[Array, " E"] | None,
    weight: Float[Array, " E"] | None,
    norm_bias: Float[Array, " E"] | None,
    form: NormForm,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """`summed = residual + x + bias` and its norm, in one pass over memory (DeepSpeed Inference, section 3.1).

    Args:
        x: what a sublayer computed.
        residual: what it is added to, in the dtype of `x`.
        bias: of the sublayer's last product, where that left it out.
        weight: of the norm; an RMSNorm needs it.
        norm_bias: of a LayerNorm.
        form: which norm.
        implementation: one by name, or the fastest that takes the arguments.

    Returns:
        The norm and the sum, both in the dtype of `x`. The sum is taken in float32 and rounded once; the statistics
        are those of the rounded sum, in float32, as if the two steps were apart.

    Raises:
        ValueError: arrays that do not fit together.
        UnsupportedError: the named implementation cannot take the arguments.
    """
    width = x.shape[-1]
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"x is {jax.typeof(x).str_short()} but the residual {jax.typeof(residual).str_short()}")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"the bias has shape {bias.shape}, not ({width},)")
    form.check(width, weight, norm_bias)
    return ADD_NORM(x, residual, bias, weight, norm_bias, implementation=implementation, form=form)


def norm(
    x: Float[Array, "... E"],
    weight: Float[Array, " E"] | None,
    bias: Float[Array, " E"] | None,
    form: NormForm,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "... E"]:
    """The norm of `x` over its last axis: `add_norm` with nothing to add. See there."""
    rows = x.reshape(-1, x.shape[-1])
    return add_norm(rows, None, None, weight, bias, form, implementation=implementation)[0].reshape(x.shape)

"""Products of a few rows with quantised weights: the public functions."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..linear.form import LinearForm, dtype_or_none
from ..normalization import NormForm
from ..normalization import norm as normalised
from ..operator import Implementation, Operator
from .reference import quantized_linear as reference
from .weight import QuantizedWeight


def _bucket(x: Array, weight: QuantizedWeight, bias: Array | None, residual: Array | None, *, form: LinearForm) -> str:
    tokens = 1 if x.shape[0] == 1 else -(-x.shape[0] // 8) * 8
    gate = " gated" if form.gated else ""
    return f"T={tokens} out={weight.shape[0]} in={x.shape[1]} {x.dtype} {weight.format}{gate}"


QUANTIZED_LINEAR = Operator(
    "quantized_linear", "jdsi.pallas_kernels.quantized_linear", reference, _bucket, ("pallas", "triton")
)


def quantized_linear(
    x: Float[Array, "T in"],
    weight: QuantizedWeight,
    bias: Float[Array, " out"] | None = None,
    *,
    activation: str | None = None,
    residual: Float[Array, "T out"] | None = None,
    norm: NormForm | None = None,
    norm_weight: Float[Array, " in"] | None = None,
    norm_bias: Float[Array, " in"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T out"]:
    """`residual + act(norm(x) W^T + bias)` with the matrix `W` that `weight` stands for, accumulated in float32.

    Up to 64 narrow tokens run as one kernel on Hopper GPUs, if need be with a second pass over split sums; it reads the
    weights as they are stored. Elsewhere the weight is turned back into float32 first.

    Args:
        weight: see `quantize`.
        activation: one of `ACTIVATIONS`, applied in float32.
        residual: added after the product was rounded; of the dtype of the result.
        norm: applied to `x` first, as an operator of its own; `norm_weight` and `norm_bias` are its arrays.
        out_dtype: of the result, by default that of `x`.
        implementation: one by name, or the fastest that takes the arguments.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        UnsupportedError: the named implementation cannot take the arguments.
    """
    form = LinearForm(activation, False, None, dtype_or_none(out_dtype))
    _check(x, weight, bias, residual, form)
    x = _normalised(x, norm, norm_weight, norm_bias)
    return QUANTIZED_LINEAR(x, weight, bias, residual, implementation=implementation, form=form)


def quantized_gated_linear(
    x: Float[Array, "T in"],
    weight: QuantizedWeight,
    bias: Float[Array, " 2F"] | None = None,
    *,
    activation: str | None,
    norm: NormForm | None = None,
    norm_weight: Float[Array, " in"] | None = None,
    norm_bias: Float[Array, " in"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T F"]:
    """`act(gate) * up`, where `gate, up` are the halves of `norm(x) W^T + bias`.

    Args:
        weight: of a matrix `[2 F, in]`, the rows of gate, then those of up.
        activation: of the gate, in float32 as the product with `up` (Shazeer 2020); `None` for a bilinear gate.

    The rest as in `quantized_linear`.
    """
    form = LinearForm(activation, True, None, dtype_or_none(out_dtype))
    _check(x, weight, bias, None, form)
    x = _normalised(x, norm, norm_weight, norm_bias)
    return QUANTIZED_LINEAR(x, weight, bias, None, implementation=implementation, form=form)


def _normalised(x: Array, norm: NormForm | None, weight: Array | None, bias: Array | None) -> Array:
    if norm is not None:
        return normalised(x, weight, bias, norm)
    if weight is not None or bias is not None:
        raise ValueError("norm_weight and norm_bias need `norm`, which says what norm they belong to")
    return x


def _check(x: Array, weight: QuantizedWeight, bias: Array | None, residual: Array | None, form: LinearForm) -> None:
    """Raises ValueError for shapes and dtypes that do not go together."""
    rows, inputs = weight.shape
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"x is {jax.typeof(x).str_short()}, the weight {rows} rows of {inputs} inputs")
    if rows % form.operands:
        raise ValueError(f"the weight of a gated product has as many rows for up as for gate, not {rows} in all")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {bias.shape}, not ({rows},), one number per row of the weight")
    if residual is not None:
        if residual.shape != (x.shape[0], rows):
            raise ValueError(f"residual has shape {residual.shape}, not {(x.shape[0], rows)}, that of the result")
        if residual.dtype != (dtype := form.result_dtype(x.dtype)):
            raise ValueError(f"residual is {residual.dtype}, the result {dtype}")

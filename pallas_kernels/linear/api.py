"""Products of a few rows with everything around them fused: the public functions."""

import dataclasses

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..normalization import NormForm
from ..normalization import norm as normalised
from ..operator import Implementation, Operator
from ..quantized_linear import api as quantized
from ..quantized_linear.weight import QuantizedWeight
from .form import LinearForm, dtype_or_none
from .reference import linear as reference


def _bucket(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    *,
    form: LinearForm,
) -> str:
    """Tokens by wgmma's columns; what fits in shared memory depends on the norm, the epilogue is next to free."""
    tokens = 1 if x.shape[0] == 1 else -(-x.shape[0] // 8) * 8
    gate, norm = " gated" if form.gated else "", " norm" if form.norm else ""
    return f"T={tokens} out={weight.shape[0]} in={x.shape[1]} {x.dtype}{gate}{norm}"


LINEAR = Operator("linear", "jdsi.pallas_kernels.linear", reference, _bucket, ("pallas", "triton"))


def linear(
    x: Float[Array, "T in"],
    weight: Float[Array, "out in"] | QuantizedWeight,
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
    """`residual + act(norm(x) weight^T + bias)`, accumulated in float32 (never TF32); what is `None` is left out.

    The skinny product of DeepSpeed Inference (SBI-GeMM, Aminabadi et al. 2022, section III-C), with its neighbours.
    Up to 64 narrow tokens run as one kernel on Hopper GPUs, if need be with a second pass over split sums; more tokens
    and float32 are XLA's. Of a quantised weight the kernel reads the numbers as they are stored; elsewhere it is turned
    back into float32 first.

    Args:
        weight: laid out as checkpoints store it, of the dtype of `x`; or a matrix that was quantised, see `quantize`.
        activation: one of `ACTIVATIONS`, applied in float32.
        residual: added after the product was rounded; of the dtype of the result.
        norm: applied to `x` first and rounded to its dtype; `norm_weight` and `norm_bias` are its arrays. With a
            quantised weight it is an operator of its own.
        out_dtype: of the result, by default that of `x`.
        implementation: one by name, or the fastest that takes the arguments.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        UnsupportedError: the named implementation cannot take the arguments.
    """
    form = LinearForm(activation, False, norm, dtype_or_none(out_dtype))
    return _product(x, weight, bias, residual, norm_weight, norm_bias, form, implementation)


def gated_linear(
    x: Float[Array, "T in"],
    weight: Float[Array, "2F in"] | QuantizedWeight,
    bias: Float[Array, " 2F"] | None = None,
    *,
    activation: str | None,
    norm: NormForm | None = None,
    norm_weight: Float[Array, " in"] | None = None,
    norm_bias: Float[Array, " in"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T F"]:
    """`act(gate) * up` in one pass over `x`, where `gate, up` are the halves of `norm(x) weight^T + bias`.

    Args:
        weight: the rows of gate, then those of up.
        activation: of the gate, in float32 as the product with `up` (Shazeer 2020); `None` for a bilinear gate.

    The rest as in `linear`.
    """
    form = LinearForm(activation, True, norm, dtype_or_none(out_dtype))
    return _product(x, weight, bias, None, norm_weight, norm_bias, form, implementation)


def _product(
    x: Array,
    weight: Array | QuantizedWeight,
    bias: Array | None,
    residual: Array | None,
    norm_weight: Array | None,
    norm_bias: Array | None,
    form: LinearForm,
    implementation: Implementation | None,
) -> Array:
    _check(x, weight, bias, residual, norm_weight, norm_bias, form)
    if not isinstance(weight, QuantizedWeight):
        return LINEAR(x, weight, bias, residual, norm_weight, norm_bias, implementation=implementation, form=form)
    if form.norm is not None:
        x, form = normalised(x, norm_weight, norm_bias, form.norm), dataclasses.replace(form, norm=None)
    return quantized.QUANTIZED_LINEAR(x, weight, bias, residual, implementation=implementation, form=form)


def _check(
    x: Array,
    weight: Array | QuantizedWeight,
    bias: Array | None,
    residual: Array | None,
    norm_weight: Array | None,
    norm_bias: Array | None,
    form: LinearForm,
) -> None:
    """Raises ValueError for shapes and dtypes that do not go together."""
    if len(x.shape) != 2 or len(weight.shape) != 2:
        raise ValueError(f"x and weight are matrices, not of shapes {x.shape} and {weight.shape}")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns, weight {weight.shape[1]}")
    rows = weight.shape[0]
    if rows % form.operands:
        raise ValueError(f"the weight of a gated product has as many rows for up as for gate, not {rows} in all")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {bias.shape}, not ({rows},), one number per row of the weight")
    if residual is not None:
        if residual.shape != (x.shape[0], rows):
            raise ValueError(f"residual has shape {residual.shape}, not {(x.shape[0], rows)}, that of the result")
        if residual.dtype != (dtype := form.result_dtype(x.dtype)):
            raise ValueError(f"residual is {residual.dtype}, the result {dtype}")
    if form.norm is not None:
        form.norm.check(x.shape[1], norm_weight, norm_bias)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError("norm_weight and norm_bias need `norm`, which says what norm they belong to")

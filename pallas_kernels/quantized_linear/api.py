"""Products of a few rows with quantised weights: the operator, which `linear` and `gated_linear` call."""

from jaxtyping import Array

from ..linear.form import LinearForm
from ..operator import Operator
from .reference import quantized_linear as reference
from .weight import QuantizedWeight


def _bucket(x: Array, weight: QuantizedWeight, bias: Array | None, residual: Array | None, *, form: LinearForm) -> str:
    tokens = 1 if x.shape[0] == 1 else -(-x.shape[0] // 8) * 8
    gate = " gated" if form.gated else ""
    return f"T={tokens} out={weight.shape[0]} in={x.shape[1]} {x.dtype} {weight.format}{gate}"


QUANTIZED_LINEAR = Operator(
    "quantized_linear", "jdsi.pallas_kernels.quantized_linear", reference, _bucket, ("pallas", "triton")
)

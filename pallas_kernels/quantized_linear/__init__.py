"""Matrix products of a few rows with quantised weights."""

from .api import quantized_gated_linear, quantized_linear
from .weight import QuantizedWeight, WeightFormat, dequantize, quantize

__all__ = [
    "QuantizedWeight",
    "WeightFormat",
    "dequantize",
    "quantize",
    "quantized_gated_linear",
    "quantized_linear",
]

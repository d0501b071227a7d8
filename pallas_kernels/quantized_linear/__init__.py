"""Matrix products of a few rows with quantised weights."""

from .weight import QuantizedWeight, WeightFormat, dequantize, quantize

__all__ = [
    "QuantizedWeight",
    "WeightFormat",
    "dequantize",
    "quantize",
]

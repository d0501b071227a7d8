"""The few building blocks every family is made of."""

from .linear import Embedding, Linear, VocabularyEmbedding, array_weight, rows_of
from .norm import Norm
from .parameter import WIDTH, Axis, Declaration, declaration_of, parameter, vocabulary_axis
from .sums import Combined, Product, Sum, row_parallel, whole
from .weight import ArrayWeight, UnfusedWeight, Weight, WeightForm, fused_product

__all__ = [
    "WIDTH",
    "ArrayWeight",
    "Axis",
    "Combined",
    "Declaration",
    "Embedding",
    "Linear",
    "Norm",
    "Product",
    "Sum",
    "UnfusedWeight",
    "VocabularyEmbedding",
    "Weight",
    "WeightForm",
    "array_weight",
    "declaration_of",
    "fused_product",
    "parameter",
    "row_parallel",
    "rows_of",
    "vocabulary_axis",
    "whole",
]

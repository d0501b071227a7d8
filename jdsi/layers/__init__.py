"""The few building blocks every family is made of."""

from .linear import Embedding, Linear, VocabularyEmbedding, row_parallel, rows_of, whole
from .norm import Norm
from .parameter import WIDTH, Axis, Declaration, declaration_of, parameter, vocabulary_axis

__all__ = [
    "WIDTH",
    "Axis",
    "Declaration",
    "Embedding",
    "Linear",
    "Norm",
    "VocabularyEmbedding",
    "declaration_of",
    "parameter",
    "row_parallel",
    "rows_of",
    "vocabulary_axis",
    "whole",
]

"""The few building blocks every family is made of."""

from .linear import Embedding, Linear, VocabularyEmbedding, row_parallel, rows_of, whole
from .norm import Norm

__all__ = ["Embedding", "Linear", "Norm", "VocabularyEmbedding", "row_parallel", "rows_of", "whole"]

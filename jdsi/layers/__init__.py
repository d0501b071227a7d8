"""The few building blocks every family is made of."""

from .linear import Embedding, Linear
from .norm import LayerNorm, RMSNorm

__all__ = ["Embedding", "LayerNorm", "Linear", "RMSNorm"]
